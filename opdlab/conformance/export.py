"""An opdlab method as a plain function: for `conform`, and for the interfaces of TRL and verl.

The method's own plan and loss run on the log-probs that the function is given. Gradients go through
them by autograd, so this is for trainers that hold logits anyway; `opdlab.bridges.trl` trains in
constant memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opdlab.audit.subject import name_with_options
from opdlab.conformance.case import Case
from opdlab.conformance.contract import Kind
from opdlab.conformance.spec import Spec
from opdlab.data.prompt import Prompt
from opdlab.data.rollout import Rollout
from opdlab.engine.batch import Batch
from opdlab.engine.loss_contract import call_loss
from opdlab.engine.planned import run_plan
from opdlab.engine.rows import Rows
from opdlab.errors import InvalidValue, OpdlabError
from opdlab.losses import TopK
from opdlab.methods import OPD, OPDPlus
from opdlab.methods.contract import HasPlan, name_of, needs_verifier, student_share
from opdlab.methods.conversion import as_method
from opdlab.models.graded import TopLogprobs
from opdlab.support.validation import Unchecked, validate_arguments

PlainLoss = Callable[..., Any]


@dataclass(frozen=True)
class LogProbs:
    """Log-probs that somebody else computed, as a grade.

    Attributes:
        values: `[tokens, V]`, in nats.
    """

    values: Tensor

    @property
    def vocab_size(self) -> int:
        """Return the number of tokens that the distributions are over."""
        return self.values.shape[-1]

    def part(self, piece: slice | Tensor) -> LogProbs:
        """Return the grades of some tokens.

        Args:
            piece: A slice or indices of tokens.

        Returns:
            Their log-probs.
        """
        return LogProbs(self.values[piece])

    def logp(self) -> Tensor:
        """Return the log-probs.

        Returns:
            `[n, V]`.
        """
        return self.values


@dataclass(frozen=True)
class _Given:
    """A policy whose grades of one rollout are known."""

    grades: LogProbs | TopLogprobs

    def grade(self, _: Rollout) -> LogProbs | TopLogprobs:
        return self.grades


def token_losses(
    method: Any,
    student: Tensor,
    teacher: LogProbs | TopLogprobs,
    tokens: Tensor,
    mask: Tensor,
    sampler: Tensor | None = None,
) -> Tensor:
    """Run a method's plan and loss on given log-probs.

    Args:
        method: The method; it reads the teacher alone.
        student: Log-probs `[n, V]` of the tokens that count, row by row of `mask`.
        teacher: The teacher's, likewise.
        tokens: Ids `[B, T]`.
        mask: `[B, T]`, bool.
        sampler: Log-probs `[B, T]` with which the tokens were sampled; the student's by default.

    Returns:
        `[B, T]`, 0 where the mask is False.
    """
    token = tokens[mask]
    rows: dict[str, Any] = {"student": student}
    if method.needs:
        rows["teacher"] = teacher.logp() if isinstance(teacher, LogProbs) else teacher
    columns: Mapping[str, Tensor] = {}
    if isinstance(method, HasPlan) and len(token):
        rollout = _rollout(student.detach(), tokens, mask, sampler)
        given = {"student": _Given(LogProbs(student.detach())), "teacher": _Given(teacher)}
        with torch.no_grad():
            columns = run_plan(method, Batch(rollout, given)).columns
    given_rows = Rows(rows, token, dict(columns))
    if not len(token):
        values = student[:, :1].sum(-1)  # none, with a gradient where the student has one
    elif student.requires_grad:
        values = call_loss(method.loss, given_rows)
    else:
        values = method.loss(given_rows)  # an evaluation
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(
        mask, values
    )


def _rollout(student: Tensor, tokens: Tensor, mask: Tensor, sampler: Tensor | None) -> Rollout:
    """The tokens that count as a rollout, those of each text side by side from its beginning."""
    lengths = mask.sum(-1)
    width = max(1, int(lengths.max()))
    place = torch.arange(width, device=mask.device) < lengths[:, None]

    def packed(values: Tensor) -> Tensor:
        empty = torch.zeros(place.shape, dtype=values.dtype, device=values.device)
        return empty.masked_scatter(place, values)

    own = student.gather(-1, tokens[mask][:, None])[:, 0] if sampler is None else sampler[mask]
    entropy = -(student.exp() * student.clamp_min(torch.finfo(student.dtype).min)).sum(-1)
    many = len(lengths)
    return Rollout(
        tuple(Prompt(f"text {i}", id=str(i)) for i in range(many)),
        packed(tokens[mask]),
        lengths,
        packed(own.detach()),
        packed(entropy),
        ("length",) * many,
        ("",) * many,
        ("student",) * many,
    )


def checked_method(method: Any, where: str) -> Any:
    """Convert what `as_method` takes, and refuse what a plain function cannot do.

    Args:
        method: The method.
        where: The function that was called, for errors.

    Returns:
        The method.

    Raises:
        OpdlabError: It reads other policies than the teacher, or needs a verifier, or texts.
    """
    found = as_method(method, where)
    name = name_of(found)
    others = [need for need in found.needs if need != "teacher"]
    if others or needs_verifier(found) or student_share(found) < 1:
        what = others[0] if others else "a verifier or given texts"
        raise OpdlabError(
            f"{where} got {name}, which needs {what!r}. A plain function of logits has student and"
            " teacher alone; use opdlab.distill, or opdlab.bridges.trl."
        )
    return found


def plain_loss(method: Any, where: str = "plain_loss") -> PlainLoss:
    """Make a function of logits of a method.

    Args:
        method: A method that reads the teacher alone.
        where: The function that was called, for errors.

    Returns:
        `loss(student [B, T, V], teacher [B, T, V], mask [B, T], *, tokens [B, T]) -> [B, T]`.
    """
    chosen = checked_method(method, where)

    def loss(student: Tensor, teacher: Tensor, mask: Tensor, *, tokens: Tensor) -> Tensor:
        own, other = student[mask].log_softmax(-1), teacher[mask].detach().log_softmax(-1)
        return token_losses(chosen, own, LogProbs(other), tokens, mask)

    loss.__name__ = name_of(chosen)
    return loss


@validate_arguments
def for_trl(method: Unchecked[Any]) -> PlainLoss:
    """Make a function with the interface of TRL's `generalized_jsd_loss` of a method.

        GKDTrainer.generalized_jsd_loss = staticmethod(for_trl(opd.OPD("jensen_shannon")))

    TRL shifts logits and labels before it calls the function. `beta` is ignored.

    Args:
        method: A method that reads the teacher alone.

    Returns:
        The function.

    Raises:
        OpdlabError: It reads more than that.
    """
    chosen = checked_method(method, "for_trl")

    def generalized_jsd_loss(
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        beta: float = 0.5,
        temperature: float = 1.0,
        reduction: str = "batchmean",
        num_items_in_batch: Tensor | float | None = None,
    ) -> Tensor:
        mask = labels != -100
        own = (student_logits[mask] / temperature).log_softmax(-1)
        other = (teacher_logits[mask].detach() / temperature).log_softmax(-1)
        tokens = labels.masked_fill(~mask, 0)
        losses = token_losses(chosen, own, LogProbs(other), tokens, mask)
        if num_items_in_batch is not None:
            return losses.sum() / num_items_in_batch
        if reduction == "none":
            return losses[mask]
        if reduction == "sum":
            return losses.sum()
        if reduction in ("batchmean", "mean"):
            return losses.sum() / mask.sum().clamp_min(1)
        raise InvalidValue(
            f"The loss got reduction={reduction!r}. Use 'batchmean', 'mean', 'sum' or 'none'."
        )

    return generalized_jsd_loss


@validate_arguments
def for_verl(method: Unchecked[Any]) -> PlainLoss:
    """Make a function with an interface of verl's distillation losses of a method.

    A method with a `TopK` of the teacher becomes a loss of the logits processor, with the arguments
    `student_logits, teacher_topk_log_probs, teacher_topk_ids, config, data_format`, which returns a
    dict of `[B, T]`. Other methods must know the sampled token alone, such as `OPDPlus()`. They
    become a registered loss, with the arguments `config, distillation_config, model_output, data`,
    which returns `[B, T]` and a dict of metrics. Give these padded tensors.

    Args:
        method: A method that reads the teacher alone.

    Returns:
        The function.

    Raises:
        OpdlabError: It reads more than that.
    """
    chosen = checked_method(method, "for_verl")
    top_k = getattr(chosen, "top_k", None)
    if isinstance(top_k, TopK) and top_k.by == "teacher":
        return _verl_top_k(chosen)
    if not _reads_sampled_only(chosen):
        raise OpdlabError(
            f"for_verl got {name_of(chosen)}, which reads more than the sampled token alone. verl"
            " gives its losses the teacher's top tokens or the sampled token: use"
            " OPD(top_k=TopK(k, by='teacher')), OPD(estimator='sampled') or OPDPlus()."
        )
    return _verl_sampled(chosen)


def _reads_sampled_only(method: Any) -> bool:
    """Try a method on distributions that agree on the sampled tokens and nowhere else."""
    generator = torch.Generator().manual_seed(0)
    own, other = (torch.randn((6, 4), generator=generator).double() for _ in range(2))
    tokens, mask = torch.zeros((2, 3), dtype=torch.long), torch.ones((2, 3), dtype=torch.bool)
    found = []
    for order in ([0, 1, 2, 3], [0, 3, 1, 2]):
        leaf = own.log_softmax(-1).requires_grad_()
        teacher = LogProbs(other.log_softmax(-1)[:, order])
        losses = token_losses(method, leaf, teacher, tokens, mask)
        (slope,) = torch.autograd.grad(losses.sum(), leaf)
        found.append((losses.detach(), slope))
    (losses, slope), (again, _) = found
    return torch.allclose(losses, again) and not bool(slope[:, 1:].any())


def _verl_top_k(method: Any) -> PlainLoss:
    def distillation_losses(
        student_logits: Tensor,
        teacher_topk_log_probs: Tensor,
        teacher_topk_ids: Tensor,
        config: Any = None,
        data_format: str = "bshd",
    ) -> dict[str, Tensor]:
        every = torch.ones(student_logits.shape[:2], dtype=torch.bool, device=student_logits.device)
        logp = student_logits.log_softmax(-1)
        ids = teacher_topk_ids.flatten(0, 1)
        top = teacher_topk_log_probs.flatten(0, 1).detach()
        grades = TopLogprobs(
            ids, top, sampled=top[:, 0], token=ids[:, 0], vocab_size=student_logits.shape[-1]
        )
        losses = token_losses(method, logp[every], grades, teacher_topk_ids[..., 0], every)
        own = logp.gather(-1, teacher_topk_ids)
        return {
            "distillation_losses": losses,
            "student_mass": own.exp().sum(-1).detach(),
            "teacher_mass": teacher_topk_log_probs.exp().sum(-1),
        }

    return distillation_losses


def _verl_sampled(method: Any) -> PlainLoss:
    def distillation_losses(
        config: Any, distillation_config: Any, model_output: Mapping[str, Any], data: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        mask = data["response_mask"].bool()
        own = model_output["log_probs"]
        other = data["teacher_logprobs"].reshape(mask.shape).detach()
        # Two outcomes, the sampled token and all others: the method reads the first alone.
        student, teacher = _two_outcomes(own[mask]), _two_outcomes(other[mask])
        losses = token_losses(
            method, student, LogProbs(teacher), torch.zeros_like(mask, dtype=torch.long), mask
        )
        return losses, {}

    return distillation_losses


def _two_outcomes(logp: Tensor) -> Tensor:
    rest = torch.log(-torch.expm1(logp.detach().clamp_max(-1e-7)))
    return torch.stack([logp, rest], -1)


def case_of_method(method: Any, name: str | None = None) -> Case:
    """Make a case of a method: its plain function, with what its own fields claim.

    Args:
        method: A method that reads the teacher alone.
        name: Its name; that of its class by default.

    Returns:
        The case.
    """
    chosen = checked_method(method, "conform")
    spec = Spec(Kind.LOGITS, keywords={"tokens": "tokens"}, **_claims(chosen))
    return Case(name or name_with_options(chosen), plain_loss(chosen, "conform"), spec)


def _claims(method: Any) -> dict[str, Any]:
    """The divergence that a method names, where its fields say so."""
    if isinstance(method, OPD):
        return {
            "trains": method.divergence,
            "parameters": dict(method.options),
            "top_k": method.top_k,
        }
    if isinstance(method, OPDPlus) and not method.stop_gradient:
        own = {name: method.options[name] for name in ("alpha", "beta") if name in method.options}
        return {
            "trains": method.divergence,
            "parameters": own,
            "scale": method.options.get("scale", 1.0),
        }
    return {}
