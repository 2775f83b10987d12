"""Load models and look at what a user hands over: is it a causal language model with a tokenizer,
in a precision that works?
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
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
from opdlab.models.vocabulary import check_eos, vocabulary_rows
from opdlab.support.expect import shortened
from opdlab.support.validation import CountOrZero, validate

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float64": torch.float64,
}
_UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    RuntimeError,
    SafetensorError,
)  # what loading says to bad files


def load_model(source: Any, dtype: Any = None, device: Any = None) -> PreTrainedModel:
    """Load a causal language model from a folder or the Hub, with the adapter if it is an adapter's
    folder.

    Args:
        source: A folder, or a name on the Hub.
        dtype: A torch.dtype or its name; bfloat16 on a GPU and float32 on a CPU by default.
        device: As PyTorch names it; the GPU if there is one by default.

    Raises:
        InvalidValue: There is no such model, device or dtype.
    """
    source = _checked_source(source)
    place = checked_device(device)
    kind = checked_dtype(dtype) or (torch.bfloat16 if place.type == "cuda" else torch.float32)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source, dtype=kind)
    except _UNREADABLE as error:
        raise InvalidValue(
            f"No causal language model can be loaded from {source!r}: {_first_line(error)} "
            "Give the folder of one (with its config.json), or its name on the Hub."
        ) from error
    model.to(place)  # type: ignore[arg-type]
    return model


def load_tokenizer(source: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model; an adapter's folder without one takes its base
    model's.

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
            return AutoTokenizer.from_pretrained(place)
        except _UNREADABLE as error:
            failed = error
    raise InvalidValue(
        f"No tokenizer can be loaded from {places[-1]!r}: {_first_line(failed)} Load it yourself"
        " and give it: Policy.load(…, tokenizer=…)."
    ) from failed


def checked_dtype(dtype: Any) -> torch.dtype | None:
    """A torch.dtype from one, from its name, or from None.

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


def checked_device(device: Any) -> torch.device:
    """The device of that name, which must be there; by default a GPU, or the CPU without one.

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


def check_model(model: Any) -> PreTrainedModel:
    """See that something is a causal language model of transformers in a precision that opdlab
    computes in.

    Raises:
        InvalidValue: It is not.
    """
    if hasattr(model, "_orig_mod"):
        raise InvalidValue(
            "The model is compiled (torch.compile). Give Policy.of the model from before."
        )
    if not isinstance(model, PreTrainedModel):
        hint = ""
        if hasattr(model, "weights"):
            hint = " It is a policy already: use it as it is."
        elif isinstance(model, (str, os.PathLike)):
            hint = f" To load one from there: Policy.load({str(model)!r})."
        raise InvalidValue(
            f"Policy.of got a {type(model).__name__} as model. Use a causal language model of"
            f" transformers.{hint}"
        )
    if model.config.is_encoder_decoder:
        raise InvalidValue(
            f"{type(model).__name__} has an encoder and a decoder. Use a causal language model"
            " (decoder only)."
        )
    if model.get_output_embeddings() is None:
        raise InvalidValue(
            f"{type(model).__name__} has no output head, so it gives no distribution over tokens. "
            "Load it as a causal language model: AutoModelForCausalLM.from_pretrained(…)."
        )
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if torch.float16 in kinds:
        raise InvalidValue(
            f"{type(model).__name__} is in float16, which overflows in training without a scaler,"
            " and opdlab has none. Load it with dtype=torch.bfloat16 or torch.float32 (for a"
            " quantised model: as its compute dtype)."
        )
    if any(p.device.type == "meta" for p in model.parameters()):
        raise InvalidValue(
            f"Some weights of {type(model).__name__} are not in memory (offloaded). Load the model"
            " whole, on one device."
        )
    return model


def check_tokenizer(tokenizer: Any) -> None:
    """See that something is a tokenizer of transformers. Raises InvalidValue otherwise."""
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return
    hint = (
        " A processor holds one: give processor.tokenizer."
        if hasattr(tokenizer, "tokenizer")
        else ""
    )
    if isinstance(tokenizer, (str, os.PathLike)):
        hint = f" To load one from there: AutoTokenizer.from_pretrained({str(tokenizer)!r})."
    raise InvalidValue(
        f"Policy got a {type(tokenizer).__name__} as tokenizer. Use a tokenizer of"
        f" transformers.{hint}"
    )


def eos_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    eos: int | Sequence[int] | None = None,
) -> frozenset[int]:
    """The tokens that end a text: those given, or the model's and the tokenizer's own.

    Raises:
        InvalidValue: Something given is no token.
    """
    if eos is None:
        ids = getattr(model.generation_config, "eos_token_id", None)
        ids = [ids] if isinstance(ids, int) else list(ids or [])
        rows = vocabulary_rows(model)
        ids = [
            token for token in ids if 0 <= token < rows
        ]  # a default of the family may be none of this model's tokens
        return frozenset(
            [*ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]
        )
    given = [eos] if isinstance(eos, int) else eos
    try:
        ids = list(given)
    except TypeError:
        raise InvalidValue(
            f"Policy got eos={shortened(eos)}. Use the ids of tokens, as eos=[2]."
        ) from None
    ids = [validate("Policy", {"eos": token}, {"eos": CountOrZero})["eos"] for token in ids]
    check_eos(model, tokenizer, ids)
    return frozenset(ids)


def _checked_source(source: Any) -> str:
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
    """What a library said, on one line and not without end."""
    said = next(
        (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
    )
    said = said if len(said) <= 200 else f"{said[:200]}…"
    return said if said.endswith((".", "…")) else f"{said}."
