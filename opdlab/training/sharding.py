"""Shard a run's student over its processes with FSDP2, where the launcher asks for that.

`accelerate launch --config_file fsdp2.yaml` says so by environment variables, which Accelerate
reads. Between two loss passes the student's model is whole, so that everything else (writing,
grading, evaluating, saving) is as without shards, and needs no step that the processes must take
together. During a loss pass each process holds its shards alone, and all processes take the same
passes, one after the other (`opdlab.models.shards`).
"""

from __future__ import annotations

import copy
import os
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, StateDictType

from opdlab.engine.batch import Batch
from opdlab.errors import InvalidValue
from opdlab.models.forward import last_hidden
from opdlab.models.graded import Graded, States
from opdlab.models.head import Head
from opdlab.models.placement import is_spread
from opdlab.models.policy import Policy
from opdlab.models.quantization import describe_quantization
from opdlab.models.routed import Routed
from opdlab.models.shards import Shards
from opdlab.training.processes import AcceleratedProcesses, failing_together

EXAMPLE = "examples/fsdp2.yaml"
# Whether this PyTorch's FSDP2 has what opdlab needs of it (2.13 and later).
IS_SUPPORTED = hasattr(FSDPModule, "set_reduce_scatter_unused_params")


def check_launcher() -> None:
    """Refuse ways to split a model that opdlab does not train with.

    Raises:
        InvalidValue: The launcher asks for DeepSpeed or Megatron. The message says what to use.
    """
    for name, variable in (("DeepSpeed (ZeRO)", "DEEPSPEED"), ("Megatron-LM", "MEGATRON_LM")):
        if _is_set(f"ACCELERATE_USE_{variable}"):
            raise InvalidValue(
                f"The launcher asks for {name}, with which opdlab does not train. Shard the"
                f" student with FSDP2: accelerate launch --config_file {EXAMPLE}, or leave its"
                " weights whole: accelerate launch --multi_gpu."
            )


def read_plugin(accelerator: Accelerator) -> FullyShardedDataParallelPlugin | None:
    """Read what the launcher asks of FSDP2, whatever its options are.

    Args:
        accelerator: The processes.

    Returns:
        Accelerate's options; None where the weights stay whole in each process.

    Raises:
        InvalidValue: It asks for the first FSDP, or PyTorch is too old.
    """
    # On CPUs Accelerate leaves FSDP out without a word, though it works there too.
    state: Any = accelerator.state
    plugin: Any = getattr(state, "fsdp_plugin", None)
    if plugin is None and _is_set("ACCELERATE_USE_FSDP"):
        plugin = FullyShardedDataParallelPlugin()
    if plugin is None:
        return None
    if not IS_SUPPORTED:
        raise InvalidValue(
            f"The launcher asks for FSDP, and that of PyTorch {torch.__version__} lacks what opdlab"
            " needs. Use PyTorch 2.13 or later, or start the processes without FSDP."
        )
    if plugin.fsdp_version != 2:
        raise InvalidValue(
            f"The launcher asks for FSDP {plugin.fsdp_version}, and opdlab shards with FSDP2. Put"
            f" fsdp_version: 2 into the config, as {EXAMPLE} does."
        )
    found: FullyShardedDataParallelPlugin = plugin
    return found


def find_plugin(accelerator: Accelerator) -> FullyShardedDataParallelPlugin | None:
    """Find what the launcher asks of FSDP2, and refuse what `distill` would ignore.

    Args:
        accelerator: The processes.

    Returns:
        Accelerate's options, the run's own copy; None where the weights stay whole in each process.

    Raises:
        InvalidValue: It asks for the first FSDP, or for an option that would be ignored, or PyTorch
            is too old.
    """
    plugin = read_plugin(accelerator)
    if plugin is None:
        return None
    refused = {
        "fsdp_cpu_ram_efficient_loading": (
            plugin.cpu_ram_efficient_loading,
            "with it all processes but one load empty weights. Use false.",
        ),
        "fsdp_offload_params": (
            isinstance(plugin.cpu_offload, CPUOffloadPolicy),
            "opdlab does not offload. Use false; checkpointing=True and a smaller micro_batch save"
            " memory too.",
        ),
        "fsdp_activation_checkpointing": (
            plugin.activation_checkpointing,
            "opdlab has its own way. Use false here, and checkpointing=True in the run's settings.",
        ),
        "fsdp_ignored_modules": (
            plugin.ignored_modules,
            "opdlab shards all that the student runs. Leave it out.",
        ),
        "mixed_precision": (
            accelerator.mixed_precision != "no",
            "opdlab keeps log-probs and losses in float32. Use 'no' here, and precision='bf16' in"
            " the run's settings.",
        ),
        "parallelism_config": (
            accelerator.parallelism_config,
            "opdlab shards over all processes of the run. Leave it out.",
        ),
    }
    for name, (is_asked, advice) in refused.items():
        if is_asked:
            raise InvalidValue(f"The launcher asks for FSDP2 with {name}: {advice}")
    return copy.copy(plugin)


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")


