"""Let policies read a student whose weights TRL's trainer keeps in shards (FSDP2).

TRL's model holds the shards all the time. Policies need whole weights, to write texts and to grade.
So they look at the same modules a second time, and those are filled from the shards of all
processes when a step begins and emptied when the policies have graded:

    TRL's model     this process's share of each parameter; gathers a layer while it computes
    the whole       what policies look at; empty during the loss pass, but for the heads that are
                    read then

All processes fill it at the same places. What they read of it in between needs no other process.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor

from opdlab.errors import InvalidValue
from opdlab.models.shards import copy_modules, fsdp_modules, whole_tensor
from opdlab.training.sharding import EXAMPLE, read_plugin

WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")  # in names of parameters


def shard_on_cpu(accelerator: Accelerator, options: dict[str, Any] | None) -> bool:
    """Let Accelerate shard on CPUs as it does on GPUs; it would leave FSDP out without a word.

    Args:
        accelerator: The trainer's, which is changed.
        options: Those of the trainer's argument `fsdp`; None where it says nothing of FSDP.

    Returns:
        Whether Accelerate now shards, and did not before.
    """
    state: Any = accelerator.state
    if state.distributed_type != DistributedType.MULTI_CPU:
        return False
    if options is None:
        plugin = read_plugin(accelerator)
    else:
        plugin = FullyShardedDataParallelPlugin(**options)
    if plugin is None:
        return False
    state.fsdp_plugin, state.distributed_type = plugin, DistributedType.FSDP
    partial: Any = PartialState()  # which every later look at the state copies
    partial.distributed_type = DistributedType.FSDP
    return True


def check_shards(accelerator: Accelerator, model: nn.Module) -> None:
    """Refuse options of FSDP with which policies cannot read the student.

    FSDP's own mixed precision, which casts norms and the head too, is left to autocast: then a step
    has the numbers that it has with DDP.

    Args:
        accelerator: The trainer's.
        model: The student, whole.

    Raises:
        InvalidValue: It is the first FSDP, PyTorch is too old, or an option cannot work.
    """
    plugin = read_plugin(accelerator)
    if plugin is None:
        return
    refused = {
        "fsdp_cpu_ram_efficient_loading": (
            plugin.cpu_ram_efficient_loading,
            "with it all processes but one load empty weights, which no policy can grade with. Use"
            " false.",
        ),
        "fsdp_offload_params": (
            isinstance(plugin.cpu_offload, CPUOffloadPolicy),
            "policies gather the shards on the device that they grade on. Use false;"
            " gradient_checkpointing=True in TRL's config saves memory too.",
        ),
    }
    for name, (is_asked, advice) in refused.items():
        if is_asked:
            raise InvalidValue(f"The launcher asks for FSDP2 with {name}: {advice}")
    plugin.mixed_precision_policy = None
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise InvalidValue(
            "The model's weights are in shards already, and policies are made of whole ones. Load"
            f" the model without a device mesh; the launcher shards it: {EXAMPLE}."
        )


class WholeStudent:
    """The modules of TRL's student with whole weights, for as long as policies read them.

    Args:
        model: TRL's model before its trainer shards it.

    Attributes:
        model: The same modules again. They share the parameters until the trainer shards its own;
            adapters that are added to them are theirs alone.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = copy_modules(model)
        self._sharded = model
        self._is_set_up = False

    @torch.no_grad()
    def gather(self, trained_only: bool = False) -> None:
        """Fill the weights from the shards of all processes, which must all call it.

        Args:
            trained_only: Leave frozen weights as they are, empty or whole.
        """
        for parameter, shard in self._pairs():
            if shard.requires_grad or not trained_only:
                parameter.data = whole_tensor(shard)

    @torch.no_grad()
    def release(self, keep: Collection[Tensor] = ()) -> None:
        """Give the memory of the whole weights back.

        Args:
            keep: Weights that stay.
        """
        kept = {id(value) for value in keep}
        for parameter, _ in self._pairs():
            if id(parameter) not in kept:
                parameter.data = parameter.data.new_empty(0)

    @contextmanager
    def filled(self, trained_only: bool) -> Iterator[None]:
        """Have whole weights between two steps; all processes must come here.

        Args:
            trained_only: Whether those that train are enough.

        Yields:
            Nothing.
        """
        self.gather(trained_only)
        try:
            yield
        finally:
            self.release()

    @contextmanager
    def standing_in(self, trainer: Any) -> Iterator[None]:
        """Let TRL's trainer generate with the whole weights, where no process waits for another.

        Args:
            trainer: The trainer.

        Yields:
            Nothing.
        """
        own = trainer.model_wrapped
        trainer.model_wrapped = self.model
        try:
            yield
        finally:
            trainer.model_wrapped = own

    def _pairs(self) -> list[tuple[nn.Parameter, DTensor]]:
        """Our parameters with TRL's shards of them; empty until TRL has sharded."""
        theirs = {_bare(name): value for name, value in self._sharded.named_parameters()}
        shards = {name: value for name, value in theirs.items() if isinstance(value, DTensor)}
        if shards and not self._is_set_up:
            set_up_reduction(self._sharded)
            self._is_set_up = True
        ours = dict(self.model.named_parameters())
        return [(ours[name], shard) for name, shard in shards.items()]


def set_up_reduction(model: nn.Module) -> None:
    """Let gradients be added up on every backend, also those of layers that nothing went through.

    Args:
        model: A model under FSDP2.
    """
    root: Any = model
    root.set_reduce_scatter_unused_params(True)  # an expert that got no token
    if torch.distributed.get_backend() == "gloo":  # which has sums, and no means
        for module in fsdp_modules(model):
            module.set_force_sum_reduction_for_comms(True)


def _bare(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name
