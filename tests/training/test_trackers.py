"""Trackers get numbers, settings, evaluations and graded texts, offline and at their steps."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from warm_start import python

CONFIG = """
[student]
source = "student"
[teacher]
source = "teacher"
[settings]
steps = 4
batch = 4
evaluate_every = 4
[run]
folder = "run"
trackers = {trackers}
eval_prompts = 0
trace_every = 2
trace_prompts = 1
"""

READ_TRACKIO = """
import json, sys
from trackio.sqlite_storage import SQLiteStorage as store
(project,) = store.get_projects()
(run,) = store.get_runs(project)
print(json.dumps([run, store.get_logs(project, run)], default=str))
"""


def distil(folder: Path, trackers: list[str]) -> dict[str, str]:
    (folder / "config.toml").write_text(
        CONFIG.format(trackers=json.dumps(trackers)), encoding="utf-8"
    )
    surroundings = {
        **os.environ,
        "TRACKIO_DIR": str(folder / "trackio"),
        "WANDB_MODE": "offline",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [python(), "-m", "opdlab.commands.cli", "distill", "config.toml", "--json"],
        capture_output=True,
        text=True,
        timeout=2500,
        check=False,
        cwd=folder,
        env=surroundings,
    )
    assert done.returncode == 0, done.stderr
    json.loads(done.stdout)  # nothing that a tracker prints is on stdout
    return surroundings


def test_tensorboard_and_trackio(tmp_path):
    pytest.importorskip("trackio")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    surroundings = distil(tmp_path, ["tensorboard", "trackio"])
    events = EventAccumulator(str(tmp_path / "run" / "opdlab"))
    events.Reload()
    tags = events.Tags()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert [event.step for event in events.Scalars("accuracy")] == [4]
    (texts,) = [tag for tag in tags["tensors"] if tag.startswith("texts/text 1")]
    assert [event.step for event in events.Tensors(texts)] == [0, 2, 4]
    shown = events.Tensors(texts)[0].tensor_proto.string_val[0].decode()
    assert all(line.startswith("    ") or line in ("", "---") for line in shown.splitlines())

    done = subprocess.run(
        [python(), "-c", READ_TRACKIO],
        capture_output=True,
        text=True,
        timeout=2500,
        check=True,
        env=surroundings,
    )
    name, logs = json.loads(done.stdout.splitlines()[-1])
    assert name.startswith("run-")
    assert [row["step"] for row in logs if "loss" in row] == [1, 2, 3, 4]
    pages = [row["texts/text 1"] for row in logs if "texts/text 1" in row]
    assert len(pages) == 3
    files = list((tmp_path / "trackio").rglob("*.html"))
    assert len(files) == 3
    assert all("opd-strip" in file.read_text(encoding="utf-8") for file in files)


def test_weights_and_biases_offline(tmp_path):
    pytest.importorskip("wandb")
    distil(tmp_path, ["wandb"])
    (run,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    pages = list(run.rglob("*.html"))
    assert len(pages) == 3
    assert all("opd-strip" in page.read_text(encoding="utf-8") for page in pages)
