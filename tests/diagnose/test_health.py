"""Each alarm goes off on a run that truly breaks that way, and none on a healthy run of the shipped
world.
"""

from __future__ import annotations

import itertools
import math

import pandas as pd
import pytest
import torch

from opdlab import DOPD, OPD, SFT, TOPD, Policy, Task, distill, method, tasks
from opdlab.diagnose import Alarm, Health, Limits, health
from opdlab.diagnose.first_tokens import measure_pull
from opdlab.diagnose.health import SIGNATURES
from opdlab.diagnose.vitals import read_vitals, repetition
from opdlab.losses.divergences import entropy
from opdlab.tasks.market import model

MARKET = tasks.market()


def watched(
    student: str, teacher: Policy | None, how=None, task: Task = MARKET, **settings
) -> Health:
    run = distill(
        model(student), teacher, task, method=how, quiet=True, **{"batch": 16, **settings}
    )
    watch = health(run)
    for step in run:
        watch(step)
    return watch


LONG = next(one for one in SIGNATURES if one.name == "length run-away")


def signatures(watch: Health) -> list[str]:
    return [alarm.signature for alarm in watch.alarms]


@pytest.fixture(scope="module")
def healthy() -> Health:
    return watched("student", model("teacher"), steps=12, evaluate_every=4)


def test_a_healthy_run_sets_nothing_off(healthy):
    assert healthy.alarms == []
    assert healthy.vitals["accuracy"].dropna().iloc[-1] > 0.6  # from 0.35: it did learn
    assert str(healthy) == "No alarms in 12 steps."
    assert healthy.table.empty
    assert (
        not healthy.vitals[
            ["length_p95", "cut", "repetition", "acceptance", "stop_acceptance", "first_acceptance"]
        ]
        .isna()
        .any()
        .any()
    )


def test_the_acceptance_is_that_of_full_distributions():
    """E min(1, q/p) over the sampled tokens against 1 - TV; the bound is four standard errors of a
    sample of this size.
    """
    student, teacher = model("novice"), model("teacher")
    step = next(distill(student, teacher, MARKET, batch=32, n=2, lora=4, lr=0.0, quiet=True))
    p, q = (policy.log_probs(step.rollout).exp() for policy in (student, teacher))
    kept = torch.minimum(p, q).sum(-1)
    assert read_vitals(step)["acceptance"] == pytest.approx(
        kept.mean().item(), abs=4 * 0.5 / step.rollout.tokens**0.5
    )
    ends = step.rollout.lengths.cumsum(0) - 1
    stopped = torch.tensor([f == "stop" for f in step.rollout.finish])
    ratio = (q / p).gather(-1, step.rollout.ids[step.rollout.mask][:, None])[:, 0].clamp(max=1)
    assert read_vitals(step)["stop_acceptance"] == pytest.approx(
        ratio[ends][stopped].mean().item(), abs=1e-5
    )
    assert read_vitals(step)["first_acceptance"] == pytest.approx(
        ratio[ends - step.rollout.lengths + 1].mean().item(), abs=1e-5
    )


def test_minimising_entropy_is_seen_as_its_collapse():
    surer = method(needs=("teacher",))(lambda rows: entropy(rows.student))
    watch = watched("novice", model("teacher"), surer, steps=12)
    assert signatures(watch) == ["entropy collapse"]
    assert "The student's entropy fell from" in watch.alarms[0].sentence


def test_a_teacher_that_stops_elsewhere_is_seen_before_lengths_run_away():
    """The teacher ends its texts with another token, which no check of vocabularies can tell."""
    teacher = model("teacher")
    weight, (eos,) = teacher.weights.head.weight, teacher.weights.eos
    with torch.no_grad():
        weight[[eos, 0]] = weight[[0, eos]].clone()
    watch = watched("student", teacher, OPD("forward_kl"), steps=12)
    found = {alarm.signature: alarm for alarm in reversed(watch.alarms)}  # the first of each
    assert set(found) == {"EOS or template mismatch", "length run-away"}
    assert found["EOS or template mismatch"].step == 2
    assert (
        "Where the student stops, the teacher accepts it with probability 0.00"
        in found["EOS or template mismatch"].sentence
    )
    assert found["length run-away"].step <= 12
    assert "of the texts are cut off at the length limit" in found["length run-away"].sentence


