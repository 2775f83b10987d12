"""On-policy distillation: the student writes, the teacher grades every token (GKD).

    L(θ) = E_{y ~ p_θ} sum_t D( p_θ(.|s_t), q(.|s_t) )         no gradient through the sampling

`D` is any divergence of `opdlab.losses`, on the full vocabulary or on a top-k support (Agarwal et
al., arXiv 2306.13649). With estimator="sampled" only the sampled token is graded, as a policy
gradient with the detached advantage

    A_t = log q(y_t) - log p(y_t),                             loss_t = -A_t p(y_t) / sg p(y_t)

which is the gradient of the reverse KL. Advantages of other f-divergences need more than -f: see
`OPDPlus`. For teachers that only write, see `OmniOPD`.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from opdlab.data.column import Column
from opdlab.engine.batch import Batch, return_to_go
from opdlab.engine.rows import Rows
from opdlab.errors import InvalidValue, UnknownOption
from opdlab.losses import DIVERGENCES, TopK, reverse_kl
from opdlab.losses.closed_forms import ClosedForm, Pair
from opdlab.methods.policy_gradient import (
    advantage_column,
    policy_gradient_loss,
    sampler_column,
)
from opdlab.support.expect import shortened
from opdlab.support.validation import Finite, Flag, validate, validate_fields


class HasDivergence(Protocol):
    """A method with a choice of divergence, its options and a support."""

    @property
    def divergence(self) -> str:
        """A name of `DIVERGENCES`."""
        ...

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of the divergence."""
        ...

    @property
    def top_k(self) -> TopK | None:
        """A coarse support, or None."""
        ...


@dataclass(frozen=True)
class OPD:
    """Match the teacher on the student's own tokens.

    `discount` and `baseline` belong to estimator="sampled". Neither baseline moves the expected
    gradient. Both cut its variance, the one at the token not where the student is nearly sure.

    Attributes:
        divergence: A name of `opdlab.losses.DIVERGENCES`.
        options: Keywords of the divergence, such as `{"beta": 0.9, "normalize": True}`.
        top_k: A coarse support to compare on; a number k stands for `TopK(k)`, the student's top k.
            None is the full vocabulary.
        estimator: "full" for the divergence itself, or "sampled" for the policy gradient of the
            reverse KL.
        baseline: "value" replaces what the state alone decides by its expectation. It adds
            KL(p || q) at the token (vOPD, arXiv 2605.07865), and counts -KL(p || q) instead of the
            sampled log-ratio at later tokens (arXiv 2504.10637).
        discount: From 0 to 1; above 0 a token is credited with what follows (MiniLLM, arXiv
            2306.08543).
        on_policy: Share of prompts that the student answers, from 0 to 1; the teacher writes the
            others (GKD's λ).

    Raises:
        UnknownOption: The divergence does not take an option.
        InvalidValue: A value is out of its range, or two do not go together.
    """

    divergence: str = "reverse_kl"
    options: dict[str, Any] = field(default_factory=dict)
    top_k: TopK | None = None
    estimator: Literal["full", "sampled"] = "full"
    baseline: Literal["value"] | None = None
    discount: Finite = 0.0
    on_policy: Finite = 1.0

    needs: ClassVar[tuple[str, ...]] = ("teacher",)
    writer: ClassVar[str] = "teacher"

    def __post_init__(self) -> None:
        check_divergence(self)
        if self.estimator not in ("full", "sampled") or self.baseline not in (None, "value"):
            raise InvalidValue(
                f"OPD got estimator={self.estimator!r}, baseline={self.baseline!r}. Use 'full' or"
                " 'sampled', and None or 'value'."
            )
        validate_fields(self)
        if not 0 <= self.on_policy <= 1 or not 0 <= self.discount <= 1:
            raise InvalidValue(
                f"OPD got on_policy={self.on_policy}, discount={self.discount}. Both are shares"
                " from 0 to 1."
            )
        is_sampled = self.estimator == "sampled"
        if is_sampled and (
            self.divergence != "reverse_kl" or self.top_k or self.options or self.on_policy < 1
        ):
            raise InvalidValue(
                "OPD(estimator='sampled') is the reverse KL on tokens that the student sampled."
                " Leave divergence, options, top_k and on_policy at their defaults, or use"
                " estimator='full'."
            )
        if not is_sampled and (self.baseline or self.discount):
            raise InvalidValue(
                "OPD's baseline and discount belong to the policy gradient. Use them with"
                " estimator='sampled'."
            )

    def plan(self, batch: Batch) -> dict[str, Column]:
        """Compute the advantage of sampled tokens; the full divergence needs no plan.

        Args:
            batch: The step's rollout under all policies.

        Returns:
            Nothing with `estimator="full"`, else `advantage` and `sampler_logp`, `[B, T]` each, in
            nats.
        """
        if self.estimator == "full":
            return {}
        logp = batch.rollout.logp
        reward = batch.map(lambda rows: rows.logp_of("teacher"), needs=("teacher",)) - logp
        # The reward that a later token is expected to earn: by default, the one that it earned.
        value = reward
        if self.baseline == "value":
            value = -batch.map(
                lambda rows: reverse_kl(rows.student, rows.teacher), needs=("student", "teacher")
            )
        advantage = reward - value if self.baseline else reward
        if self.discount:
            advantage = advantage + return_to_go(value, batch.learn, self.discount) - value
        formula = "log T(y) − log S(y), y the sampled token"
        if self.baseline:
            formula += ", + KL(S || T)"
        if self.discount:
            formula += ", with that of later tokens"
        return {
            "advantage": advantage_column(advantage, formula),
            "sampler_logp": sampler_column(logp),
        }

    def loss(self, rows: Rows) -> Tensor:
        """Compute the divergence, or the policy-gradient loss with `estimator="sampled"`.

        Args:
            rows: A chunk of `n` tokens, with the columns of `plan`.

        Returns:
            `[n]`.
        """
        if self.estimator == "sampled":
            return policy_gradient_loss(rows)
        pair = rows.on("teacher", self.top_k) if self.top_k else (rows.student, rows.teacher)
        return DIVERGENCES[self.divergence](*pair, **self.options)

    def closed_form(self, rows: Rows) -> ClosedForm | None:
        """Compute the divergence with its gradient in the logits, on the full vocabulary.

        Args:
            rows: A chunk of `n` tokens, without gradient.

        Returns:
            What `loss` gives, and its gradient; None with `top_k` or `estimator="sampled"`.
        """
        if self.estimator == "sampled" or self.top_k:
            return None
        return closed_form_of_divergence(self, rows.pair("teacher"))


