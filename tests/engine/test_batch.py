"""Batches: what `plan` sees, against plain log-probs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opdlab import Policy, Prompt, Task
from opdlab.engine.batch import Batch, return_to_go
from opdlab.engine.columns import flatten
from opdlab.engine.signals import full
from opdlab.errors import MissingPolicy, OpdlabError, TokenizerMismatch, UnknownName
from opdlab.losses.divergences import entropy, forward_kl, jensen_shannon, reverse_kl
from opdlab.models.text_rollouts import rollout_from_texts


@pytest.fixture(scope="module")
def batch(student, teacher, prompts) -> Batch:
    rollout = student.sample(prompts, n=2, max_new_tokens=10, seed=1)
    task = Task("apples", lambda n, seed, split: prompts[:n], lambda prompt, text: len(text) / 100)
    return Batch(rollout, {"student": student, "teacher": teacher}, task)


def test_map_equals_full_log_probs(batch, student, teacher):
    p, q = student.log_probs(batch.rollout), teacher.log_probs(batch.rollout)
    got = batch.map(
        lambda rows: {
            "kl": forward_kl(rows.student, rows.teacher),
            "top": rows.teacher.topk(3).values,
        }
    )
    torch.testing.assert_close(got["kl"][batch.mask], forward_kl(p, q), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got["top"][batch.mask], q.topk(3).values, rtol=1e-4, atol=1e-4)
    assert got["top"].shape == (*batch.mask.shape, 3)
    assert (got["kl"][~batch.mask] == 0).all()


def test_map_carries_only_what_is_needed(batch):
    assert (
        batch.map(lambda rows: torch.full((len(rows),), len(list(rows))), needs=("teacher",))[
            batch.mask
        ]
        .eq(1)
        .all()
    )


def test_signals(batch, student, teacher):
    p, q = student.log_probs(batch.rollout), teacher.log_probs(batch.rollout)
    want = {
        "student_logp": batch.rollout.logp[batch.mask],
        "teacher_logp": q.gather(-1, batch.token[:, None])[:, 0],
        "student_entropy": entropy(p),
        "teacher_reverse_kl": reverse_kl(p, q),
    }
    assert batch.signals.keys() == want.keys()
    for name, column in want.items():
        torch.testing.assert_close(batch.signals[name][batch.mask], column, rtol=1e-4, atol=1e-4)


def test_every_signal_of_full_is_computed_when_it_is_asked_for(batch, student, teacher):
    p, q = student.log_probs(batch.rollout), teacher.log_probs(batch.rollout)
    fresh = Batch(batch.rollout, batch.policies)
    want = {
        "teacher_entropy": entropy(q),
        "teacher_forward_kl": forward_kl(p, q),
        "teacher_jsd": jensen_shannon(p, q),
        "teacher_rank": (q > q.gather(-1, batch.token[:, None])).sum(-1) + 1,
        "student_rank": (p > p.gather(-1, batch.token[:, None])).sum(-1) + 1,
    }
    for name, column in want.items():
        assert name in fresh.signals
        assert fresh.signals[name].shape == batch.mask.shape
        torch.testing.assert_close(fresh.signals[name][batch.mask], column, rtol=1e-4, atol=1e-4)
    everything = fresh.map(full())
    for name, column in everything.items():
        torch.testing.assert_close(fresh.signals[name], column, rtol=1e-4, atol=1e-4)


def test_asking_for_one_signal_runs_no_other_policy(student, teacher, prompts):
    batch = Batch(
        student.sample(prompts, max_new_tokens=4), {"student": student, "teacher": teacher}
    )
    batch.signals["teacher_logp"]
    passes = []
    batch.signals._map = lambda fn, needs=None: passes.append(needs) or batch.map(fn, needs)
    batch.signals["teacher_entropy"]
    batch.signals["teacher_entropy"]
    batch.signals["student_logp"]
    assert passes == [["teacher"]]


def test_a_signal_that_does_not_exist_is_answered_with_those_that_do(batch):
    with pytest.raises(
        UnknownName,
        match=(
            r"no signal 'teacher_entrpy'; there are student_logp, .*teacher_entropy, .*batch\.map"
        ),
    ):
        batch.signals["teacher_entrpy"]
    assert batch.signals.get("reference_logp") is None
    assert isinstance(UnknownName("x"), (KeyError, OpdlabError))


def test_states_are_computed_once(batch):
    assert batch.states("teacher") is batch.states("teacher")
    assert not batch.states("student").hidden.requires_grad


def test_spread_and_flat_are_inverse(batch):
    flat = torch.randn(batch.rollout.tokens, 3)
    assert torch.equal(flatten(batch, "x", batch.spread(flat)), flat)
    assert batch.spread(flat)[~batch.mask].abs().sum() == 0
    assert batch.spread(torch.ones(batch.rollout.tokens, dtype=torch.bool)).equal(batch.mask)


def test_a_number_a_completion_is_one_for_all_its_tokens(batch):
    got = flatten(batch, "x", torch.arange(8.0))
    assert torch.equal(got, torch.arange(8.0).repeat_interleave(batch.rollout.lengths))


def test_columns_carry_no_gradient(batch):
    assert not flatten(batch, "x", torch.zeros(batch.mask.shape, requires_grad=True)).requires_grad


@pytest.mark.parametrize("shape", [(7,), (8, 3), (10, 8), ()])
def test_a_column_of_the_wrong_shape_is_refused(batch, shape):
    with pytest.raises(
        OpdlabError, match=r"column 'gate' with shape \[.*\] for a batch of \[8, 10\].*\[B, T, K\]"
    ):
        flatten(batch, "gate", torch.zeros(shape))


@pytest.mark.parametrize("name", ["logp", "token", "on", "teacher", "student"])
def test_a_column_that_hides_a_name_is_refused(batch, name):
    with pytest.raises(OpdlabError, match=f"column named '{name}'.*another name"):
        flatten(batch, name, torch.zeros(batch.mask.shape))


def test_columns_may_have_any_other_name(batch):
    for name in ("values", "keys", "items", "get"):
        flatten(batch, name, torch.zeros(batch.mask.shape))


def test_rewards_are_the_verifiers(batch):
    assert batch.rewards.tolist() == pytest.approx(
        [len(text) / 100 for text in batch.rollout.texts]
    )


def test_what_is_missing_is_named(batch):
    with pytest.raises(
        MissingPolicy,
        match=(
            r"no policy 'reference' here; there are student, teacher\. Name it in the method's"
            r" `needs`"
        ),
    ):
        batch.states("reference")
    with pytest.raises(MissingPolicy, match="no verifier"):
        Batch(batch.rollout, batch.policies).rewards  # noqa: B018


def test_an_empty_completion_has_no_tokens(make_model, make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    policy = Policy.of(make_model(12), tokenizer, eos=[])
    for texts, tokens in ((["", "a b"], 2), (["", ""], 0)):
        batch = Batch(
            rollout_from_texts(policy, [Prompt("a"), Prompt("b")], texts),
            {"student": policy, "teacher": policy},
        )
        assert batch.token.shape == (tokens,)
        assert batch.signals["teacher_reverse_kl"].shape == batch.mask.shape
        assert batch.signals["teacher_reverse_kl"].abs().max() < 1e-6


@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 4),
    width=st.integers(1, 6),
    discount=st.floats(0, 1),
)
def test_return_to_go_equals_the_naive_sum(seed, rows, width, discount):
    g = torch.Generator().manual_seed(seed)
    reward = torch.randn(rows, width, generator=g, dtype=torch.float64)
    mask = torch.arange(width) < torch.randint(0, width + 1, (rows, 1), generator=g)
    want = torch.zeros_like(reward)
    for b in range(rows):
        length = int(mask[b].sum())
        for t in range(length):
            want[b, t] = sum(discount ** (s - t) * reward[b, s] for s in range(t, length))
    torch.testing.assert_close(return_to_go(reward, mask, discount), want)


def test_a_rollout_of_another_tokenizer_is_not_graded(batch, make_policy, make_tokenizer):
    with pytest.raises(
        TokenizerMismatch, match=r"'teacher' cannot grade.*another tokenizer than that of"
    ):
        Batch(
            batch.rollout,
            {"student": batch.policies["student"], "teacher": make_policy(0, make_tokenizer())},
        ).states("teacher")
