"""Judge what the student and the teacher wrote: lengths, agreement, scores, and the cost of a step.

Each function looks at numbers that were measured already, and gives a `Check`. The order and most
thresholds are those of the survey's practice notes (sections 8.2, 8.6, 8.10); the numbers in
`ENOUGH` are opdlab's starting guesses.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from opdlab.data.rollout import Rollout
from opdlab.diagnose.checks import Check
from opdlab.diagnose.cost import Cost
from opdlab.diagnose.overlap import Overlap
from opdlab.tasks.splits import count_distinct
from opdlab.training.intervals import wilson

ENOUGH = {"acceptance": 0.5, "pass@k": 0.2, "right": 0.1, "stop": 0.2, "first": 0.1, "cut": 0.5}


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


@dataclass(frozen=True)
class Skill:
    """The accuracies of the two.

    Attributes:
        mean: The student's texts.
        solved: Prompts with a right text among the student's k.
        alone: The teacher from the prompt.
        helped: The teacher from half of the student's text; NaN if no text is that long, or it was
            not asked.
        prompts: Different prompts of the student's texts.
        answered: Different prompts that the teacher answered alone.
    """

    mean: float
    solved: float
    alone: float
    helped: float
    prompts: int
    answered: int


def show_interval(mean: float, prompts: int) -> str:
    """Show the 95 % interval of a mean over prompts.

    Args:
        mean: The mean of scores from 0 to 1.
        prompts: The number of different prompts.

    Returns:
        Wilson's interval, as "[0.20, 0.54]".
    """
    known = wilson(mean, prompts)
    return f"[{known.low:.2f}, {known.high:.2f}]"


def check_student(skill: Skill, k: int, is_own_teacher: bool) -> Check:
    """Check whether the student ever gets there by itself.

    A student that is its own teacher lacks what it is not told, and not a skill.

    Args:
        skill: The accuracies.
        k: The student's texts of each prompt.
        is_own_teacher: Whether the teacher is the student itself, told more.

    Returns:
        "ok", or "warn" if there is little that can be built on.
    """
    found = (
        f"right {skill.mean:.2f} of the time {show_interval(skill.mean, skill.prompts)}, pass@{k}"
        f" {skill.solved:.2f} {show_interval(skill.solved, skill.prompts)}"
    )
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


def check_teacher(skill: Skill, half: int) -> Check:
    """Check whether the teacher is better than the student, and helps on the student's text.

    Args:
        skill: The accuracies.
        half: Tokens of the student's text from which the teacher went on.

    Returns:
        "ok"; "warn" if it is no better; "note" if it hardly helps.
    """
    if np.isnan(skill.alone):
        return Check("teacher", "none", "it was not asked to answer")
    found = (
        f"right {skill.alone:.2f} of the time alone {show_interval(skill.alone, skill.answered)}"
    )
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


def check_ranking(right: np.ndarray, reward: np.ndarray, rollout: Rollout) -> list[Check]:
    """Check whether OPD's reward tells the student's right texts from its wrong ones.

    The reward of a text is sum log T - log S, and the measure is AUROC.

    Args:
        right: The verifier's scores of the texts, `[B]`.
        reward: Their rewards, `[B]`.
        rollout: The texts.

    Returns:
        The check "grades"; none if there are fewer than three prompts with right texts, or with
        wrong ones.
    """
    right = right > 0.5
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