class Sharding:
    """The shards of a run's student, and the passes that the processes take together.

    Args:
        student: The policy that trains; its parameters are trainable already.
        accelerator: The processes.
        plugin: What the launcher asks of FSDP2, as `find_plugin` gives it.

    Attributes:
        student: The student as it learns: the same policy on the shards.
        shards: The shards.
        parameters: The parameters that train, by name: DTensors.
        saves_whole: Whether checkpoints hold the optimizer's state in one file, gathered, and not
            in one for each process.
    """

    def __init__(
        self, student: Policy, accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin
    ) -> None:
        weights = student.weights
        self._processes = AcceleratedProcesses(accelerator)
        self.saves_whole = plugin.state_dict_type != StateDictType.SHARDED_STATE_DICT

        def shard(model: nn.Module) -> None:
            state: Any = accelerator.state
            before = getattr(state, "fsdp_plugin", None)
            state.fsdp_plugin = plugin  # this run's own, which takes up the classes of its layers
            fsdp2_prepare_model(accelerator, model)
            state.fsdp_plugin = before

        self.shards = Shards(weights.model, student.adapter, shard)
        beside: Any = copy.copy(weights)
        beside.model, beside._dropped = self.shards.model, []
        # All processes take the same passes, whatever their prompts begin with.
        beside.abilities = replace(weights.abilities, shares_prefix=False)
        self.student = student._view(weights=beside)
        self.parameters: dict[str, Any] = {
            name: value for name, value in self.shards.parameters.items() if value.requires_grad
        }

    @property
    def head(self) -> Head:
        """The student's head, between a pass of the backbone and its way back."""
        weights = self.student.weights
        return Head.read(weights.model, weights.vocab_size, self.student.adapter)

    def begin(self, batch: Batch, passes: int) -> int:
        """Go over from the whole model to the shards.

        Args:
            batch: The step's batch, whose policies have graded. The heads that their grades need
                stay whole.
            passes: How many passes this process needs.

        Returns:
            How many idle passes it must make besides, so that all processes make as many.
        """
        self.shards.release(keep=weights_read_later(batch))
        return int(max(self._processes.gather_json(passes))) - passes

    def end(self) -> None:
        """Make the model whole again, as the shards are now."""
        if self.shards.is_released:
            self.shards.gather()

    def idle_passes(self, number: int) -> None:
        """Take part in passes for which this process has no rows.

        Args:
            number: How many passes.
        """
        weights, adapter = self.student.weights, self.student.adapter
        for _ in range(number):
            with weights.using(adapter) as model:
                with torch.enable_grad():
                    hidden = last_hidden(model, [[0]], [[0]], weights.abilities)
                with self.failing_together():
                    pass  # there is no loss here that could fail
                torch.autograd.backward(hidden, torch.zeros_like(hidden))

    def failing_together(self) -> AbstractContextManager[None]:
        """Let an error in one process end the pass in all of them.

        All processes run such a block at the same place of each pass.

        Returns:
            The block. Where it fails, the model is whole again, as before the step.
        """
        return failing_together(self._processes, settle=self._give_up)

    def _give_up(self) -> None:
        self.shards.reset()
        self.end()


def weights_read_later(batch: Batch) -> list[Tensor]:
    """List the weights that are still read once all policies have graded: those of their heads.

    Args:
        batch: A step's batch, whose policies have graded.

    Returns:
        The weights; the student's own head is not among them, unless another policy shares it.
    """
    graded = [batch.states(name) for name in batch.distributions if name != "student"]
    heads = [head for states in graded for head in _heads_of(states)]
    return [value for head in heads for value in _weights_of(head)]


def _heads_of(graded: Graded) -> list[Head]:
    """The heads that the log-probs of these grades are still to be made with."""
    if isinstance(graded, States):
        return [graded.head]
    parts = graded.parts if isinstance(graded, Routed) else ()
    return [head for part in parts for head in _heads_of(part)]


def _weights_of(head: Head) -> list[Tensor]:
    lora = () if head.lora is None else (head.lora.up, head.lora.down)
    return [value for value in (head.weight, head.bias, *lora) if value is not None]


def check_sharding(student: Policy, accelerator: Accelerator) -> None:
    """Refuse a student or options with which the launcher's wish for shards cannot be met.

    Args:
        student: The policy that is to train.
        accelerator: The processes.

    Raises:
        InvalidValue: An option of FSDP2 would be ignored (`find_plugin`), the student's weights are
            quantised or spread already, or its model cannot pad.
    """
    if find_plugin(accelerator) is None:
        return
    weights = student.weights
    if how := describe_quantization(weights.model):
        raise InvalidValue(
            f"The launcher asks for FSDP2, and {weights.name} is {how}, whose weights opdlab does"
            " not shard. Load it without quantization, or start the processes without FSDP2."
        )
    if is_spread(weights.model):
        raise InvalidValue(
            f"The launcher asks for FSDP2, and {weights.name} is spread by device_map already. Load"
            " it without device_map."
        )
    if not (weights.abilities.pads and weights.abilities.batches):
        raise InvalidValue(
            f"The launcher asks for FSDP2, and {weights.name} runs texts of different length apart,"
            " so that the processes would not take the same passes. Start them without FSDP2."
        )


def shard_student(student: Policy, accelerator: Accelerator) -> Sharding | None:
    """Shard a student over the processes, where the launcher asks for that.

    Args:
        student: The policy that trains; its parameters are trainable already.
        accelerator: The processes.

    Returns:
        The shards; None where it does not ask, and in a run of one process.
    """
    plugin = find_plugin(accelerator)
    if plugin is None or accelerator.num_processes == 1:
        return None
    return Sharding(student, accelerator, plugin)
