"""Before any training: can on-policy distillation work between these two, and if not, why not?

What it does to find out: it compares tokens, stops, templates and room without running a model,
lets the student write `k` answers to each of some held-out prompts and the teacher grade them, lets
the teacher answer alone and from half of the student's text, and predicts what a step will cost.
The order and most thresholds are those of the survey's practice notes (sections 8.2, 8.6, 8.10);
the numbers in `ENOUGH` are opdlab's starting guesses. `stop` is only said of what `distill` would
refuse or what leaves no signal at all; what makes success unlikely is a `warn` with what to do
first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from opdlab.data.prompt import Prompt
from opdlab.data.rollout import Rollout
from opdlab.diagnose.cost import Cost, cost
from opdlab.diagnose.exposure import continuation
from opdlab.diagnose.identity import Check, identity, sides
from opdlab.diagnose.overlap import Overlap, agreement
from opdlab.diagnose.probe import ask, frame, grade
from opdlab.diagnose.report import Diagnosis
from opdlab.errors import OpdlabError
from opdlab.models.policy import Policy, sample
from opdlab.support.validation import Count, Seed, Unchecked, validate_arguments
from opdlab.tasks import Task
from opdlab.tasks.splits import count_distinct
from opdlab.teachers.contract import expect_teacher
from opdlab.training.settings import Settings, make_settings

ENOUGH = {"acceptance": 0.5, "pass@k": 0.2, "right": 0.1, "stop": 0.2, "first": 0.1, "cut": 0.5}
PLAIN = tuple(
    Prompt(messages=({"role": "user", "content": text},), id=str(i))
    for i, text in enumerate(
        [
            "What is 17 + 25?",
            "Name three colours.",
            "Why is the sky blue?",
            "Write a sentence about a cat.",
            "What comes after Tuesday?",
            "Translate 'good morning' into French.",
            "Is 7 a prime number?",
            "How do I boil an egg?",
        ]
    )
)


@validate_arguments
def doctor(
    student: Policy,
    teacher: Any,
    task: Task | None = None,
    *,
    prompts: Unchecked[int | Sequence[Prompt]] = 32,
    k: Count = 8,
    seed: Seed = 0,
    **settings: Any,
) -> Diagnosis:
    """Look at a pair before training it.

    Trains nothing and raises nothing about the pair: what is wrong is in the result. Raises
    MissingHint where a hinted teacher meets a prompt without one.

    task: without one, a few plain questions are asked and nothing can be scored. prompts, k:
        held-out prompts, and the student's
    samples of each. settings: of the planned `distill`, for the cost.
    """
    expect_teacher(teacher, "doctor")
    if task is None:
        task = Task("plain questions", lambda n, seed, split: list((PLAIN * n)[:n]))
        prompts = list(PLAIN) if isinstance(prompts, int) else prompts
    planned = make_settings(settings, None, task, "doctor")
    asked = ask(task, prompts, seed)
    names = _name(student, "student"), _name(teacher, "teacher")
    if not isinstance(teacher, Policy):
        return Diagnosis((*_served(student, teacher, asked, planned),), names=names)
    checks = identity(student, teacher, asked, planned.max_new_tokens)
    if any(check.state == "stop" and check.name == "room" for check in checks):
        return Diagnosis(tuple(checks), sides(student, teacher), names=names)
    rollout = sample(
        student,
        asked,
        k,
        max_new_tokens=planned.max_new_tokens,
        seed=seed,
        batch_size=max(1, 256 // k),
    )
    checks.append(_lengths(rollout, planned.max_new_tokens))
    found = predicted = None
    if all(check.state != "stop" for check in checks):
        columns = grade(rollout, _measure, {"student": student, "teacher": teacher})
        found = Overlap(16, frame(rollout, columns))
        checks += _overlap(found, rollout, told=teacher.context is not None)
    else:
        checks.append(Check("overlap", "none", "not comparable token by token"))
    probe, scored = _scores(rollout, student, teacher, task, k)
    checks += scored
    if found is not None:
        checks += _ranking(found, rollout, task)
        predicted = cost(student, teacher, rollout, planned)
        checks.append(affordable(predicted))
    return Diagnosis(tuple(checks), sides(student, teacher), found, probe, predicted, names)


def _measure(rows: Any) -> dict[str, torch.Tensor]:
    return agreement(16)(rows) | {"reward": rows.logp_of("teacher") - rows.logp}


def _served(
    student: Policy, teacher: Any, prompts: Sequence[Prompt], planned: Settings
) -> list[Check]:
    """A teacher that is no local model: it knows best what it can take, and nothing is asked of it
    here (it may cost money).
    """
    grades = hasattr(teacher, "grade")
    checks = [
        Check(
            "tokens",
            "note" if grades else "ok",
            f"{type(teacher).__name__} "
            + (
                "grades tokens of its own making; it is checked below"
                if grades
                else "only writes, so its tokens do not matter"
            ),
            "" if grades else "Use a method that needs only its texts (OmniOPD, SequenceKD).",
        )
    ]
    try:
        teacher.check(student, prompts, planned.max_new_tokens)
    except OpdlabError as error:
        return [*checks, Check("teacher", "stop", str(error))]
    return [
        *checks,
        Check("teacher", "ok", "takes these prompts; it was not asked to write or grade"),
    ]


def _lengths(rollout: Rollout, limit: int) -> Check:
    name, form = (
        "student's texts",
        "Look at its stop tokens and template; a short SFT teaches the form.",
    )
    cut = sum(f == "length" for f in rollout.finish) / len(rollout)
    empty = float((rollout.lengths <= 1).float().mean())
    usual = float(rollout.lengths.float().mean())
    found = (
        f"{usual:.0f} tokens on average, {cut:.0%} cut off at the limit of {limit} (on"
        f" {count_distinct(rollout.prompts)} prompts)"
    )
    if not rollout.tokens:
        return Check(name, "stop", "it writes nothing at all, so there is nothing to grade", form)
    if empty > 0.5:
        return Check(name, "warn", f"{empty:.0%} end at once", form)
    if cut > ENOUGH["cut"]:
        return Check(
            name,
            "note",
            found,
            "Raise max_new_tokens, unless the teacher is to teach it to be brief.",
        )
    return Check(name, "ok", found)


def _overlap(found: Overlap, rollout: Rollout, told: bool) -> list[Check]:
    """Agreement everywhere, where the student stops, and at its first token (where a teacher that
    is told more may differ).
    """
    tokens, m = found.tokens, found.mean
    text = (
        f"a token is accepted with probability {m['acceptance']:.2f}; the top {found.k} overlap"
        f" {m['overlap']:.2f} and the teacher's hold {m['student_mass']:.0%} of the student's mass"
    )
    few = m["acceptance"] < ENOUGH["acceptance"]
    checks = [
        Check(
            "overlap",
            "warn" if few else "ok",
            text,
            "Train on the teacher's texts first (a short SFT: SequenceKD)." * few,
        )
    ]
    ends = tokens.groupby("sample")["acceptance"].last()
    stop = ends[[rollout.finish[i] == "stop" for i in ends.index]].mean()
    first = tokens.loc[tokens["position"] == 0, "acceptance"].mean()
    if stop < min(ENOUGH["stop"], m["acceptance"] / 2):  # false for nan: no text stops
        text = f"where the student stops, the teacher would accept it with probability {stop:.2f}"
        remedy = (
            "Lengths may run away: align the stop tokens, or teach the teacher's way of ending"
            " first (a short SFT)."
        )
        checks.append(Check("stopping", "warn", text, remedy))
    if first < min(ENOUGH["first"], m["acceptance"] / 2) and not told:
        text = f"the teacher would accept the student's with probability {first:.2f}"
        remedy = (
            "One of them expects another form here (a think tag, a system prompt): align what comes"
            " before the answer."
        )
        checks.append(Check("first token", "warn", text, remedy))
    return checks


def _scores(
    rollout: Rollout, student: Policy, teacher: Policy, task: Task, k: int
) -> tuple[pd.DataFrame | None, list[Check]]:
    """The student's pass@k, the teacher alone and from half of the student's text."""
    if task.verify is None:
        return None, [
            Check(
                "student",
                "none",
                f"{task.name} has no verifier, so pass@{k} and the teacher's accuracy are unknown",
            )
        ]
    right = _right(rollout, task)
    solved, mean = float(right.reshape(-1, k).max(1).mean()), float(right.mean())
    firsts = rollout.rows(range(0, len(rollout), k))
    half = max(1, int(firsts.lengths.float().median()) // 2)
    probe = continuation(
        firsts, student, teacher, task, at=[0, half], room=_room(rollout, student, teacher)
    )
    alone, helped = (*probe["teacher"].tolist(), float("nan"), float("nan"))[:2]
    return probe, [
        *_student(
            solved,
            mean,
            alone,
            helped,
            k,
            told=student.weights is teacher.weights and teacher.context is not None,
        ),
        *_teacher(mean, alone, helped, half),
    ]


def _student(
    solved: float, mean: float, alone: float, helped: float, k: int, told: bool
) -> list[Check]:
    """Does it ever get there by itself?

    One that is its own teacher lacks what it is not told, and not a skill.
    """
    found = f"right {mean:.2f} of the time, pass@{k} {solved:.2f}"
    lost = (
        mean < ENOUGH["right"] and helped < alone / 2
    )  # hardly ever right, and what it writes is beyond help
    if (solved < ENOUGH["pass@k"] or lost) and solved < alone and not told:
        remedy = (
            "It hardly ever gets there by itself, so little of its text can be built on: short SFT"
            " on the teacher's texts first."
        )
        return [Check("student", "warn", found, remedy)]
    return [Check("student", "ok", found + " (its own teacher, told more)" * told)]


def _teacher(mean: float, alone: float, helped: float, half: int) -> list[Check]:
    """Is it better than the student, and does it still help on the student's text?"""
    found = f"right {alone:.2f} of the time alone" + (
        "" if np.isnan(helped) else f", {helped:.2f} from the student's first {half} tokens"
    )
    if alone < mean + 0.05:
        return [
            Check(
                "teacher",
                "warn",
                found,
                "It is no better than the student here: take a better teacher, or tell it a hint.",
            )
        ]
    if helped < alone / 2:
        return [
            Check(
                "teacher",
                "note",
                found,
                "Its grades are worth less the further the student has gone: shorter completions"
                " may do.",
            )
        ]
    return [Check("teacher", "ok", found)]


