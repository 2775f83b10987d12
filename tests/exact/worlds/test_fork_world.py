"""Forks: the world's expectations against enumeration, and its windows against TOPD itself."""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks.maps import topd
from opdlab import OPD, TOPD, Prompt, exact
from opdlab.errors import InvalidValue
from opdlab.exact.table import Letters, make_rollout, starts
from opdlab.exact.worlds import ForkWorld
from opdlab.exact.worlds.forks import A, B

WORLD = ForkWorld(depth=2, window=2, seed=4)  # texts of 5 tokens: fork, two steps, room
LENGTH, V = 5, WORLD.vocab


def states_of_prefixes() -> torch.Tensor:
    """The state that each prefix of a table of `LENGTH` tokens leads to; -1 where all is lost."""
    out = torch.full((starts(V, LENGTH),), -1)
    on_a, on_b = WORLD.steps
    table = exact.Table(torch.zeros(1, len(out), V, dtype=torch.float64), (Prompt("p"),), LENGTH)
    out[0] = WORLD.fork
    for branch, part in ((A, on_a), (B, on_b)):
        prefix = [branch]
        for state in range(part.start, part.stop):
            out[table.start(prefix)] = state
            prefix.append(int(WORLD.right[state]))
    return out


STATES = states_of_prefixes()


def tables() -> dict[str, exact.Table]:
    """The world as tables; where all is lost both sides like token 0 a little."""
    lost = torch.zeros(V, dtype=torch.float64)
    lost[0] = 0.5
    made = {}
    for name, rows in (("student", WORLD.student()), ("teacher", WORLD.teacher())):
        logits = torch.where((STATES < 0)[:, None], lost, rows[STATES.clamp(min=0)])
        made[name] = exact.Table(logits[None], (Prompt("p", id="p"),), LENGTH)
    return made


def by_state(gradient: torch.Tensor) -> torch.Tensor:
    on = STATES >= 0
    out = torch.zeros(len(WORLD.right), V, dtype=torch.float64)
    return out.index_add_(0, STATES[on], gradient[0][on])


def test_visits_and_accuracy_are_those_of_all_texts():
    student = tables()["student"]
    visits = exact.visits(student)[0]
    want = torch.zeros(len(WORLD.right), dtype=torch.float64)
    want.index_add_(0, STATES[STATES >= 0], visits[STATES >= 0])
    torch.testing.assert_close(WORLD.visits(WORLD.student()), want)
    on_a = WORLD.steps[A]
    right = [A, *WORLD.right[on_a].tolist()]
    end = visits[student.start(right)].item()
    assert WORLD.accuracy(WORLD.student()).item() == pytest.approx(end)


def test_the_step_of_opd_is_that_of_the_method():
    both = tables()
    texts = [list(body) for body in itertools.product(range(V), repeat=3)]
    rollout = both["student"].own(
        make_rollout(both["student"].prompts * len(texts), texts, Letters(V), 1, "student")
    )
    law = exact.law(both["student"], rollout)
    found = by_state(exact.gradient_on(OPD(), both, rollout, law))
    visits = WORLD.visits(WORLD.student())[:, None]
    want = visits * topd.pull_reverse_kl(WORLD.student().log_softmax(-1), WORLD.teacher())
    torch.testing.assert_close(found, want)


PATHS = {
    "branch B": ([B, 6, 7, 0, 0], "fork"),
    "an error on A": ([A, 2, 9, 0, 0], "a1"),
    "an error at once": ([A, 9, 0, 0, 0], "a0"),
    "an error on B": ([B, 9, 0, 0, 0], "b0"),
    "another token": ([5, 0, 0, 0, 0], "fork"),
}


@pytest.mark.parametrize("path", PATHS)
def test_a_window_is_where_topd_has_it_and_teaches_what_topd_teaches(path):
    """TOPD's own plan on the text and one without a fault, less the plan without the term."""
    text, place = PATHS[path]
    on_a, on_b = WORLD.steps
    start = {"fork": WORLD.fork, "a0": on_a.start, "a1": on_a.start + 1, "b0": on_b.start}[place]
    both = tables()
    good = [A, 2, 3, 0, 0]
    rollout = both["student"].own(
        make_rollout(both["student"].prompts * 2, [text, good], Letters(V), 1, "student")
    )
    method = TOPD(
        window=2, share=0.01, quantile=0.0, targets="diagonal", embedding="onehot", weight=1.0
    )
    weight = torch.full((2,), 0.1, dtype=torch.float64)  # the mean over ten tokens
    found = exact.gradient_on(method, both, rollout, weight)
    found = by_state(found - exact.gradient_on(OPD(), both, rollout, weight))
    want = torch.zeros_like(found)
    p = WORLD.student().softmax(-1)
    for state, target in topd.targets_of(WORLD, start, "topd_diagonal").items():
        follows_b = state in range(on_b.start, on_b.stop) and start == WORLD.fork
        if not (follows_b and text[0] != B):
            want[state] = target.sum() * p[state] - target
    torch.testing.assert_close(found, want)


def test_the_chance_of_each_point_is_that_of_the_texts_that_have_it():
    """Each text has one token of highest NLL; enumerated over fork and procedure."""
    both = tables()
    texts = [list(body) for body in itertools.product(range(V), repeat=3)]
    rollout = both["student"].own(
        make_rollout(both["student"].prompts * len(texts), texts, Letters(V), 1, "student")
    )
    law = exact.law(both["student"], rollout)
    nll = (
        -both["teacher"]
        .logp[both["teacher"].where(rollout)]
        .gather(-1, rollout.ids.reshape(-1, 1))
        .view(-1, 3)
    )
    rows = STATES[both["student"].where(rollout)[1]].view(-1, 3)
    want = torch.zeros(len(WORLD.right), dtype=torch.float64)
    for i in range(len(texts)):
        place = int(nll[i].masked_fill(rows[i] < 0, -1).argmax())
        if nll[i, place] > 1:
            want[rows[i, place]] += law[i]
    torch.testing.assert_close(WORLD.points(WORLD.student()), want)


def test_a_louder_wording_hides_the_fork():
    hidden = [
        ForkWorld(wordings=n, seed=2).points(ForkWorld(wordings=n, seed=2).student())[..., n]
        for n in (0, 2, 6)
    ]
    assert hidden[0] > hidden[1] > hidden[2] > 0


def test_knobs_out_of_range_are_refused():
    with pytest.raises(InvalidValue, match="ForkWorld got reach"):
        ForkWorld(reach=2)
