"""Load models, adapters and tokenizers from a folder, a GGUF file or the Hub."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file

from opdlab.errors import InvalidValue
from opdlab.models import adapters, gguf_files
from opdlab.models.adapters import files as adapter_files
from opdlab.models.load_options import GGUF_AND_QUANTIZATION, LoadOptions, read_chat_template
from opdlab.models.placement import refuse_offloaded
from opdlab.models.quantization import is_quantized, read_quantization
from opdlab.models.requirements import check_tokenizer
from opdlab.support.expect import shortened

# The errors that loading raises for bad files.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError)


@dataclass(frozen=True)
class Place:
    """Say where the parts of a policy are to be loaded from.

    Attributes:
        base: Folder or Hub name of the model.
        revision: Its revision on the Hub, or None.
        adapter: Local folder of the adapter, or None.
        tokenizers: Folders and Hub names to look for the tokenizer in, the first one first.
        is_named_by: The folder or name of the adapter that named the base, or "".
    """

    base: str
    revision: str | None
    adapter: Path | None
    tokenizers: tuple[tuple[str, str | None], ...]
    is_named_by: str = ""


def find(source: Any, options: LoadOptions) -> Place:
    """Find out what a source is: a model, an adapter that names its base, or a GGUF file.

    A GGUF file is unpacked to safetensors the first time.

    Args:
        source: A folder, a GGUF file, or a name on the Hub.
        options: The options of `Policy.load`.

    Returns:
        Where the parts are.

    Raises:
        InvalidValue: There is no such thing, or the options do not fit it.
    """
    source = _read_source(source)
    if options.revision is not None and Path(source).exists() and not _names_a_base(source):
        raise InvalidValue(
            f"Policy.load got revision={options.revision!r}, which names a version on the Hub, and"
            f" {source!r} is on this machine. Leave revision out."
        )
    own = None if options.gguf_file else _find_adapter(source, options, options.revision)
    if own is None:
        base, revision = _unpack_gguf(source, options)
        adapter = None if options.adapter is None else _fetch_adapter(options.adapter, options)
        names = [(base, revision)] if adapter is None else [(str(adapter), None), (base, revision)]
        return Place(base, revision, adapter, tuple(names))
    if options.adapter is not None:
        raise InvalidValue(
            f"Policy.load got adapter={str(options.adapter)!r} for {source!r}, which is an adapter"
            " itself. Give the base model as the source, or leave adapter out."
        )
    base = _base_of(own, source)
    revision = _base_revision(own)
    if Path(source).exists() and options.revision is not None:
        revision = options.revision
    base, _ = _unpack_gguf(base, options)
    return Place(base, revision, own, ((str(own), None), (base, revision)), source)


def _names_a_base(source: str) -> bool:
    folder = Path(source)
    return (folder / adapter_files.CONFIG).is_file() and not (folder / "config.json").is_file()


def _find_adapter(source: str, options: LoadOptions, revision: str | None) -> Path | None:
    """The local folder of the adapter that a source is; None for a model.

    A folder with a model and an adapter is a model, whose adapter transformers loads with it.
    """
    if Path(source).exists():
        return Path(source) if _names_a_base(source) else None
    try:
        found = cached_file(
            source,
            adapter_files.CONFIG,
            revision=revision,
            token=options.token,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except _UNREADABLE:  # no such repository: said when the model is loaded
        return None
    if found is None:
        return None
    return _fetch_tensors(source, options, revision)


def _fetch_adapter(adapter: str | os.PathLike[str], options: LoadOptions) -> Path:
    """The local folder of an adapter that is given beside its base."""
    name = os.fspath(adapter)
    if Path(name).expanduser().exists():
        return Path(name).expanduser()
    found = _find_adapter(name, options, None)
    if found is None:
        raise InvalidValue(
            f"Policy.load got adapter={name!r}, where no adapter can be found. Use the folder of a"
            " PEFT adapter (with its adapter_config.json), or its name on the Hub."
        )
    return found


def _fetch_tensors(name: str, options: LoadOptions, revision: str | None) -> Path:
    """Fetch an adapter from the Hub, with its tokenizer's files where it has some."""
    from huggingface_hub import snapshot_download

    wanted = ["adapter_*", "tokenizer*", "special_tokens_map.json", "*.jinja", "*.model"]
    wanted += ["vocab.*", "merges.txt", "added_tokens.json"]
    try:
        return Path(
            snapshot_download(name, revision=revision, token=options.token, allow_patterns=wanted)
        )
    except _UNREADABLE as error:
        raise _failure(
            f"The adapter {name!r} cannot be fetched: {{said}} Try again, or give the folder of a"
            " copy.",
            error,
            options,
        ) from None


def _base_of(folder: Path, source: str) -> str:
    """The base model that an adapter names."""
    config = _read_json(folder / adapter_files.CONFIG)
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base.strip():
        raise InvalidValue(
            f"The adapter in {source!r} does not say which model it belongs to. Give the base"
            f" model: Policy.load('a folder or a name on the Hub', adapter={source!r})."
        )
    beside = folder / base  # a path that was written down as seen from the adapter
    if (
        not Path(base).exists()
        and not Path(base).is_absolute()
        and (beside / "config.json").exists()
    ):
        return str(beside)
    return base


