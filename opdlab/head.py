"""The output head of a causal language model, apart from its backbone: hidden states in, float32 logits out.

Knows the three things that model families do after the linear layer (scale, divide, soft-cap) and checks itself against
the model's own logits when it is made, so that a family that does something else is an error and not a wrong loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel


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
        """The head of `model`; raises ValueError for a model whose logits it does not reproduce."""
        layer, config = model.get_output_embeddings(), model.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
        cap = getattr(config, "final_logit_softcapping", None)
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
        want = model(ids).logits[0].float()[:, : self.rows]
        got = self(model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0])
        if not torch.allclose(got.float(), want, rtol=1e-2, atol=1e-2 * want.abs().max().item()):
            raise ValueError(
                f"{type(model).__name__} computes its logits in a way that opdlab does not know (largest difference "
                f"{(got - want).abs().max():.3g}). Please report the model; until then use one with a plain linear head."
            )


def _grad(tensor: Tensor) -> Tensor:
    if tensor.grad is None:
        tensor.grad = torch.zeros_like(tensor)
    return tensor.grad
