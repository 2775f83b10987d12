"""OPD+: any f-divergence from the sampled token alone (Zhao, Chen et al., arXiv 2606.01039).

    u_t = q(y_t) / p(y_t),   D_f(q || p) = E_p f(u)
    A_t = w_f(u_t) = -f(u_t) + u_t f'(u_t)                 detached;     loss_t = -(p / p_old)(y_t) A_t

The advantage that others use, -f(u), forgets that u moves with the student: `stop_gradient=True`
has it, for comparison. It is right for the reverse KL, whose u f'(u) is the constant -1; with the
forward KL it climbs. With a discount, what a token leads to is rewarded by -f alone, and its own
correction u f'(u) stays with it:

    A_t = sum_{s >= t} discount^(s - t) (-f(u_s)) + u_t f'(u_t)

Confirmed of the paper, as far as its text could be read: the weight, the three divergences of its
table, sampled tokens only.
Ours: the other generators, the discount, the centre and the value baseline; the clip is that of a
    public reproduction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from opdlab.engine.batch import Batch, return_to_go
from opdlab.engine.rows import Rows
from opdlab.errors import InvalidValue, UnknownOption
from opdlab.losses import Generator
from opdlab.support.validation import Finite, Flag, validate, validate_fields


@dataclass(frozen=True)
class OPDPlus:
    """Descend D_f(teacher || student) where the student goes, knowing one log-prob of the teacher a
    token.

    divergence: a name of `opdlab.losses.Generator`; options: its keywords, as `{"alpha": 0.25}`.
    discount: 0 leaves out how a token changes what follows (common practice); 1 is the gradient of
        the sum over the text.
    clip: log u is held within ±clip (None: as it is). This biases the gradient a little, and the
        forward KL's the most.
    centred: subtract f'(1), so that a token on which both agree says nothing. baseline="value":
        subtract E_p[w_f], from the whole
    distributions, and count its expectation -D_f at later tokens instead of the sampled -f. Neither
    moves the expected gradient. Divergences differ in unit: divide the learning rate by
    `generator.curvature` before comparing them. Write at temperature 1 and top_p 1, where the
    student's own probabilities are those of the sampler.
    """

    divergence: str = "reverse_kl"
    options: dict[str, Any] = field(default_factory=dict)
    discount: Finite = 0.0
    clip: Finite | None = 6.0
    centred: Flag = False
    baseline: Literal["value"] | None = None
    stop_gradient: Flag = False

    needs: ClassVar[tuple[str, ...]] = ("teacher",)

    def __post_init__(self) -> None:
        validate("OPDPlus", {"options": self.options}, {"options": dict[str, Any]})
        if strange := [
            name for name in self.options if name not in ("alpha", "beta", "shift", "scale")
        ]:
            raise UnknownOption(
                f"OPDPlus got options={self.options!r}, but no divergence has {strange[0]!r}. Use"
                " alpha, beta, shift or scale."
            )
        _ = self.generator  # a bad name or option raises here, not after the first rollout
        if self.baseline not in (None, "value"):
            raise InvalidValue(f"OPDPlus got baseline={self.baseline!r}. Use None or 'value'.")
        validate_fields(self)
        if not 0 <= self.discount <= 1 or (self.clip is not None and not self.clip > 0):
            raise InvalidValue(
                f"OPDPlus got discount={self.discount}, clip={self.clip}. Use a discount from 0 to"
                " 1, and a clip above 0 or None for none."
            )
        if self.stop_gradient and self.centred:
            raise InvalidValue(
                "OPDPlus(stop_gradient=True) has the advantage -f(u), which is 0 at u = 1 as it is."
                " Leave out centred=True."
            )

    @property
    def generator(self) -> Generator:
        return Generator(self.divergence, **self.options)

    def form(self, c: float) -> OPDPlus:
        """The same method from `f + c (u - 1)`, another form of the same divergence: the
        stop-gradient trains something else.
        """
        return replace(self, options={**self.options, "shift": self.options.get("shift", 0.0) + c})

    def plan(self, batch: Batch) -> dict[str, Tensor]:
        """`advantage`, `clipped` (1 where log u was outside ±clip) and `sampler_logp`, `[B, T]`
        each.
        """
        logp = batch.rollout.logp
        log_u = batch.map(lambda rows: rows.logp_of("teacher"), needs=("teacher",)) - logp
        reward, advantage = self.reward(log_u), self.weight(log_u)
        if self.baseline == "value":
            expected = batch.map(
                lambda rows: {"weight": mean(self.weight, rows), "reward": mean(self.reward, rows)}
            )
            reward, advantage = expected["reward"], advantage - expected["weight"]
        if self.discount:
            advantage = advantage + return_to_go(reward, batch.mask, self.discount) - reward
        clipped = log_u.abs() > (torch.inf if self.clip is None else self.clip)
        return {"advantage": advantage, "clipped": clipped.long(), "sampler_logp": logp}

    def reward(self, log_u: Tensor) -> Tensor:
        """-f(u), what the divergence takes from a token."""
        return self.generator.stop_gradient_weight(self._within(log_u))

    def weight(self, log_u: Tensor) -> Tensor:
        """w_f(u), or -f(u) with the stop-gradient."""
        if self.stop_gradient:
            return self.reward(log_u)
        return self.generator.weight(self._within(log_u)) - (
            self.generator.centre if self.centred else 0
        )

    def loss(self, rows: Rows) -> Tensor:
        ratio = (rows.logp - rows.sampler_logp).exp()  # 1, but it carries the gradient
        return -ratio * rows.advantage

    def _within(self, log_u: Tensor) -> Tensor:
        return log_u if self.clip is None else log_u.clamp(-self.clip, self.clip)


def mean(value: Callable[[Tensor], Tensor], rows: Rows) -> Tensor:
    """`E_{a ~ p} value(log u(a))` over the whole vocabulary, `[n]`: what the state alone decides."""
    p = rows.student.exp()
    each = value(rows.teacher - rows.student)
    return torch.where(p > 0, p * each, 0.0).sum(-1)