def _base_revision(folder: Path) -> str | None:
    revision = _read_json(folder / adapter_files.CONFIG).get("revision")
    return revision if isinstance(revision, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidValue(f"{path} cannot be read ({error}). Give another folder.") from error
    return content if isinstance(content, dict) else {}


def _unpack_gguf(source: str, options: LoadOptions) -> tuple[str, str | None]:
    """Return folder and revision of a model, unpacked where the source is a GGUF file."""
    file = gguf_files.find(source, options.gguf_file, options.revision, options.token)
    if file is None:
        return source, options.revision
    if options.quantization is not None:
        raise InvalidValue(GGUF_AND_QUANTIZATION)
    return str(gguf_files.unpack(file)), None


def load_model(place: Place, options: LoadOptions) -> PreTrainedModel:
    """Load a causal language model, and the adapter on it.

    Args:
        place: Where they are.
        options: The options of `Policy.load`.

    Returns:
        The model on its device, or spread over several; the adapter is in force.

    Raises:
        InvalidValue: There is no such model, or it cannot be loaded in this way.
    """
    refuse_remote_code(place, options)
    model = _load_base(place, options)
    if place.adapter is not None:
        if adapters.names(model):
            raise InvalidValue(
                f"{place.base!r} has an adapter beside the model already. Give a folder with the"
                " model alone as the base."
            )
        refuse_offloaded(model, place.base)
        adapter_files.load(model, place.adapter, "default")
    return model


def _load_base(place: Place, options: LoadOptions) -> PreTrainedModel:
    kind = options.kind()
    given: dict[str, Any] = {
        "dtype": kind,
        "revision": place.revision,
        "token": options.token,
        "attn_implementation": options.attn_implementation,
        "quantization_config": read_quantization(options.quantization, kind),
        "device_map": options.device_map,
    }
    if options.quantization is not None and options.device_map is None:
        given["device_map"] = {"": options.place()}  # quantised where it shall be
    given = {name: value for name, value in given.items() if value is not None}
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(  # nosec B615  # the revision is the user's
            place.base, trust_remote_code=False, **given
        )
    except _UNREADABLE as error:
        raise _no_model(place, error, options) from None
    if options.device_map is None and not is_quantized(model):
        model.to(options.place())  # type: ignore[arg-type]
    return model


def _no_model(place: Place, error: Exception, options: LoadOptions) -> InvalidValue:
    if place.is_named_by:
        return _failure(
            f"The adapter {place.is_named_by!r} belongs to the base model {place.base!r}, which"
            " cannot be loaded: {said} Give the base model as the source: Policy.load('its folder"
            f" or name', adapter={place.is_named_by!r}).",
            error,
            options,
        )
    return _failure(
        f"No causal language model can be loaded from {place.base!r}: {{said}} Give the folder of"
        " one (with its config.json), or its name on the Hub.",
        error,
        options,
    )


def _failure(text: str, error: Exception, options: LoadOptions) -> InvalidValue:
    """Make an error of a library's; the token is in none of them."""
    said = _first_line(error)
    if isinstance(options.token, str) and options.token:
        said = said.replace(options.token, "***")
    return InvalidValue(text.replace("{said}", said))


def refuse_remote_code(place: Place, options: LoadOptions) -> None:
    """Refuse a model that only code from its own repository can run.

    Args:
        place: Where it is.
        options: The options of `Policy.load`.

    Raises:
        InvalidValue: transformers has no class for it.
    """
    try:
        config, _ = PreTrainedConfig.get_config_dict(
            place.base, revision=place.revision, token=options.token
        )
    except _UNREADABLE:  # said when the model is loaded
        return
    if "AutoModelForCausalLM" not in (config.get("auto_map") or {}):
        return
    if config.get("model_type") in CONFIG_MAPPING:
        return  # transformers has a class of its own, which is used
    raise InvalidValue(
        f"{place.base!r} brings its own code (auto_map in its config.json), and opdlab runs no code"
        " that comes with weights. Read that code; if you trust it, load model and tokenizer"
        " yourself with transformers, and give Policy.of(model, tokenizer)."
    )


def load_tokenizer(place: Place, options: LoadOptions) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model, or the one that the user names.

    Args:
        place: Where the model is. An adapter's folder without a tokenizer takes that of its base.
        options: The options of `Policy.load`; a chat template of the user's replaces the
            tokenizer's.

    Returns:
        The tokenizer; a copy where the user gave one with a chat template.

    Raises:
        InvalidValue: There is none.
    """
    template = read_chat_template(options.chat_template)
    given = options.tokenizer
    tokenizer: Any = given
    if given is None:
        tokenizer = _first_tokenizer(place.tokenizers, options)
    elif isinstance(given, (str, os.PathLike)):
        tokenizer = _first_tokenizer(((os.fspath(given), None),), options)
    check_tokenizer(tokenizer)
    if template is not None:
        tokenizer = copy.deepcopy(tokenizer) if tokenizer is given else tokenizer
        tokenizer.chat_template = template
    return tokenizer  # type: ignore[no-any-return]


def _first_tokenizer(
    names: tuple[tuple[str, str | None], ...], options: LoadOptions
) -> PreTrainedTokenizerBase:
    failed: Exception = ValueError("nothing was given")
    for name, revision in names:
        given = {"revision": revision, "token": options.token}
        given = {key: value for key, value in given.items() if value is not None}
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(  # nosec B615  # the revision is the user's
                name, trust_remote_code=False, **given
            )
            return tokenizer
        except _UNREADABLE as error:
            failed = error
    raise _failure(
        f"No tokenizer can be loaded from {names[-1][0]!r}: {{said}} Load it yourself and give it:"
        " Policy.load(…, tokenizer=…).",
        failed,
        options,
    ) from None


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
