"""Checkpoints: exact resume, a process killed at the worst moments, damage that is noticed, no
pickle.
"""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from warm_start import python

import opdlab as opd
from opdlab import errors
from opdlab.tasks import market as market_task
from opdlab.tasks.market import data

SETTINGS = {"steps": 4, "batch": 4, "seed": 5, "quiet": True, "save_every": 1}


def train(folder, **settings) -> opd.Run:
    return opd.distill(*opd.load("market"), save=folder, **{**SETTINGS, **settings}).train()


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same(a: Path, b: Path) -> bool:
    one, two = adapter(a), adapter(b)
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run, saved at every step."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder)
    return folder


def test_resume_is_bit_identical(whole, tmp_path):
    train(tmp_path, steps=2)
    run = opd.resume(tmp_path, *opd.load("market"), steps=4, quiet=True)
    assert run.done == 2
    run.train()
    assert same(whole / "step-000004", tmp_path / "step-000004")
    assert run.history["loss"].tolist() == [
        row["loss"] for row in json.loads((whole / "step-000004/history.json").read_text())
    ]


CHILD = """
import os, signal, sys
from pathlib import Path
import opdlab as opd
from opdlab.training import checkpoint, phases

folder, where = Path(sys.argv[1]), sys.argv[2]
kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
options = {"steps": 4, "batch": 4, "seed": 5, "quiet": True, "save_every": 1}
run = opd.distill(*opd.load("market"), save=folder, **options)
for step in run:
    if step.number == 2:
        if where == "in the middle of a step":
            phases.reduce_gradients = kill
        elif where == "before the rename":
            checkpoint._flush_files = kill
        else:
            Path.rename = lambda self, target, rename=Path.rename: (rename(self, target), kill())
"""


@pytest.mark.parametrize(
    "where", ["in the middle of a step", "before the rename", "after the rename"]
)
def test_killed_and_resumed_is_bit_identical(whole, tmp_path, where):
    done = subprocess.run(
        [python(), "-c", CHILD, str(tmp_path), where],
        capture_output=True,
        text=True,
        timeout=2000,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    complete = sorted(p.name for p in tmp_path.glob("step-*"))
    assert complete[-1] == ("step-000003" if where == "after the rename" else "step-000002")
    opd.resume(tmp_path, *opd.load("market"), quiet=True).train()
    assert same(whole / "step-000004", tmp_path / "step-000004")


def test_full_training_resumes_too(tmp_path):
    train(tmp_path / "a", lora=None, steps=2, lr=1e-3)
    train(tmp_path / "b", lora=None, steps=1, lr=1e-3)
    opd.resume(tmp_path / "b", *opd.load("market"), steps=2, quiet=True).train()
    one, two = (load_file(tmp_path / x / "step-000002/model.safetensors") for x in "ab")
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_peft_reads_the_adapter(whole):
    student, _, task = opd.load("market")
    rollout = student.sample(task.prompts(2), max_new_tokens=6)
    run = opd.resume(whole, *opd.load("market"), quiet=True)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(data() / "student"), whole / "step-000004"
    )
    theirs = opd.Policy.of(model.merge_and_unload(), student.tokenizer)
    torch.testing.assert_close(
        theirs.log_probs(rollout), run.student.log_probs(rollout), rtol=1e-4, atol=1e-4
    )


def test_a_chosen_step_and_methods_come_back(whole, tmp_path):
    assert opd.resume(whole, *opd.load("market"), step=2, quiet=True).done == 2
    method = opd.OPD("forward_kl", top_k=opd.TopK(4, tail="renormalize"))
    train(tmp_path, steps=1, method=method)
    assert opd.resume(tmp_path, *opd.load("market"), quiet=True).method == method


def test_a_method_of_your_own_must_be_given(tmp_path):
    @opd.method(needs=("teacher",))
    def mine(rows):
        return opd.losses.reverse_kl(rows.student, rows.teacher)

    train(tmp_path, steps=1, method=mine)
    with pytest.raises(errors.OpdlabError, match="a method of your own"):
        opd.resume(tmp_path, *opd.load("market"))
    assert (
        opd.resume(tmp_path, *opd.load("market"), method=mine, steps=2, quiet=True).train().done
        == 2
    )


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.safetensors", "run.json"])
def test_damage_is_noticed(tmp_path, name):
    train(tmp_path, steps=2)
    path = tmp_path / "step-000002" / name
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(
        errors.DamagedFile, match=rf"{name} is missing or not what was written.*step=N"
    ):
        opd.resume(tmp_path, *opd.load("market"))
    assert opd.resume(tmp_path, *opd.load("market"), step=1, quiet=True).done == 1


def test_nothing_there_and_another_tokenizer(whole, tmp_path):
    with pytest.raises(errors.OpdlabError, match="holds no checkpoint"):
        opd.resume(tmp_path, *opd.load("market"))
    with pytest.raises(errors.OpdlabError, match=r"no checkpoint of step 9; there are step-000001"):
        opd.resume(whole, *opd.load("market"), step=9)
    scribe = opd.load("market", student="scribe", teacher="scribe")
    with pytest.raises(errors.OpdlabError, match="another tokenizer"):
        opd.resume(whole, scribe[0], scribe[1], market_task())


def test_a_full_disk_leaves_the_earlier_checkpoints(tmp_path, monkeypatch):
    run = opd.distill(*opd.load("market"), save=tmp_path, **{**SETTINGS, "save_every": 0})
    next(run)
    kept = run.save()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("opdlab.training.optimizer_files.save_file", full)
    next(run)
    with pytest.raises(
        errors.OpdlabError, match=r"step 2 could not be written .*No space left.*make room"
    ):
        run.save()
    assert {p.name for p in tmp_path.iterdir()} == {kept.name, ".lock"}
    assert next(run).number == 3  # the run itself is unharmed


def test_no_file_is_a_pickle(whole):
    kinds = {p.suffix for p in whole.rglob("*") if p.is_file()}
    assert kinds == {".safetensors", ".json"}
