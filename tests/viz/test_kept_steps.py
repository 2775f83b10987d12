"""Kept steps: the table and the tokens of every step are those of its trace."""

from __future__ import annotations

import numpy as np
import pytest
from viz.test_run_board import troubled
from viz.traces import made, several

from opdlab.errors import InvalidValue
from opdlab.viz import RunBoard, payload
from opdlab.viz.kept_steps import ROOM

WORDS = [b" a", b" b", b" c"]


def trace(seed: int):
    parts = [made(WORDS, seed=seed + i, prompt=p) for i, p in enumerate(("one", "two", "one"))]
    rewards = np.repeat([1.0, 0.0, 0.5], len(WORDS))
    return several(*parts).with_columns(reward=rewards)


def test_every_step_has_its_rollouts_by_prompt(tmp_path):
    second = trace(10)
    board = RunBoard(troubled(), traces={20: second.save(tmp_path / "s.parquet"), 0: trace(0)})
    data = payload.unpack(payload.pack(board.data()))
    assert [one["step"] for one in data["kept"]] == [0, 20]
    rollouts = data["kept"][1]["rollouts"]
    assert [one["prompt"] for one in rollouts] == ["one", "one", "two"]
    assert [one["reward"] for one in rollouts] == [1.0, 0.5, 0.0]
    kl = second.column("teacher_reverse_kl")
    assert rollouts[1]["kl"] == pytest.approx(kl[6:9].mean())
    ratio = second.column("teacher_logp") - second.column("student_logp")
    first, size = rollouts[1]["first"], rollouts[1]["size"]
    drawn = data["channel"]["values"][first : first + size]
    np.testing.assert_allclose(drawn, ratio[6:9], rtol=2e-3)
    ids = [data["text"]["id"][i] for i in data["text"]["index"][first : first + size]]
    assert ids == second.column("token_id")[6:9].tolist()


def test_a_page_carries_as_many_tokens_as_fit():
    long = [several(*[made(WORDS * 700, seed=i) for i in range(6)]) for _ in range(2)]
    data = RunBoard(troubled(), traces=dict(enumerate(long))).data()
    assert len(data["text"]["index"]) <= ROOM
    carried = [one["first"] >= 0 for step in data["kept"] for one in step["rollouts"]]
    assert 0 < sum(carried) < len(carried)


def test_a_board_without_traces_stays_as_it_was():
    assert "kept" not in RunBoard(troubled()).data()


@pytest.mark.parametrize("given", [3, "run", {"a": made(WORDS)}, {-1: made(WORDS)}, {0: 3}])
def test_what_are_no_traces_is_refused(given):
    with pytest.raises(InvalidValue):
        RunBoard(troubled(), traces=given)
