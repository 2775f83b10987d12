"""Methods against exact expectations: every completion of a tiny vocabulary is enumerated."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from plans import plan_values

import opdlab
from opdlab import GRPO, OPD, SFT, Policy, Prompt, SequenceKD, Task, TopK
from opdlab.data.rollout import Rollout
from opdlab.engine.batch import Batch
from opdlab.engine.columns import flatten
from opdlab.engine.passes import gradient
from opdlab.errors import OpdlabError
from opdlab.losses import DIVERGENCES
from opdlab.losses.divergences import reverse_kl
from opdlab.methods import Method
from opdlab.models.graded import States

PROMPT = Prompt("a b c")
OPTIONS = {"alpha_divergence": {"alpha": 0.3}, "generalized_jsd": {"beta": 0.9, "normalize": True}}


@pytest.fixture(scope="module")
def pair(make_policy, make_tokenizer) -> tuple[Policy, Policy]:
    """A student and a teacher in float64 on twelve tokens, all weights trainable if asked."""
    policies = [
        make_policy(seed, make_tokenizer(), dtype=torch.float64, initializer_range=0.3)
        for seed in (0, 1)
    ]
    policies[0].weights.model.requires_grad_(True)
    return policies[0], policies[1]


def every_completion(student: Policy, length: int) -> tuple[Rollout, torch.Tensor]:
    """All completions of at most `length` tokens as one rollout, and their log-probs (with
    gradient), in float64.
    """
    bodies = [[]]
    for _ in range(length):
        bodies = [[*b, i] for b in bodies for i in range(12) if not b or b[-1] != 1] + [
            b for b in bodies if b and b[-1] == 1
        ]
    lengths = torch.tensor([len(b) for b in bodies])
    ids = torch.tensor([b + [0] * (length - len(b)) for b in bodies])
    none = torch.zeros(ids.shape, dtype=torch.float64)
    n = len(bodies)
    rollout = Rollout(
        (PROMPT,) * n, ids, lengths, none, none, ("stop",) * n, ("",) * n, ("student",) * n, n=n
    )
    logp = student.weights.head(student.hidden(rollout)).log_softmax(-1)
    own = none.masked_scatter(rollout.mask, logp.gather(-1, ids[rollout.mask][:, None])[:, 0])
    return replace(rollout, logp=own.detach()), own.sum(1)


def engine_gradient(
    method: OPD, student: Policy, teacher: Policy, rollout: Rollout, weight: torch.Tensor
) -> list[torch.Tensor]:
    """What a training step adds to the parameters: plan, loss pass, one backward pass."""
    student.weights.model.zero_grad()
    batch = Batch(rollout, {"student": student, "teacher": teacher})
    columns = {name: flatten(batch, name, column) for name, column in method.plan(batch).items()}
    hidden = student.hidden(rollout)
    states = {"student": States(hidden, student.weights.head), "teacher": batch.states("teacher")}
    result = gradient(
        method.loss, states, batch.token, weight.repeat_interleave(rollout.lengths), columns
    )
    hidden.backward(result.gradient.double())
    return [p.grad.clone() for p in student.weights.model.parameters() if p.grad is not None]


def close(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    assert len(got) == len(want) > 10
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert max(x.norm() for x in want) > 0.1


def slopes(value: torch.Tensor, policy: Policy) -> list[torch.Tensor]:
    return [
        g
        for g in torch.autograd.grad(
            value, list(policy.weights.model.parameters()), allow_unused=True
        )
        if g is not None
    ]


SAMPLED = {"plain": OPD(estimator="sampled"), "value": OPD(estimator="sampled", baseline="value")}


@pytest.mark.parametrize("name", SAMPLED)
def test_the_expected_policy_gradient_is_that_of_the_reverse_kl(name, pair):
    student, teacher = pair
    rollout, logp = every_completion(student, 1)
    assert logp.exp().sum().item() == pytest.approx(1)
    p, q = (x.weights.head(x.hidden(rollout.select([0]))).log_softmax(-1)[0] for x in pair)
    want = slopes(reverse_kl(p, q), student)
    close(engine_gradient(SAMPLED[name], student, teacher, rollout, logp.exp().detach()), want)


@pytest.mark.parametrize("name", SAMPLED)
def test_with_returns_it_is_that_of_the_sequence_kl(name, pair):
    """discount=1: KL between whole completions, differentiated through what is sampled first."""
    student, teacher = pair
    rollout, logp = every_completion(student, 2)
    assert logp.exp().sum().item() == pytest.approx(1)
    with torch.no_grad():
        theirs = teacher.log_probs(rollout).gather(-1, rollout.ids[rollout.mask][:, None])[:, 0]
        theirs = torch.zeros_like(rollout.logp).masked_scatter(rollout.mask, theirs).sum(1)
    want = slopes((logp.exp() * (logp - theirs)).sum(), student)
    close(
        engine_gradient(
            replace(SAMPLED[name], discount=1.0), student, teacher, rollout, logp.exp().detach()
        ),
        want,
    )


@pytest.mark.parametrize("name", SAMPLED)
def test_without_returns_it_is_that_of_the_full_loss(name, pair):
    """discount=0: both leave out how a token changes what comes after."""
    student, teacher = pair
    rollout, logp = every_completion(student, 2)
    full = engine_gradient(OPD(), student, teacher, rollout, logp.exp().detach())
    close(engine_gradient(SAMPLED[name], student, teacher, rollout, logp.exp().detach()), full)


def spread(method: OPD, student: Policy, teacher: Policy, length: int) -> float:
    """Expected squared length of a completion's gradient with respect to the hidden state of its
    first token.
    """
    rollout, logp = every_completion(student, length)
    batch = Batch(rollout, {"student": student, "teacher": teacher})
    columns = {name: flatten(batch, name, column) for name, column in method.plan(batch).items()}
    states = {name: batch.states(name) for name in ("student", "teacher")}
    norm = gradient(method.loss, states, batch.token, torch.ones(rollout.tokens), columns).columns[
        "grad_norm"
    ]
    first = rollout.lengths.cumsum(0) - rollout.lengths
    return float((logp.exp().detach() * norm[first] ** 2).sum())


@pytest.mark.parametrize("seed", range(4))
def test_the_value_baseline_cuts_the_variance(seed, make_policy, make_tokenizer):
    """The mean is the same, so the second moment tells.

    Soft students: one that is nearly sure of a token can lose by it.
    """
    student, teacher = (
        make_policy(2 * seed + i, make_tokenizer(), dtype=torch.float64, initializer_range=0.1)
        for i in (0, 1)
    )
    assert spread(SAMPLED["value"], student, teacher, 1) < 0.97 * spread(
        SAMPLED["plain"], student, teacher, 1
    )
    plain, value = (replace(SAMPLED[name], discount=1.0) for name in ("plain", "value"))
    assert spread(value, student, teacher, 2) < 0.6 * spread(plain, student, teacher, 2)


@pytest.fixture(scope="module")
def rollout(student, prompts) -> Rollout:
    return student.sample(prompts, n=2, max_new_tokens=6)


def run_loss(method, student: Policy, teacher: Policy, rollout: Rollout):
    batch = Batch(rollout, {"student": student, "teacher": teacher})
    states = {name: batch.states(name) for name in ("student", "teacher")}
    columns = (
        {name: flatten(batch, name, column) for name, column in method.plan(batch).items()}
        if hasattr(method, "plan")
        else {}
    )
    return gradient(method.loss, states, batch.token, torch.ones(rollout.tokens), columns)


@pytest.mark.parametrize("top_k", [None, TopK(5), TopK(5, by="teacher", tail="renormalize")])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_nothing_to_learn_from_oneself(name, top_k, student, rollout):
    result = run_loss(OPD(name, OPTIONS.get(name, {}), top_k), student, student.frozen(), rollout)
    assert result.loss.abs().max() < 1e-5
    assert result.gradient.abs().max() < 1e-4


@pytest.mark.parametrize("name", SAMPLED)
def test_no_advantage_over_oneself(name, student, rollout):
    result = run_loss(SAMPLED[name], student, student.frozen(), rollout)
    assert result.loss.abs().max() < 1e-4
    assert result.gradient.abs().max() < 1e-3


@pytest.mark.parametrize("name", DIVERGENCES)
def test_opd_is_the_divergence_of_its_name(name, student, teacher, rollout):
    options = OPTIONS.get(name, {})
    got = run_loss(OPD(name, options), student, teacher, rollout).loss
    want = DIVERGENCES[name](student.log_probs(rollout), teacher.log_probs(rollout), **options)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_top_k_is_taken_from_whom_it_says(student, teacher, rollout):
    p, q = student.log_probs(rollout), teacher.log_probs(rollout)
    for by, logp in (("student", p), ("teacher", q)):
        support = TopK(3, by=by)
        ids = logp.topk(3).indices
        want = reverse_kl(support.coarse(p, ids), support.coarse(q, ids))
        torch.testing.assert_close(
            run_loss(OPD(top_k=support), student, teacher, rollout).loss, want, rtol=1e-3, atol=1e-4
        )


# GRPO.


def rewarded(student: Policy, rollout: Rollout, rewards: list[float]) -> Batch:
    table = dict(zip(range(len(rewards)), rewards, strict=True))
    prompts = tuple(replace(p, answer=str(i)) for i, p in enumerate(rollout.prompts))
    task = Task("given", lambda n, seed, split: [], lambda prompt, text: table[int(prompt.answer)])
    return Batch(replace(rollout, prompts=prompts), {"student": student}, task)


def test_grpo_advantages_by_hand(student, prompts):
    rollout = student.sample(prompts[:2], n=4, max_new_tokens=3)
    batch = rewarded(student, rollout, [1, 0, 0, 1, 0.5, 0.5, 0.5, 0.5])
    half = 0.5 / (3**-0.5 + 1e-4)  # the standard deviation of 1, 0, 0, 1 is sqrt(1/3)
    assert plan_values(GRPO(), batch)["advantage"].tolist() == pytest.approx(
        [half, -half, -half, half, 0, 0, 0, 0]
    )
    assert plan_values(GRPO(scale=False), batch)["advantage"].tolist() == pytest.approx(
        [0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0]
    )
    assert plan_values(GRPO(), batch)["sampler_logp"] is rollout.logp


def test_grpo_on_policy_is_the_policy_gradient(student, prompts):
    rollout = student.sample(prompts[:2], n=2, max_new_tokens=4)
    batch = rewarded(student, rollout, [1, 0, 0, 1])
    columns = {name: flatten(batch, name, column) for name, column in GRPO().plan(batch).items()}
    states = {"student": batch.states("student")}
    weight = torch.ones(rollout.tokens)
    got = gradient(GRPO().loss, states, batch.token, weight, columns)
    want = gradient(lambda rows: -rows.logp * rows.advantage, states, batch.token, weight, columns)
    torch.testing.assert_close(got.gradient, want.gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("advantage", "ratio", "flat"),
    [(1.0, 1.5, True), (1.0, 0.5, False), (-1.0, 1.5, False), (-1.0, 0.5, True)],
)
def test_grpo_clips_what_already_moved_far(advantage, ratio, flat, student, prompts):
    batch = rewarded(student, student.sample(prompts[:1], max_new_tokens=1), [1.0])
    states = {"student": batch.states("student")}
    columns = {
        "advantage": torch.tensor([advantage]),
        "sampler_logp": batch.rollout.logp[:, 0] - torch.tensor(ratio).log(),
    }
    got = gradient(GRPO().loss, states, batch.token, torch.ones(1), columns)
    assert (got.gradient.abs().max() == 0) == flat
    assert got.loss.item() == pytest.approx(
        -advantage * ((1.2 if advantage > 0 else 0.8) if flat else ratio), rel=1e-3
    )


def test_grpo_refuses_single_samples(student, rollout):
    with pytest.raises(OpdlabError, match=r"one sample per prompt\. Use n=4 or more"):
        GRPO().plan(rewarded(student, student.sample([PROMPT], max_new_tokens=1), [1.0]))


# Supervised.


@pytest.mark.parametrize("method", [SFT(), SequenceKD()])
def test_cross_entropy(method, student, teacher, rollout):
    result = run_loss(method, student, teacher, rollout)
    torch.testing.assert_close(result.loss, -rollout.logp[rollout.mask], rtol=1e-4, atol=1e-4)
    assert method.on_policy == 0


def test_who_writes():
    assert (SFT.writer, SequenceKD.writer, OPD.writer) == ("answer", "teacher", "teacher")
    assert (SFT.needs, SequenceKD.needs, OPD.needs, GRPO.needs) == ((), (), ("teacher",), ())


# The contract.


def test_a_function_is_a_method(student, teacher, rollout):
    @opdlab.method(
        needs=("teacher",),
        plan=lambda batch: {"gate": (batch.signals["student_entropy"] > 1).float()},
    )
    def gated(rows):
        return rows.gate * reverse_kl(rows.student, rows.teacher)

    assert isinstance(gated, Method)
    assert gated.needs == ("teacher",)
    plain = run_loss(OPD(), student, teacher, rollout)
    gate = plain.loss.new_tensor((rollout.entropy[rollout.mask] > 1).tolist())
    assert 0 < gate.mean() < 1
    torch.testing.assert_close(
        run_loss(gated, student, teacher, rollout).loss, gate * plain.loss, rtol=1e-4, atol=1e-5
    )
    assert (
        plan_values(opdlab.method()(lambda rows: rows.logp), Batch(rollout, {"student": student}))
        == {}
    )


@pytest.mark.parametrize("method", [OPD(), GRPO(), SFT(), SequenceKD()])
def test_all_methods_keep_the_contract(method):
    assert isinstance(method, Method)
    assert not isinstance(object(), Method)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"divergence": "kl"}, "no divergence 'kl'. Use one of forward_kl, reverse_kl"),
        ({"on_policy": 1.5}, "on_policy=1.5"),
        ({"discount": -0.1}, "discount=-0.1"),
        ({"estimator": "smapled"}, "estimator='smapled'"),
        ({"estimator": "sampled", "baseline": "mean"}, "baseline='mean'"),
        ({"estimator": "sampled", "divergence": "forward_kl"}, "Leave divergence, options, top_k"),
        ({"estimator": "sampled", "top_k": TopK(3)}, "Leave divergence, options, top_k"),
        ({"estimator": "sampled", "on_policy": 0.5}, "Leave divergence, options, top_k"),
        ({"baseline": "value"}, "Use them with estimator='sampled'"),
        ({"discount": 0.5}, "Use them with estimator='sampled'"),
        ({"divergence": "generalized_jsd", "options": {"beta": 0}}, "beta=0"),
        ({"divergence": "skew_forward_kl", "options": {"alpha": 1}}, "Use 0 <= alpha < 1"),
    ],
)
def test_bad_settings_are_refused_at_once(settings, says):
    with pytest.raises(ValueError, match=says):
        OPD(**settings)


def test_options_of_another_divergence_are_refused_at_once():
    with pytest.raises(TypeError, match=r"reverse_kl.*'beta'"):
        OPD("reverse_kl", {"beta": 0.5})