def _ranking(found: Overlap, rollout: Rollout, task: Task) -> list[Check]:
    """Whether the reward of OPD, sum log T - log S over a text, tells the student's right texts
    from its wrong ones: AUROC.
    """
    if task.verify is None:
        return []
    right = _right(rollout, task) > 0.5
    reward = (
        found.tokens.groupby("sample")["reward"]
        .sum()
        .reindex(range(len(rollout)), fill_value=0.0)
        .to_numpy()
    )
    # texts of one prompt are alike, so prompts are counted and not texts
    fewest = min(
        count_distinct(
            p for p, is_right in zip(rollout.prompts, right, strict=True) if is_right == kind
        )
        for kind in (True, False)
    )
    if fewest < 3:
        return []
    area = auroc(reward[right], reward[~right])
    text = (
        "the teacher ranks a right text of the student's above a wrong one with probability"
        f" {area:.2f} ({right.sum()} right, {(~right).sum()} wrong)"
    )
    if area + (area * (1 - area) / fewest) ** 0.5 * 2 < 0.5:
        return [
            Check(
                "grades",
                "note",
                text,
                "They are about something else than the verifier's: look at them in"
                " opdlab.viz.TokenLens.",
            )
        ]
    return [Check("grades", "ok", text)]


def auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """The chance that a positive is above a negative, ties counting half."""
    gap = np.subtract.outer(positive, negative)
    return float((gap > 0).mean() + 0.5 * (gap == 0).mean())


def affordable(predicted: Cost) -> Check:
    """Does the predicted peak fit what is free?"""
    if predicted.peak > predicted.available:
        return Check(
            "cost",
            "warn",
            predicted.sentence,
            "It does not fit: lower micro_batch, set checkpointing=True, or train a LoRA.",
        )
    return Check("cost", "ok", predicted.sentence)


def _right(rollout: Rollout, task: Task) -> np.ndarray:
    return np.array(task.scores(rollout.prompts, rollout.texts))


def _room(rollout: Rollout, student: Policy, teacher: Policy) -> float:
    """How many of its tokens the teacher needs for one of the student's, with a quarter to spare; 1
    where tokens are the same.
    """
    if teacher.tokenizer.get_vocab() == student.tokenizer.get_vocab():
        return 1.0
    counts = [
        sum(len(p.tokenizer(t, add_special_tokens=False)["input_ids"]) for t in rollout.texts)
        for p in (student, teacher)
    ]
    return max(1.0, 1.25 * counts[1] / max(counts[0], 1))


def _name(policy: Any, role: str) -> str:
    source = policy.weights.source if isinstance(policy, Policy) else type(policy).__name__
    return (Path(source).name if Path(source).is_dir() else source) or role
