"""The gap between sampler and trainer: measured as it is, and corrected exactly.

The exact tests list every completion of a tiny model, so that expectations are sums: under the law
s of a wrong sampler, weighted gradients add up to the on-policy gradient under the student's law p.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

import opdlab as opd
from opdlab import OPD, Prompt, Rollout, viz
from opdlab.engine.batch import Batch
from opdlab.errors import InvalidValue
from opdlab.models.fingerprints import vocabulary_digest
from opdlab.tasks.task import from_prompts
from opdlab.training import phases, sampler_gap

HOT = 1.5  # the wrong sampler's temperature
QUESTION = Prompt("a b c")


class Hot:
    """Samples from the student at another temperature, and gives the log-probs of that law."""

    def __init__(self, temperature: float = HOT) -> None:
        self.temperature, self.calls = temperature, []

    def start(self, student) -> None:
        self.student = student
        self.calls.append("start")

    def update(self, student, step) -> None:
        self.calls.append(step)

    def close(self) -> None:
        self.calls.append("close")

    def sample(self, prompts, n=1, **options) -> Rollout:
        options["temperature"] = self.temperature
        rollout = self.student.sample(prompts, n, **options)
        return replace(rollout, logp=self.logp(rollout))

    def logp(self, rollout: Rollout) -> torch.Tensor:
        batch = Batch(rollout, {"student": self.student})
        divided = batch.map(lambda rows: (rows.student / self.temperature).log_softmax(-1))
        return divided.gather(-1, rollout.ids[..., None])[..., 0] * rollout.mask


class Stale(Hot):
    """Samples from the student as it was at the start."""

    def start(self, student) -> None:
        super().start(student.frozen())


class Exact(Hot):
    """Samples from the student, and gives the very log-probs that the trainer computes."""

    def __init__(self) -> None:
        super().__init__(1.0)

    def logp(self, rollout: Rollout) -> torch.Tensor:
        batch = Batch(rollout, {"student": self.student})
        return batch.map(lambda rows: rows.logp_of("student"))


# Every completion of a tiny model.


@pytest.fixture(scope="module")
def pair(make_policy, make_tokenizer):
    """Student and teacher over nine tokens, in float64."""
    tokenizer = make_tokenizer("a b c")
    make = [make_policy(seed, tokenizer, dtype=torch.float64) for seed in (0, 1)]
    return make[0], make[1]


def prepare(pair, length: int, method=None, **settings):
    """A run whose student has moved away from its beginning, and which has made no step."""
    student, teacher = pair
    run = opd.distill(
        student.copied(),
        teacher,
        from_prompts([QUESTION] * 8, name="enumerable", max_new_tokens=length),
        method=method,
        quiet=True,
        **{"lora": 2, "clip": 0, "normalize": "constant", "batch": 1, **settings},
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in run.parameters.values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return run


def every_completion(run) -> Rollout:
    """All completions of at most `max_new_tokens` tokens, with the student's log-probs."""
    length, vocab = run.settings.max_new_tokens, run.student.weights.vocab_size
    (eos,) = run.student.weights.eos
    rows = []
    for size in range(1, length + 1):
        for ids in itertools.product(range(vocab), repeat=size):
            if eos not in ids[:-1] and (size == length or ids[-1] == eos):
                rows.append(ids)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    nothing = torch.zeros(ids.shape, dtype=torch.float64)
    rollout = Rollout(
        (QUESTION,) * len(rows),
        ids,
        torch.tensor([len(row) for row in rows]),
        logp=nothing,
        entropy=nothing,
        finish=("stop",) * len(rows),
        texts=("",) * len(rows),
        writer=("student",) * len(rows),
        vocabulary=vocabulary_digest(run.student.tokenizer),
    )
    return replace(rollout, logp=log_law(run.student, rollout))


def log_law(policy, rollout: Rollout, temperature: float = 1.0) -> torch.Tensor:
    """Log-probs of the tokens under a policy at a temperature, `[B, T]`."""
    hot = Hot(temperature)
    hot.student = policy
    return hot.logp(rollout)


def expected_gradient(run, rollout: Rollout, monkeypatch) -> torch.Tensor:
    """The gradient of a step, in expectation over completions that are drawn as `logp` says."""
    chance = rollout.logp.sum(1).exp()
    assert float(chance.sum()) == pytest.approx(1, abs=1e-9)  # nothing is missing
    plain = phases.token_weights
    spread = chance.repeat_interleave(rollout.lengths) * len(rollout)
    with monkeypatch.context() as patch:
        patch.setattr(phases, "token_weights", lambda *args: plain(*args) * spread)
        run.optimizer.zero_grad()
        phases.accumulate_gradient(run, phases.plan_step(run, rollout), rollout)
    return torch.cat([parameter.grad.flatten() for parameter in run.parameters.values()])