def test_a_teacher_that_reads_another_template_is_seen_at_the_first_token():
    class Elsewhere(Policy):
        """Leaves out the marker after which an answer begins."""

        def encode_unchecked(self, prompts):
            return [row[:-1] for row in super().encode_unchecked(prompts)]

    watch = watched("student", Elsewhere(model("teacher").weights), steps=3)
    assert signatures(watch) == ["EOS or template mismatch"]
    assert "first token with probability 0.0" in watch.alarms[0].sentence


def test_a_teacher_that_is_told_more_may_begin_otherwise():
    """Where the teacher is given another context on purpose, its first token says nothing about
    templates.
    """
    blind = model("teacher").seeing(lambda prompt: type(prompt)(text="ana has"))
    watch = watched("student", blind, steps=2)
    assert "first_acceptance" not in watch.vitals
    assert not any("first token" in alarm.sentence for alarm in watch.alarms)


@pytest.fixture(scope="module")
def babbling() -> Health:
    """A reward for saying one of the last two tokens again."""

    def again(batch) -> dict[str, torch.Tensor]:
        ids = batch.rollout.ids
        same = torch.zeros(ids.shape)
        for back in (1, 2):
            same[:, back:] += (ids[:, back:] == ids[:, :-back]).float()
        return {"reward": same - same[batch.mask].mean()}

    loop = method(needs=("teacher",), plan=again)(lambda rows: -rows.reward * rows.logp)
    return watched("novice", model("teacher"), loop, steps=10, n=2, lr=3e-3)


@pytest.mark.parametrize("signature", ["repetition", "length run-away", "falling overlap"])
def test_a_reward_for_loops_is_seen_as_such(babbling, signature):
    assert signature in signatures(babbling)
    first, last = babbling.vitals["repetition"].iloc[[0, -1]]
    assert first < 0.05
    assert last > 0.3
    assert len(signatures(babbling)) == len(set(signatures(babbling)))  # each is said once


def test_training_too_long_on_eight_prompts_is_seen_on_others():
    few = MARKET.prompts(8)
    task = Task(
        "few",
        lambda n, seed, split: (
            (few * n)[:n] if split == "train" else MARKET.prompts(n, seed, split)
        ),
        MARKET.verify,
        24,
    )
    watch = watched(
        "student", None, SFT(), task, steps=15, batch=8, lr=1e-3, lora=None, evaluate_every=5
    )
    late = [alarm for alarm in watch.alarms if alarm.signature == "late over-training"]
    assert [alarm.step for alarm in late] == [15]
    accuracy = watch.vitals.set_index("step")["accuracy"].dropna()
    assert (
        f"Held-out accuracy was {accuracy[5]:.2f} at step 5 and is {accuracy[15]:.2f}"
        in late[0].sentence
    )


def note(watch: Health, **series: list[float]) -> list[str]:
    for i, values in enumerate(zip(*series.values(), strict=True), 1):
        watch.note({"step": float(i), **dict(zip(series, values, strict=True))})
    return signatures(watch)


