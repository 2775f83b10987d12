"""The numbers of a training step that show how the student's own texts develop."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from opdlab.data.rollout import Rollout
from opdlab.diagnose.first_tokens import measure_pull
from opdlab.training.resolution import grader_names
from opdlab.training.step import Step

Vitals = dict[str, float]


@runtime_checkable
class _ReadsContext(Protocol):
    """A policy that may be told more than the student."""

    @property
    def context(self) -> object: ...


def read_vitals(step: Step) -> Vitals:
    """Return a step's metrics and further numbers of the student's own texts.

    These are their lengths, repetition and acceptances. Texts of other writers do not count, since
    they do not show what the student would write.

    Args:
        step: A step of a run.

    Returns:
        Numbers by name: the step's metrics and the method's `pull` alone if the student wrote no
        text, and no acceptances without a teacher's log-probs.
    """
    rollout, columns = step.rollout, step.columns
    own = torch.tensor([name == "student" for name in rollout.writer], device=rollout.ids.device)
    out = {"step": float(step.number), **step.metrics}
    pull = measure_pull(step.planned.method)
    if pull is not None:
        out["pull"] = pull
    if not bool(own.any()):
        others = ("entropy", "length", "cut")
        return {name: value for name, value in out.items() if name not in others}
    cut = torch.tensor([finish == "length" for finish in rollout.finish], device=own.device)
    out["length_p95"] = float(rollout.lengths[own].float().quantile(0.95))
    out["cut"] = float(cut[own].float().mean())
    out["repetition"] = float(repetition(*_learned_ids(rollout))[own].mean())
    mine = rollout.learn & own[:, None]
    out["entropy"] = float(columns["student_entropy"][mine[rollout.mask]].mean())
    teacher = _find_teacher(step)
    if teacher:
        ratio = (columns[f"{teacher}_logp"] - columns["student_logp"]).clamp(max=0).exp()
        none = torch.zeros(rollout.ids.shape, device=ratio.device, dtype=ratio.dtype)
        policy = step.policies[teacher]
        is_told_more = isinstance(policy, _ReadsContext) and policy.context is not None
        accepted = none.masked_scatter(rollout.mask, ratio)
        out |= _mean_acceptances(accepted, rollout, mine, is_told_more)
    return out


def _learned_ids(rollout: Rollout) -> tuple[Tensor, Tensor]:
    """The ids of the learned tokens, right-padded, and how many there are in each row."""
    counts = rollout.learn.sum(1)
    if bool((counts == rollout.lengths).all()):
        return rollout.ids, rollout.lengths
    order = (~rollout.learn).long().argsort(dim=1, stable=True)
    return rollout.ids.gather(1, order), counts


def repetition(ids: Tensor, lengths: Tensor) -> Tensor:
    """Measure how much texts repeat themselves.

    Args:
        ids: Token ids `[B, T]`.
        lengths: Number of tokens of each text without padding, `[B]`.

    Returns:
        The share of each text's triples of tokens that stand in it before, `[B]`; 0 for texts under
        four tokens.
    """
    if ids.shape[1] < 4:
        return torch.zeros(len(ids), device=ids.device)
    base = int(ids.max()) + 1
    triple = (ids[:, :-2] * base + ids[:, 1:-1]) * base + ids[:, 2:]
    count = (lengths - 2).clamp(min=0)
    is_padding = torch.arange(triple.shape[1], device=ids.device) >= count[:, None]
    ordered = triple.masked_fill(is_padding, -1).sort(1).values
    # Every change in the sorted row is a new triple. The first is one too, unless it is padding,
    # whose change to the first triple was counted.
    new = (ordered[:, 1:] != ordered[:, :-1]).sum(1) + (ordered[:, 0] != -1)
    return torch.where(count > 1, 1 - new / count.clamp(min=1), 0.0)


def _find_teacher(step: Step) -> str | None:
    """The policy that the student is drawn to: a teacher before a hinted or averaged self.

    A reference is none.
    """
    names = [
        name
        for name in grader_names(step.policies)
        if name not in ("student", "reference") and f"{name}_logp" in step.columns
    ]
    return min(names, key=lambda name: not name.startswith("teacher"), default=None)


def _mean_acceptances(
    accepted: Tensor, rollout: Rollout, mine: Tensor, is_told_more: bool
) -> Vitals:
    """E min(1, q/p) over all tokens, over the stops, and over the first tokens.

    A teacher that is told more may begin otherwise, so its first tokens are left out.
    """
    out = {"acceptance": float(accepted[mine].mean())}
    stopped = torch.tensor([finish == "stop" for finish in rollout.finish], device=mine.device)
    stopped = stopped & mine[:, 0]
    if bool(stopped.any()):
        last = (rollout.lengths - 1).clamp(min=0)[:, None]
        out["stop_acceptance"] = float(accepted.gather(1, last)[stopped].mean())
    if not is_told_more:
        out["first_acceptance"] = float(accepted[:, 0][mine[:, 0]].mean())
    return out
