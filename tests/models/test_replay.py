"""Functions that are called again and again; the GPUs here are pretended."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from opdlab.models import replay
from opdlab.models.replay import Repeat, can_replay

CPU, SECOND_GPU = torch.device("cpu"), torch.device("cuda", 1)


def test_without_a_gpu_a_function_is_called():
    calls = []
    repeat = Repeat(lambda *arguments: calls.append(arguments), CPU)
    for _ in range(4):
        repeat(True, layout=1)
    repeat(False, layout=1)
    assert calls == [(True,)] * 4 + [(False,)]


def test_only_plain_weights_on_a_gpu_are_recorded(make_model):
    assert not can_replay(make_model(40))


class PretendedGpus:
    """`torch.cuda` of a machine with GPUs, which notes on which stream a function is called."""

    def __init__(self) -> None:
        self.current = {0: "main 0", 1: "main 1"}
        self.device, self.made, self.recorded_on = 0, 0, []

    def Stream(self, device=None):  # noqa: N802
        self.made += 1
        index = self.device if device is None else device.index
        return SimpleNamespace(device=index, name=f"side {index}", wait_stream=self.waits)

    def waits(self, other):
        pass

    def current_stream(self, device=None):
        index = self.device if device is None else device.index
        return SimpleNamespace(device=index, name=self.current[index], wait_stream=self.waits)

    def set_stream(self, stream):
        self.device = stream.device
        self.current[stream.device] = stream.name

    @contextmanager
    def stream(self, stream):
        before = self.device, dict(self.current)
        self.set_stream(stream)
        try:
            yield
        finally:
            self.device, self.current = before

    def is_available(self):
        return True

    def CUDAGraph(self):  # noqa: N802
        return SimpleNamespace(replay=lambda: self.recorded_on.append("replay"))

    @contextmanager
    def graph(self, graph, stream=None, **_):
        """Like PyTorch's, it does not leave its stream when a recording fails."""
        before = self.device, dict(self.current)
        self.set_stream(stream or self.Stream())
        yield
        self.device, self.current = before


@pytest.fixture
def gpus(monkeypatch):
    gpus = PretendedGpus()
    replay._stream.cache_clear()
    monkeypatch.setattr(replay, "torch", SimpleNamespace(cuda=gpus))
    yield gpus
    replay._stream.cache_clear()


def test_kernels_are_recorded_on_the_gpu_of_the_model(gpus):
    """Otherwise they run once, and the graph that is replayed for all later tokens is empty."""
    seen = []
    repeat = Repeat(lambda: seen.append((gpus.device, gpus.current[1])), SECOND_GPU)
    for layout in (0, 1):
        for _ in range(4):
            repeat(layout=layout)
    assert seen == [(1, "side 1")] * 6
    assert gpus.recorded_on == ["replay"] * 4
    assert gpus.made == 1  # each stream keeps memory of its own for products of matrices
    assert (gpus.device, gpus.current[1]) == (0, "main 1")


def test_what_cannot_be_recorded_is_called_where_it_was_with_a_warning(gpus):
    def wait() -> None:
        if len(calls) == 2:
            calls.append("refused")
            raise RuntimeError("operation not permitted when stream is capturing")
        calls.append(gpus.current[1])

    calls: list[str] = []
    repeat = Repeat(wait, SECOND_GPU)
    repeat()
    repeat()
    with pytest.warns(UserWarning, match=r"cannot be recorded .* slower\. OPDLAB_CUDA_GRAPHS=0"):
        repeat()
    assert (gpus.device, gpus.current[1]) == (0, "main 1")
    assert calls == ["side 1", "side 1", "refused", "main 1"]


def test_quantised_layers_are_not_recorded(monkeypatch):
    """Their weights say that they are plain tensors."""
    weight = SimpleNamespace(is_cuda=True, data=torch.zeros(1), device=SECOND_GPU)
    model = SimpleNamespace(parameters=lambda: [weight], modules=list, hf_quantizer=None)
    assert can_replay(model)
    model.hf_quantizer = object()
    assert not can_replay(model)
