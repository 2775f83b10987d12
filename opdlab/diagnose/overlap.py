"""Measure how far two policies agree on the student's own prefixes.

On-policy distillation only grades the student's texts. If the teacher's likely tokens have no mass
under the student, nothing can be learned from the grades. The numbers are those that users of this
method watch ("Rethinking OPD", code thunlp/OPD: in runs that work the shared tokens carry 97-99 %
of the mass), with DistillSpec's acceptance (arXiv 2310.08461). With a small vocabulary, `overlap`
looks worse than it is, since most of the top k have no mass: read the masses and the acceptance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from opdlab.data.prompt import Prompt
from opdlab.data.rollout import Rollout
from opdlab.diagnose.probe import measure_tokens, write_rollout
from opdlab.diagnose.tables import make_token_table, to_html
from opdlab.engine.rows import Rows
from opdlab.losses.divergences import entropy, total_variation
from opdlab.models.policy import as_policy
from opdlab.support.validation import Count, Seed, Unchecked, validate_arguments
from opdlab.tasks import Task
from opdlab.teachers.contract import expect_teacher

NUMBERS = ("overlap", "advantage", "acceptance", "student_mass", "teacher_mass", "entropy_gap")


@dataclass(frozen=True, eq=False)
class Overlap:
    """The agreement of two policies.

    Attributes:
        k: Number of top tokens of each policy that were compared.
        tokens: One row per token, with the numbers of `agreement(k)`.
    """

    k: int
    tokens: pd.DataFrame

    @property
    def table(self) -> pd.DataFrame:
        """Means by position, with the count in `tokens`."""
        by = self.tokens.groupby("position")
        return pd.concat([by.size().rename("tokens"), by[list(NUMBERS)].mean()], axis=1)

    @property
    def mean(self) -> dict[str, float]:
        """Means over all tokens (the advantage over those whose top tokens meet at all)."""
        return {name: float(self.tokens[name].mean()) for name in NUMBERS}

    @property
    def sentence(self) -> str:
        """The means in words."""
        m = self.mean
        return (
            f"On the student's own prefixes the two share {m['overlap']:.0%} of their top {self.k}"
            f" tokens; the teacher's hold {m['student_mass']:.1%} of the student's mass and the"
            f" student's {m['teacher_mass']:.1%} of the teacher's. A token of the student's would"
            f" be accepted with probability {m['acceptance']:.3f}."
        )

    def __str__(self) -> str:
        return self.sentence

    def __repr__(self) -> str:
        return (
            f"Overlap(k={self.k},"
            f" {', '.join(f'{name} {value:.3g}' for name, value in self.mean.items())},"
            f" {len(self.tokens)} tokens)"
        )

    def _repr_html_(self) -> str:
        return to_html(self.sentence, self.table)


@validate_arguments
def overlap(
    student: Any,
    teacher: Any,
    task: Task | None = None,
    *,
    k: Count = 16,
    rollout: Rollout | None = None,
    prompts: Unchecked[int | Sequence[Prompt]] = 32,
    n: Count = 1,
    seed: Seed = 0,
) -> Overlap:
    """Measure the agreement of two policies on texts of the student.

    Args:
        student: A policy, or an exact table.
        teacher: Likewise, with the student's tokens.
        task: Where prompts come from, if neither `rollout` nor `prompts` is a list.
        k: Number of top tokens of each policy to compare; cut to the vocabulary.
        rollout: Texts of the student; written here by default.
        prompts: The prompts to write to, or how many of the task's held-out ones.
        n: Texts for each prompt.
        seed: Seed of prompts and texts.

    Returns:
        The table of tokens, with the columns that `agreement` lists, and `k`.

    Raises:
        InvalidValue: One of the two is no policy.
        TokenizerMismatch: They have other tokens.
    """
    for name, policy in (("student", student), ("teacher", teacher)):
        expect_teacher(policy, "overlap", name)
    rollout = rollout or write_rollout(student, task, prompts, n, seed)
    columns = measure_tokens(rollout, agreement(k), {"student": student, "teacher": teacher})
    local = as_policy(student)
    compared = k if local is None else min(k, local.weights.vocab_size)
    return Overlap(compared, make_token_table(rollout, columns, task, student.tokenizer))


def agreement(k: int) -> Callable[[Rows], dict[str, Tensor]]:
    """Make the function that measures agreement.

    With p the student, q the teacher and K_p, K_q the top k tokens of each, it gives `[n]` each:

    overlap        |K_p & K_q| / k
    advantage      sum p' (log q' - log p') over K_p & K_q, both renormalised there; minus a KL, so
                   0 at best, and NaN if K_p & K_q is empty
    acceptance     sum min(p, q) = 1 - TV, the chance that speculative checking keeps a token
    student_mass   p(K_q)
    teacher_mass   q(K_p)
    entropy_gap    |H(q) - H(p)|, nats

    Args:
        k: Number of top tokens of each policy to compare; cut to the vocabulary.

    Returns:
        A function of rows of log-probs (`[n, V]` for each policy) that gives these columns.
    """

    def measure(rows: Rows) -> dict[str, Tensor]:
        p, q = rows["student"], rows["teacher"]
        tops = [logp.topk(min(k, p.shape[-1]), -1).indices for logp in (p, q)]
        # [n, k]: which of the student's top tokens are the teacher's too
        common = (tops[0][:, :, None] == tops[1][:, None, :]).any(-1)
        return {
            "overlap": common.float().mean(-1),
            "advantage": _shared_advantage(p.gather(-1, tops[0]), q.gather(-1, tops[0]), common),
            "acceptance": 1 - total_variation(p, q),
            "student_mass": p.gather(-1, tops[1]).exp().sum(-1),
            "teacher_mass": q.gather(-1, tops[0]).exp().sum(-1),
            "entropy_gap": (entropy(q) - entropy(p)).abs(),
        }

    return measure


def _shared_advantage(p: Tensor, q: Tensor, common: Tensor) -> Tensor:
    """The advantage `[n]` of log-probs `[n, k]`, over those that are `common`."""
    p, q = (x.masked_fill(~common, -torch.inf).log_softmax(-1) for x in (p, q))
    gap = (q - p).masked_fill(~common, 0.0)
    # A token without mass gives NaN, and adds nothing.
    value = (p.exp() * gap).nan_to_num(nan=0.0, neginf=-torch.inf).sum(-1)
    return value.masked_fill(~common.any(-1), torch.nan)
