"""The settings of LoRA adapters: which opdlab takes, and which it refuses before anything is made
of them.
"""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

import torch
from peft import LoraConfig, PeftType
from torch import Tensor, nn
from torch.nn import functional

from opdlab.errors import InvalidValue
from opdlab.support.expect import shortened
from opdlab.support.validation import Count, Flag, Positive, Text, validate

# Options of LoraConfig with names of opdlab's own, and those that would change or replace the
# shared base model.
_OUR_NAMES = {"r": "rank", "lora_alpha": "alpha", "target_modules": "targets"}
_SET_HERE = {
    "peft_type",
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
}
_SET_HERE |= {"inference_mode", "runtime_config", "megatron_core", "qalora_group_size"}
_NOT_SUPPORTED = {
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "megatron_config",
}
_NOT_SUPPORTED |= {
    "monteclora_config",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
}
_INITIALISATIONS = (
    True,
    False,
    "gaussian",
    "orthogonal",
)  # the others change the base model or read data
_NEED_OTHER_INITIALISATION = {"loftq_config", "eva_config", "corda_config", "lora_ga_config"}
OPTIONS = sorted(
    {field.name for field in dataclasses.fields(LoraConfig)}
    - _OUR_NAMES.keys()
    - _SET_HERE
    - _NOT_SUPPORTED
    - _NEED_OTHER_INITIALISATION
)


def configuration(
    rank: int, alpha: float | None, targets: Any, options: dict[str, Any]
) -> LoraConfig:
    """The PEFT configuration of a new adapter.

    Args:
        rank: Rank of the two matrices.
        alpha: The update is scaled by alpha / rank; twice the rank by default.
        targets: "all-linear", or names of layers, or one regular expression over them.
        options: Further fields of `peft.LoraConfig`, by their names there.

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
    check_kind("the new one", config)
    return config


def check_kind(name: str, config: Any) -> None:
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
    if odd := sorted(field for field in _NOT_SUPPORTED if getattr(config, field, None)):
        raise InvalidValue(
            f"The adapter {name!r} has {odd[0]}={shortened(getattr(config, odd[0]))}, a variant of"
            " LoRA that opdlab does not compute. Leave it out, or merge the adapter into the"
            " model: merge_and_unload()."
        )
    if str(config.init_lora_weights).lower() == "mica":
        raise InvalidValue(
            f"The adapter {name!r} has init_lora_weights='mica', a variant of LoRA that opdlab does"
            " not train."
        )


def special_linear_layers(model: nn.Module) -> list[str]:
    """Linear layers that a family computes in a way of its own (routers that return several
    tensors): LoRA would break them.
    """
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and type(module).forward is not nn.Linear.forward
        and type(module).__module__.startswith("transformers.models")
        and not _is_plain(module)
    ]


@torch.no_grad()
def _is_plain(layer: nn.Linear) -> bool:
    """Whether a linear layer with a `forward` of its own (as Falcon's) computes what any linear
    layer does.
    """
    some = torch.ones(2, layer.in_features, device=layer.weight.device, dtype=layer.weight.dtype)
    try:
        out = layer(some)
    except Exception:
        return False
    return isinstance(out, Tensor) and torch.allclose(
        out, functional.linear(some, layer.weight, layer.bias), rtol=0.02, atol=1e-4
    )


def unused_settings(
    model: nn.Module, config: LoraConfig, said: list[str], has_patterns: bool
) -> list[str]:
    """List settings that fit nothing in the model; PEFT only warns of some (`said`), and passes
    over others.
    """
    paths = [path for path, _ in model.named_modules()]
    wanted = [*(config.modules_to_save or []), *(config.target_parameters or [])]
    if not isinstance(config.target_modules, str):
        wanted += list(config.target_modules or [])
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)  # type: ignore[union-attr,operator]
    asked = config.layers_to_transform
    asked = [asked] if isinstance(asked, int) else list(asked or [])
    there = [*paths, *(path for path, _ in model.named_parameters())]
    unused = [
        f"{target!r}"
        for target in wanted
        if not any(_without_peft(path).endswith(target) for path in there)
    ]
    unused += [
        f"layer {i} (there are {layers})"
        for i in asked
        if layers is not None and not 0 <= i < layers
    ]
    unused += [text for text in said if "no module" in text or "no parameter was" in text]
    unused += [text for text in said if has_patterns and "did not match any" in text]
    return unused


def _without_peft(path: str) -> str:
    """A module's or a parameter's path as it is in the model without adapters."""
    return path.replace(".base_layer", "").replace(".original_module", "")


def _type_of(option: str) -> Any:
    """What an option of LoraConfig must be; whether a flag is one is checked strictly."""
    hint = get_type_hints(LoraConfig)[option]
    return Flag if hint is bool else hint
