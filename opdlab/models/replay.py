"""Record the kernels of a function on a GPU once and replay them, as a CUDA graph.

Writing one token takes hundreds of small kernels. Starting each of them from Python takes longer
than the kernel itself, so a GPU waits most of the time. A recorded graph starts all of them at
once.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Hashable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opdlab.models.quantization import is_quantized

SWITCH = "OPDLAB_CUDA_GRAPHS"  # 0 turns them off
WARM_UPS = 2  # calls before a recording, in which libraries choose kernels and take their memory


def can_replay(model: PreTrainedModel) -> bool:
    """Tell whether the kernels of a model may be recorded.

    Args:
        model: The model.

    Returns:
        True if all its weights are plain tensors on one GPU, and the environment variable
        `OPDLAB_CUDA_GRAPHS` is not 0. Sharded models talk to other processes in each pass, and
        layers in 8 bits wait for the device to look for outliers.
    """
    weights = list(model.parameters())
    is_plain = all(weight.is_cuda and type(weight.data) is Tensor for weight in weights)
    is_at_one_place = len({weight.device for weight in weights}) == 1
    is_on = os.environ.get(SWITCH, "1") != "0"
    return is_on and is_plain and is_at_one_place and not is_quantized(model)


class Repeat:
    """Call a function again and again; on a GPU, record its kernels and replay them.

    The function reads and writes the same tensors in each call, in place, and does not wait for the
    device. Where it cannot be recorded, it is called, with a warning.

    Args:
        function: The function. Its arguments decide which kernels there are.
        device: Where its tensors are, which need not be PyTorch's current GPU.
    """

    def __init__(self, function: Callable[..., None], device: torch.device) -> None:
        self.function, self.device = function, device
        self.graph: torch.cuda.CUDAGraph | None = None
        self.calls = 0  # since the kernels last changed
        self.recorded_for: tuple[Hashable, ...] = ()
        self.can_record = device.type == "cuda"

    def __call__(self, *arguments: Hashable, layout: int = 0) -> None:
        """Call the function, or replay what it did.

        Args:
            arguments: The arguments of the function. Others than last time are recorded anew.
            layout: A number that changes when the function's tensors are replaced by others.
        """
        if self.recorded_for != (*arguments, layout):
            self.graph, self.calls, self.recorded_for = None, 0, (*arguments, layout)
        if self.graph is None and self.can_record and self.calls >= WARM_UPS:
            self.graph = self._record(arguments)
        if self.graph is not None:
            self.graph.replay()
        elif self.can_record:
            self._warm_up(arguments)
        else:
            self.function(*arguments)
        self.calls += 1

    def _warm_up(self, arguments: tuple[Hashable, ...]) -> None:
        """Call the function on the stream of recordings."""
        stream, before = _stream(self.device), torch.cuda.current_stream(self.device)
        stream.wait_stream(before)
        try:
            with torch.cuda.stream(stream):
                self.function(*arguments)
        finally:  # also after an interrupt: memory that the kernels write must not be reused before
            before.wait_stream(stream)

    def _record(self, arguments: tuple[Hashable, ...]) -> torch.cuda.CUDAGraph | None:
        """Record a call without running it; None where that is not possible."""
        try:
            # Not PyTorch's own stream, which is on the GPU of the first recording in a process:
            # kernels on another GPU would run once and be missing from the graph.
            stream = _stream(self.device)
            with torch.cuda.stream(stream):  # `graph` does not leave it where a recording fails
                graph = torch.cuda.CUDAGraph()
                # Other threads may use the GPU meanwhile.
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    self.function(*arguments)
        except RuntimeError as error:
            self.can_record = False
            reason = " ".join(str(error).split())[:200]
            warnings.warn(
                f"The model's kernels cannot be recorded as a CUDA graph ({reason}). It writes the"
                f" same texts, slower. {SWITCH}=0 in the environment leaves out the attempt.",
                stacklevel=2,
            )
            return None
        return graph


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of warm-ups and recordings on a GPU.

    It is one for all, since PyTorch keeps memory for each stream on which matrices are multiplied.
    """
    return torch.cuda.Stream(device)
