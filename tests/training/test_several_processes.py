"""Every method in one and two processes, some in three: the same texts, losses, weights, files.

The batch of five prompts leaves the processes unequal shares.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import every_method
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from test_processes import launched

import opdlab as opd
from opdlab import Trace

METHODS = tuple(every_method.methods())
RUNS = [(method, 2) for method in METHODS] + [(method, 3) for method in every_method.IN_THREE]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[int, Path]:
    """The files of the runs, by the number of processes."""
    script, out = Path(every_method.__file__), {}
    for processes in (1, 2, 3):
        out[processes] = tmp_path_factory.mktemp(f"{processes}-processes")
        launched(script, processes, out[processes], *([out[1]] if processes > 1 else []))
    return out


def assert_close(ours: object, theirs: object, where: str, tolerance: float = 1e-4) -> None:
    """Compare plain data, numbers up to rounding."""
    if isinstance(theirs, dict):
        assert isinstance(ours, dict)
        assert ours.keys() == theirs.keys(), where
        for key, value in theirs.items():
            if key != "seconds" and not key.endswith("_s"):
                assert_close(ours[key], value, f"{where}.{key}", tolerance)
    elif isinstance(theirs, list):
        assert isinstance(ours, list)
        assert len(ours) == len(theirs), where
        for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_close(one, other, f"{where}[{i}]", tolerance)
    elif isinstance(theirs, float):
        both_nan = math.isnan(theirs) and math.isnan(float(ours))
        assert both_nan or ours == pytest.approx(theirs, rel=tolerance, abs=tolerance), where
    else:
        assert ours == theirs, where


def assert_same_trace(ours: Path, theirs: Path) -> None:
    one, two = Trace.load(theirs), Trace.load(ours)
    assert two.table.column_names == one.table.column_names
    assert two.meta["texts"] == one.meta["texts"]
    for name in one.table.column_names:
        left, right = one.table[name].to_pylist(), two.table[name].to_pylist()
        assert_close(right, left, name)
    assert_close(two.meta, one.meta, "meta")


@pytest.mark.parametrize(("method", "processes"), RUNS)
def test_a_method_gives_the_trace_of_one_process(folders, method, processes):
    """Texts, sampling log-probs, routes, plan columns, losses, gradients of every token, notes."""
    assert_same_trace(
        folders[processes] / method / "trace.parquet", folders[1] / method / "trace.parquet"
    )


def assert_close_tensors(one: Path, many: Path, step: int) -> None:
    """Compare the tensors of two checkpoints.

    The first step's averages are its gradients, equal up to the rounding of sums. Adam divides each
    by its own size, so where a gradient is all rounding the weight goes either way, up to a whole
    step; the other weights are compared to a small part of a step. The second step's gradients are
    those of slightly different weights, so its bounds are wider.
    """
    of_largest, of_step = {1: (1e-4, 2e-3), 2: (1e-2, 0.1)}[step]
    first = load_file(one.with_name("step-000001") / "optimizer.safetensors")
    for file in sorted(one.glob("*.safetensors")):
        left, right = load_file(file), load_file(many / file.name)
        assert left.keys() == right.keys()
        for key, value in left.items():
            if file.name == "optimizer.safetensors":
                least = of_largest * float(value.abs().max())
                torch.testing.assert_close(right[key], value, rtol=0.0, atol=least)
                continue
            torch.testing.assert_close(right[key], value, rtol=0.0, atol=2 * step * every_method.LR)
            gradient = first.get("exp_avg/" + key.removeprefix("base_model.model."))
            if gradient is not None:
                is_clear = gradient.abs() >= 1e-3 * gradient.abs().max()
                least = of_step * every_method.LR
                torch.testing.assert_close(
                    right[key][is_clear], value[is_clear], rtol=0.0, atol=least
                )


@pytest.mark.parametrize(("method", "processes"), RUNS)
def test_a_method_gives_the_checkpoint_of_one_process(folders, method, processes):
    """Weights, the optimizer's averages of gradients, the moving average, metrics, identity."""
    for step in (1, 2):
        one, many = (folders[n] / method / f"step-{step:06}" for n in (1, processes))
        names = {path.name for path in one.iterdir()}
        assert {path.name for path in many.iterdir()} == names
        assert_close_tensors(one, many, step)
    history = [json.loads((folder / "history.json").read_text()) for folder in (one, many)]
    assert_close(history[1], history[0], "history")
    said = [json.loads((folder / "run.json").read_text()) for folder in (one, many)]
    assert (said[0].pop("processes"), said[1].pop("processes")) == (1, processes)
    assert said[0].pop("run").keys() == said[1].pop("run").keys()
    assert said[0] == said[1]


