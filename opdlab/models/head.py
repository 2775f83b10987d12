"""The output head of a causal language model, apart from its backbone: hidden states in, float32
logits out.

A head is one matrix, with what adapters may do to it: replace it (`modules_to_save`) or add a
low-rank matrix (LoRA). It knows the three things that model families do after the linear layer
(scale, divide, soft-cap) and checks itself against the model's own logits when it is made, so that
a family that does something else is an error and not a wrong loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from opdlab.errors import InvalidValue, UnsupportedModel
from opdlab.models.forward import run_backbone
from opdlab.models.precision import without_autocast

_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True)
class LowRank:
    """What a LoRA adds to a head: `scale * up @ down`, with `up [rows', r]` and `down [r, H]`."""

    up: Tensor
    down: Tensor
    scale: float


@dataclass(frozen=True)
class Head:
    """`rows` tokens from `weight [rows', H]` (padding rows beyond are cut), then `* scale` and a
    tanh cap.
    """

    weight: Tensor
    bias: Tensor | None
    rows: int
    scale: float = 1.0
    cap: float | None = None
    lora: LowRank | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, rows: int, adapter: str | None = None) -> Head:
        """Find the head of `model` under `adapter`, which must be in force, and check it against
        the model's logits.

        Raises:
            InvalidValue: The head is no plain matrix.
            UnsupportedModel: The model's logits are something else than the head gives. The message
                says how far off.
        """
        head = cls.read(model, rows, adapter)
        head._check(model)
        return head

    @classmethod
    def read(cls, model: PreTrainedModel, rows: int, adapter: str | None = None) -> Head:
        """Find the head of `model` under `adapter`, without running anything.

        Raises:
            InvalidValue: The head is no plain matrix.
        """
        weight, bias, lora = _matrix(model, adapter)
        config = model.config.get_text_config()
        cap = next((cap for name in _CAPS if (cap := getattr(config, name, None))), None)
        return cls(weight, bias, min(rows, weight.shape[0]), _scale(config), cap, lora)

    @property
    def parameters(self) -> list[Tensor]:
        """The tensors that train with the head, if any."""
        lora = [] if self.lora is None else [self.lora.up, self.lora.down]
        return [p for p in (self.weight, self.bias, *lora) if p is not None and p.requires_grad]

    def __call__(self, hidden: Tensor) -> Tensor:
        """`[n, H] -> [n, rows]`, float32, in the head's own precision until after the product."""
        bias = None if self.bias is None else self.bias[: self.rows]
        with without_autocast(hidden.device):
            logits = F.linear(hidden.to(self.weight.dtype), self.weight[: self.rows], bias)
            logits = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
            if self.lora is not None:
                up, down = self.lora.up[: self.rows], self.lora.down
                logits = (
                    logits + F.linear(F.linear(hidden.to(down.dtype), down), up) * self.lora.scale
                )
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    @torch.no_grad()
    def backward(self, slope: Tensor, logits: Tensor, hidden: Tensor) -> Tensor:
        """Gradient `[n, H]` for the hidden states, given d/d(logits) `slope [n, rows]`, which is
        used up.

        Float32, or float64 where the states and the head are. A trainable head gets its own
        gradient added on the way: straight into `.grad`, without a copy the size of the head.
        """
        with without_autocast(hidden.device):
            if self.cap is not None:
                slope *= 1 - (logits / self.cap) ** 2
            slope = slope if self.scale == 1.0 else slope.mul_(self.scale)
            through_lora = (
                None if self.lora is None else self._backward_lora(self.lora, slope, hidden)
            )
            slope = slope.to(self.weight.dtype)
            if self.weight.requires_grad:
                _grad(self.weight)[: self.rows].addmm_(slope.T, hidden.to(slope.dtype))
            if self.bias is not None and self.bias.requires_grad:
                _grad(self.bias)[: self.rows].add_(slope.sum(0))
            out = (slope @ self.weight[: self.rows]).to(self.precision(hidden))
            return out if through_lora is None else out.add_(through_lora)

    def _backward_lora(self, lora: LowRank, slope: Tensor, hidden: Tensor) -> Tensor:
        """The LoRA's part of `backward`: its own gradients into `.grad`, that of the hidden states
        returned.
        """
        up, down = lora.up[: self.rows], lora.down
        hidden = hidden.to(down.dtype)
        slope = slope.to(up.dtype)
        inner = (slope @ up) * lora.scale  # [n, r]
        if lora.up.requires_grad:
            _grad(lora.up)[: self.rows].addmm_(slope.T, F.linear(hidden, down), alpha=lora.scale)
        if down.requires_grad:
            _grad(down).addmm_(inner.T, hidden)
        return inner @ down

    def precision(self, hidden: Tensor) -> torch.dtype:
        """What gradients for `hidden` come in: float64 where the states and the head are, as for
        proofs, else float32.
        """
        return (
            torch.float64 if hidden.dtype == self.weight.dtype == torch.float64 else torch.float32
        )

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
        except (
            Exception
        ) as error:  # other shapes, no hidden states: the model is built in another way
            raise self._unsupported(
                model, f"applying it to the last hidden states: {error}"
            ) from error
        if not torch.allclose(got, want, rtol=1e-2, atol=1e-2 * want.abs().max().item()):
            raise self._unsupported(model, f"largest difference {far:.3g}")

    def _unsupported(self, model: PreTrainedModel, reason: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"{type(model).__name__} computes its logits in a way that opdlab does not know"
            f" ({_line(reason)}). opdlab knows one linear layer on the last hidden states, times a"
            " constant, with a tanh cap. Please report the model; until then use one with a plain"
            " linear head."
        )


