"""Measure whether a student can find the tokens with which its teacher would begin.

On-policy, a token is learned only if the gradient at it is not zero. With p the student, q the
teacher, and z the student's logits, the pull of a divergence D on a token y is -dD/dz_y:

    forward KL    q_y - p_y
    reverse KL    p_y (log q_y / p_y + KL(p || q))

So where the teacher wants y and p_y is nearly 0, forward KL pulls with the teacher's whole
probability, and reverse KL hardly at all; Jensen-Shannon's pull vanishes with p_y likewise. The
teacher's first tokens stand behind the bare prompt, where every text passes: a share of texts that
the teacher wrote does not help there, because the divergence at that place is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from opdlab.data.rollout import Rollout
from opdlab.data.tokens import token_bytes
from opdlab.diagnose.checks import Check
from opdlab.engine.rows import Rows
from opdlab.errors import OpdlabError
from opdlab.losses import DIVERGENCES
from opdlab.methods import Method
from opdlab.models.policy import Policy

FIRST = 4  # tokens of the teacher that are looked at
TINY, LIMIT = 1e-4, "1e-4"  # probability under which a token is as good as never sampled
RARE, RARE_LIMIT = 1e-2, "1e-2"  # probability under which reverse KL pulls on a token weakly
OUT_OF_REACH = 1e-6  # the probability at which a method's pull is measured
PULLS = ("reverse_kl", "jensen_shannon", "forward_kl", "jeffreys")  # divergences that are compared
ENOUGH_PULL = 0.1  # share of forward KL's pull that a divergence needs to be named as a cure


@dataclass(frozen=True, eq=False)
class FirstTokens:
    """The teacher's first tokens, as the student sees them.

    Attributes:
        table: One row per prompt and position: `text` of the teacher's token, its probability
            `student` and `teacher` under both, and the pull on it of each divergence of `PULLS`.
    """

    table: pd.DataFrame

    @property
    def least(self) -> pd.DataFrame:
        """The row of each prompt on whose token the student's probability is smallest."""
        by_prompt = self.table.groupby("prompt")["student"]
        return self.table.loc[by_prompt.idxmin()]

    @property
    def probability(self) -> float:
        """The median over prompts of the student's smallest probability of these tokens."""
        return float(self.least["student"].median())

    @property
    def is_out_of_reach(self) -> bool:
        """True if the student gives such a token no probability on at least half of the prompts."""
        return self.probability < TINY

    @property
    def is_rare(self) -> bool:
        """True if the student seldom writes such a token, and reverse KL pulls on it weakly."""
        return self.probability < RARE and "reverse_kl" not in self.cures

    @property
    def pulls(self) -> dict[str, float]:
        """Each divergence's median pull on the tokens of `least`."""
        return {name: float(self.least[name].median()) for name in PULLS}

    @property
    def cures(self) -> list[str]:
        """The divergences that pull on them about as much as forward KL does."""
        pulls = self.pulls
        return [name for name in PULLS if pulls[name] > ENOUGH_PULL * pulls["forward_kl"]]

    def check(self) -> Check:
        """Say what was found.

        Returns:
            "warn" if the tokens are out of the student's reach, "note" if the student writes them
            so seldom that reverse KL hardly pulls on them, else "ok".
        """
        least, pulls = self.least, self.pulls
        example = str(least["text"].mode().iloc[0])
        count, below = len(least), int((least["student"] < TINY).sum())
        found = (
            f"the student gives the least likely of the teacher's first {FIRST} tokens probability"
            f" {self.probability:.2g} (median over {count} prompts)"
        )
        if not self.is_out_of_reach and not self.is_rare:
            return Check(NAME, "ok", found)
        if not self.is_out_of_reach:
            share = pulls["reverse_kl"] / pulls["forward_kl"]
            found += (
                f", under {RARE_LIMIT}, as {example!r}; reverse KL pulls on it {share:.1%} as hard"
                " as forward KL"
            )
            remedy = "Begin with forward KL; under reverse KL such a beginning is learned late."
            return Check(NAME, "note", found, remedy)
        shown = ", ".join(f"{DIVERGENCES[name].label} {pulls[name]:.1g}" for name in PULLS)
        found += (
            f", under {LIMIT} on {below} of {count}, as {example!r}: it will not write them, and"
            f" divergences pull on them by {shown}"
        )
        good = ", ".join(f'OPD("{name}")' for name in self.cures if name != "forward_kl")
        also = f" ({good} would pull as well)" if good else ""
        weak = " and ".join(DIVERGENCES[name].label for name in PULLS if name not in self.cures)
        remedy = (
            f"The student gives the teacher's first tokens less than {LIMIT}: use forward KL"
            f"{also}, alone or on a share of the teacher's texts, or train on its texts first"
            f" (SequenceKD). Under {weak} such a run stalls."
        )
        return Check(NAME, "warn", found, remedy)


