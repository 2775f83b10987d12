"""Rollouts as data: the tokens that the loss sees, and the turns that they belong to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from opdlab import Prompt
from opdlab.data.rollout import Rollout, concat_rollouts
from opdlab.errors import InvalidValue

LEARN = torch.tensor([[True, False, True, True], [True, True, False, False]])
TURN = torch.tensor([[0, 1, 2, 2], [0, 0, 0, 0]])


def written(lengths=(4, 2), n=1, **fields) -> Rollout:
    """A rollout made by hand, with ids 1, 2, 3, … row by row."""
    rows, width = len(lengths), max(*lengths, 1)
    ids = torch.arange(1, rows * width + 1).view(rows, width)
    size = torch.tensor(lengths)
    ids = ids * (torch.arange(width) < size[:, None])
    return Rollout(
        prompts=tuple(Prompt("a", id=str(i)) for i in range(rows)),
        ids=ids,
        lengths=size,
        logp=-ids.float(),
        entropy=ids.float(),
        finish=("stop",) * rows,
        texts=tuple(f"text {i}" for i in range(rows)),
        writer=("student",) * rows,
        n=n,
        **fields,
    )


def test_by_default_all_tokens_are_learned_in_one_turn():
    rollout = written()
    assert torch.equal(rollout.learn, rollout.mask)
    assert not rollout.turn.any()
    assert rollout.turn.dtype == torch.long
    assert rollout.learned.tolist() == [True] * rollout.tokens


def test_tokens_between_the_turns_are_not_learned():
    rollout = written(learn=LEARN, turn=TURN)
    assert rollout.learned.tolist() == [True, False, True, True, True, True]
    assert rollout.tokens == 6  # they are graded all the same


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"learn": LEARN[:, :3]}, r"learn of shape \[2, 3\] for ids of shape \[2, 4\]"),
        ({"learn": LEARN[0]}, r"learn of shape \[4\] for ids of shape \[2, 4\]"),
        ({"turn": TURN[:1]}, r"turn of shape \[1, 4\] for ids of shape \[2, 4\]"),
        ({"learn": LEARN.long()}, r"learn mask that is not boolean"),
        ({"learn": torch.ones(2, 4, dtype=torch.bool)}, r"is true in the padding"),
        ({"turn": TURN.float()}, r"turn of dtype torch\.float32\. Use whole numbers"),
        ({"turn": TURN - 1}, r"turn that is negative\. Number the turns from 0"),
    ],
)
def test_wrong_shapes_and_values_are_refused(fields, said):
    with pytest.raises(InvalidValue, match=said):
        written(**fields)


def test_rows_keep_what_is_learned():
    rollout = written(learn=LEARN, turn=TURN)
    back = rollout.select([1, 0])
    assert torch.equal(back.learn, LEARN[[1, 0]])
    assert torch.equal(back.turn, TURN[[1, 0]])
    short = rollout.select([1])
    assert short.ids.shape == (1, 2)
    assert torch.equal(short.learn, LEARN[1:, :2])
    empty = rollout.select([])
    assert (len(empty), empty.tokens) == (0, 0)


def test_only_whole_groups_stay_groups():
    rollout = written((1, 1, 1, 1), n=2)
    assert rollout.select([2, 3, 0, 1]).n == 2
    assert rollout.select([0, 1]).n == 2
    for which in ([0], [1, 0], [0, 2], [1, 2]):
        assert rollout.select(which).n == 1


def test_joining_pads_what_is_learned_with_false():
    wide, narrow = written(learn=LEARN, turn=TURN), written((1,))
    whole = concat_rollouts([narrow, wide])
    assert torch.equal(whole.learn[1:], LEARN)
    assert torch.equal(whole.turn[1:], TURN)
    assert whole.learn[0].tolist() == [True, False, False, False]
    assert whole.ids[0].tolist() == [1, 0, 0, 0]
    assert whole.completions() == [*narrow.completions(), *wide.completions()]
    assert torch.equal(whole.select([1, 2]).learn, LEARN)


def test_joining_keeps_n_and_vocabulary_where_all_agree():
    pair = written((1, 1), n=2, vocabulary="v")
    assert concat_rollouts([pair, pair]).n == 2
    assert concat_rollouts([pair, pair]).vocabulary == "v"
    assert concat_rollouts([pair, written()]).n == 1
    assert concat_rollouts([pair, replace(pair, vocabulary="w")]).vocabulary is None


def test_nothing_to_join_is_refused():
    with pytest.raises(InvalidValue, match="concat_rollouts got no rollouts"):
        concat_rollouts([])
