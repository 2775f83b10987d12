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
from stress import times

import opdlab as opd

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
