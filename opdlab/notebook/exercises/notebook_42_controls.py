"""Notebook 42: the teacher's share, the penalty without a teacher, controls by claim, and AUROC."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from opdlab.evidence.controls import TEACHER, ArmResult, Controls
from opdlab.evidence.credit import auroc as library_auroc
from opdlab.notebook.checking import Exercise

ADVANTAGE = -0.5


def share(gain: float, others: Sequence[float]) -> float:
    """Solve 42.1: the share of a gain that is due to the teacher.

    Args:
        gain: The gain of the run with its teacher, above 0.
        others: The gains of the arms without a teacher.

    Returns:
        The share, at most 1.
    """
    return (gain - max(0.0, *others)) / gain


def _reference_share(gain: float, others: Sequence[float]) -> float:
    """The share of controls in which every prompt gains as much as the others do."""

    def arm(name: str, gained: float) -> ArmResult:
        scores, one = np.full((1, 200), 0.4 + gained), np.zeros(1)
        return ArmResult(name, "", name != TEACHER, (0,), scores, scores, one, one)

    free = {f"free {i}": arm(f"free {i}", gained) for i, gained in enumerate(others)}
    before = np.full(200, 0.4)
    return Controls(before, before, {TEACHER: arm(TEACHER, gain), **free}, {}, {}).share.value


def _cases_of_share() -> list[tuple[float, list[float]]]:
    return [
        (0.5, [0.1, -0.2]),
        (0.5, [-0.3, -0.1]),
        (0.2, [0.05, 0.3]),
        (0.4, [0.4, 0.1]),
        (0.6, [0.0, 0.0]),
    ]


def _without_the_start(gain: float, others: Sequence[float]) -> float:
    return (gain - max(others)) / gain


def _mean_of_arms(gain: float, others: Sequence[float]) -> float:
    return (gain - max(0.0, sum(others) / len(others))) / gain


def _share_of_the_others(gain: float, others: Sequence[float]) -> float:
    return max(0.0, *others) / gain


def _never_below_zero(gain: float, others: Sequence[float]) -> float:
    return max(0.0, share(gain, others))


def penalty(logp: Tensor, part: float) -> Tensor:
    """Solve 42.2: the advantages of a penalty on the least likely tokens.

    Args:
        logp: Log-probs of the tokens that the student drew, `[n]`.
        part: The share of the tokens that is pushed down.

    Returns:
        `[n]`, -0.5 on those tokens and 0 on the others.
    """
    count = int(part * len(logp))
    advantage = torch.zeros(len(logp))
    advantage[logp.argsort()[:count]] = ADVANTAGE
    return advantage


def _reference_penalty(logp: Tensor, part: float) -> Tensor:
    border = logp.sort().values[int(part * len(logp))]
    return ADVANTAGE * (logp < border).float()


def _cases_of_penalty() -> list[tuple[Tensor, float]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (-torch.rand(n, generator=generator), part) for n, part in ((10, 0.2), (15, 0.4), (20, 0.1))
    ]


def _most_likely(logp: Tensor, part: float) -> Tensor:
    return penalty(-logp, part)


def _below_a_share(logp: Tensor, part: float) -> Tensor:
    return ADVANTAGE * (logp.exp() < part).float()


def _rewarded(logp: Tensor, part: float) -> Tensor:
    return -penalty(logp, part)


CLAIMS = {
    "the grades of this very token matter": "shuffled",
    "how much likelier the teacher finds a token matters": "sign",
    "the teacher's knowledge matters, not only that it is a good model": "weaker",
    "the student must write the texts": "teacher_texts",
    "this direction of the KL is the right one": "other_direction",
    "the gain needs a teacher at all": "no_teacher",
}


def control(claim: str) -> str:
    """Solve 42.3: the arm that would expose a claim that is wrong.

    Args:
        claim: A claim about a run.

    Returns:
        The name of the arm.
    """
    return CLAIMS[claim]


def _cases_of_control() -> list[tuple[str]]:
    return [(claim,) for claim in CLAIMS]


def _always_without(claim: str) -> str:
    return "no_teacher"


def _sign_and_shuffled(claim: str) -> str:
    return {"sign": "shuffled", "shuffled": "sign"}.get(CLAIMS[claim], CLAIMS[claim])


def auroc(score: Sequence[float], matters: Sequence[bool]) -> float:
    """Solve 42.4: the chance that a token that matters scores higher than one that does not.

    Args:
        score: A rule's number for each token.
        matters: Whether the token matters.

    Returns:
        From 0 to 1; ties count half.
    """
    wanted = [s for s, m in zip(score, matters, strict=True) if m]
    others = [s for s, m in zip(score, matters, strict=True) if not m]
    wins = sum((w > o) + 0.5 * (w == o) for w in wanted for o in others)
    return wins / (len(wanted) * len(others))


def _reference_auroc(score: Sequence[float], matters: Sequence[bool]) -> float:
    return library_auroc(np.asarray(score, float), np.asarray(matters, bool))


def _cases_of_auroc() -> list[tuple[list[float], list[bool]]]:
    return [
        ([0.9, 0.1, 0.8, 0.3], [True, False, True, False]),
        ([0.5, 0.5, 0.5], [True, False, False]),
        ([3.0, 1.0, 2.0, 2.0, 0.0], [True, False, True, False, True]),
    ]


def _ties_lost(score: Sequence[float], matters: Sequence[bool]) -> float:
    wanted = [s for s, m in zip(score, matters, strict=True) if m]
    others = [s for s, m in zip(score, matters, strict=True) if not m]
    return sum(w > o for w in wanted for o in others) / (len(wanted) * len(others))


def _ties_won(score: Sequence[float], matters: Sequence[bool]) -> float:
    wanted = [s for s, m in zip(score, matters, strict=True) if m]
    others = [s for s, m in zip(score, matters, strict=True) if not m]
    return sum(w >= o for w in wanted for o in others) / (len(wanted) * len(others))


def _lower_wins(score: Sequence[float], matters: Sequence[bool]) -> float:
    return 1 - auroc(score, matters)


EXERCISES = (
    Exercise(
        "42.1",
        request="return the share of the gain that is due to the teacher",
        confirmation="that is the share that opdlab.controls gives",
        reference=_reference_share,
        solution=share,
        cases=_cases_of_share,
        mistakes={
            "not to train is an arm too, which gains 0.": _without_the_start,
            "take the best of the arms without a teacher, not their mean.": _mean_of_arms,
            "that is the share that needs no teacher.": _share_of_the_others,
            (
                "an arm without a teacher may gain more than the teacher does: then the share is"
                " below 0."
            ): _never_below_zero,
        },
    ),
    Exercise(
        "42.2",
        request="return the advantages, [n]",
        confirmation="that is the whole of the method: it never asks what is right",
        reference=_reference_penalty,
        solution=penalty,
        cases=_cases_of_penalty,
        mistakes={
            "those are the likeliest tokens.": _most_likely,
            (
                "those are the tokens with a probability below `part`. Take a share of the tokens."
            ): _below_a_share,
            "a penalty has an advantage below zero.": _rewarded,
        },
    ),
    Exercise(
        "42.3",
        request="return the name of the arm that would expose the claim",
        confirmation="each of these arms keeps everything but what the claim is about",
        reference=control,
        solution=control,
        cases=_cases_of_control,
        mistakes={
            "an arm without any teacher answers one of the claims only.": _always_without,
            (
                "'sign' keeps whose grade it is and drops its size; 'shuffled' keeps the size and"
                " drops whose it is."
            ): _sign_and_shuffled,
        },
    ),
    Exercise(
        "42.4",
        request="return the AUROC",
        confirmation="that is what found.ranking() computes for each rule",
        reference=_reference_auroc,
        solution=auroc,
        cases=_cases_of_auroc,
        mistakes={
            "a tie counts half, not nothing.": _ties_lost,
            "a tie counts half, not whole.": _ties_won,
            "that is the chance of a lower score.": _lower_wins,
        },
    ),
)
