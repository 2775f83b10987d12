"""Functions that are called again and again; there is no GPU here to record them on."""

from __future__ import annotations

import pytest

from opdlab.models import replay
from opdlab.models.replay import Repeat, can_replay


def test_without_a_gpu_a_function_is_called():
    calls = []
    repeat = Repeat(lambda *arguments: calls.append(arguments))
    for _ in range(4):
        repeat(True, layout=1)
    repeat(False, layout=1)
    assert calls == [(True,)] * 4 + [(False,)]


def test_what_cannot_be_recorded_is_called_with_a_warning(monkeypatch):
    """PyTorch without CUDA refuses to make a graph, as a function that waits would be refused."""
    monkeypatch.setattr(replay, "WARM_UPS", 0)
    calls = []
    repeat = Repeat(lambda *arguments: calls.append(arguments))
    repeat.can_record = True
    with pytest.warns(UserWarning, match=r"cannot be recorded .* slower\. OPDLAB_CUDA_GRAPHS=0"):
        repeat(1)
    repeat(1)
    assert calls == [(1,), (1,)]


def test_only_plain_weights_on_a_gpu_are_recorded(make_model):
    assert not can_replay(make_model(40))