def closed_form_of_divergence(method: HasDivergence, pair: Pair) -> ClosedForm | None:
    """Compute a method's divergence with its gradient in the student's logits.

    Args:
        method: The method.
        pair: The student beside the teacher.

    Returns:
        Value and gradient; None for a divergence without a closed form.
    """
    formula = DIVERGENCES[method.divergence].closed_form
    return None if formula is None else formula(pair, **method.options)


def check_divergence(method: HasDivergence) -> None:
    """Check `divergence`, `options` and `top_k` of a method before the first rollout.

    A number for `top_k` becomes a `TopK`.

    Args:
        method: The method; its `top_k` may change in place.

    Raises:
        UnknownOption: The divergence does not take an option.
        InvalidValue: There is no such divergence, or a value is out of its range.
    """
    owner = type(method).__name__
    if not isinstance(method.divergence, str) or method.divergence not in DIVERGENCES:
        raise InvalidValue(
            f"{owner} has no divergence {shortened(method.divergence)}. Use one of"
            f" {', '.join(DIVERGENCES)}."
        )
    if not isinstance(method.options, Mapping):
        raise InvalidValue(
            f"{owner} got options={shortened(method.options)}. Use a dict of the divergence's"
            " keywords, as {'beta': 0.5}."
        )
    divergence = DIVERGENCES[method.divergence]
    known = divergence.options
    for name, value in method.options.items():
        if name not in known:
            takes = f"It takes {', '.join(known)}." if known else "It takes none."
            raise UnknownOption(
                f"{owner} got options={shortened(method.options)}, but {method.divergence} has no"
                f" option {name!r}. {takes}"
            )
        kind = Flag if isinstance(known[name], bool) else Finite
        validate(f"{owner}({method.divergence!r})", {name: value}, {name: kind})
    # A value out of range is refused by the divergence itself.
    uniform = torch.zeros(1, 2).log_softmax(-1)
    divergence(uniform, uniform, **method.options)
    if isinstance(method.top_k, numbers.Integral) and not isinstance(method.top_k, bool):
        object.__setattr__(method, "top_k", TopK(int(method.top_k)))
    if isinstance(method.top_k, TopK) and method.top_k.by not in ("student", "teacher"):
        raise InvalidValue(
            f"{owner} got top_k={method.top_k!r}, but it reads no {method.top_k.by!r}. Use"
            " by='student' or by='teacher'."
        )
