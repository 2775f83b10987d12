"""Checkpoint activations: run layers again in the backward pass, which changes only memory.

The way of transformers runs in train mode only, and train mode also switches on every dropout and
jitter of a family. So the layers are wrapped here, in the mode they are in: each keeps its inputs
alone and runs once more in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from opdlab.errors import InvalidValue


@contextmanager
def recompute_layers(model: PreTrainedModel, enabled: bool = True) -> Iterator[None]:
    """Let forward passes in this block keep the inputs of every layer and nothing inside it.

    The backward pass runs the layers again, so the same adapter must be in force then. Torch
    restores autocast.

    Args:
        model: The model, in any mode.
        enabled: Whether to do it.

    Yields:
        Nothing.

    Raises:
        InvalidValue: The family has no layers that are known to run again.
    """
    layers = recomputable_layers(model) if enabled else []
    for layer in layers:
        # An attribute of the instance hides the method of its class; hooks stay outside and run
        # once.
        layer.forward = partial(_run_again, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def recomputes_in_transformers(model: PreTrainedModel) -> bool:
    """Tell whether transformers runs the layers of `model` again in its own way.

    It takes away the cache then.

    Args:
        model: The model.

    Returns:
        True in train mode after `gradient_checkpointing_enable`.
    """
    return model.training and any(
        getattr(module, "gradient_checkpointing", False) for module in model.modules()
    )


def recomputable_layers(model: PreTrainedModel) -> list[nn.Module]:
    """List the layers of `model` that can run again in the backward pass.

    Args:
        model: The model, in any mode.

    Returns:
        The outermost layers of that kind; none lies inside another.

    Raises:
        InvalidValue: There are none.
    """
    # A private list of transformers: names of classes, which most families fill in.
    unsplit = set(getattr(model, "_no_split_modules", None) or [])
    found = [
        module
        for module in model.modules()
        # FSDP2 puts its name before that of a class.
        if isinstance(module, GradientCheckpointingLayer)
        or type(module).__name__.removeprefix("FSDP") in unsplit
    ]
    inside = {id(part) for layer in found for part in layer.modules() if part is not layer}
    layers = [layer for layer in found if id(layer) not in inside]
    if not layers:
        raise InvalidValue(
            f"distill got checkpointing=True, but {type(model).__name__} names no layers that could"
            " be run again. Leave checkpointing off and use a smaller micro_batch to save memory."
        )
    return layers


def _run_again(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    # Nothing in a layer draws random numbers in eval mode, so there is no random state to keep.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
