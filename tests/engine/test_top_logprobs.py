"""Some log-probs of a distribution against all of them: what a served teacher gives must mean what
a local one does.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import opdlab as opd
from opdlab import GRPO, OPD, Policy, TopK, errors, what_if
from opdlab.engine.batch import Batch
from opdlab.engine.columns import flatten
from opdlab.engine.passes import compute, gradient
from opdlab.engine.rows import Rows
from opdlab.engine.signals import cheap, full
from opdlab.losses.divergences import forward_kl, reverse_kl
from opdlab.models.graded import RESOLUTION, TopLogprobs
from opdlab.training.rehearsal import rehearse


def cut(logp: torch.Tensor, token: torch.Tensor, k: int) -> TopLogprobs:
    """What a server would give of `logp [n, V]`."""
    top, ids = logp.topk(k, -1)
    return TopLogprobs(ids, top, logp.gather(-1, token[:, None])[:, 0], token, logp.shape[-1])


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    student, teacher = (3 * torch.randn(40, 30).double() for _ in range(2))
    return student.log_softmax(-1), teacher.log_softmax(-1), torch.randint(30, (40,))


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize(
    ("asked", "given"), [(1, 1), (5, 5), (5, 12), (29, 29), (30, 30), (64, 30)]
)
def test_a_coarse_support_is_that_of_the_whole_distribution(tail, asked, given, pair):
    student, teacher, token = pair
    support = TopK(asked, by="teacher", tail=tail)
    want = Rows({"student": student, "teacher": teacher}, token).on("teacher", support)
    got = Rows({"student": student, "teacher": cut(teacher, token, given)}, token).on(
        "teacher", support
    )
    torch.testing.assert_close(got[0], want[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got[1].exp(), want[1].exp(), rtol=1e-9, atol=2 * RESOLUTION)
    known = want[1].exp() > 1e-5
    torch.testing.assert_close(got[1][known], want[1][known], rtol=1e-9, atol=1e-6)


def test_the_sampled_token_is_known_inside_and_outside_the_top(pair):
    student, teacher, token = pair
    rows = Rows({"student": student, "teacher": cut(teacher, token, 3)}, token)
    assert torch.equal(rows.logp_of("teacher"), teacher.gather(-1, token[:, None])[:, 0])
    inside = (cut(teacher, token, 3).ids == token[:, None]).any(-1)
    assert 0 < inside.sum() < len(token)


@given(st.integers(0, 10_000), st.integers(1, 9), st.floats(0.1, 30))
def test_the_tail_is_right_to_what_float32_shows(seed, k, scale):
    generator = torch.Generator().manual_seed(seed)
    logp = (scale * torch.randn(8, 10, generator=generator).double()).log_softmax(-1)
    token = torch.randint(10, (8,), generator=generator)
    some = cut(logp.float(), token, k)
    true = logp.scatter(-1, some.ids, -math.inf).exp().sum(-1)
    tail = some.tail().double().exp()
    assert (tail > 0).all()
    assert ((tail - true).abs() <= 1e-6 * true + 2 * RESOLUTION).all()
    outside = (some.ids != token[:, None]).all(-1)
    assert (tail[outside] >= some.sampled[outside].double().exp() * (1 - 1e-5)).all()
    assert (tail <= (10 - k) * some.top[:, -1].double().exp() * (1 + 1e-5)).all()


def test_the_whole_vocabulary_leaves_no_tail(pair):
    _, teacher, token = pair
    assert cut(teacher, token, 30).tail().isneginf().all()


def test_what_is_not_known_is_an_error_that_says_what_is(pair):
    student, teacher, token = pair
    rows = Rows({"student": student, "teacher": cut(teacher, token, 4)}, token)
    for ask in (lambda: rows.teacher, lambda: rows["teacher"], lambda: rows.on("teacher", TopK(2))):
        with pytest.raises(
            errors.PartialDistribution,
            match=(
                r"whole distribution of 'teacher', but its server gives the 4 likeliest of 30"
                r" tokens and the sampled one\. "
                r"Use OPD\(top_k=TopK\(4, by='teacher'\)\), OPD\(estimator='sampled'\), or rows\.on"
            ),
        ):
            ask()
    with pytest.raises(
        errors.PartialDistribution,
        match=(
            r"wants 5 tokens of 'teacher', whose server gives 4\. Use TopK\(4, by='teacher'\), or "
        ),
    ):
        rows.on("teacher", TopK(5, by="teacher"))


class Served:
    """A teacher as `opdlab.teachers` has them, on a local model: it grades in part."""

    def __init__(self, policy: Policy, k: int) -> None:
        self.policy, self.k, self.graded = policy, k, 0

    def grade(self, rollout: opd.Rollout) -> TopLogprobs:
        self.graded += 1
        return cut(self.policy.log_probs(rollout), rollout.ids[rollout.mask], self.k)


@pytest.mark.parametrize("chunk", [None, 1, 7])
@pytest.mark.parametrize(
    "method",
    [
        OPD(top_k=TopK(6, by="teacher")),
        OPD("forward_kl", top_k=TopK(3, by="teacher", tail="renormalize")),
        OPD(estimator="sampled"),
        OPD(estimator="sampled", discount=0.9),
    ],
    ids=["top-k", "renormalized", "sampled", "returns"],
)
def test_the_engine_gives_the_gradient_of_a_local_teacher(method, chunk, student, teacher, prompts):
    rollout = student.sample(prompts, n=2, max_new_tokens=6)
    results = []
    for grader in (teacher, Served(teacher, 6)):
        batch = Batch(rollout, {"student": student, "teacher": grader})
        columns = {
            name: flatten(batch, name, column) for name, column in method.plan(batch).items()
        }
        states = {name: batch.states(name) for name in ("student", "teacher")}
        results.append(
            gradient(
                method.loss, states, batch.token, torch.ones(rollout.tokens), columns, cheap, chunk
            )
        )
    torch.testing.assert_close(results[1].loss, results[0].loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[1].gradient, results[0].gradient, rtol=1e-4, atol=1e-5)
    assert results[0].gradient.abs().max() > 0.1


def test_signals_are_a_lower_bound_under_their_own_name(student, teacher, prompts):
    rollout = student.sample(prompts, max_new_tokens=8)
    local, served = (
        Batch(rollout, {"student": student, "teacher": t}) for t in (teacher, Served(teacher, 5))
    )
    assert torch.allclose(served.signals["teacher_logp"], local.signals["teacher_logp"], atol=1e-5)
    assert "teacher_reverse_kl" not in served.signals
    bound, true = served.signals["teacher_coarse_reverse_kl"], local.signals["teacher_reverse_kl"]
    assert (bound <= true + 1e-4).all()
    assert bound.sum() > 0.1 * true.sum() > 0
    with pytest.raises(errors.PartialDistribution):
        compute(
            full(4), {name: served.states(name) for name in ("student", "teacher")}, served.token
        )


@opd.method(needs=("teacher",))
def own(rows):
    return forward_kl(rows.student, rows.teacher)


def planned(batch: Batch) -> dict[str, torch.Tensor]:
    return {"gap": batch.map(lambda rows: reverse_kl(rows.student, rows.teacher))}


def by_signal(batch: Batch) -> dict[str, torch.Tensor]:
    return {"gap": batch.signals["teacher_reverse_kl"]}


UNFIT = {
    "full": OPD(),
    "user": own,
    "value": OPD(estimator="sampled", baseline="value"),
    "student's support": OPD(top_k=TopK(3)),
    "too many": OPD(top_k=TopK(9, by="teacher")),
    "plan": opd.method(plan=planned)(lambda rows: rows.gap * rows.logp),
    "signal": opd.method(plan=by_signal)(lambda rows: rows.gap * rows.logp),
}


@pytest.mark.parametrize("name", UNFIT)
def test_an_unfit_loss_is_refused_when_the_run_is_made(name, make_policy):
    served, task = Served(make_policy(1), 4), opd.tasks.market()
    with pytest.raises(errors.PartialDistribution, match="teacher"):
        opd.distill(make_policy(0), served, task, method=UNFIT[name], quiet=True)
    assert served.graded == 0


def test_a_fit_loss_is_not_refused(student, prompts):
    served = Served(student, 4)
    for method in (
        OPD(top_k=TopK(4, by="teacher")),
        OPD(estimator="sampled"),
        GRPO(),
        opd.method()(lambda rows: rows.nobody),
    ):
        rehearse(method, {"student": student, "teacher": served}, opd.tasks.market(), prompts[0])
    rehearse(OPD(), {"student": student, "teacher": student}, opd.tasks.market(), prompts[0])
    assert served.graded == 0


def test_a_signal_that_needs_everything_says_what_there_is(student, teacher, prompts):
    batch = Batch(
        student.sample(prompts, max_new_tokens=4),
        {"student": student, "teacher": Served(teacher, 5)},
    )
    for name in ("teacher_reverse_kl", "teacher_entropy", "teacher_top"):
        with pytest.raises(
            errors.PartialDistribution,
            match=(
                rf"signal '{name}' needs the whole distribution of 'teacher', whose server gives"
                r" its 5 likeliest tokens and the sampled "
                r"one\. There are teacher_logp, teacher_overlap, teacher_coarse_reverse_kl\."
            ),
        ):
            batch.signals[name]
        assert name not in batch.signals
    assert (
        batch.signals["student_entropy"].shape
        == batch.signals["teacher_overlap"].shape
        == batch.mask.shape
    )


def test_a_server_is_scored_with_what_it_tells(student, teacher, prompts):
    rollout = student.sample(prompts, max_new_tokens=6)
    served, local = (
        opd.score(rollout, student, Served(teacher, 5), k=4),
        opd.score(rollout, student, teacher, k=4),
    )
    for name in ("teacher_logp", "student_entropy", "teacher_overlap", "student_rank"):
        np.testing.assert_allclose(served.column(name), local.column(name), rtol=1e-4, atol=1e-5)
    assert (
        served.column("teacher_coarse_reverse_kl") <= local.column("teacher_reverse_kl") + 1e-4
    ).all()
    assert not {"teacher_reverse_kl", "teacher_top", "teacher_entropy"} & set(
        served.table.column_names
    )
    assert served.column("support").tolist() == local.column("support").tolist()
    assert "teacher" in repr(opd.viz.TokenLens(served))
    assert what_if(served, lambda rows: -rows.logp).column("loss") == pytest.approx(
        -served.column("student_logp"), abs=1e-5
    )
    with pytest.raises(
        errors.PartialDistribution,
        match=r"no 'teacher'.*no top tokens of 'teacher', which gave only some log-probs",
    ):
        what_if(served, lambda rows: reverse_kl(rows.student, rows.teacher))
