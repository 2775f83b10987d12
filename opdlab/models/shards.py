"""Hold a model's weights in shards, one per process, while a training step learns.

Policies need whole weights: to write texts, to grade, to be saved and copied. The loss pass needs
none of that, and it is where memory is short. So a sharded student has its modules twice, and only
one of the two holds the parameters:

    the model     as everybody knows it; whole between two loss passes, empty during one
    the shards    the same modules under FSDP2, which during a loss pass hold this process's share
                  of each parameter, and gather those of a layer for as long as it computes

`Shards.release` goes over from the model to the shards, each process cutting out its own share.
`Shards.gather` goes back, with what the optimizer made of the shards of all processes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from opdlab.models import adapters
from opdlab.models.forward import find_backbone


class Shards:
    """The shards of a model in this process, beside the model itself.

    Args:
        model: The model, whole. It keeps its parameters, and its other adapters are not sharded.
        adapter: Name of the adapter that trains; None where all weights train.
        shard: Puts a model under FSDP2, in place, as `accelerate.utils.fsdp2_prepare_model` does.

    Attributes:
        model: The modules that hold the shards. They run as the model does, after `release`.
        parameters: Their parameters by name: DTensors, of which this process holds a part, and
            nothing while the model is whole.
        is_released: Whether the model is empty now.
    """

    def __init__(
        self, model: PreTrainedModel, adapter: str | None, shard: Callable[[nn.Module], Any]
    ) -> None:
        self.model = _twin_of(model, adapter)
        self._whole = dict(self.model.named_parameters())  # the model's own, by name
        shard(self.model)
        for module in fsdp_modules(self.model):
            # Gradients are added up, as opdlab's losses are means over all processes already.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # the one that gloo has too
        # An expert that got no token, or a process without a micro-batch, has no gradient.
        root: Any = self.model
        root.set_reduce_scatter_unused_params(True)
        enter_through_backbone(self.model)
        self.parameters: dict[str, Tensor] = dict(self.model.named_parameters())
        self._bytes = {name: _storage(value).nbytes() for name, value in self.parameters.items()}
        self.is_released = False
        for value in self.parameters.values():
            _storage(value).resize_(0)

    @torch.no_grad()
    def release(self, keep: Collection[Tensor] = ()) -> None:
        """Cut this process's shards out of the model, which is empty from then on.

        Args:
            keep: Parameters of the model that stay, for policies whose head is read meanwhile.
        """
        kept = {id(value) for value in keep}
        for name, parameter in self._whole.items():
            shard = self.parameters[name]
            _storage(shard).resize_(self._bytes[name])
            shard.copy_(share_of(parameter.detach(), shard))
            if id(parameter) not in kept:
                parameter.data = parameter.data.new_empty(0)
        self.is_released = True

    @torch.no_grad()
    def gather(self) -> None:
        """Fill the model from the shards of all processes. Every process must call it."""
        for name, parameter in self._whole.items():
            shard = self.parameters[name]
            parameter.data = whole_tensor(shard)
            _storage(shard).resize_(0)
        self.is_released = False

    def reset(self) -> None:
        """Forget a pass that failed between its forward and its backward half."""
        for parameter in self.model.parameters():  # the head's gathered ones, with a gradient
            parameter.grad = None
        root: Any = self.model
        root.reset_iter_state()


def copy_modules(model: nn.Module) -> Any:
    """Copy the modules of a model, without copying a parameter or a buffer.

    Args:
        model: The model.

    Returns:
        Modules of their own with the same parameters.
    """
    shared = {id(value): value for value in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _twin_of(model: PreTrainedModel, adapter: str | None) -> PreTrainedModel:
    """Copy the modules of a model with one adapter, trainable, or with none."""
    twin: PreTrainedModel = copy_modules(model)
    for name in adapters.names(twin):
        if name != adapter:
            adapters.remove(twin, name)
    if adapter is not None:
        adapters.make_trainable(twin, adapter)
    return twin


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    """List the modules of a model that gather and free their parameters.

    Args:
        model: A model under FSDP2.

    Returns:
        The modules, the model itself first.
    """
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def enter_through_backbone(model: Any) -> None:
    """Let FSDP2 treat a pass of the backbone as one of the model.

    It gathers and frees parameters around a model's own `forward`, and opdlab runs the backbone
    and the head apart.

    Args:
        model: A model under FSDP2.
    """
    backbone = find_backbone(model)
    model.run_backbone = backbone.forward
    register_fsdp_forward_method(model, "run_backbone")
    backbone.forward = model.run_backbone


def whole_tensor(value: Tensor) -> Tensor:
    """Gather a tensor from the shards of all processes, which all must call it.

    Args:
        value: A DTensor, or a plain tensor.

    Returns:
        The whole, in memory of its own; a plain tensor itself.
    """
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def share_of(value: Tensor, like: Tensor) -> Tensor:
    """Take this process's part of a whole tensor.

    Args:
        value: The whole tensor, the same in every process.
        like: A DTensor that is sharded in the wanted way, or a plain tensor.

    Returns:
        The part, as a DTensor of the same kind; for a plain `like` the whole.
    """
    if not isinstance(like, DTensor):
        return value
    # `src_data_rank=None`: every process has the whole, so nothing is sent.
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def _storage(value: Tensor) -> torch.UntypedStorage:
    """The memory that a tensor has in this process."""
    value = value.detach()
    return (value.to_local() if isinstance(value, DTensor) else value).untyped_storage()


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Count the memory of tensors in this process.

    Args:
        tensors: Plain tensors or DTensors; those that share memory count once.

    Returns:
        Bytes.
    """
    storages = {}
    for value in tensors:
        storage = _storage(value)
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
