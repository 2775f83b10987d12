"""Trainings that are killed, interrupted or cannot write lose nothing.

Three kills at random moments and five at phases of a step in `make test`; thirty, and every phase
before and after, in `make stress`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hostile import Asked, hostile, http
from stress import times

import opdlab as opd
from opdlab.data.prompt import Prompt
from opdlab.teachers import TextServer

KILLS = times(3, 30)


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> dict[str, Any]:
    """What the laboratory found."""
    folder = tmp_path_factory.mktemp("lab")
    command = [sys.executable, str(Path(__file__).with_name("crash_lab.py"))]
    done = subprocess.run(
        [*command, str(folder), str(KILLS)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(opd.__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_killed_run_is_taken_up_bit_for_bit(lab):
    tries = lab["tries"]
    assert len(tries) >= 2 * KILLS + 4
    for name, found in tries.items():
        assert found["resumed"] == 0, name
        assert found["differs"] == [], name
        assert found["unreadable"] == [], name
        assert found["left in the end"] == [], name
    killed = [found for found in tries.values() if found["ended"] == -signal.SIGKILL]
    assert len(killed) >= KILLS
    left = [name for found in killed for name in found["left by the killed"]]
    assert any(name.endswith(".partial") for name in left)  # there was something to remove


def test_a_full_disk_is_said_and_leaves_whole_checkpoints(lab):
    found = lab["full disk"]
    assert "The checkpoint of step 3 could not be written" in found["said"]
    assert "make room" in found["said"]
    assert found["steps"] == ["step-000001", "step-000002"]
    assert found["left"] == ["run/.lock"]  # the process ended without letting go
    assert found["resumed"] == 0
    assert found["differs"] == []


def test_a_folder_that_becomes_read_only_is_said(lab):
    found = lab["read-only"]
    if not found:
        pytest.skip("needs the right to change users")
    assert "could not be written" in found["said"]
    assert found["resumed"] == 0
    assert found["differs"] == []


def test_a_second_process_in_the_folder_is_refused(lab):
    found = lab["two"]
    assert f"is in use by process {found['process']} on" in found["said"]
    assert found["ended"] == 0
    assert found["after"] == ""
    assert found["differs"] == []


SERVED = """
import os, signal, sys
import opdlab as opd
from opdlab.data.prompt import Prompt
from opdlab.teachers import TextServer
server = TextServer(sys.argv[1], cache=sys.argv[2], concurrency=2, quiet=True, retries=0)
server.write([Prompt(text=f"question {i}", id=str(i)) for i in range(12)], max_new_tokens=4)
"""


def test_nothing_paid_for_is_asked_twice_after_a_kill(tmp_path):
    """The process is killed after seven questions; those whose answers were kept are not asked."""
    path = tmp_path / "c.sqlite"
    process: subprocess.Popen | None = None

    def act(line: Any, asked: Asked) -> None:
        if process is not None and asked.number == 8:
            process.send_signal(signal.SIGKILL)
            process.wait()
        line.sendall(http(asked.answer()))

    with hostile() as server:
        server.act = act
        command = [sys.executable, "-c", SERVED, server.url, str(path)]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        assert process.wait(300) == -signal.SIGKILL
        before = {one.body["prompt"] for one in server.seen if not one.is_greeting}
        server.act = None
        first = len(server.seen)
        prompts = [Prompt(text=f"question {i}", id=str(i)) for i in range(12)]
        texts = TextServer(server.url, cache=path, concurrency=2, quiet=True).write(
            prompts, max_new_tokens=4
        )
        again = [one.body["prompt"] for one in server.seen[first:] if not one.is_greeting]
    assert [written for (written,) in texts] == ["text 0"] * 12
    assert len(again) == len(set(again))
    # Two were under way when the process died; the others were answered, and are kept.
    assert len(before & set(again)) <= 2
    assert len(before | set(again)) == 12


def test_leftovers_are_removed_and_a_checkpoint_that_made_room_comes_back(tmp_path):
    from opdlab.training.folder_lock import remove_leftovers

    for name in ("step-000001", ".step-000002.77.partial", ".step-000002.77.old", ".keep"):
        (tmp_path / name).mkdir()
    (tmp_path / ".step-000001.78.old").mkdir()
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots" / ".a.safetensors.77.partial").touch()
    (tmp_path / f".probe-{'0' * 32}").touch()
    (tmp_path / "step-000001" / ".manifest.json.77.partial").touch()
    remove_leftovers(tmp_path)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert left == [".keep", "snapshots", "step-000001", "step-000002"]


def test_runs_of_one_process_share_the_folder(make_policy, tmp_path):
    """An interrupted run is taken up in the same notebook while the first one still exists."""
    records = [{"prompt": f"{name} has 4 7 apples", "answer": "9"} for name in ("ana", "ben")]
    task = opd.tasks.from_records(records, test=1, max_new_tokens=2)
    first = opd.distill(
        make_policy(0), make_policy(1), task, batch=1, steps=2, save=tmp_path, save_every=1,
        quiet=True,
    )  # fmt: skip
    next(first)
    second = opd.resume(tmp_path, make_policy(0), make_policy(1), task, quiet=True)
    second.train()
    assert (tmp_path / ".lock").exists()  # the first one holds it
    del first
    import gc

    gc.collect()
    assert not (tmp_path / ".lock").exists()
