"""Styles: visits and scores against sampling-free sums, and OmniOPD's step in expectation."""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks.maps import omniopd
from opdlab.errors import InvalidValue
from opdlab.exact.worlds import StyleWorld
from opdlab.exact.worlds.styles import LOOP, LOOPING, OTHER, OWN, VOCAB, spell
from opdlab.methods.omniopd import posterior

WORLD = StyleWorld(style=1.5, trap=0.6, words=3, seed=5)


def test_tokens_are_spelled_apart_and_lead_where_they_should():
    assert len({spell(i) for i in range(VOCAB)}) == VOCAB
    assert StyleWorld.follow(torch.tensor([0, 4, LOOP])).tolist() == [OTHER, OWN, LOOPING]


def test_visits_accuracy_and_form_are_sums_over_all_texts():
    logits = WORLD.student()
    p = logits.softmax(-1)
    visits = torch.zeros(3, 3, dtype=torch.float64)
    accuracy = own_form = 0.0
    for text in itertools.product(range(VOCAB), repeat=3):
        state, mass, states = OWN, 1.0, []
        for t, token in enumerate(text):
            states.append(state)
            mass *= p[t, state, token].item()
            state = int(StyleWorld.follow(torch.tensor(token)))
        for t, token in enumerate(text):
            visits[t, states[t]] += mass
            accuracy += mass * (token != LOOP and token % 4 == WORLD.right[t].item()) / 3
            own_form += mass * (token < 4) / 3
    torch.testing.assert_close(WORLD.visits(logits), visits)
    assert WORLD.accuracy(logits).item() == pytest.approx(accuracy)
    assert WORLD.own_form(logits).item() == pytest.approx(own_form)


def test_the_teacher_is_surest_after_its_own_form_and_loops_as_the_trap_says():
    teacher = WORLD.teacher().exp()
    right = WORLD.right[:, None]
    hit = [
        (teacher[:, s].gather(1, right) + teacher[:, s].gather(1, right + 4)).mean().item()
        for s in (OWN, OTHER)
    ]
    assert hit[0] > hit[1]
    torch.testing.assert_close(
        teacher[:, LOOPING, LOOP], torch.full((3,), 0.6, dtype=torch.float64)
    )
    assert not StyleWorld(unaligned=1.0).graded.any()
    assert StyleWorld(unaligned=0.5, words=8).graded.sum() == 4


@pytest.mark.parametrize("n", [1, 4])
def test_a_step_of_omniopd_is_right_in_expectation(n):
    """20 000 texts: audited rows move by E[w (p - onehot)], summed over all pairs of tokens.

    w is `posterior` of the method; the first word has the highest entropy in all texts, so it is
    always audited. Within five standard errors of a sum of bounded terms, decided in advance.
    """
    logits = WORLD.student()
    logits[0] *= 0.1
    logits[1:] *= 3
    logp, teacher = logits.log_softmax(-1), WORLD.teacher()
    phi = omniopd.table_of("edit")
    p, q = logp[0, OWN].exp(), teacher[0, OWN].exp()
    weight = posterior(n * (phi @ q), n, logp[0, OWN], 1.0)
    want = p * (p * weight).sum() - p * weight
    texts, omniopd.TEXTS = omniopd.TEXTS, 20_000
    try:
        random = torch.Generator().manual_seed(1)
        found = omniopd.omniopd_pull(logp[None], logp[None], teacher[None], phi, n, random)
    finally:
        omniopd.TEXTS = texts
    assert (found[0, 0, OWN] - want).abs().max() < 5 * 0.5 / 20_000**0.5


@pytest.mark.parametrize(
    ("name", "pair", "value"),
    [
        ("edit", (0, 4), 0.5),
        ("rouge1", (0, 4), 0.0),
        ("content", (0, 4), 1.0),
        ("edit", (0, 1), 0.5),
    ],
)
def test_similarities_see_contents_and_forms(name, pair, value):
    assert omniopd.table_of(name)[pair].item() == value


def test_knobs_out_of_range_are_refused():
    with pytest.raises(InvalidValue, match="StyleWorld got trap"):
        StyleWorld(trap=2)
