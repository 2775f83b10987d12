"""The adapters of one model, through PEFT: which there are, which is in force, adding, copying, folding and removing them.

Only LoRA (with rsLoRA and DoRA) is understood; other kinds are refused by name. All functions take the transformers model
itself. The state is read from its layers and not kept beside them, so whatever else switches adapters is noticed.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any, get_type_hints

import torch
from peft import LoraConfig, PeftMixedModel, PeftModel, PeftType, get_peft_model_state_dict
from peft.functional import cast_adapter_dtype, delete_adapter, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from opdlab.errors import InvalidValue
from opdlab.validation import Count, Flag, Positive, Text, shortened, validate

# Options of LoraConfig with names of opdlab's own, and those that would change or replace the shared base model.
_OUR_NAMES = {"r": "rank", "lora_alpha": "alpha", "target_modules": "targets"}
_SET_HERE = {"peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
_SET_HERE |= {"inference_mode", "runtime_config", "megatron_core", "qalora_group_size"}
_NOT_SUPPORTED = {"alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "megatron_config"}
_NOT_SUPPORTED |= {"monteclora_config", "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config"}
_INITIALISATIONS = (True, False, "gaussian", "orthogonal")  # the others change the base model or read data
_NEED_OTHER_INITIALISATION = {"loftq_config", "eva_config", "corda_config", "lora_ga_config"}
OPTIONS = sorted(
    {field.name for field in dataclasses.fields(LoraConfig)} - _OUR_NAMES.keys() - _SET_HERE - _NOT_SUPPORTED - _NEED_OTHER_INITIALISATION
)


def unwrap(model: Any) -> Any:
    """The transformers model inside a `PeftModel`, with its adapters in place; anything else as it is.

    Raises:
        InvalidValue: The adapter is not inside the model's layers (prompt tuning and the like), or is of several kinds.
    """
    if isinstance(model, PeftMixedModel):
        raise InvalidValue("A PeftMixedModel has adapters of several kinds. Merge them into the model: merge_and_unload().")
    if not isinstance(model, PeftModel):
        return model
    for name, config in model.peft_config.items():
        _check_kind(name, config)
    return model.get_base_model()


def names(model: nn.Module) -> list[str]:
    """Names of all adapters on `model`."""
    return list(getattr(model, "peft_config", None) or {})


def config_of(model: nn.Module, name: str) -> LoraConfig:
    """The PEFT configuration of an adapter."""
    return model.peft_config[name]  # type: ignore[index,return-value]


def check(model: nn.Module) -> None:
    """Look at every adapter on `model`.

    Raises:
        InvalidValue: One is no LoRA, moves the base model, or is merged into it.
    """
    for name in names(model):
        _check_kind(name, config_of(model, name))
    if any(layer.merged for layer in _layers(model) if isinstance(layer, BaseTunerLayer)):
        raise InvalidValue(
            "An adapter of the model is merged into it for now, so it cannot be switched off or trained. "
            "Call unmerge_adapter(), or make it permanent with merge_and_unload()."
        )


def in_force(model: nn.Module) -> list[str]:
    """Names of the adapters that a forward pass of `model` goes through, `[]` for the bare model.

    Raises:
        InvalidValue: The layers disagree.
    """
    states = {_state(layer) for layer in _layers(model) if isinstance(layer, BaseTunerLayer)}
    if len(states) > 1:
        raise InvalidValue(
            "The model's layers go through different adapters: "
            f"{' and '.join(sorted(repr(list(state)) for state in states))}. Choose one: Policy.of(…, adapter=name)."
        )
    return list(states.pop()) if states else []


def switch(model: nn.Module, name: str | None) -> None:
    """Put one adapter in force, its weights trainable, or none: then the bare model answers."""
    layers = _layers(model)
    if not all(_is_in_force(layer, name) for layer in layers):
        _set_in_force(layers, name)


def make_trainable(model: nn.Module, name: str) -> list[nn.Parameter]:
    """Put an adapter in force with its weights trainable, whatever froze them; returns them."""
    model.requires_grad_(False)
    _set_in_force(_layers(model), name)
    return [p for p in model.parameters() if p.requires_grad]


def _set_in_force(layers: list[Any], name: str | None) -> None:
    for layer in layers:
        if name is None:
            layer.enable_adapters(False)
        elif isinstance(layer, BaseTunerLayer):
            layer.set_adapter([name])
            layer.enable_adapters(True)
        else:  # a whole module of an adapter's own; only some adapters have one here
            own = name in layer._adapters
            layer.set_adapter(name if own else [])
            layer.enable_adapters(own)


def add(model: nn.Module, name: str, config: LoraConfig) -> None:
    """Make a new adapter, in float32, and leave it in force.

    Raises:
        InvalidValue: PEFT cannot put it on this model. The model is as it was.
    """
    has_patterns = bool(config.rank_pattern or config.alpha_pattern)  # PEFT adds its own for fused experts
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            inject_adapter_in_model(config, model, name)
        except Exception as error:  # whatever PEFT or the model's layers say to these options
            remove(model, name)
            raise InvalidValue(f"{type(model).__name__} cannot take this LoRA: {error}") from error
    _refuse_unused(model, name, config, [str(warning.message) for warning in said], has_patterns)
    model._hf_peft_config_loaded = True  # type: ignore[assignment]
    model.eval()  # new layers come in train mode, with their dropout on
    make_float32(model, name)


def configuration(rank: int, alpha: float | None, targets: Any, options: dict[str, Any]) -> LoraConfig:
    """The PEFT configuration of a new adapter.

    Args:
        rank: Rank of the two matrices.
        alpha: The update is scaled by alpha / rank; twice the rank by default.
        targets: "all-linear", or names of layers, or one regular expression over them.
        options: Further fields of `peft.LoraConfig`, by their names there.

    Raises:
        InvalidValue: An option is unknown, has a value that it cannot have, or would not be honoured.
    """
    values = validate("adapt", {"rank": rank}, {"rank": Count})
    if alpha is not None:
        values |= validate("adapt", {"alpha": alpha}, {"alpha": Positive})
    if isinstance(targets, (set, tuple)):
        targets = sorted(targets)
    values |= validate("adapt", {"targets": targets}, {"targets": Text | list[Text]})
    for name, value in options.items():
        if name in _OUR_NAMES:
            raise InvalidValue(f"adapt got {name}={shortened(value)}. Its name here is {_OUR_NAMES[name]}.")
        if name not in OPTIONS:
            raise InvalidValue(f"adapt has no option {name!r}. There are rank, alpha, targets, seed and {', '.join(OPTIONS)}.")
        validate("adapt", {name: value}, {name: _type_of(name)})
    if options.get("lora_dropout"):
        raise InvalidValue(
            f"adapt got lora_dropout={shortened(options['lora_dropout'])}, but opdlab trains without dropout, so that the "
            "policy that is graded is the one that trains. Leave it out."
        )
    if options.get("init_lora_weights", True) not in _INITIALISATIONS:
        raise InvalidValue(
            f"adapt got init_lora_weights={shortened(options['init_lora_weights'])}, which would change the base model that "
            "other policies share, or needs data. Use True, False, 'gaussian' or 'orthogonal'."
        )
    fields: dict[str, Any] = {"r": values["rank"], "lora_alpha": values.get("alpha", 2 * values["rank"])}
    try:
        config = LoraConfig(**fields, target_modules=values["targets"], task_type="CAUSAL_LM", **options)
    except (ValueError, TypeError) as error:
        raise InvalidValue(f"adapt cannot make this LoRA: {error}") from error
    _check_kind("the new one", config)
    return config


def special_linear_layers(model: nn.Module) -> list[str]:
    """Linear layers that a family computes in a way of its own (routers that return several tensors): LoRA would break them."""
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and type(module).forward is not nn.Linear.forward
        and type(module).__module__.startswith("transformers.models")
    ]


def clone(model: nn.Module, source: str, name: str) -> None:
    """Make `name` an exact copy of the adapter `source`: all settings, all tensors, the same precision."""
    original = config_of(model, source)
    config = copy.deepcopy(original)
    # Some initialisations (PiSSA and the like) change the base model, and all of them are overwritten by the copy.
    config.init_lora_weights = True
    config.inference_mode = False
    with torch.random.fork_rng(devices=[]):
        add(model, name, config)
    config.init_lora_weights = original.init_lora_weights
    set_state(model, name, state(model, source))


def state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The adapter's tensors, named as PEFT names them in files. Not copies."""
    # PEFT's "auto" for embedding layers would ask the Hub each time.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Adapter .* have invalid shape")  # PEFT takes biases for matrices
        return get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)