def both(pair, monkeypatch, length: int, over: str | None, method=None):
    """The on-policy gradient, and that of a wrong sampler, corrected or not, in float64."""
    run = prepare(pair, length, method)
    completions = every_completion(run)
    right = expected_gradient(run, completions, monkeypatch)
    corrected = {} if over is None else {"importance_cap": math.inf, "importance_over": over}
    other = prepare(pair, length, method, **corrected)
    wrong = replace(completions, logp=log_law(other.student, completions, HOT))
    return right, expected_gradient(other, wrong, monkeypatch)


SAMPLED = OPD(estimator="sampled")
TO_GO = OPD(estimator="sampled", discount=1.0)


@pytest.mark.parametrize(
    ("length", "over", "method"),
    [
        (1, "token", OPD()),
        (1, "token", SAMPLED),
        (2, "prefix", OPD()),
        (2, "prefix", SAMPLED),
        (2, "sequence", OPD("forward_kl")),
        (2, "sequence", TO_GO),
    ],
)
def test_the_corrected_gradient_is_the_on_policy_one(pair, monkeypatch, length, over, method):
    right, found = both(pair, monkeypatch, length, over, method)
    assert (found - right).norm() < 1e-5 * right.norm()  # the losses are computed in float32
    _, uncorrected = both(pair, monkeypatch, length, None, method)
    if length > 1:  # the full divergence at the first token does not depend on what was sampled
        assert (uncorrected - right).norm() > 0.01 * right.norm()


@pytest.mark.parametrize(("over", "method"), [("token", OPD()), ("prefix", TO_GO)])
def test_fewer_ratios_leave_a_bias(pair, monkeypatch, over, method):
    """As the module says: "token" trusts the text before a token, "prefix" the text behind it."""
    right, found = both(pair, monkeypatch, 2, over, method)
    assert (found - right).norm() > 0.01 * right.norm()


@pytest.mark.parametrize(
    ("length", "over", "method"), [(1, "token", SAMPLED), (2, "sequence", TO_GO)]
)
def test_the_corrected_gradient_is_that_of_the_divergence_of_completions(
    pair, monkeypatch, length, over, method
):
    """Central differences of KL(student || teacher) over all completions, along a direction."""
    run = prepare(pair, length, method, importance_cap=math.inf, importance_over=over)
    completions = every_completion(run)
    wrong = replace(completions, logp=log_law(run.student, completions, HOT))
    found = expected_gradient(run, wrong, monkeypatch)
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).double()

    def divergence(step: float) -> float:
        parts = direction.split([p.numel() for p in run.parameters.values()])
        with torch.no_grad():
            for parameter, part in zip(run.parameters.values(), parts, strict=True):
                parameter += step * part.view_as(parameter)
            p = log_law(run.student, completions).sum(1)
            q = log_law(run.teacher, completions).sum(1)
            for parameter, part in zip(run.parameters.values(), parts, strict=True):
                parameter -= step * part.view_as(parameter)
        return float((p.exp() * (p - q)).sum())

    step = 1e-4
    slope = (divergence(step) - divergence(-step)) / (2 * step)
    # The run's loss is a mean over completions and their `max_new_tokens`.
    assert float(found @ direction) * length == pytest.approx(slope, rel=1e-3)


def test_the_cap_truncates_the_weights(pair):
    run = prepare(pair, 2, importance_cap=1.25)
    completions = every_completion(run)
    wrong = replace(completions, logp=log_law(run.student, completions, HOT))
    ratio = (completions.logp - wrong.logp).exp()
    weight = sampler_gap.importance(wrong, completions.logp, run.settings)
    mask = completions.mask
    torch.testing.assert_close(weight[mask], ratio.clamp(max=1.25)[mask])
    assert (ratio[mask] > 1.25).any()
    assert (ratio[mask] < 1).any()
    assert (weight[~mask] == 1).all()


def test_texts_of_others_are_not_corrected(pair):
    run = prepare(pair, 2, importance_cap=2.0, importance_over="sequence")
    completions = every_completion(run)
    half = len(completions) // 2
    mixed = replace(
        completions,
        logp=log_law(run.student, completions, HOT),
        writer=("student",) * half + ("teacher",) * (len(completions) - half),
    )
    weight = sampler_gap.importance(mixed, completions.logp, run.settings)
    assert (weight[half:] == 1).all()
    assert (weight[:half][completions.mask[:half]] != 1).any()


# In a run.