def test_each_threshold_from_both_sides():
    short = Limits(window=1)
    assert note(Health(short), length_p95=[20, 25]) == []
    assert note(Health(short), length_p95=[20, 27]) == ["length run-away"]
    assert note(Health(short), length_p95=[2, 5]) == []  # a token or two are no run-away
    assert note(Health(short), cut=[0.0, 0.09]) == []
    assert note(Health(short), cut=[0.0, 0.11]) == ["length run-away"]
    assert note(Health(short), cut=[0.4, 0.42]) == []  # it always was like this
    assert note(Health(short), repetition=[0.1, 0.29]) == []
    assert note(Health(short), repetition=[0.1, 0.31]) == ["repetition"]
    assert note(Health(short), entropy=[1.0, 0.51]) == []
    assert note(Health(short), entropy=[1.0, 0.49]) == ["entropy collapse"]
    assert (
        note(Health(short), entropy=[1.0, 0.1], acceptance=[0.5, 0.6]) == []
    )  # sure, and nearer to the teacher
    assert note(Health(short), entropy=[1.0, 0.1], acceptance=[0.5, 0.52]) == ["entropy collapse"]
    assert (
        note(Health(short), entropy=[1.0, 0.1], reverse_kl=[0.5, 0.4]) == []
    )  # as a history tells it
    assert note(Health(short), entropy=[1.0, 0.1], reverse_kl=[0.5, 0.46]) == ["entropy collapse"]
    assert note(
        Health(short), entropy=[1.0, 0.1], reverse_kl=[0.5, 0.1], acceptance=[0.5, 0.5]
    ) == ["entropy collapse"]
    assert note(Health(short), acceptance=[0.8, 0.71]) == []
    assert note(Health(short), acceptance=[0.8, 0.69]) == ["falling overlap"]
    assert note(Health(short), acceptance=[0.8] * 3, stop_acceptance=[0.21] * 3) == []
    assert note(Health(short), acceptance=[0.8] * 3, stop_acceptance=[0.19] * 3) == [
        "EOS or template mismatch"
    ]
    assert (
        note(Health(short), acceptance=[0.3] * 3, stop_acceptance=[0.19] * 3) == []
    )  # all is as low: overlap, not the stop
    assert note(Health(short), acceptance=[0.8] * 3, first_acceptance=[0.11] * 3) == []
    assert note(Health(short), acceptance=[0.8] * 3, first_acceptance=[0.09] * 3) == [
        "EOS or template mismatch"
    ]
    assert note(Health(short), accuracy=[0.6, 0.56, 0.56]) == []
    assert note(Health(short), accuracy=[0.6, 0.54, 0.6]) == []  # one bad evaluation may be noise
    assert note(Health(short), accuracy=[0.6, 0.54, 0.5]) == ["late over-training"]
    assert note(Health(short), sampler_gap=[0.049] * 3, sampler_beyond=[0.009] * 3) == []
    assert note(Health(short), sampler_gap=[0.051] * 3, sampler_beyond=[0.0] * 3) == ["sampler gap"]
    assert note(Health(short), sampler_gap=[0.01] * 3, sampler_beyond=[0.02] * 3) == ["sampler gap"]
    assert len(SIGNATURES) == 8


def test_an_alarm_comes_again_only_after_it_has_gone():
    watch = Health(Limits(window=1))
    assert note(watch, cut=[0, 0.2, 0.2, 0.0, 0.3]) == ["length run-away"] * 2
    assert [alarm.step for alarm in watch.alarms] == [2, 5]


def test_averages_keep_one_bad_step_quiet():
    assert note(Health(Limits(window=5)), cut=[0.0] * 8 + [0.3] + [0.0] * 4) == []
    assert note(Health(Limits(window=5)), cut=[0.0] * 5 + [0.3] * 2) == ["length run-away"]


def test_a_history_alone_can_be_read():
    history = pd.DataFrame(
        {"cut": [0.0] * 6 + [0.9] * 3, "entropy": [1.0] * 9, "accuracy": [math.nan] * 9}
    )
    watch = health(history)
    assert [(a.step, a.signature) for a in watch.alarms] == [(7, "length run-away")]
    assert str(watch.alarms[0]) == str(
        Alarm(7, "length run-away", watch.alarms[0].sentence, LONG.remedy, "length")
    )
    assert watch.sentence == "1 alarm in 9 steps: length run-away (step 7)."
    assert "length run-away" in watch._repr_html_()


def test_repetition_against_counting():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, (40, 12), generator=generator)
    lengths = torch.randint(0, 13, (40,), generator=generator)
    for row, length, got in zip(
        ids.tolist(), lengths.tolist(), repetition(ids, lengths).tolist(), strict=True
    ):
        triples = [tuple(row[i : i + 3]) for i in range(length - 2)]
        again = sum(t in triples[:i] for i, t in enumerate(triples))
        assert got == pytest.approx(again / len(triples) if len(triples) > 1 else 0)
    big = torch.tensor([[200_000, 1, 2, 200_000, 1, 2]])
    assert repetition(big, torch.tensor([6])).item() == pytest.approx(1 / 4)
    assert repetition(torch.zeros(2, 3, dtype=torch.long), torch.tensor([3, 0])).tolist() == [0, 0]


