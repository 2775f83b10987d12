"""Load models and tokenizers from a folder or the Hub."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from opdlab.errors import InvalidValue
from opdlab.support.expect import shortened

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float64": torch.float64,
}
# The errors that loading raises for bad files.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError)


def load_model(source: Any, dtype: Any = None, device: Any = None) -> PreTrainedModel:
    """Load a causal language model from a folder or the Hub.

    Args:
        source: A folder, or a name on the Hub. An adapter's folder loads its base model with it.
        dtype: A torch.dtype or its name; bfloat16 on a GPU and float32 on a CPU by default.
        device: As PyTorch names it; the GPU if there is one by default.

    Returns:
        The model on its device, in evaluation mode.

    Raises:
        InvalidValue: There is no such model, device or dtype.
    """
    source = _read_source(source)
    place = read_device(device)
    kind = read_dtype(dtype) or (torch.bfloat16 if place.type == "cuda" else torch.float32)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source, dtype=kind)
    except _UNREADABLE as error:
        raise InvalidValue(
            f"No causal language model can be loaded from {source!r}: {_first_line(error)} Give the"
            " folder of one (with its config.json), or its name on the Hub."
        ) from error
    model.to(place)  # type: ignore[arg-type]
    return model


def load_tokenizer(source: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model.

    Args:
        source: A folder, or a name on the Hub. An adapter's folder without a tokenizer takes that
            of its base model.

    Returns:
        The tokenizer.

    Raises:
        InvalidValue: There is none.
    """
    places = [str(source)]
    config = Path(source) / "adapter_config.json"
    if config.is_file():
        base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
        places += [base] if base else []
    for place in places:
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place)
            return tokenizer
        except _UNREADABLE as error:
            failed = error
    raise InvalidValue(
        f"No tokenizer can be loaded from {places[-1]!r}: {_first_line(failed)} Load it yourself"
        " and give it: Policy.load(…, tokenizer=…)."
    ) from failed


def read_dtype(dtype: Any) -> torch.dtype | None:
    """Read a torch.dtype, its name, or None.

    Args:
        dtype: As the user gave it: torch.float32, torch.bfloat16, torch.float64, a name, or None.

    Returns:
        The dtype; None for None.

    Raises:
        InvalidValue: opdlab does not compute in it.
    """
    if dtype is None:
        return None
    known = DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if known in DTYPES.values():
        return known
    if known is torch.float16 or (
        isinstance(dtype, str) and dtype.removeprefix("torch.") in ("float16", "fp16", "half")
    ):
        raise InvalidValue(
            f"Policy.load got dtype={shortened(dtype)}: float16 overflows in training without a"
            " scaler, which opdlab has not. Use torch.bfloat16, or torch.float32 where the GPU has"
            " no bfloat16."
        )
    raise InvalidValue(
        f"Policy.load got dtype={shortened(dtype)}. Use torch.float32, torch.bfloat16 or"
        " torch.float64, or their names."
    )


def read_device(device: Any) -> torch.device:
    """Read the name of a device that is there; by default a GPU, or the CPU without one.

    Args:
        device: As the user gave it: a torch.device, a name such as "cuda:1", or None.

    Returns:
        The device.

    Raises:
        InvalidValue: There is no such device.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidValue(
            f"Policy.load got device={shortened(device)}. Use 'cpu', 'cuda' or 'cuda:1'."
        ) from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise InvalidValue(
            f"Policy.load got device={str(place)!r}, but PyTorch sees no GPU here. Use"
            " device='cpu', or leave it out."
        )
    if (
        place.type == "cuda"
        and place.index is not None
        and place.index >= torch.cuda.device_count()
    ):
        raise InvalidValue(
            f"Policy.load got device={str(place)!r}, but there are {torch.cuda.device_count()}"
            " GPUs, counted from 0."
        )
    if place.type not in ("cuda", "cpu", "mps", "xpu") or (
        place.type == "mps" and not torch.backends.mps.is_available()
    ):
        raise InvalidValue(
            f"Policy.load got device={str(place)!r}, on which no model can run here. Use 'cpu' or"
            " 'cuda'."
        )
    return place


def _read_source(source: Any) -> str:
    if not isinstance(source, (str, os.PathLike)) or not str(source).strip():
        raise InvalidValue(
            f"Policy.load got {shortened(source)}. Use the folder of a model, or its name on the"
            " Hub."
        )
    if "\0" in str(source):
        raise InvalidValue(
            f"Policy.load got {shortened(source)}, which is no path: it holds a NUL character."
        )
    return str(source)


def _first_line(error: BaseException) -> str:
    """The message of a library's error, on one line of at most 200 characters."""
    said = next(
        (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
    )
    said = said if len(said) <= 200 else f"{said[:200]}…"
    return said if said.endswith((".", "…")) else f"{said}."