def set_state(model: nn.Module, name: str, values: dict[str, Tensor]) -> None:
    """Copy `values` into the adapter's tensors.

    Raises:
        InvalidValue: Names or shapes are not those of the adapter; nothing is changed then.
    """
    there = state(model, name)
    odd = sorted(there.keys() ^ values.keys()) or sorted(key for key, value in values.items() if value.shape != there[key].shape)
    if odd:
        raise InvalidValue(
            f"These are not the tensors of the adapter {name!r}: {odd[0]!r} is missing, too much, or of another shape "
            f"({len(odd)} of {len(there)} differ). Use weights of an adapter with the same targets and rank."
        )
    with torch.no_grad():
        for key, value in values.items():
            there[key].copy_(value)


def make_float32(model: nn.Module, name: str) -> None:
    """Keep an adapter's weights in float32 whatever the base model's dtype: small updates vanish in bfloat16."""
    cast_adapter_dtype(model, name)
    for layer in _layers(model):
        if isinstance(layer, ModulesToSaveWrapper) and name in layer.modules_to_save:
            _compute_in_float32(layer.modules_to_save[name])


def remove(model: nn.Module, name: str) -> None:
    """Take an adapter off the model; with the last one, PEFT's layers go as well. Nothing happens if it is not there."""
    layers = _layers(model)
    before = None if any(name in _state(layer) for layer in layers) else next(iter(in_force(model)), None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Adapter .* was active which is now deleted")  # set again below
        _set_in_force(layers, None)
        delete_adapter(model, adapter_name=name, prefix="lora_")
    getattr(model, "peft_config", {}).pop(name, None)
    if names(model):
        _set_in_force(_layers(model), before)
    else:
        _take_off_layers(model)


def fold(model: nn.Module, name: str | None) -> None:
    """Add one adapter to the base weights for good and take all adapters off.

    Raises:
        InvalidValue: PEFT cannot add this one to the weights. The model is spoilt then.
    """
    if name is not None:
        _untie(model, name)
        switch(model, name)
    for path, layer in _outermost(model):
        try:
            _replace(model, path, _folded(layer, name))
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise InvalidValue(f"The adapter {name!r} cannot be folded into {path}: {error} Train it on as it is.") from error
    _forget_configuration(model)
    model.requires_grad_(False)


def _check_kind(name: str, config: Any) -> None:
    kind = getattr(config.peft_type, "value", config.peft_type)
    if config.peft_type != PeftType.LORA:
        raise InvalidValue(
            f"The adapter {name!r} is of the kind {kind}, and opdlab works with LoRA adapters (rsLoRA and DoRA included). "
            "Merge it into the model where PEFT can (merge_and_unload()), or use a LoRA."
        )
    if config.bias != "none":
        raise InvalidValue(
            f"The adapter {name!r} has bias={config.bias!r}: it moves biases of the base model, which every policy on these "
            "weights shares. Use bias='none', or merge the adapter into the model: merge_and_unload()."
        )
    if odd := sorted(field for field in _NOT_SUPPORTED if getattr(config, field, None)):
        raise InvalidValue(
            f"The adapter {name!r} has {odd[0]}={shortened(getattr(config, odd[0]))}, a variant of LoRA that opdlab does not "
            "compute. Leave it out, or merge the adapter into the model: merge_and_unload()."
        )
    if str(config.init_lora_weights).lower() == "mica":
        raise InvalidValue(f"The adapter {name!r} has init_lora_weights='mica', a variant of LoRA that opdlab does not train.")


def _refuse_unused(model: nn.Module, name: str, config: LoraConfig, said: list[str], has_patterns: bool) -> None:
    """Refuse settings that fit nothing in the model; PEFT only warns of some, and passes over others."""
    paths = [path for path, _ in model.named_modules()]
    wanted = [*(config.modules_to_save or []), *(config.target_parameters or [])]
    if not isinstance(config.target_modules, str):
        wanted += list(config.target_modules or [])
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)  # type: ignore[union-attr,operator]
    asked = config.layers_to_transform
    asked = [asked] if isinstance(asked, int) else list(asked or [])
    there = [*paths, *(path for path, _ in model.named_parameters())]
    unused = [f"{target!r}" for target in wanted if not any(_without_peft(path).endswith(target) for path in there)]
    unused += [f"layer {i} (there are {layers})" for i in asked if layers is not None and not 0 <= i < layers]
    unused += [text for text in said if "no module" in text or "no parameter was" in text]
    unused += [text for text in said if has_patterns and "did not match any" in text]
    if unused:
        remove(model, name)
        raise InvalidValue(
            f"Some settings of the LoRA fit nothing in {type(model).__name__}: {'; '.join(unused)}. Use names as in "
            "model.named_modules(), or leave them out."
        )