NAME = "in reach"


def keep_first(rollout: Rollout, count: int = FIRST) -> Rollout:
    """Cut every text of a rollout behind its first tokens.

    Args:
        rollout: Texts.
        count: The tokens that are kept.

    Returns:
        The rollout; texts that were cut count as cut at the limit.
    """
    parts: dict[str, Any] = {
        name: getattr(rollout, name)[:, :count]
        for name in ("ids", "logp", "entropy", "learn", "turn")
    }
    finish = tuple(
        "length" if length > count else end
        for length, end in zip(rollout.lengths.tolist(), rollout.finish, strict=True)
    )
    return replace(rollout, **parts, lengths=rollout.lengths.clamp(max=count), finish=finish)


def measure_pulls(rows: Rows) -> dict[str, Tensor]:
    """Measure both policies' probability of each token, and how divergences pull on it.

    Args:
        rows: Tokens under "student" and "teacher".

    Returns:
        `student`, `teacher` and each name of `PULLS`, `[n]` each.
    """
    student, teacher = rows["student"], rows["teacher"]
    out = {
        "student": rows.logp_of("student").exp(),
        "teacher": rows.logp_of("teacher").exp(),
    }
    token, p = rows.token[:, None], student.exp()
    for name in PULLS:
        leaf = student.detach().clone().requires_grad_()
        with torch.enable_grad():
            value = DIVERGENCES[name](leaf, teacher).sum()
        (slope,) = torch.autograd.grad(value, leaf)
        # Back through the softmax that made the log-probs of logits.
        at_logits = slope - p * slope.sum(-1, keepdim=True)
        out[name] = -at_logits.gather(-1, token)[:, 0]
    return out


def measure_pull(method: Method) -> float | None:
    """Measure how strongly a method's loss pulls on a token that the student hardly ever writes.

    The student gives it `OUT_OF_REACH`, and the teacher nearly everything.

    Args:
        method: The method.

    Returns:
        Minus the gradient of its loss for that token's logit: about 1 for the forward KL, and
        nearly 0 for a mode-seeking loss. None if the loss reads what a plan computes.
    """
    likely = torch.tensor([[1 - OUT_OF_REACH, OUT_OF_REACH]])
    student, teacher = likely.log(), likely.flip(1).log()
    leaf = student.clone().requires_grad_()
    needs = [name for name in method.needs if name != "student"]
    distributions = {"student": leaf, **dict.fromkeys(needs, teacher)}
    try:
        with torch.enable_grad():
            value = method.loss(Rows(distributions, torch.tensor([0]), {})).sum()
            (slope,) = torch.autograd.grad(value, leaf)
    except (OpdlabError, RuntimeError):  # it reads a column, or has no gradient here
        return None
    return -float((slope - student.exp() * slope.sum(-1, keepdim=True))[0, 1])


def make_first_tokens(
    rollout: Rollout, columns: Mapping[str, np.ndarray], student: Policy, start: int = 0
) -> pd.DataFrame:
    """Put the numbers of `measure_pulls` into a table.

    Args:
        rollout: The teacher's first tokens after each prompt.
        columns: The numbers, `[tokens]` each.
        student: The policy whose tokens these are.
        start: The number of the first prompt.

    Returns:
        A table as `FirstTokens` has.
    """
    lengths = rollout.lengths.tolist()
    pieces = token_bytes(student.tokenizer, [i for row in rollout.completions() for i in row])
    return pd.DataFrame(
        {
            "prompt": np.repeat(np.arange(start, start + len(lengths)), lengths),
            "position": np.concatenate([np.arange(length) for length in lengths]),
            "text": [piece.decode("utf-8", "replace") for piece in pieces],
            **columns,
        }
    )
