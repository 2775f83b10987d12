"""Damaged traces, checkpoints and caches: refused, or read with the numbers that were written.

Sixty random damages of each kind in `make test`, a thousand in `make stress`.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from stress import times

import opdlab as opd
from opdlab import Trace
from opdlab.errors import DamagedFile, OpdlabError
from opdlab.support.tensor_files import read_tensors
from opdlab.teachers.cache import Cache, key_of, rescue
from opdlab.training import checkpoint

DAMAGES = times(60, 1000)


def flip(data: bytes, at: random.Random) -> bytes:
    i = at.randrange(len(data))
    return data[:i] + bytes([data[i] ^ (1 << at.randrange(8))]) + data[i + 1 :]


def flip_near_the_end(data: bytes, at: random.Random) -> bytes:
    """Parquet keeps names and places at the end."""
    start = max(0, len(data) - 6000)
    return data[:start] + flip(data[start:], at)


def flip_near_the_start(data: bytes, at: random.Random) -> bytes:
    """SQLite and safetensors keep names and places at the start."""
    return flip(data[:4200], at) + data[4200:]


def overwrite(data: bytes, at: random.Random) -> bytes:
    i, size = at.randrange(len(data)), at.randrange(1, 600)
    return (data[:i] + at.randbytes(size) + data[i + size :])[: max(len(data), 1)]


def blank(data: bytes, at: random.Random) -> bytes:
    i, size = at.randrange(len(data)), at.choice([16, 512, 4096])
    return data[:i] + bytes(min(size, len(data) - i)) + data[i + size :]


def cut(data: bytes, at: random.Random) -> bytes:
    return data[: at.randrange(len(data))]


def cut_out(data: bytes, at: random.Random) -> bytes:
    i = at.randrange(len(data))
    return data[:i] + data[i + at.randrange(1, 600) :]


def insert(data: bytes, at: random.Random) -> bytes:
    i = at.randrange(len(data))
    return data[:i] + at.randbytes(at.randrange(1, 40)) + data[i:]


def repeat(data: bytes, at: random.Random) -> bytes:
    """One page written over another, as by a confused disk."""
    i, j = at.randrange(len(data)), at.randrange(len(data))
    page = data[i : i + 512]
    return (data[:j] + page + data[j + len(page) :])[: len(data)]


WAYS = (
    flip,
    flip_near_the_end,
    flip_near_the_start,
    overwrite,
    blank,
    cut,
    cut_out,
    insert,
    repeat,
)


def damage_often(path: Path, check: Callable[[], bool], often: int = DAMAGES) -> int:
    """Damage a file in many ways, one at a time; return how often `check` said it was refused."""
    whole, refused = path.read_bytes(), 0
    for number in range(often):
        at = random.Random(number)
        damaged = at.choice(WAYS)(whole, at)
        path.write_bytes(damaged)
        try:
            is_refused = check()
        except Exception as error:
            raise AssertionError(f"damage {number}: {error!r}") from error
        refused += is_refused
    path.write_bytes(whole)
    return refused


@pytest.fixture(scope="module")
def policies() -> tuple[opd.Policy, opd.Policy]:
    from opdlab.tasks.market import model

    return model("student"), model("teacher")


def test_traces(policies, tmp_path):
    student, teacher = policies
    rollout = student.sample(opd.tasks.market().prompts(3), max_new_tokens=12)
    trace = opd.score(rollout, student, teacher)
    path = trace.save(tmp_path / "t.parquet")
    right = Trace.load(path)
    assert right.meta == json.loads(json.dumps(trace.meta))

    def is_refused() -> bool:
        try:
            found = Trace.load(path)
        except DamagedFile:
            return True
        assert found.meta == right.meta
        assert found.table.column_names == right.table.column_names
        assert found.table.equals(right.table)
        return False

    assert damage_often(path, is_refused) > DAMAGES / 2


def test_caches(tmp_path):
    path = tmp_path / "c.sqlite"
    cache = Cache(path)
    answers = {key_of(i): {"text": f"answer {i} " * (i % 40), "finish": "stop"} for i in range(60)}
    for key, answer in answers.items():
        cache.put(key, answer)
    assert cache.get(key_of(3)) == answers[key_of(3)]
    del cache

    def is_refused() -> bool:
        for left in tmp_path.glob("c.sqlite-*"):
            left.unlink()
        try:
            found = {key: Cache(path).get(key) for key in [*answers][::7]}
        except OpdlabError:
            return True
        # A file of nothing is a new cache; anything else would be lost in silence.
        assert found == {key: answers[key] for key in found}
        return False

    whole = path.read_bytes()
    assert damage_often(path, is_refused) > DAMAGES / 4
    # What is left of it can be saved.
    start = whole.index(b"answer 31 answer 31")
    path.write_bytes(whole[:start] + b"\xff" * 5000 + whole[start + 5000 :])
    with pytest.raises(DamagedFile, match=r"answers are lost|malformed"):
        Cache(path).get(key_of(1))
    saved = rescue(path, tmp_path / "new.sqlite")
    assert 0 < saved < 60
    new = Cache(tmp_path / "new.sqlite")
    assert sum(new.get(key) == answer for key, answer in answers.items()) == saved


@pytest.fixture
def saved(make_policy, tmp_path) -> Path:
    task = opd.tasks.from_records(
        [{"prompt": f"{name} has 4 7 apples", "answer": "9"} for name in ("ana", "ben", "cleo")],
        test=1,
        max_new_tokens=4,
    )
    options = {"batch": 2, "steps": 2, "quiet": True, "save": tmp_path / "run", "save_every": 1}
    opd.distill(make_policy(0), make_policy(1), task, **options).train()
    return tmp_path / "run"


def contents(folder: Path) -> dict[str, object]:
    """All that a resumed run takes from a checkpoint."""
    tensors = {
        f"{path.name}/{name}": value
        for path in sorted(folder.glob("*.safetensors"))
        for name, value in read_tensors(path).items()
    }
    said = {name: checkpoint.read_json(folder / name) for name in ("run.json", "history.json")}
    return {**tensors, **said}


def test_checkpoints(saved):
    folder = saved / "step-000002"
    right = contents(folder)
    files = sorted(path for path in folder.iterdir() if path.stat().st_size)

    def is_refused() -> bool:
        try:
            found = contents(checkpoint.find_checkpoint(saved, step=2))
        except DamagedFile:
            return True
        assert found.keys() == right.keys()
        for name, value in right.items():
            same = (
                torch.equal(found[name], value)
                if isinstance(value, torch.Tensor)
                else found[name] == value
            )
            assert same, name
        return False

    often = -(-DAMAGES // len(files))
    for path in files:
        refused = damage_often(path, is_refused, often)
        # In the manifest, a damage may change nothing but the space between words.
        assert refused >= often - (often if path.name == "manifest.json" else 1), path.name


@pytest.mark.parametrize(
    "manifest",
    [[], "text", None, 7, {}, {"run.json": 3}, {"run.json": ["a"], "history.json": [None]}],
)
def test_a_manifest_of_the_wrong_type_is_damage(saved, manifest):
    (saved / "step-000002" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedFile, match=r"manifest\.json .*Resume from an earlier one"):
        checkpoint.find_checkpoint(saved, step=2)


def test_a_file_that_is_not_in_the_manifest_is_damage(saved):
    (saved / "step-000002" / "ema.safetensors").write_bytes(b"")
    with pytest.raises(DamagedFile, match=r"ema\.safetensors is not in the manifest"):
        checkpoint.find_checkpoint(saved)


@pytest.mark.parametrize("left", ["nothing", "an empty manifest", "files without a manifest"])
def test_an_empty_newer_checkpoint_falls_back_to_the_older_one_with_a_warning(saved, left):
    newest = saved / "step-000002"
    if left == "nothing":
        shutil.rmtree(newest)
        newest.mkdir()
    elif left == "an empty manifest":
        (newest / "manifest.json").write_bytes(b"")
    else:
        (newest / "manifest.json").unlink()
    with pytest.warns(UserWarning, match=r"step-000002 in .* holds no complete checkpoint"):
        assert checkpoint.find_checkpoint(saved) == saved / "step-000001"
    with pytest.raises(DamagedFile):
        checkpoint.find_checkpoint(saved, step=2)
