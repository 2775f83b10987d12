"""Load weights, or find that another policy has them in memory already."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from opdlab.models import loading
from opdlab.models.adapters import files as adapter_files
from opdlab.models.fingerprints import base_tensors, tensors_digest, vocabulary_digest
from opdlab.models.load_options import LoadOptions
from opdlab.models.quantization import read_quantization
from opdlab.models.vocabulary import find_eos
from opdlab.models.weights import Weights


@dataclass(frozen=True)
class Origin:
    """Say what weights were loaded from, and what they were then.

    Attributes:
        base: The resolved folder, or the name on the Hub with the commit.
        stamp: Names, sizes and times of the files of a local folder.
        dtype: Of the weights that are not quantised.
        quantization: The quantisation config, as JSON; "" for none.
        attention: The attention implementation that the user asked for, or None.
        digest: A fingerprint of the weights.
    """

    base: str
    stamp: str
    dtype: str
    quantization: str
    attention: str | None
    digest: str


@dataclass(frozen=True)
class Shared:
    """What a policy on weights that are in memory has of its own.

    Attributes:
        adapter: Name of its adapter on the weights, or None.
        chat_template_kwargs: Its arguments for the chat template.
    """

    adapter: str | None
    chat_template_kwargs: Mapping[str, Any]


def load_weights(place: loading.Place, options: LoadOptions) -> Weights:
    """Load a model with its tokenizer, and the adapter on it.

    Args:
        place: Where they are.
        options: The options of `Policy.load`.

    Returns:
        The weights, which know where they are from.

    Raises:
        InvalidValue: They cannot be loaded in this way.
    """
    # What the user names is looked at first, since a model may take minutes.
    given = None if options.tokenizer is None else loading.load_tokenizer(place, options)
    model = loading.load_model(place, options)
    tokenizer = given or loading.load_tokenizer(place, options)
    weights = Weights(model, tokenizer, options.eos, place.base, options.context_length)
    has_resized = place.adapter is not None and adapter_files.has_embeddings(model, place.adapter)
    if options.device_map is None and not has_resized:
        weights.origin = _origin_of(place, options, _digest(weights))
    return weights


def share(weights: Weights, place: loading.Place, options: LoadOptions) -> Shared | str:
    """Put a policy on weights that are in memory, if these are what it would load.

    Args:
        weights: The weights in memory; they get the adapter, if there is one.
        place: What would be loaded.
        options: The options of `Policy.load`.

    Returns:
        What the policy has of its own; or, where the weights are others, the reason in words.
    """
    origin = weights.origin
    if not isinstance(origin, Origin):
        return "nobody knows what its weights were loaded from"
    if options.device_map is not None:
        return "device_map was given"
    if options.device is not None and options.place() != weights.device:
        return f"its weights are on {weights.device} and device={str(options.device)!r} was given"
    wanted = _origin_of(place, options, origin.digest)
    for what in ("base", "stamp", "dtype", "quantization", "attention"):
        here, there = getattr(origin, what), getattr(wanted, what)
        if here != there:
            if what == "stamp":
                return "the files of its model have changed since it was loaded"
            if what == "quantization":
                return "it is quantised in another way"
            return f"its {what} is {here or 'none'}, and {there or 'none'} was asked for"
    if _digest(weights) != origin.digest:
        return "its weights have changed since they were loaded"
    if options.context_length not in (None, weights.own_context_length):
        return "another context_length was given"
    return _put_on(weights, place, options)


def _put_on(weights: Weights, place: loading.Place, options: LoadOptions) -> Shared | str:
    tokenizer = loading.load_tokenizer(place, options)
    if vocabulary_digest(tokenizer) != vocabulary_digest(weights.tokenizer):
        return "its tokenizer has other tokens"
    if find_eos(weights.model, tokenizer, options.eos) != weights.eos:
        return "its texts end with other tokens"
    if place.adapter is not None and adapter_files.has_embeddings(weights.model, place.adapter):
        return "the adapter brings embeddings of its own"
    own = dict(options.chat_template_kwargs or {})
    if tokenizer.chat_template != weights.tokenizer.chat_template and tokenizer.chat_template:
        own.setdefault("chat_template", tokenizer.chat_template)
    adapter = None if place.adapter is None else weights.load_adapter(place.adapter)
    return Shared(adapter, own)


def _digest(weights: Weights) -> str:
    return tensors_digest(base_tensors(weights.model))


def _origin_of(place: loading.Place, options: LoadOptions, digest: str) -> Origin:
    base, stamp = _identify(place, options)
    config = read_quantization(options.quantization, options.kind())
    return Origin(
        base=base,
        stamp=stamp,
        dtype=str(options.kind()).removeprefix("torch."),
        quantization="" if config is None else json.dumps(config.to_dict(), default=str),
        attention=options.attn_implementation,
        digest=digest,
    )


def _identify(place: loading.Place, options: LoadOptions) -> tuple[str, str]:
    """A model's identity: its folder with the files' stamps, or its name with the commit."""
    folder = Path(place.base)
    if folder.is_dir():
        files = sorted(
            one for one in folder.iterdir() if one.suffix in (".safetensors", ".bin", ".json")
        )
        stamp = [(one.name, one.stat().st_size, one.stat().st_mtime_ns) for one in files]
        return str(folder.resolve()), json.dumps(stamp)
    config, _ = PreTrainedConfig.get_config_dict(
        place.base, revision=place.revision, token=options.token
    )
    return place.base, str(config.get("_commit_hash") or place.revision)
