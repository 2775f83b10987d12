"""On-policy distillation: the student writes, the teacher grades every token (GKD, Agarwal et al.,
arXiv 2306.13649).

    L(theta) = E_{y ~ p_theta} sum_t D( p_theta(.|s_t), q(.|s_t) ),     no gradient through the sampling

`D` is any divergence of `opdlab.losses`, on the full vocabulary or on a top-k support; or only the
sampled token is graded, as a policy gradient with the detached advantage A_t = log q(y_t) - log
p(y_t), which is the gradient of the reverse KL. Left out: advantages of other f-divergences (they
need more than -f, see OPD+) and teachers that only write.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from opdlab.engine.batch import Batch, return_to_go
from opdlab.engine.rows import Rows
from opdlab.errors import InvalidValue, UnknownOption
from opdlab.losses import DIVERGENCES, TopK, reverse_kl
from opdlab.support.expect import shortened
from opdlab.support.validation import Finite, Flag, validate, validate_fields


@dataclass(frozen=True)
class OPD:
    """Match the teacher on the student's own tokens.

    divergence: a name of `DIVERGENCES`; options: its keywords, as `{"beta": 0.9, "normalize":
        True}`.
    top_k: compare on a coarse support instead of the full vocabulary; a number k stands for
        `TopK(k)`, the student's top k.
    estimator: "full", or "sampled" for the policy gradient (reverse KL only). With it, `discount` >
        0 credits a token with
    what follows (arXiv 2306.08543), and baseline="value" replaces what the state alone decides by
    its expectation: it adds KL(p || q) at the token (vOPD, arXiv 2605.07865) and counts -KL(p || q)
    instead of the sampled log-ratio at later ones (arXiv 2504.10637). Neither moves the expected
    gradient; both cut its variance (the first may not, where the student is nearly sure of a
    token).
    on_policy: share of prompts that the student answers; the teacher writes the others (GKD's
        lambda).
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
        sampled = self.estimator == "sampled"
        if sampled and (
            self.divergence != "reverse_kl" or self.top_k or self.options or self.on_policy < 1
        ):
            raise InvalidValue(
                "OPD(estimator='sampled') is the reverse KL on tokens that the student sampled."
                " Leave divergence, options, top_k and on_policy at their defaults, or use"
                " estimator='full'."
            )
        if not sampled and (self.baseline or self.discount):
            raise InvalidValue(
                "OPD's baseline and discount belong to the policy gradient. Use them with"
                " estimator='sampled'."
            )

    def plan(self, batch: Batch) -> dict[str, Tensor]:
        if self.estimator == "full":
            return {}
        logp = batch.rollout.logp
        reward = batch.map(lambda rows: rows.logp_of("teacher"), needs=("teacher",)) - logp
        value = reward  # what a later token is expected to earn: by default, what it earned
        if self.baseline == "value":
            value = -batch.map(
                lambda rows: reverse_kl(rows.student, rows.teacher), needs=("student", "teacher")
            )
        advantage = reward - value if self.baseline else reward
        if self.discount:
            advantage = advantage + return_to_go(value, batch.mask, self.discount) - value
        return {"advantage": advantage, "sampler_logp": logp}

    def loss(self, rows: Rows) -> Tensor:
        if self.estimator == "sampled":
            ratio = (rows.logp - rows.sampler_logp).exp()  # 1, but it carries the gradient
            return -ratio * rows.advantage
        pair = rows.on("teacher", self.top_k) if self.top_k else (rows.student, rows.teacher)
        return DIVERGENCES[self.divergence](*pair, **self.options)


def check_divergence(method: Any) -> None:
    """Check `divergence`, `options` and `top_k` of a method, before the first rollout; a number for
    `top_k` becomes a `TopK`.

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
        validate(
            f"{owner}({method.divergence!r})",
            {name: value},
            {name: Flag if isinstance(known[name], bool) else Finite},
        )
    probe = torch.zeros(1, 2).log_softmax(-1)
    divergence(probe, probe, **method.options)  # a value out of range is refused here
    if isinstance(method.top_k, numbers.Integral) and not isinstance(method.top_k, bool):
        object.__setattr__(method, "top_k", TopK(int(method.top_k)))
    if isinstance(method.top_k, TopK) and method.top_k.by not in ("student", "teacher"):
        raise InvalidValue(
            f"{owner} got top_k={method.top_k!r}, but it reads no {method.top_k.by!r}. Use"
            " by='student' or by='teacher'."
        )
