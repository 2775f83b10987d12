"""Files are replaced whole, and what a killed process left is removed."""

import os
import subprocess
import sys
import time

import pytest

from opdlab.support import files


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path):
    path = files.write_file(tmp_path / "new" / "a.txt", b"old")

    def fail_half_way():
        with files.replacing(path) as partial:
            partial.write_bytes(b"half of the n")
            assert path.read_bytes() == b"old"
            raise KeyError

    with pytest.raises(KeyError):
        fail_half_way()
    assert path.read_bytes() == b"old"
    files.write_file(path, b"new", flush=True)
    assert [entry.name for entry in path.parent.iterdir()] == ["a.txt"]
    assert path.read_bytes() == b"new"


def test_what_a_killed_process_left_is_removed_by_the_next_that_writes_the_file(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    names = {
        "abandoned": f".a.txt.{gone.pid}.partial",
        "young": f".a.txt.{gone.pid - 1 if gone.pid > 2 else 2}0000000.partial",
        "of a process that lives": f".a.txt.{os.getppid()}.partial",
        "of another file": f".b.txt.{gone.pid}.partial",
        "no partial file": ".a.txt.old.partial",
    }
    for kind, name in names.items():
        (tmp_path / name).write_bytes(b"x")
        if kind != "young":
            past = time.time() - 2 * files.ABANDONED_AFTER
            os.utime(tmp_path / name, (past, past))
    files.write_file(tmp_path / "a.txt", b"x")
    left = {entry.name for entry in tmp_path.iterdir()}
    assert left == {"a.txt", *names.values()} - {names["abandoned"]}
