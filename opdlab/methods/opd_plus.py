"""OPD+: any f-divergence, estimated from the sampled token only (arXiv 2606.01039).

    u_t = q(y_t) / p(y_t),      D_f(q || p) = E_p f(u)
    A_t = w_f(u_t) = -f(u_t) + u_t f'(u_t)        detached;      loss_t = -(p / p_old)(y_t) A_t

The advantage that others use, -f(u), ignores that u moves with the student; `stop_gradient=True`
has it, for comparison. It is right for the reverse KL, whose u f'(u) is the constant -1; with the
forward KL it climbs. With a discount, later tokens count by -f alone, and a token keeps its own
correction u f'(u):

    A_t = sum_{s >= t} discount^(s - t) (-f(u_s)) + u_t f'(u_t)

The paper, as far as its text could be read, confirms the weight, the three divergences of its table
and sampled tokens only. The other generators, the discount, the centre and the value baseline are
ours; the clip is that of a public reproduction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from opdlab.data.column import Column
from opdlab.engine.batch import Batch, return_to_go
from opdlab.engine.rows import Rows
from opdlab.errors import InvalidValue, UnknownOption
from opdlab.losses import Generator
from opdlab.methods.policy_gradient import (
    advantage_column,
    policy_gradient_loss,
    sampler_column,
)
from opdlab.support.validation import Finite, Flag, validate, validate_fields


@dataclass(frozen=True)
class OPDPlus:
    """Descend D_f(teacher || student), knowing one log-prob of the teacher per token.

    Keeps the pathwise term that is lost when -f(u) is treated as a fixed reward. Divergences differ
    in unit: divide the learning rate by `generator.curvature` before comparing them. Sample at
    temperature 1 and top_p 1, where the student's own probabilities are those of the sampler.

    Attributes:
        divergence: A name of `opdlab.losses.DIVERGENCES`.
        options: Keywords of `opdlab.losses.Generator`, such as `{"alpha": 0.25}`.
        discount: From 0 to 1. 0 leaves out how a token changes what follows (common practice); 1 is
            the gradient of the sum over the text.
        clip: log u is held within ±clip, in nats; None for no limit. This biases the gradient a
            little, that of the forward KL most.
        centred: Subtract f'(1), so that a token on which both agree has no advantage.
        baseline: "value" subtracts E_p[w_f], from the whole distributions, and counts -D_f at later
            tokens instead of the sampled -f. Like `centred`, it does not move the expected
            gradient.
        stop_gradient: Use the advantage -f(u).

    Raises:
        UnknownOption: No divergence has such an option.
        InvalidValue: A value is out of its range, or two do not go together.
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
        known = ("alpha", "beta", "shift", "scale")
        if unknown := [name for name in self.options if name not in known]:
            raise UnknownOption(
                f"OPDPlus got options={self.options!r}, but no divergence has {unknown[0]!r}. Use"
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
        """The generator f of the divergence."""
        return Generator(self.divergence, **self.options)

    def form(self, c: float) -> OPDPlus:
        """Return the method made of `f + c (u - 1)`, another generator of the same divergence.

        Args:
            c: The multiple of `u - 1` that is added to the generator.

        Returns:
            A new method.
        """
        return replace(self, options={**self.options, "shift": self.options.get("shift", 0.0) + c})

    def plan(self, batch: Batch) -> dict[str, Column]:
        """Compute the advantage of each sampled token.

        Args:
            batch: The step's rollout under all policies.

        Returns:
            `advantage`, `clipped` (1 where the clip held log u) and `sampler_logp` (nats), `[B, T]`
            each.
        """
        logp = batch.rollout.logp
        log_u = batch.map(lambda rows: rows.logp_of("teacher"), needs=("teacher",)) - logp
        reward, advantage = self.reward(log_u), self.weight(log_u)
        if self.baseline == "value":
            expected = batch.map(
                lambda rows: {
                    "weight": student_mean(self.weight, rows),
                    "reward": student_mean(self.reward, rows),
                }
            )
            reward, advantage = expected["reward"], advantage - expected["weight"]
        if self.discount:
            advantage = advantage + return_to_go(reward, batch.learn, self.discount) - reward
        limit = torch.inf if self.clip is None else self.clip
        formula = "−f(u)" if self.stop_gradient else "−f(u) + u f′(u)"
        return {
            "advantage": advantage_column(
                advantage, f"{formula}, u = T(y) / S(y), y the sampled token", unit=""
            ),
            "clipped": Column(
                (log_u.abs() > limit).long(),
                "whether |log T(y) − log S(y)| was above the clip",
                labels=("as it is", "clipped"),
            ),
            "sampler_logp": sampler_column(logp),
        }

    def reward(self, log_u: Tensor) -> Tensor:
        """Compute -f(u) of clipped log-ratios.

        Args:
            log_u: log q - log p of tokens in nats, any shape.

        Returns:
            The same shape.
        """
        return self.generator.stop_gradient_weight(self._clip(log_u))

    def weight(self, log_u: Tensor) -> Tensor:
        """Compute w_f(u) of clipped log-ratios, or -f(u) with the stop-gradient.

        Args:
            log_u: log q - log p of tokens in nats, any shape.

        Returns:
            The same shape.
        """
        if self.stop_gradient:
            return self.reward(log_u)
        centre = self.generator.centre if self.centred else 0.0
        return self.generator.weight(self._clip(log_u)) - centre

    def loss(self, rows: Rows) -> Tensor:
        """Compute the policy-gradient loss -ratio A.

        Args:
            rows: A chunk of `n` tokens, with the columns of `plan`.

        Returns:
            `[n]`.
        """
        return policy_gradient_loss(rows)

    def _clip(self, log_u: Tensor) -> Tensor:
        return log_u if self.clip is None else log_u.clamp(-self.clip, self.clip)


def student_mean(function: Callable[[Tensor], Tensor], rows: Rows) -> Tensor:
    """Compute `E_{a ~ p} function(log u(a))` over the whole vocabulary.

    Args:
        function: Takes log u `[n, V]` in nats, and gives the same shape.
        rows: A chunk of `n` tokens, with the whole distributions of student and teacher.

    Returns:
        `[n]`.
    """
    p = rows.student.exp()
    values = function(rows.teacher - rows.student)
    return torch.where(p > 0, p * values, 0.0).sum(-1)
