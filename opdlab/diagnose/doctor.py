"""Check before any training whether on-policy distillation can work between two models.

The doctor compares tokens, stops, templates and room without running a model. It lets the student
write `k` answers to each of some held-out prompts and the teacher grade them, lets the teacher
answer alone and from half of the student's text, and predicts the cost of a step. The order and
most thresholds are those of the survey's practice notes (sections 8.2, 8.6, 8.10); the numbers in
`ENOUGH` are opdlab's starting guesses. `stop` is only said of pairs that `distill` would refuse or
that leave no signal at all. If success is unlikely, that is a `warn`, with what to do first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from opdlab.data.prompt import Prompt
from opdlab.data.rollout import Rollout
from opdlab.diagnose.checks import Check
from opdlab.diagnose.cost import Cost, cost
from opdlab.diagnose.diagnosis import Diagnosis
from opdlab.diagnose.exposure import continuation
from opdlab.diagnose.overlap import Overlap, agreement
from opdlab.diagnose.pair_checks import check_pair
from opdlab.diagnose.probe import choose_prompts, measure_tokens
from opdlab.diagnose.tables import make_token_table
from opdlab.engine.rows import Rows
from opdlab.errors import OpdlabError
from opdlab.models.policy import Policy, as_policy, sample
from opdlab.models.protocols import Checked, Grader, Writer
from opdlab.models.same_tokens import compare_chats, compare_vocabularies
from opdlab.support.validation import Count, Seed, Unchecked, validate_arguments
from opdlab.tasks import Task
from opdlab.tasks.splits import count_distinct
from opdlab.teachers.contract import expect_teacher
from opdlab.training.settings import Settings, make_settings

TOP = 16  # tokens of each side that are compared
ENOUGH = {"acceptance": 0.5, "pass@k": 0.2, "right": 0.1, "stop": 0.2, "first": 0.1, "cut": 0.5}
QUESTIONS = (
    "What is 17 + 25?",
    "Name three colours.",
    "Why is the sky blue?",
    "Write a sentence about a cat.",
    "What comes after Tuesday?",
    "Translate 'good morning' into French.",
    "Is 7 a prime number?",
    "How do I boil an egg?",
)
PLAIN = tuple(
    Prompt(messages=({"role": "user", "content": text},), id=str(i))
    for i, text in enumerate(QUESTIONS)
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
    """Look at a pair before training it. Trains nothing.

    Args:
        student: The policy that would train.
        teacher: A policy, or any other teacher; of the latter only its own check runs.
        task: Where prompts and scores come from. Without one, a few plain questions are asked and
            nothing can be scored.
        prompts: Prompts to ask, or how many of the task's held-out ones.
        k: The student's samples of each.
        seed: Seed of prompts and samples.
        settings: Settings of the planned `distill`, for the cost.

    Returns:
        A diagnosis. Faults of the pair are in it, and are not raised.

    Raises:
        InvalidValue: An argument or setting cannot be right.
        MissingHint: The teacher reads hints, and a prompt has none.
    """
    expect_teacher(teacher, "doctor")
    if task is None:
        task = Task("plain questions", lambda n, seed, split: list((PLAIN * n)[:n]))
        prompts = list(PLAIN) if isinstance(prompts, int) else prompts
    planned = make_settings(settings, None, task, "doctor")
    asked = choose_prompts(task, prompts, seed)
    names = _name(student, "student"), _name(teacher, "teacher")
    local = as_policy(teacher)
    if local is None:
        return Diagnosis(tuple(_check_other(student, teacher, asked, planned)), names=names)
    return _examine(_Pair(student, local, task, k, planned), asked, seed, names)


@dataclass(frozen=True)
class _Pair:
    """Two local models that are looked at.

    Attributes:
        student: The policy that would train.
        teacher: The policy that would grade.
        task: Where prompts and scores come from.
        k: The student's samples of each prompt.
        planned: The settings of the planned run.
    """

    student: Policy
    teacher: Policy
    task: Task
    k: int
    planned: Settings

    @property
    def teacher_is_told_more(self) -> bool:
        """Whether the teacher reads more than the prompt."""
        return self.teacher.context is not None

    def scores(self, rollout: Rollout) -> np.ndarray:
        """The verifier's scores of a rollout's texts."""
        return np.array(self.task.scores(rollout.prompts, rollout.texts))


def _examine(pair: _Pair, asked: list[Prompt], seed: int, names: tuple[str, str]) -> Diagnosis:
    """Look at a local pair: first without running it, then at texts of the student."""
    student, teacher, length = pair.student, pair.teacher, pair.planned.max_new_tokens
    checks = check_pair(student, teacher, asked, length)
    templates = compare_chats(student, teacher)
    if any(check.state == "stop" and check.name == "room" for check in checks):
        return Diagnosis(tuple(checks), templates, names=names)
    rollout = sample(
        student,
        asked,
        pair.k,
        max_new_tokens=length,
        seed=seed,
        batch_size=max(1, 256 // pair.k),
    )
    checks.append(check_lengths(rollout, length))
    overlap = predicted = None
    if all(check.state != "stop" for check in checks):
        columns = measure_tokens(rollout, _measure, {"student": student, "teacher": teacher})
        overlap = Overlap(TOP, make_token_table(rollout, columns))
        checks += check_overlap(overlap, rollout, pair.teacher_is_told_more)
    else:
        checks.append(Check("overlap", "none", "not comparable token by token"))
    probe, scored = _check_scores(pair, rollout)
    checks += scored
    if overlap is not None:
        checks += _check_ranking(pair, overlap, rollout)
        predicted = cost(student, teacher, rollout, pair.planned)
        checks.append(check_memory(predicted))
    return Diagnosis(tuple(checks), templates, overlap, probe, predicted, names)


def _measure(rows: Rows) -> dict[str, torch.Tensor]:
    return agreement(TOP)(rows) | {"reward": rows.logp_of("teacher") - rows.logp}


def _check_other(
    student: Policy, teacher: Grader | Writer, prompts: Sequence[Prompt], planned: Settings
) -> list[Check]:
    """Check a teacher that is no local model by its own check.

    It is not asked to write or grade, which may cost money.
    """
    name = type(teacher).__name__
    if isinstance(teacher, Grader):
        said = f"{name} grades tokens of its own making; it is checked below"
        checks = [Check("tokens", "note", said)]
    else:
        said = f"{name} only writes, so its tokens do not matter"
        remedy = "Use a method that needs only its texts (OmniOPD, SequenceKD)."
        checks = [Check("tokens", "ok", said, remedy)]
    if not isinstance(teacher, Checked):
        return [*checks, Check("teacher", "none", f"{name} has no check of its own")]
    try:
        teacher.check(student, prompts, planned.max_new_tokens)
    except OpdlabError as error:
        return [*checks, Check("teacher", "stop", str(error))]
    taken = "takes these prompts; it was not asked to write or grade"
    return [*checks, Check("teacher", "ok", taken)]


def check_lengths(rollout: Rollout, limit: int) -> Check:
    """Check that the student's texts are neither empty nor cut off.

    Args:
        rollout: Texts of the student.
        limit: The length limit of the texts, in tokens.

    Returns:
        "stop" if there is no token, "warn" if half of the texts end at once, "note" if many are
        cut, else "ok".
    """
    name = "student's texts"
    remedy = "Look at its stop tokens and template; a short SFT teaches the form."
    if not rollout.tokens:
        nothing = "it writes nothing at all, so there is nothing to grade"
        return Check(name, "stop", nothing, remedy)
    cut = sum(finish == "length" for finish in rollout.finish) / len(rollout)
    empty = float((rollout.lengths <= 1).float().mean())
    found = (
        f"{float(rollout.lengths.float().mean()):.0f} tokens on average, {cut:.0%} cut off at the"
        f" limit of {limit} (on {count_distinct(rollout.prompts)} prompts)"
    )
    if empty > 0.5:
        return Check(name, "warn", f"{empty:.0%} end at once", remedy)
    if cut > ENOUGH["cut"]:
        remedy = "Raise max_new_tokens, unless the teacher is to teach it to be brief."
        return Check(name, "note", found, remedy)
    return Check(name, "ok", found)


def check_overlap(overlap: Overlap, rollout: Rollout, teacher_is_told_more: bool) -> list[Check]:
    """Check the agreement everywhere, at the student's stops, and at its first tokens.

    A teacher that is told more may differ at the first tokens.

    Args:
        overlap: The agreement of student and teacher on `rollout`.
        rollout: Texts of the student.
        teacher_is_told_more: Whether the teacher reads a context that the student does not.

    Returns:
        The check "overlap", and where they fail, "stopping" and "first token".
    """
    tokens, mean = overlap.tokens, overlap.mean
    found = (
        f"a token is accepted with probability {mean['acceptance']:.2f}; the top {overlap.k}"
        f" overlap {mean['overlap']:.2f} and the teacher's hold {mean['student_mass']:.0%} of the"
        " student's mass"
    )
    checks = [Check("overlap", "ok", found)]
    if mean["acceptance"] < ENOUGH["acceptance"]:
        remedy = "Train on the teacher's texts first (a short SFT: SequenceKD)."
        checks = [Check("overlap", "warn", found, remedy)]
    ends = tokens.groupby("sample")["acceptance"].last()
    stop = ends[[rollout.finish[i] == "stop" for i in ends.index]].mean()
    if stop < min(ENOUGH["stop"], mean["acceptance"] / 2):  # false for NaN: no text stops
        found = f"where the student stops, the teacher would accept it with probability {stop:.2f}"
        remedy = (
            "Lengths may run away: align the stop tokens, or teach the teacher's way of ending"
            " first (a short SFT)."
        )
        checks.append(Check("stopping", "warn", found, remedy))
    first = tokens.loc[tokens["position"] == 0, "acceptance"].mean()
    if first < min(ENOUGH["first"], mean["acceptance"] / 2) and not teacher_is_told_more:
        found = f"the teacher would accept the student's with probability {first:.2f}"
        remedy = (
            "One of them expects another form here (a think tag, a system prompt): align the text"
            " before the answer."
        )
        checks.append(Check("first token", "warn", found, remedy))
    return checks


def _check_scores(pair: _Pair, rollout: Rollout) -> tuple[pd.DataFrame | None, list[Check]]:
    """Check the student's pass@k, and the teacher alone and from half of the student's text."""
    student, teacher, task, k = pair.student, pair.teacher, pair.task, pair.k
    if task.verify is None:
        unknown = f"{task.name} has no verifier, so pass@{k} and the teacher's accuracy are unknown"
        return None, [Check("student", "none", unknown)]
    right = pair.scores(rollout)
    firsts = rollout.select(range(0, len(rollout), k))
    half = max(1, int(firsts.lengths.float().median()) // 2)
    room = _room(rollout, student, teacher)
    probe = continuation(firsts, student, teacher, task, at=[0, half], room=room)
    alone, helped = (*probe["teacher"].tolist(), float("nan"), float("nan"))[:2]
    skill = _Skill(
        mean=float(right.mean()),
        solved=float(right.reshape(-1, k).max(1).mean()),
        alone=alone,
        helped=helped,
    )
    is_own_teacher = student.weights is teacher.weights and pair.teacher_is_told_more
    return probe, [_check_student(skill, k, is_own_teacher), _check_teacher(skill, half)]


@dataclass(frozen=True)
class _Skill:
    """The accuracies of the two.

    Attributes:
        mean: The student's texts.
        solved: Prompts with a right text among the student's k.
        alone: The teacher from the prompt.
        helped: The teacher from half of the student's text; NaN if no text is that long.
    """

    mean: float
    solved: float
    alone: float
    helped: float


def _check_student(skill: _Skill, k: int, is_own_teacher: bool) -> Check:
    """Check whether the student ever gets there by itself.

    A student that is its own teacher lacks what it is not told, and not a skill.
    """
    found = f"right {skill.mean:.2f} of the time, pass@{k} {skill.solved:.2f}"
    if is_own_teacher:
        return Check("student", "ok", found + " (its own teacher, told more)")
    # It is hardly ever right, and its texts are beyond help.
    is_lost = skill.mean < ENOUGH["right"] and skill.helped < skill.alone / 2
    if (skill.solved < ENOUGH["pass@k"] or is_lost) and skill.solved < skill.alone:
        remedy = (
            "It hardly ever gets there by itself, so little of its text can be built on: short SFT"
            " on the teacher's texts first."
        )
        return Check("student", "warn", found, remedy)
    return Check("student", "ok", found)


def _check_teacher(skill: _Skill, half: int) -> Check:
    """Check whether the teacher is better than the student, and helps on the student's text."""
    found = f"right {skill.alone:.2f} of the time alone"
    if not np.isnan(skill.helped):
        found += f", {skill.helped:.2f} from the student's first {half} tokens"
    if skill.alone < skill.mean + 0.05:
        remedy = "It is no better than the student here: take a better teacher, or tell it a hint."
        return Check("teacher", "warn", found, remedy)
    if skill.helped < skill.alone / 2:
        remedy = (
            "Its grades are worth less the further the student has gone: shorter completions may"
            " do."
        )
        return Check("teacher", "note", found, remedy)
    return Check("teacher", "ok", found)