def market_run(sampler=None, **settings):
    student, teacher, task = opd.load("market")
    options = {"steps": 2, "batch": 8, "lora": 8, "lr": 3e-3, "quiet": True, **settings}
    return opd.distill(student, teacher, task, sampler=sampler, **options)


def gradient_of(run) -> list[torch.Tensor]:
    next(run)
    return [parameter.grad.clone() for parameter in run.parameters.values()]


def test_micro_batches_change_no_correction():
    one, other = (
        gradient_of(market_run(Hot(), importance_cap=2.0, micro_batch=size)) for size in (None, 3)
    )
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    plain = gradient_of(market_run(Hot()))
    assert any(not torch.allclose(a, b, rtol=1e-2) for a, b in zip(one, plain, strict=True))


@pytest.mark.parametrize("over", ["token", "prefix", "sequence"])
def test_without_a_gap_the_correction_changes_not_one_bit(over):
    plain = market_run(Exact()).train()
    corrected = market_run(Exact(), importance_cap=2.0, importance_over=over).train()
    for a, b in zip(plain.parameters.values(), corrected.parameters.values(), strict=True):
        assert torch.equal(a, b)
    pick = ["loss", "reverse_kl", "grad_norm"]
    assert plain.history[pick].equals(corrected.history[pick])
    assert (corrected.last.columns["importance"] == 1).all()


def test_the_metrics_are_those_of_the_tokens():
    step = next(market_run(Hot(), batch=32))
    rollout, columns = step.rollout, step.columns
    gap = columns["student_logp"] - rollout.logp[rollout.mask]
    torch.testing.assert_close(columns["sampler_gap"], gap)
    gap = gap.double()
    assert step.metrics["sampler_gap"] == pytest.approx(float(gap.abs().mean()))
    assert step.metrics["sampler_gap_max"] == pytest.approx(float(gap.abs().max()))
    assert step.metrics["sampler_beyond"] == pytest.approx(
        float((gap.abs() > math.log(2)).double().mean())
    )
    assert 0 < step.metrics["sampler_beyond"] < 1


def test_the_divergence_is_estimated_without_bias(pair):
    """The mean of exp(gap) − 1 − gap under the sampler's law is KL(s || p), token by token."""
    run = prepare(pair, 1)
    completions = every_completion(run)
    hot = log_law(run.student, completions, HOT)
    drawn = torch.multinomial(
        hot[:, 0].exp(), 40_000, True, generator=torch.Generator().manual_seed(0)
    )
    batch = Batch(completions.select(drawn.tolist()), {"student": run.student})
    gap = (completions.logp - hot)[drawn, 0]
    found = sampler_gap.measure_gap(batch, gap)
    exact = float((hot[:, 0].exp() * (hot - completions.logp)[:, 0]).sum())
    assert found["sampler_kl"] == pytest.approx(exact, rel=0.05)


def test_the_students_own_loop_has_hardly_any_gap():
    run = market_run().train()
    assert run.history["sampler_gap"].max() < 1e-5
    assert (run.history["sampler_beyond"] == 0).all()
    assert "sampler_gap" not in run.last.columns


def test_the_gap_is_a_channel_of_token_lens():
    step = next(market_run(Hot(), importance_cap=2.0))
    trace = step.trace()
    channels = viz.channels.find_channels(trace)
    assert channels["sampler_gap"].label == "sampler gap"
    assert channels["sampler_gap"].kind == "signed"
    assert channels["sampler_gap"].unit == "nats"
    assert channels["importance"].label == "importance weight"
    page = viz.TokenLens(trace, channel="sampler_gap").static()
    assert "sampler gap" in page


def test_a_sampler_that_keeps_the_old_adapter_sets_off_the_alarm():
    watches = {}
    for kind in (Exact, Stale):
        run = market_run(kind() if kind is Exact else kind(1.0), steps=8, batch=16)
        watch = opd.diagnose.health(run)
        for step in run:
            watch(step)
        watches[kind] = [alarm.signature for alarm in watch.alarms]
    assert "sampler gap" in watches[Stale]
    assert "sampler gap" not in watches[Exact]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"importance_cap": 0.5}, "importance_cap=0.5, which would shrink"),
        ({"importance_cap": 2.0, "temperature": 0.7}, "at temperature 1 without filters only"),
        ({"importance_cap": 2.0, "top_p": 0.9}, "at temperature 1 without filters only"),
        ({"importance_over": "prefix"}, "nothing is corrected. Give importance_cap"),
        ({"importance_cap": 2.0, "method": opd.SFT()}, "nothing is sampled"),
    ],
)
def test_what_cannot_be_corrected_is_refused(settings, said):
    with pytest.raises(InvalidValue, match=said):
        market_run(**settings)