def _without_peft(path: str) -> str:
    """A module's or a parameter's path as it is in the model without adapters."""
    return path.replace(".base_layer", "").replace(".original_module", "")


def _type_of(option: str) -> Any:
    """What an option of LoraConfig must be; whether a flag is one is checked strictly."""
    hint = get_type_hints(LoraConfig)[option]
    return Flag if hint is bool else hint


def _layers(model: nn.Module) -> list[Any]:
    """PEFT's layers: those that carry adapters, and wrappers around whole modules that an adapter replaces."""
    return [m for m in model.modules() if isinstance(m, (BaseTunerLayer, ModulesToSaveWrapper))]


def _state(layer: Any) -> tuple[str, ...]:
    return () if layer.disable_adapters else tuple(layer.active_adapters)


def _is_in_force(layer: Any, name: str | None) -> bool:
    if isinstance(layer, BaseTunerLayer):
        return _state(layer) == (() if name is None else (name,))
    return _state(layer) == ((name,) if name in layer._adapters else ())


def _compute_in_float32(module: nn.Module) -> None:
    """Give a module float32 weights behind inputs and before outputs of the model's own dtype."""
    own = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    if own not in (torch.float16, torch.bfloat16):
        return
    module.float()
    module.register_forward_pre_hook(_inputs_to_float32, with_kwargs=True)
    module.register_forward_hook(_ToDtype(own))


