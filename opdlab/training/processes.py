"""The processes of a run: statistics of the whole step, and each process's share of it.

A step is one batch, however many processes share it. Its prompts stand in one order, the student's
first; process `i` of `P` takes every `P`-th prompt from the `i`-th on, so that each gets its part
of what each writer answers. Random numbers follow the place of a prompt in that order.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import pad_across_processes
from torch import Tensor

from opdlab.data.trace import Trace
from opdlab.data.trace_merging import merge_traces, trace_from_bytes, trace_to_bytes
from opdlab.errors import InvalidValue, OpdlabError
from opdlab.support.expect import expect

MESSAGE_BYTES = 32 << 20  # of gradients that are added up at once


class AcceleratedProcesses:
    """Sums and gathers over the processes of an Accelerate run.

    In a run of one process they give its own values back.

    Args:
        accelerator: The processes of the run; None for this process alone.
    """

    def __init__(self, accelerator: Accelerator | None) -> None:
        self._accelerator = accelerator

    @classmethod
    def of(cls, processes: Any, where: str) -> AcceleratedProcesses:
        """Make the processes that a user gives a function.

        Args:
            processes: An accelerator, or None.
            where: The function, for the error.

        Returns:
            The processes.

        Raises:
            InvalidValue: It is something else.
        """
        if processes is not None:
            expect(processes, Accelerator, where, "processes")
        return cls(processes)

    @property
    def index(self) -> int:
        """Number of this process, from 0."""
        return 0 if self._accelerator is None else int(self._accelerator.process_index)

    @property
    def count(self) -> int:
        """How many processes there are."""
        return 1 if self._accelerator is None else int(self._accelerator.num_processes)

    def sum(self, values: Tensor) -> Tensor:
        """Add up a tensor over all processes.

        Args:
            values: A tensor of any shape, the same shape in every process.

        Returns:
            The sum, the same in every process.
        """
        if self._accelerator is None or self.count == 1:
            return values
        total: Tensor = self._accelerator.reduce(values, "sum")
        return total

    def gather(self, values: Tensor) -> Tensor:
        """Put the rows `[n, ...]` of all processes together, in the order of their ranks.

        `n` may differ among the processes.

        Args:
            values: `[n, ...]` of this process.

        Returns:
            `[N, ...]`, the same in every process.
        """
        return torch.cat(self.gather_each(values))

    def gather_each(self, values: Tensor) -> list[Tensor]:
        """List the rows `[n, ...]` of every process.

        Args:
            values: `[n, ...]` of this process; `n` may differ among the processes.

        Returns:
            One tensor per process, in the order of their ranks; the same in every process.
        """
        accelerator = self._accelerator
        if accelerator is None or self.count == 1:
            return [values]
        size = torch.tensor([len(values)], device=accelerator.device)
        sizes = accelerator.gather(size).tolist()
        if max(sizes) == 0:
            return [values] * len(sizes)
        moved = values.to(accelerator.device).contiguous()
        if values.dtype == torch.bool:  # which not every backend sends
            moved = moved.to(torch.uint8)
        padded = pad_across_processes(moved, dim=0)
        everyone = accelerator.gather(padded).unflatten(0, (len(sizes), max(sizes)))
        everyone = everyone.to(values.device, values.dtype)
        return [rows[:n] for rows, n in zip(everyone, sizes, strict=True)]

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """List the bytes that every process gives.

        Args:
            data: Those of this process.

        Returns:
            One entry per process, in the order of their ranks.
        """
        values = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
        return [part.numpy().tobytes() for part in self.gather_each(values)]

    def gather_json(self, value: Any) -> list[Any]:
        """List the JSON data that every process gives.

        Args:
            value: That of this process.

        Returns:
            One value per process, in the order of their ranks.
        """
        return [json.loads(data) for data in self.gather_bytes(json.dumps(value).encode())]


def gather_trace(trace: Trace, row: Tensor, processes: AcceleratedProcesses) -> Trace:
    """Put together the traces that the processes made of one batch.

    Every process must call it.

    Args:
        trace: The trace of this process's completions.
        row: Their numbers in the whole batch, `[B]`.
        processes: The processes.

    Returns:
        The trace of the whole batch, the same in every process.
    """
    if processes.count == 1:
        return trace
    parts = [trace_from_bytes(data) for data in processes.gather_bytes(trace_to_bytes(trace))]
    return merge_traces(parts, [numbers.tolist() for numbers in processes.gather_each(row)])


def sum_in_place(processes: AcceleratedProcesses, tensors: Sequence[Tensor]) -> None:
    """Add up tensors over all processes, many in one message.

    Args:
        processes: The processes.
        tensors: The same shapes in every process; changed in place.
    """
    for group in _messages(tensors):
        flat = processes.sum(torch.cat([tensor.flatten() for tensor in group]))
        parts = flat.split([tensor.numel() for tensor in group])
        for tensor, part in zip(group, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


def _messages(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Tensors in groups of one dtype and of `MESSAGE_BYTES` at most, or of one larger tensor."""
    groups: list[list[Tensor]] = []
    size = 0
    for tensor in tensors:
        is_same = bool(groups) and groups[-1][0].dtype == tensor.dtype
        size += tensor.nbytes
        if not is_same or size > MESSAGE_BYTES:
            groups.append([])
            size = tensor.nbytes
        groups[-1].append(tensor)
    return groups


