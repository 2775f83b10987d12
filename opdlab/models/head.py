"""Compute float32 logits from hidden states: the output head, apart from its backbone.

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
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel

from opdlab.errors import InvalidValue, UnsupportedModel
from opdlab.models.forward import run_backbone
from opdlab.models.placement import fetch, input_device
from opdlab.models.precision import without_autocast
from opdlab.models.products import project, project_back

_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True)
class LowRank:
    """The low-rank matrix that a LoRA adds to a head: `scale * up @ down`.

    Attributes:
        up: `[rows, r]`; as many rows as the head's matrix.
        down: `[r, H]`.
        scale: A constant.
    """

    up: Tensor
    down: Tensor
    scale: float


@dataclass(frozen=True)
class Head:
    """Compute logits: one linear layer, times a constant, with a tanh cap.

    Attributes:
        weight: `[rows, H]`. Rows from `vocab_size` on are padding and are cut.
        bias: `[rows]`, or None.
        vocab_size: Number of tokens, `V`.
        scale: The constant.
        cap: Logits stay between -cap and cap; None for no cap.
        lora: A low-rank matrix beside `weight`, or None.
    """

    weight: Tensor
    bias: Tensor | None
    vocab_size: int
    scale: float = 1.0
    cap: float | None = None
    lora: LowRank | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, vocab_size: int, adapter: str | None = None) -> Head:
        """Find the head of a model, and check it against the model's own logits.

        Args:
            model: With `adapter` in force.
            vocab_size: Number of tokens of the tokenizer; the head may have fewer rows, or more.
            adapter: Name of the adapter; None for the bare model.

        Returns:
            The head.

        Raises:
            InvalidValue: The head is no plain matrix.
            UnsupportedModel: The model's logits are something else than the head gives. The message
                says how far off.
        """
        head = cls.read(model, vocab_size, adapter)
        head._check(model)
        return head

    @classmethod
    def read(cls, model: PreTrainedModel, vocab_size: int, adapter: str | None = None) -> Head:
        """Find the head of a model without running anything; see `of`.

        Args:
            model: The model; `adapter` need not be in force.
            vocab_size: Number of tokens of the tokenizer; the head may have fewer rows, or more.
            adapter: Name of the adapter; None for the bare model.

        Returns:
            The head, unchecked.

        Raises:
            InvalidValue: The head is no plain matrix.
        """
        weight, bias, lora = _matrix(model, adapter)
        config = model.config.get_text_config()
        return cls(
            weight, bias, min(vocab_size, weight.shape[0]), _scale(config), _cap(config), lora
        )

    @property
    def parameters(self) -> list[Tensor]:
        """The tensors that train with the head, if any."""
        lora = [] if self.lora is None else [self.lora.up, self.lora.down]
        return [p for p in (self.weight, self.bias, *lora) if p is not None and p.requires_grad]

    def __call__(self, hidden: Tensor, memory: Tensor | None = None) -> Tensor:
        """Compute logits `[n, V]` of hidden states `[n, H]`.

        They are float32 (or float64), on the device of the hidden states, wherever the head is. A
        head in bfloat16 gives the float32 sums of its products where the device can
        (`opdlab.models.products`).

        Args:
            hidden: The hidden states, `[n, H]`.
            memory: Logits of an earlier call, at least `n` rows, that are no longer needed. They
                may be overwritten: new pages of memory cost a tenth of a product.

        Returns:
            `[n, V]`, in `memory` where that is possible.
        """
        bias, device = None if self.bias is None else self.bias[: self.vocab_size], hidden.device
        weight = self.weight[: self.vocab_size]
        with without_autocast(weight.device):
            hidden = hidden.to(weight.device)
            logits = project(hidden, weight, bias, memory)
            if self.lora is not None:
                up, down = self.lora.up[: self.vocab_size], self.lora.down
                inner = functional.linear(hidden.to(down.dtype), down)
                logits = logits + functional.linear(inner, up) * self.lora.scale
        logits = logits.to(device)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def through_cap(self, slope: Tensor, logits: Tensor) -> Tensor:
        """Carry a gradient back through the tanh that some families cap their logits with.

        Args:
            slope: Gradient for the capped logits, `[n, V]`; it is overwritten.
            logits: The capped logits, `[n, V]`.

        Returns:
            Gradient for the logits before the cap, `[n, V]`.
        """
        return slope if self.cap is None else slope.mul_(1 - (logits / self.cap) ** 2)

    @torch.no_grad()
    def backward(self, slope: Tensor, hidden: Tensor) -> Tensor:
        """Carry a gradient back through the head.

        A trainable head gets its own gradient added on the way: straight into `.grad`, without a
        copy the size of the head.

        Args:
            slope: Gradient for the logits before the cap (`through_cap`), `[n, V]`; it is
                overwritten.
            hidden: The hidden states `[n, H]`.

        Returns:
            Gradient for the hidden states `[n, H]`, on their device, in float32, or in float64
            where the states and the head are.
        """
        device = hidden.device
        slope = slope if self.scale == 1.0 else slope.mul_(self.scale)
        with without_autocast(self.weight.device):
            slope, hidden = slope.to(self.weight.device), hidden.to(self.weight.device)
            through_lora = None
            if self.lora is not None:
                through_lora = self._backward_lora(self.lora, slope, hidden)
            out = project_back(slope, self.weight[: self.vocab_size]).to(self.precision(hidden))
            slope = slope.to(self.weight.dtype)
            if self.weight.requires_grad:
                _grad(self.weight)[: self.vocab_size].addmm_(slope.T, hidden.to(slope.dtype))
            if self.bias is not None and self.bias.requires_grad:
                _grad(self.bias)[: self.vocab_size].add_(slope.sum(0))
            return (out if through_lora is None else out.add_(through_lora)).to(device)

    def _backward_lora(self, lora: LowRank, slope: Tensor, hidden: Tensor) -> Tensor:
        """Do the LoRA's part of `backward`; returns its gradient for the hidden states."""
        up, down = lora.up[: self.vocab_size], lora.down
        hidden = hidden.to(down.dtype)
        slope = slope.to(up.dtype)
        inner = (slope @ up) * lora.scale  # [n, r]
        if lora.up.requires_grad:
            inside = functional.linear(hidden, down)
            _grad(lora.up)[: self.vocab_size].addmm_(slope.T, inside, alpha=lora.scale)
        if down.requires_grad:
            _grad(down).addmm_(inner.T, hidden)
        return inner @ down

    def precision(self, hidden: Tensor) -> torch.dtype:
        """Choose the dtype of gradients for hidden states: float64 where these and the head are.

        Proofs use float64; everything else is float32.

        Args:
            hidden: The hidden states, of any shape.

        Returns:
            torch.float32 or torch.float64.
        """
        is_double = hidden.dtype == self.weight.dtype == torch.float64
        return torch.float64 if is_double else torch.float32

    @torch.no_grad()
    def _check(self, model: PreTrainedModel) -> None:
        ids = torch.arange(4, device=input_device(model))[None] % self.vocab_size
        try:
            want = model(input_ids=ids, use_cache=False).logits[0].float()[:, : self.vocab_size]
        except Exception as error:
            raise cannot_run(model, error) from error
        try:
            got = self(run_backbone(model, ids)[0]).float().to(want.device)
            far = (got - want).abs().max().item()
        except Exception as error:  # other shapes, no hidden states: it is built in another way
            reason = f"applying it to the last hidden states: {error}"
            raise self._unsupported(model, reason) from error
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
    """Make the error for a model that fails on plain token ids.

    Args:
        model: The model that failed.
        error: The error that its forward pass raised.

    Returns:
        The error, for the caller to raise.
    """
    return UnsupportedModel(
        f"{type(model).__name__} cannot be run on plain token ids ({type(error).__name__}:"
        f" {_line(str(error))}). Use a causal language model that needs nothing else."
    )


def _line(text: str) -> str:
    return " ".join(text.split())[:200]


def _scale(config: PreTrainedConfig) -> float:
    """The constant that a family multiplies its logits with.

    Each family names it in its own way, and most configurations have no such field.
    """
    scale = 1.0
    for name in _FACTORS:
        scale *= getattr(config, name, None) or 1.0
    for name in _DIVISORS:
        scale /= getattr(config, name, None) or 1.0
    return scale


def _cap(config: PreTrainedConfig) -> float | None:
    """The limit that a family's tanh puts on its logits; None for no limit."""
    for name in _CAPS:
        if cap := getattr(config, name, None):
            return float(cap)
    return None


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
    # Not `layer.weight`: parametrizations make one up at every access.
    weight, bias = fetch(layer, "weight"), fetch(layer, "bias")
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
    """Say in words what a head is that is no plain matrix."""
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
