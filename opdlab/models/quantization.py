"""Load base models in 4 or 8 bits, and let their layers compute what their numbers say.

bitsandbytes has faster kernels for inference on a CPU, which round to bfloat16 or int8 and which no
gradient passes. They are used by layers in evaluation mode only. So opdlab keeps these layers, and
nothing else of the model, in training mode: a quantised model then computes exactly with its
dequantised weights, and the gradient reaches every adapter.
"""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from opdlab.errors import InvalidValue
from opdlab.support.expect import shortened

WAYS = ("4bit", "8bit")


def read_quantization(given: Any, dtype: torch.dtype) -> Any:
    """Read how a model is to be quantised.

    Args:
        given: "4bit" (NF4 with double quantisation, as in QLoRA), "8bit", a quantisation config of
            transformers, or None.
        dtype: The dtype of everything that stays unquantised, in which the layers also compute.

    Returns:
        A quantisation config of transformers, or None.

    Raises:
        InvalidValue: It is something else, or needs a package that is not installed.
    """
    if given is None:
        return None
    check_quantization(given)
    if not isinstance(given, str):
        return given
    from transformers import BitsAndBytesConfig

    if given == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def check_quantization(given: Any) -> None:
    """Check how a model is to be quantised, before anything is loaded.

    Args:
        given: As the user gave it; not None.

    Raises:
        InvalidValue: It is nothing that `read_quantization` understands, or needs a package that is
            not installed.
    """
    from transformers.utils.quantization_config import BitsAndBytesConfig, QuantizationConfigMixin

    is_config = isinstance(given, QuantizationConfigMixin)
    if not is_config and given not in WAYS:
        raise InvalidValue(
            f"Policy.load got quantization={shortened(given)}. Use '4bit', '8bit', or a"
            " quantisation config of transformers, as BitsAndBytesConfig(load_in_4bit=True)."
        )
    if isinstance(given, (str, BitsAndBytesConfig)) and find_spec("bitsandbytes") is None:
        raise InvalidValue(
            f"Policy.load got quantization={shortened(given)}, which needs the package"
            " bitsandbytes. Install it: pip install 'opdlab[quantized]'."
        )


def is_quantized(model: nn.Module) -> bool:
    """Tell whether some of a model's layers hold quantised weights.

    Args:
        model: The model, with or without adapters.

    Returns:
        True for models that transformers quantised or loaded quantised.
    """
    # Attributes that transformers adds to such models alone.
    return getattr(model, "hf_quantizer", None) is not None or bool(_find_layers(model))


def describe_quantization(model: nn.Module) -> str:
    """Say in a word how a model is quantised.

    Args:
        model: The model.

    Returns:
        Such as "4-bit" or "8-bit"; "quantised" for other ways; "" for a plain model.
    """
    if not is_quantized(model):
        return ""
    if getattr(model, "is_loaded_in_4bit", False):
        return "4-bit"
    if getattr(model, "is_loaded_in_8bit", False):
        return "8-bit"
    return "quantised"


def set_evaluation(model: nn.Module) -> None:
    """Put a model into evaluation mode, but for layers of bitsandbytes.

    These have no dropout. In training mode they compute with their dequantised weights; see above.

    Args:
        model: The model.
    """
    model.eval()
    for layer in _find_layers(model):
        # What an earlier pass in evaluation mode has packed for a kernel of its own is unpacked by
        # asking for the state.
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            layer.state_dict()
        layer.train()


def rounds_coarsely(model: nn.Module) -> bool:
    """Tell whether quantised layers compute in less than single precision.

    Args:
        model: The model.

    Returns:
        True where 4-bit layers compute in half precision, and for 8-bit layers on a GPU, which
        round their inputs.
    """
    for layer in _find_layers(model):
        if getattr(layer, "compute_dtype", None) in (torch.bfloat16, torch.float16):
            return True
        is_8bit = not hasattr(layer, "compute_dtype")
        if is_8bit and layer.weight.device.type != "cpu":
            return True
    return False


def dequantized(model: Any) -> Any:
    """Copy a quantised model into one with plain weights that computes the same.

    Args:
        model: A quantised model of transformers, without adapters; it is not changed.

    Returns:
        A model of the same class, in the dtype that the quantised one computes in.

    Raises:
        InvalidValue: transformers cannot dequantise it.
    """
    dtype = model.dtype
    twin = copy.deepcopy(model)
    try:
        plain = twin.dequantize(dtype=dtype)
    except (NotImplementedError, ValueError, TypeError, RuntimeError, ImportError) as error:
        raise InvalidValue(
            f"{type(model).__name__} is quantised in a way that cannot be undone ({error}). Load it"
            " without quantization."
        ) from error
    plain.requires_grad_(False)
    return plain


def _find_layers(model: nn.Module) -> list[Any]:
    """List the layers of bitsandbytes, which need not be installed."""
    return [
        layer
        for layer in model.modules()
        if any(
            cls.__module__.startswith("bitsandbytes.")
            and cls.__name__ in ("Linear4bit", "Linear8bitLt")
            for cls in type(layer).__mro__
        )
        and not hasattr(layer, "base_layer")
    ]