def cannot_run(model: PreTrainedModel, error: Exception) -> UnsupportedModel:
    """The error for a model that fails on plain token ids."""
    return UnsupportedModel(
        f"{type(model).__name__} cannot be run on plain token ids ({type(error).__name__}:"
        f" {_line(str(error))}). Use a causal language model that needs nothing else."
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


def _matrix(
    model: PreTrainedModel, adapter: str | None
) -> tuple[Tensor, Tensor | None, LowRank | None]:
    """The head's weight and bias under `adapter`, and the LoRA on it, if any."""
    name = type(model).__name__
    layer: nn.Module = model.get_output_embeddings()
    lora = None
    while isinstance(layer, (ModulesToSaveWrapper, LoraLinear)):
        if isinstance(layer, LoraLinear):
            lora = lora or _low_rank(layer, adapter)
            layer = layer.get_base_layer()
        else:
            own = adapter is not None and adapter in layer.modules_to_save
            layer = layer.modules_to_save[str(adapter)] if own else layer.original_module
    weight, bias = layer._parameters.get("weight"), getattr(layer, "bias", None)
    is_plain = (
        weight is not None
        and type(weight.data) is Tensor
        and weight.is_floating_point()
        and weight.dim() == 2
    )
    if weight is None or not is_plain:
        raise InvalidValue(
            f"The output head of {name} is no plain matrix but {_kind(layer)}, so opdlab cannot"
            " tell its log-probs and their gradient. Keep the head as an ordinary torch.nn.Linear:"
            " leave it out of quantisation (llm_int8_skip_modules and the like), remove"
            " parametrizations from it, and merge adapters of other kinds than LoRA."
        )
    return weight, bias, lora


def _low_rank(layer: Any, adapter: str | None) -> LowRank | None:
    if adapter is None or adapter not in layer.lora_A:
        return None
    if adapter in layer.lora_variant or layer.lora_bias[adapter]:
        raise InvalidValue(
            f"The adapter {adapter!r} puts a special kind of LoRA (DoRA, or one with a bias) on the"
            " output head, where opdlab computes plain LoRA only. Leave the head out of its"
            " targets."
        )
    return LowRank(
        layer.lora_B[adapter].weight, layer.lora_A[adapter].weight, float(layer.scaling[adapter])
    )


def _kind(layer: nn.Module) -> str:
    """What a head is instead of a plain matrix, in words."""
    if nn.utils.parametrize.is_parametrized(layer):
        return f"a parametrized {type(layer).__name__}"
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor) and not weight.is_floating_point():
        return f"a quantised {type(layer).__name__} ({weight.dtype})"
    return f"a {type(layer).__name__}"


def _grad(tensor: Tensor) -> Tensor:
    if tensor.grad is None:
        tensor.grad = torch.zeros_like(tensor)
    return tensor.grad
