"""Read the options of a new LoRA, and refuse adapters that opdlab cannot work with."""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

from peft import LoraConfig, PeftType

from opdlab.errors import InvalidValue
from opdlab.support.expect import shortened
from opdlab.support.validation import Count, Flag, Positive, Text, validate

# Options of LoraConfig that have names of opdlab's own.
_OUR_NAMES = {"r": "rank", "lora_alpha": "alpha", "target_modules": "targets"}
# Options that opdlab or PEFT fills in.
_SET_HERE = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
# Options that would change or replace the shared base model, or compute something else than LoRA.
_NOT_SUPPORTED = {
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "monteclora_config",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
}
# The other initialisations change the base model or read data.
_INITIALISATIONS = (True, False, "gaussian", "orthogonal")
_NEED_OTHER_INITIALISATION = {"loftq_config", "eva_config", "corda_config", "lora_ga_config"}
OPTIONS = sorted(
    {field.name for field in dataclasses.fields(LoraConfig)}
    - _OUR_NAMES.keys()
    - _SET_HERE
    - _NOT_SUPPORTED
    - _NEED_OTHER_INITIALISATION
)


def make_config(
    rank: int, alpha: float | None, targets: Any, options: dict[str, Any]
) -> LoraConfig:
    """Make the PEFT configuration of a new adapter.

    Args:
        rank: Rank of the two matrices.
        alpha: The update is scaled by alpha / rank; twice the rank by default.
        targets: "all-linear", or names of layers, or one regular expression over them.
        options: Further fields of `peft.LoraConfig`, by their names there.

    Returns:
        The configuration, checked.

    Raises:
        InvalidValue: An option is unknown, has a value that it cannot have, or would not be
            honoured.
    """
    values = validate("adapt", {"rank": rank}, {"rank": Count})
    if alpha is not None:
        values |= validate("adapt", {"alpha": alpha}, {"alpha": Positive})
    if isinstance(targets, (set, tuple)):
        targets = sorted(targets)
    values |= validate("adapt", {"targets": targets}, {"targets": Text | list[Text]})
    _check_options(options)
    fields: dict[str, Any] = {
        "r": values["rank"],
        "lora_alpha": values.get("alpha", 2 * values["rank"]),
    }
    try:
        config = LoraConfig(
            **fields, target_modules=values["targets"], task_type="CAUSAL_LM", **options
        )
    except (ValueError, TypeError) as error:
        raise InvalidValue(f"adapt cannot make this LoRA: {error}") from error
    check_config("the new one", config)
    return config


def _check_options(options: dict[str, Any]) -> None:
    for name, value in options.items():
        if name in _OUR_NAMES:
            raise InvalidValue(
                f"adapt got {name}={shortened(value)}. Its name here is {_OUR_NAMES[name]}."
            )
        if name not in OPTIONS:
            raise InvalidValue(
                f"adapt has no option {name!r}. There are rank, alpha, targets, seed and"
                f" {', '.join(OPTIONS)}."
            )
        validate("adapt", {name: value}, {name: _type_of(name)})
    if options.get("lora_dropout"):
        raise InvalidValue(
            f"adapt got lora_dropout={shortened(options['lora_dropout'])}, but opdlab trains"
            " without dropout, so that the policy that is graded is the one that trains. Leave it"
            " out."
        )
    if options.get("init_lora_weights", True) not in _INITIALISATIONS:
        raise InvalidValue(
            f"adapt got init_lora_weights={shortened(options['init_lora_weights'])}, which would"
            " change the base model that other policies share, or needs data. Use True, False,"
            " 'gaussian' or 'orthogonal'."
        )


def check_config(name: str, config: Any) -> None:
    """Refuse an adapter that is no LoRA, or a variant that opdlab does not compute.

    Args:
        name: The adapter's name, for errors.
        config: Its configuration, of any kind that PEFT has.

    Raises:
        InvalidValue: opdlab cannot work with it. The message says what can be done instead.
    """
    # PEFT writes the type as an enum; files and other versions may hold its plain text.
    kind = getattr(config.peft_type, "value", config.peft_type)
    if config.peft_type != PeftType.LORA:
        raise InvalidValue(
            f"The adapter {name!r} is of the kind {kind}, and opdlab works with LoRA adapters"
            " (rsLoRA and DoRA included). Merge it into the model where PEFT can"
            " (merge_and_unload()), or use a LoRA."
        )
    if config.bias != "none":
        raise InvalidValue(
            f"The adapter {name!r} has bias={config.bias!r}: it moves biases of the base model,"
            " which every policy on these weights shares. Use bias='none', or merge the adapter"
            " into the model: merge_and_unload()."
        )
    # Fields come and go with PEFT's versions.
    if odd := sorted(field for field in _NOT_SUPPORTED if getattr(config, field, None)):
        raise InvalidValue(
            f"The adapter {name!r} has {odd[0]}={shortened(getattr(config, odd[0]))}, a variant of"
            " LoRA that opdlab does not compute. Leave it out, or merge the adapter into the model:"
            " merge_and_unload()."
        )
    if str(config.init_lora_weights).lower() == "mica":
        raise InvalidValue(
            f"The adapter {name!r} has init_lora_weights='mica', a variant of LoRA that opdlab does"
            " not train."
        )


def _type_of(option: str) -> Any:
    """The type of an option of LoraConfig; flags are checked strictly."""
    hint = get_type_hints(LoraConfig)[option]
    return Flag if hint is bool else hint
