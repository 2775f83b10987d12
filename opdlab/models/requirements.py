"""Refuse models and tokenizers that opdlab cannot use, before anything is run."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opdlab.errors import InvalidValue, UnsupportedModel
from opdlab.models.placement import stored_tensors

# Rotary embeddings that transformers computes anew from a batch's longest row.
_CHANGING_ROTARY = ("dynamic", "longrope")


def check_model(model: Any) -> PreTrainedModel:
    """Check that a model is one of transformers that opdlab can train and sample.

    Args:
        model: Anything that a user passed.

    Returns:
        The same object.

    Raises:
        InvalidValue: It is no causal language model, or in a precision that opdlab does not
            compute in.
    """
    if hasattr(model, "_orig_mod"):  # the mark that torch.compile leaves
        raise InvalidValue(
            "The model is compiled (torch.compile). Give Policy.of the model from before."
        )
    if not isinstance(model, PreTrainedModel):
        hint = ""
        if hasattr(model, "weights"):  # a Policy, whose class is defined on this
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
    lost = {name for name, p in model.named_parameters() if p.is_meta} - stored_tensors(
        model
    ).keys()
    if lost:
        raise InvalidValue(
            f"Some weights of {type(model).__name__} are nowhere: {min(lost)} is on the meta device"
            " and not offloaded. Load the model whole: Policy.load(…, device_map='auto') offloads"
            " what does not fit."
        )
    return model


def check_tokenizer(tokenizer: Any) -> None:
    """Check that something is a tokenizer of transformers.

    Args:
        tokenizer: As the user gave it.

    Raises:
        InvalidValue: It is something else.
    """
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return
    hint = ""
    if hasattr(tokenizer, "tokenizer"):  # processors of transformers share no class of their own
        hint = " A processor holds one: give processor.tokenizer."
    if isinstance(tokenizer, (str, os.PathLike)):
        hint = f" To load one from there: AutoTokenizer.from_pretrained({str(tokenizer)!r})."
    raise InvalidValue(
        f"Policy got a {type(tokenizer).__name__} as tokenizer. Use a tokenizer of"
        f" transformers.{hint}"
    )


def check_rotary(model: PreTrainedModel, context_length: int | None) -> None:
    """Refuse rotary embeddings that change as a text grows.

    Args:
        model: The model.
        context_length: The user's limit. Where it is short enough, the embeddings do not change.

    Raises:
        UnsupportedModel: Rows that fit the context would change the numbers of the tokens before
            them.
    """
    config = model.config.get_text_config()
    # Families without rotary embeddings have no such setting; some have one for each kind of layer.
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope]
    if "rope_type" not in rope:
        kinds = [part for part in rope.values() if isinstance(part, dict)]
    for kind in kinds:
        name = kind.get("rope_type", "")
        if name not in _CHANGING_ROTARY:
            continue
        fixed = (
            config.max_position_embeddings
            if name == "dynamic"
            else kind["original_max_position_embeddings"]
        )
        extends = name == "dynamic" or config.max_position_embeddings > fixed
        if (context_length is None and extends) or (context_length or 0) > fixed:
            raise UnsupportedModel(
                f"{type(model).__name__} changes its rotary embedding in rows of more than {fixed}"
                f" tokens (rope_type {name!r}), so that the log-probs of a text change as it grows,"
                " and with the rows beside it. Limit the policy to rows that it does not change"
                f" for: context_length={fixed}, for Policy.load and Policy.of alike."
            )