def _check_ranking(pair: _Pair, overlap: Overlap, rollout: Rollout) -> list[Check]:
    """Check whether OPD's reward tells the student's right texts from its wrong ones.

    The reward of a text is sum log T - log S, and the measure is AUROC.
    """
    if pair.task.verify is None:
        return []
    right = pair.scores(rollout) > 0.5
    sums = overlap.tokens.groupby("sample")["reward"].sum()
    reward = sums.reindex(range(len(rollout)), fill_value=0.0).to_numpy()
    # Texts of one prompt are alike, so prompts are counted and not texts.
    fewest = min(
        count_distinct(
            prompt
            for prompt, is_right in zip(rollout.prompts, right, strict=True)
            if is_right == kind
        )
        for kind in (True, False)
    )
    if fewest < 3:
        return []
    area = auroc(reward[right], reward[~right])
    found = (
        "the teacher ranks a right text of the student's above a wrong one with probability"
        f" {area:.2f} ({right.sum()} right, {(~right).sum()} wrong)"
    )
    if area + (area * (1 - area) / fewest) ** 0.5 * 2 < 0.5:
        remedy = (
            "They are about something else than the verifier's: look at them in"
            " opdlab.viz.TokenLens."
        )
        return [Check("grades", "note", found, remedy)]
    return [Check("grades", "ok", found)]


def auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Compute the area under the ROC curve, the chance that a positive is above a negative.

    Ties count half.

    Args:
        positive: Scores of the positives, `[N]`.
        negative: Scores of the negatives, `[M]`.

    Returns:
        The chance, from 0 to 1; 0.5 if the scores tell nothing.
    """
    gap = np.subtract.outer(positive, negative)
    return float((gap > 0).mean() + 0.5 * (gap == 0).mean())


def check_memory(predicted: Cost) -> Check:
    """Check that the predicted peak fits the free memory.

    Args:
        predicted: The predicted cost of a step.

    Returns:
        "warn" if it does not fit, else "ok".
    """
    if predicted.peak > predicted.available:
        remedy = "It does not fit: lower micro_batch, set checkpointing=True, or train a LoRA."
        return Check("cost", "warn", predicted.sentence, remedy)
    return Check("cost", "ok", predicted.sentence)


def _room(rollout: Rollout, student: Policy, teacher: Policy) -> float:
    """The teacher's tokens per token of the student, with a quarter to spare.

    It is 1 if their tokens are the same.
    """
    if not compare_vocabularies(student, teacher):
        return 1.0
    ours, theirs = (
        sum(len(policy.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
        for policy, texts in ((student, rollout.texts), (teacher, rollout.texts))
    )
    return max(1.0, 1.25 * theirs / max(ours, 1))


def _name(teacher: object, role: str) -> str:
    """The name of a model for the report: that of its folder or on the Hub."""
    policy = as_policy(teacher)
    source = type(teacher).__name__ if policy is None else policy.weights.source
    return (Path(source).name if Path(source).is_dir() else source) or role
