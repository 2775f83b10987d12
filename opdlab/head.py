"""The output head of a causal language model, apart from its backbone: hidden states in, float32 logits out.

Knows the three things that model families do after the linear layer (scale, divide, soft-cap) and checks itself against
the model's own logits when it is made, so that a family that does something else is an error and not a wrong loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from opdlab.errors import UnsupportedModel
from opdlab.forward import run_backbone

_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True)
class Head:
    """`rows` tokens from `weight [rows', H]` (padding rows beyond are cut), then `* scale` and a tanh cap."""

    weight: Tensor
    bias: Tensor | None
    rows: int
    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, rows: int) -> Head:
        """The head of `model`.

        Raises:
            UnsupportedModel: The model's logits are something else than these steps give. The message says how far off.
        """
        layer, config = model.get_output_embeddings(), model.config.get_text_config()
        if getattr(layer, "weight", None) is None:
            raise UnsupportedModel(f"{type(model).__name__} has no linear output head over its vocabulary. Use a causal language model.")
        scale, cap = _scale(config), next((cap for name in _CAPS if (cap := getattr(config, name, None))), None)
        head = cls(layer.weight, getattr(layer, "bias", None), min(rows, layer.weight.shape[0]), scale, cap)
        head._check(model)
        return head

    @property
    def parameters(self) -> list[Tensor]:
        """The tensors that train with the head, if any."""
        return [p for p in (self.weight, self.bias) if p is not None and p.requires_grad]

    def __call__(self, hidden: Tensor) -> Tensor:
        """`[n, H] -> [n, rows]`, float32, in the head's own precision until after the product."""
        bias = None if self.bias is None else self.bias[: self.rows]
        logits = F.linear(hidden.to(self.weight.dtype), self.weight[: self.rows], bias)
        logits = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    @torch.no_grad()
    def backward(self, slope: Tensor, logits: Tensor, hidden: Tensor) -> Tensor:
        """Gradient `[n, H]` for the hidden states, given d/d(logits) `slope [n, rows]`, which is used up.

        Float32, or float64 where the states and the head are. A trainable head gets its own gradient added on the way: straight
        into `.grad`, without a copy the size of the head.
        """
        if self.cap is not None:
            slope *= 1 - (logits / self.cap) ** 2
        slope = (slope if self.scale == 1.0 else slope.mul_(self.scale)).to(self.weight.dtype)
        if self.weight.requires_grad:
            _grad(self.weight)[: self.rows].addmm_(slope.T, hidden.to(slope.dtype))
        if self.bias is not None and self.bias.requires_grad:
            _grad(self.bias)[: self.rows].add_(slope.sum(0))
        return (slope @ self.weight[: self.rows]).to(self.precision(hidden))

    def precision(self, hidden: Tensor) -> torch.dtype:
        """What gradients for `hidden` come in: float64 where the states and the head are, as for proofs, else float32."""
        return torch.float64 if hidden.dtype == self.weight.dtype == torch.float64 else torch.float32

    @torch.no_grad()
    def _check(self, model: PreTrainedModel) -> None:
        ids = torch.arange(4, device=model.device)[None] % self.rows
        try:
            want = model(input_ids=ids, use_cache=False).logits[0].float()[:, : self.rows]
        except Exception as error:
            raise cannot_run(model, error) from error
        try:
            got = self(run_backbone(model, ids)[0]).float()
            far = (got - want).abs().max().item()
        except Exception as error:  # other shapes, no hidden states: the model is built in another way
            raise self._unsupported(model, f"applying it to the last hidden states: {error}") from error
        if not torch.allclose(got, want, rtol=1e-2, atol=1e-2 * want.abs().max().item()):
            raise self._unsupported(model, f"largest difference {far:.3g}")

    def _unsupported(self, model: PreTrainedModel, reason: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"{type(model).__name__} computes its logits in a way that opdlab does not know ({_line(reason)}). opdlab knows one "
            "linear layer on the last hidden states, times a constant, with a tanh cap. Please report the model; until "
            "then use one with a plain linear head."
        )


def cannot_run(model: PreTrainedModel, error: Exception) -> UnsupportedModel:
    """The error for a model that fails on plain token ids."""
    return UnsupportedModel(
        f"{type(model).__name__} cannot be run on plain token ids ({type(error).__name__}: {_line(str(error))}). Use a causal "
        "language model that needs nothing else."
    )


def _line(text: str) -> str:
    return " ".join(text.split())[:200]


def _scale(config: PreTrainedConfig) -> float:
    """The constant that a family multiplies its logits with, in the words of its configuration."""
    scale = 1.0
    for name in _FACTORS:
        scale *= getattr(config, name, None) or 1.0
    for name in _DIVISORS:
        scale /= getattr(config, name, None) or 1.0
    return scale


def _grad(tensor: Tensor) -> Tensor:
    if tensor.grad is None:
        tensor.grad = torch.zeros_like(tensor)
    return tensor.grad
