"""Per-token numbers against plain sums over full log-probs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opdlab.engine import signals
from opdlab.engine.rows import Rows
from opdlab.losses.divergences import entropy, forward_kl, jensen_shannon, reverse_kl


def make_rows(seed: int = 0, n: int = 6, vocab: int = 10) -> Rows:
    g = torch.Generator().manual_seed(seed)
    logp = {
        name: (2 * torch.randn(n, vocab, generator=g)).log_softmax(-1)
        for name in ("student", "teacher", "teacher+hint")
    }
    return Rows(logp, torch.randint(vocab, (n,), generator=g))


def test_cheap():
    rows = make_rows()
    got = signals.cheap(rows)
    assert set(got) == {
        "student_logp",
        "teacher_logp",
        "teacher+hint_logp",
        "student_entropy",
        "teacher_reverse_kl",
        "teacher+hint_reverse_kl",
    }
    at = torch.arange(6), rows.token
    torch.testing.assert_close(got["teacher+hint_logp"], rows["teacher+hint"][at])
    torch.testing.assert_close(got["student_entropy"], entropy(rows.student))
    torch.testing.assert_close(
        got["teacher+hint_reverse_kl"], reverse_kl(rows.student, rows["teacher+hint"])
    )


def test_full_divergences():
    rows = make_rows()
    got = signals.full(3)(rows)
    torch.testing.assert_close(got["teacher_forward_kl"], forward_kl(rows.student, rows.teacher))
    torch.testing.assert_close(got["teacher_jsd"], jensen_shannon(rows.student, rows.teacher))
    torch.testing.assert_close(got["teacher_entropy"], entropy(rows.teacher))
    assert not {"student_forward_kl", "student_jsd", "student_overlap"} & set(got)


@given(seed=st.integers(0, 10**6), vocab=st.integers(2, 12), k=st.integers(1, 14))
def test_support_and_tail_hold_all_mass(seed, vocab, k):
    rows = make_rows(seed, vocab=vocab)
    got = signals.full(k)(rows)
    for name, logp in rows.distributions.items():
        whole = got[f"{name}_top"].exp().sum(-1) + got[f"{name}_tail"]
        torch.testing.assert_close(whole, torch.ones(6), rtol=0, atol=1e-5)
        for ids, top, row in zip(got["support"].tolist(), got[f"{name}_top"], logp, strict=True):
            kept = [i for i in ids if i >= 0]
            assert len(set(kept)) == len(kept)
            assert set(row.topk(min(k, vocab)).indices.tolist()) <= set(kept)
            assert all(top[j] == (row[i] if i >= 0 else -torch.inf) for j, i in enumerate(ids))
    assert torch.equal(got["support"][:, 0], rows.token)


@pytest.mark.parametrize("vocab", [1, 7, 255, 256, 257, 600, 768])
def test_the_likeliest_token_is_the_first_of_the_largest(vocab):
    noise = torch.Generator().manual_seed(vocab)
    distinct = torch.randn(40, vocab, generator=noise)
    ties = torch.randint(3, (40, vocab), generator=noise).float()
    ruled_out = torch.full((1, vocab), -torch.inf)
    for logp in (distinct, ties, ruled_out, distinct[:0]):
        first = [row.tolist().index(row.max()) for row in logp]
        assert signals.likeliest_token(logp).tolist() == first


def test_ranks_count_from_one():
    rows = make_rows()
    got = signals.full(2)(rows)
    for name, logp in rows.distributions.items():
        order = logp.argsort(-1, descending=True)
        want = [
            row.tolist().index(t) + 1 for row, t in zip(order, rows.token.tolist(), strict=True)
        ]
        assert got[f"{name}_rank"].tolist() == want


def test_overlap_is_the_share_of_common_favourites():
    student, teacher = torch.tensor([[4.0, 3, 2, 1, 0]]), torch.tensor([[0.0, 3, 2, 1, 4]])
    rows = Rows(
        {"student": student.log_softmax(-1), "teacher": teacher.log_softmax(-1)}, torch.tensor([0])
    )
    assert [signals.full(k)(rows)["teacher_overlap"].item() for k in (1, 2, 4)] == [0, 0.5, 0.75]


@pytest.mark.parametrize("n", [0, 1])
def test_shapes_do_not_depend_on_the_number_of_tokens(n):
    assert {k: v.shape[1:] for k, v in signals.full(3)(make_rows(n=n)).items()} == {
        k: v.shape[1:] for k, v in signals.full(3)(make_rows()).items()
    }