def _inputs_to_float32(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    as_float32 = lambda x: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x
    return tuple(map(as_float32, args)), {key: as_float32(value) for key, value in kwargs.items()}


@dataclasses.dataclass(frozen=True)
class _ToDtype:
    """A forward hook that gives a tensor back in a dtype; a class, so that it can be deep-copied with its module."""

    dtype: torch.dtype

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return output.to(self.dtype) if isinstance(output, Tensor) else output


def _outermost(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's layers that are in no other of them, by path."""
    inside: list[str] = []
    for path, module in list(model.named_modules()):
        if any(path.startswith(f"{outer}.") for outer in inside):
            continue
        if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)):
            inside.append(path)
            yield path, module


def _folded(layer: Any, name: str | None) -> nn.Module:
    """What computes the same as `layer` under the adapter, without PEFT."""
    while isinstance(layer, (BaseTunerLayer, ModulesToSaveWrapper)):
        if isinstance(layer, ModulesToSaveWrapper):
            own = name is not None and name in layer.modules_to_save
            layer = layer.modules_to_save[str(name)] if own else layer.original_module
        else:
            if name is not None:
                layer.merge(safe_merge=True, adapter_names=[name])
            layer = layer.get_base_layer()
    return layer


def _untie(model: Any, name: str) -> None:
    """Give embeddings and head matrices of their own where they share one and the adapter changes either."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or not (_is_changed(embeddings, name) or _is_changed(head, name)):
        return
    inner, outer = (_base(layer) for layer in (embeddings, head))
    if inner.weight is outer.weight:
        outer.weight = nn.Parameter(inner.weight.detach().clone(), requires_grad=False)
    model.config.get_text_config().tie_word_embeddings = False
    model.config.tie_word_embeddings = False


def _is_changed(layer: Any, name: str) -> bool:
    if isinstance(layer, BaseTunerLayer):
        return name in layer._get_available_adapters()
    return isinstance(layer, ModulesToSaveWrapper) and name in layer._adapters


def _base(layer: Any) -> Any:
    while isinstance(layer, (BaseTunerLayer, ModulesToSaveWrapper)):
        layer = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer.original_module
    return layer


def _take_off_layers(model: nn.Module) -> None:
    for path, layer in _outermost(model):
        _replace(model, path, _base(layer))
    _forget_configuration(model)


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def _forget_configuration(model: Any) -> None:
    if hasattr(model, "peft_config"):
        del model.peft_config
    model._hf_peft_config_loaded = False