def test_texts_of_others_are_not_taken_for_the_students():
    """Half of the texts are the teacher's: lengths and acceptance are of the student's alone."""
    run = distill(
        model("student"), model("teacher"), MARKET, method=OPD(on_policy=0.5), batch=8, quiet=True
    )
    step = next(run)
    own = [i for i, who in enumerate(step.rollout.writer) if who == "student"]
    assert 0 < len(own) < 8
    rows = list(itertools.accumulate(step.rollout.lengths.tolist(), initial=0))
    keep = torch.cat([torch.arange(rows[i], rows[i + 1]) for i in own])
    ratio = (step.columns["teacher_logp"] - step.columns["student_logp"])[keep].exp().clamp(max=1)
    assert read_vitals(step)["acceptance"] == pytest.approx(ratio.mean().item(), abs=1e-6)
    assert read_vitals(step)["entropy"] == pytest.approx(
        step.columns["student_entropy"][keep].mean().item(), abs=1e-6
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    "how", [OPD(), OPD("jensen_shannon"), OPD(on_policy=0.5)], ids=lambda how: how.divergence
)
def test_a_run_that_cannot_find_the_teachers_first_token_is_told_so(how, seed, marked):
    """The student gives that token 1e-8, so only a method that pulls there can learn it."""
    teacher, task = marked
    watch = watched("student", teacher, how, task, steps=8, batch=8, lr=3e-3, seed=seed)
    found = [alarm for alarm in watch.alarms if alarm.signature == "out of reach"]
    assert len(found) == 1
    assert found[0].step <= 7
    assert "OPD('forward_kl')" in found[0].remedy
    assert found[0].metric in watch.vitals
    assert watch.vitals["first_mass"].max() < 1e-6


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_forward_kl_learns_there_and_is_not_warned(seed, marked):
    teacher, task = marked
    watch = watched(
        "student", teacher, OPD("forward_kl"), task, steps=14, batch=8, lr=3e-3, seed=seed
    )
    assert "out of reach" not in signatures(watch)
    mass = watch.vitals["first_mass"]
    assert mass.iloc[0] < 1e-6
    assert mass.max() > 1e-2


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "how", [OPD(), OPD("forward_kl"), TOPD(), DOPD()], ids=lambda how: type(how).__name__
)
def test_runs_whose_student_finds_the_tokens_are_not_warned(how, seed):
    watch = watched("student", model("teacher"), how, steps=7, batch=8, seed=seed)
    assert "out of reach" not in signatures(watch)
    assert watch.vitals["first_mass"].min() > 0.01


def test_a_stall_from_both_sides():
    lost = {"first_mass": [1e-5] * 6, "loss": [1.0] * 6}
    assert note(Health(), **lost) == ["out of reach"]
    assert note(Health(), **{name: values[:5] for name, values in lost.items()}) == []  # too early
    assert note(Health(), **(lost | {"loss": [1.0] * 3 + [0.6] * 3})) == []  # it is learning
    assert note(Health(), **(lost | {"first_mass": [1e-5] * 3 + [2e-3] * 3})) == []
    assert note(Health(), **lost, pull=[1.0] * 6) == []  # slow, and on its way
    assert note(Health(), **lost, pull=[1e-5] * 6) == ["out of reach"]


def test_the_pull_of_methods_on_a_token_that_is_never_written():
    """With p = 1e-6 and q = 1 - p: q - p for forward KL, p (log q / p + KL) for reverse KL."""
    p = 1e-6
    kl = (1 - 2 * p) * math.log((1 - p) / p)
    assert measure_pull(OPD("forward_kl")) == pytest.approx(1 - 2 * p, rel=1e-4)
    assert measure_pull(OPD()) == pytest.approx(p * (math.log((1 - p) / p) + kl), rel=1e-3)
    assert measure_pull(OPD("jensen_shannon")) < 1e-4
    assert measure_pull(OPD(estimator="sampled")) is None  # its loss reads what its plan computes