@contextmanager
def failing_together(
    processes: AcceleratedProcesses, settle: Callable[[], None] | None = None
) -> Iterator[None]:
    """Let an error in one process end a block in all of them, at the end of the block.

    Otherwise the others would wait for it. All processes must come to the block.

    Args:
        processes: The processes.
        settle: Called in every process before an error is raised.

    Yields:
        Nothing.

    Raises:
        OpdlabError: Another process failed.
        Exception: This process's own error.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    said = processes.gather_json("" if own is None else str(own) or repr(own))
    if not any(said):
        return
    if settle is not None:
        settle()
    if own is not None:
        raise own
    number = next(i for i, one in enumerate(said) if one)
    raise OpdlabError(f"Process {number} failed, so all stopped: {said[number]}")


@dataclass(frozen=True)
class Share:
    """The part of a step's prompts that one process takes.

    Attributes:
        student: Places, among the prompts that the student answers, of those of this process.
        others: Places, among the prompts that others answer, of those of this process.
        all_student: Number of prompts that the student answers, in all processes.
        all_others: Number of prompts that others answer, in all processes.
    """

    student: range
    others: range
    all_student: int
    all_others: int

    @classmethod
    def of(cls, prompts: int, own: int, process: int, count: int) -> Share:
        """Return the share of one process.

        Args:
            prompts: Prompts of the step.
            own: How many of them, the first ones, the student answers.
            process: Number of the process, from 0.
            count: Number of processes.

        Returns:
            The share. The sizes of the processes' shares differ by one prompt at most.
        """
        others = range((process - own) % count, prompts - own, count)
        return cls(range(process, own, count), others, own, prompts - own)

    def rows(self, n_student: int, n_others: Sequence[int]) -> list[int]:
        """Number the completions of this process in the whole step.

        Args:
            n_student: Completions of each prompt by the student.
            n_others: Completions of each prompt by each other writer.

        Returns:
            The numbers, in the order of this process's rollout: the student's first, then writer
            by writer.
        """
        rows = _completions(self.student, n_student, 0)
        start = self.all_student * n_student
        for n in n_others:
            rows += _completions(self.others, n, start)
            start += self.all_others * n
        return rows


def _completions(places: Sequence[int], n: int, start: int) -> list[int]:
    return [start + place * n + j for place in places for j in range(n)]


def check_batch(batch: int, processes: int) -> None:
    """Refuse a batch that leaves a process without a prompt.

    Args:
        batch: Prompts of a step, over all processes.
        processes: Number of processes.

    Raises:
        InvalidValue: There are fewer prompts than processes.
    """
    if batch < processes:
        raise InvalidValue(
            f"distill got batch={batch} for {processes} processes: batch counts the prompts of a"
            f" step over all of them, so some would have none. Use batch={processes} or more, or"
            " fewer processes."
        )


def check_same_run(processes: AcceleratedProcesses, said: dict[str, Any]) -> None:
    """Refuse processes that were not given the same run.

    Args:
        processes: The processes.
        said: A description of this process's run by part, as JSON data.

    Raises:
        OpdlabError: Two processes differ. The message names the part.
    """
    if processes.count == 1:
        return
    first, *others = processes.gather_json(said)
    for number, other in enumerate(others, 1):
        if parts := [part for part in first if first[part] != other.get(part)]:
            raise OpdlabError(
                f"Processes 0 and {number} were not given the same run: they differ in"
                f" {', '.join(parts)}. Every process must make the same student, teacher, task,"
                " method and settings; give whatever is random in the script a seed."
            )


def is_main_by_environment() -> bool:
    """Tell whether this is the main process, before the processes have met.

    Returns:
        False where the launcher (torchrun, `accelerate launch`, Ray, SLURM with torchrun) says
        that this process has another number than 0.
    """
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def warning_once(is_main: bool) -> Iterator[None]:
    """Let the main process warn alone, so that a warning is not shown once for each process.

    Args:
        is_main: Whether this is the main process.

    Yields:
        Nothing.
    """
    if is_main:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