@pytest.mark.parametrize("processes", [2, 3])
def test_an_evaluation_and_a_score_are_those_of_one_process(folders, processes):
    found = [json.loads((folders[n] / "evaluation.json").read_text()) for n in (1, processes)]
    assert_close(found[1], found[0], "evaluation")
    assert len(found[0]["greedy"]) == 7
    assert np.asarray(found[0]["sampled"]).shape == (7, 3)
    assert_same_trace(folders[processes] / "scored.parquet", folders[1] / "scored.parquet")


def same_weights(one: Path, two: Path) -> None:
    left, right = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    for key, value in left.items():
        torch.testing.assert_close(right[key], value, rtol=1e-3, atol=0.05 * every_method.LR)


@pytest.mark.parametrize("processes", [2, 3])
def test_more_processes_take_up_a_run_of_one(folders, processes):
    same_weights(
        folders[1] / "OPD full" / "step-000002", folders[processes] / "resumed" / "step-000002"
    )


def test_one_process_takes_up_a_run_of_two(folders, tmp_path):
    student, teacher, task = opd.load("market")
    with pytest.warns(UserWarning, match="by 2 processes and goes on with 1.*random numbers"):
        run = opd.resume(
            folders[2] / "OPD full", student, teacher, task, step=1, save=tmp_path, quiet=True
        )
    run.train()
    same_weights(folders[1] / "OPD full" / "step-000002", tmp_path / "step-000002")


@pytest.mark.parametrize("processes", [2, 3])
def test_more_processes_take_up_texts_that_one_wrote_ahead(folders, processes):
    before = folders[1] / every_method.AHEAD
    assert (before / "step-000001" / "ahead.safetensors").exists()
    same_weights(before / "step-000002", folders[processes] / "resumed ahead" / "step-000002")


@pytest.mark.parametrize("method", ["ahead", every_method.AHEAD])
@pytest.mark.parametrize("processes", [2, 3])
def test_texts_written_ahead_are_saved_as_one_process_saves_them(folders, method, processes):
    one, many = (folders[n] / method / "step-000001" for n in (1, processes))
    left, right = (load_file(folder / "ahead.safetensors") for folder in (one, many))
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(right[name], value, rtol=1e-4, atol=1e-5)
    said = [json.loads((folder / "ahead.json").read_text()) for folder in (one, many)]
    assert said[0] == said[1]
    history = json.loads((many.parent / "step-000002" / "history.json").read_text())
    assert [row["staleness"] for row in history] == [0, 1]


def test_the_methods_of_the_library_are_all_here():
    here = {type(method).__name__ for method, _ in every_method.methods().values()}
    library = {name for name in opd.methods.__all__ if hasattr(getattr(opd.methods, name), "loss")}
    assert library - here <= {"Method"}


def test_texts_differ_between_the_two_steps(folders):
    """So the second step's texts depend on random numbers of its own and on moved weights."""
    history = pd.read_json(folders[1] / "OPD full" / "step-000002" / "history.json")
    assert history["tokens"].iloc[0] != history["tokens"].iloc[1] or history["loss"].nunique() == 2
