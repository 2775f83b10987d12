"""Measure exposure bias: whether the student gets worse on its own text, and the teacher less able.

There are three readings. The first is the excess accumulated error (Arora et al., arXiv 2204.01171;
MiniLLM's appendix, arXiv 2306.08543). With p the teacher and q the student,

    R(l)      = sum_{t<=l} E_{y_<t ~ q, y_t ~ p} log p(y_t|y_<t) / q(y_t|y_<t)
    l eps(l)  = sum_{t<=l} E_{y_<t ~ p, y_t ~ p} log p(y_t|y_<t) / q(y_t|y_<t)
    ExAccErr  = 100 (R(l) - l eps(l)) / (l eps(l))  %

R is on the student's prefixes, l eps on the teacher's, so 0 means that errors do not pile up. The
next token is taken in expectation over the teacher's whole distribution and not sampled: each term
is the forward KL at a prefix. A text that has ended adds nothing to either sum (this is ours: the
definition has texts of one length), and l eps(l) is then the KL between the two laws of the first l
tokens.

The second reading is the KLs by position. The third is the teacher-continuation probe: how often
the teacher still gets it right when it goes on from the student's first L tokens.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from opdlab.data.prompt import Prompt
from opdlab.data.rollout import Rollout
from opdlab.data.tokens import completion_texts
from opdlab.diagnose.probe import choose_prompts, measure_tokens, write_rollout
from opdlab.diagnose.tables import to_html
from opdlab.engine.rows import Rows
from opdlab.errors import MissingPolicy, OpdlabError
from opdlab.exact.table import Table
from opdlab.losses.divergences import forward_kl, reverse_kl
from opdlab.models.policy import Policy, as_policy, sample
from opdlab.models.protocols import Writer
from opdlab.models.same_tokens import compare_vocabularies
from opdlab.support.expect import expect
from opdlab.support.validation import Count, CountOrZero, Seed, Unchecked, validate_arguments
from opdlab.tasks import Task
from opdlab.tasks.splits import question_of
from opdlab.teachers.text_only import as_writer

LEAST = 1e-6  # nats: below this an accumulated KL is rounding


@dataclass(frozen=True, eq=False)
class Exposure:
    """Exposure bias of a student.

    Attributes:
        table: One row per position (tokens written so far): `tokens` (student texts still open),
            `reverse_kl` and `forward_kl` there, `teacher_tokens` and `on_teacher` (the forward KL
            on the teacher's own prefixes), `excess` (ExAccErr up to and including it, %), and the
            95 % bootstrap interval over prompts, `low` and `high`.
        probe: See `continuation`; None if nothing can be scored.
        prompts: Number of different prompts that the interval rests on.
    """

    table: pd.DataFrame
    probe: pd.DataFrame | None
    prompts: int = 0

    @property
    def excess(self) -> float:
        """ExAccErr over the whole length, %."""
        return float(self.table["excess"].iloc[-1])

    @property
    def sentence(self) -> str:
        """ExAccErr and the probe in words."""
        low, high = self.table[["low", "high"]].iloc[-1]
        text = (
            f"ExAccErr over {len(self.table)} tokens is {self.excess:+.1f} % [{low:+.1f},"
            f" {high:+.1f}] ({self.prompts} prompts): so much more the student errs on its own"
            " prefixes than on the teacher's (0: errors do not pile up)."
        )
        if np.isnan(self.excess):
            text = (
                "On the teacher's prefixes student and teacher agree, so there is no error that"
                " could pile up (ExAccErr is undefined)."
            )
        if self.probe is not None and len(self.probe):
            first, last = self.probe.iloc[0], self.probe.iloc[-1]
            text += (
                f" The teacher scores {first['teacher']:.2f} from the student's first"
                f" {int(first['length'])} tokens and {last['teacher']:.2f} from its first"
                f" {int(last['length'])}."
            )
        return text

    def __str__(self) -> str:
        return self.sentence

    def __repr__(self) -> str:
        return f"Exposure(ExAccErr {self.excess:+.3g} %, {len(self.table)} positions)"

    def _repr_html_(self) -> str:
        return to_html(self.sentence, self.table)


@validate_arguments
def exposure(
    student: Unchecked[Policy],
    teacher: Unchecked[Policy],
    task: Task | None = None,
    *,
    prompts: Unchecked[int | Sequence[Prompt]] = 64,
    n: Count = 1,
    at: Sequence[CountOrZero] | None = None,
    seed: Seed = 0,
    max_new_tokens: Count | None = None,
) -> Exposure:
    """Take all three readings, on texts of both sides at temperature 1.

    Args:
        student: A policy, or an exact table.
        teacher: Likewise, with the student's tokens.
        task: Where prompts and scores come from; without one, `prompts` must be a list.
        prompts: The prompts, or how many of the task's held-out ones.
        n: Texts of each side for each prompt.
        at: Lengths L of the probe; by default five from 0 to the student's usual length.
        seed: Seed of prompts and texts.
        max_new_tokens: Length limit; by default the task's.

    Returns:
        The table by position, the probe if the task has a verifier and no environment (else None),
        and the number of questions.

    Raises:
        InvalidValue: One of the two is no policy.
        TokenizerMismatch: They have other tokens.
    """
    for name, policy in (("student", student), ("teacher", teacher)):
        if not isinstance(policy, Table):
            expect(policy, Policy, "exposure", name)
    asked = choose_prompts(task, prompts, seed)
    own, other = (
        write_rollout(policy, task, asked, n, seed, max_new_tokens=max_new_tokens)
        for policy in (student, teacher)
    )
    mine, theirs = (kls(student, teacher, rollout) for rollout in (own, other))
    # A prompt that comes twice is one cluster.
    questions = [question_of(prompt) for prompt in asked for _ in range(n)]
    table = excess_error(mine["forward_kl"], theirs["forward_kl"], clusters=questions)
    width = len(table)
    for name, value, rollout in (
        ("reverse_kl", mine["reverse_kl"], own),
        ("forward_kl", mine["forward_kl"], own),
        ("on_teacher", theirs["forward_kl"], other),
    ):
        count = rollout.learn.sum(0).cpu().numpy()
        mean = value.sum(0).numpy() / np.where(count, count, 1)
        table[name] = _padded(np.where(count > 0, mean, np.nan), width, np.nan)
        table["teacher_tokens" if name == "on_teacher" else "tokens"] = _padded(count, width, 0)
    table = table[
        [
            "tokens",
            "reverse_kl",
            "forward_kl",
            "teacher_tokens",
            "on_teacher",
            "excess",
            "low",
            "high",
        ]
    ]
    probe = (
        continuation(own, student, teacher, task, at)
        if task is not None and task.verify is not None and task.environment is None
        else None
    )
    return Exposure(table, probe, len(set(questions)))


def excess_error(
    on_student: Tensor,
    on_teacher: Tensor,
    weight: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    group: int = 1,
    resamples: int = 1000,
    clusters: Sequence[Hashable] | None = None,
) -> pd.DataFrame:
    """Compute ExAccErr up to each position, in %.

    Args:
        on_student: Forward KLs on the student's texts, `[B, T]`, 0 in the padding.
        on_teacher: The same on the teacher's texts.
        weight: Probability of each text of the student, `[B]`, for laws that are enumerated and not
            sampled; there is no interval then.
        teacher_weight: The same for the teacher's texts.
        group: Texts for each prompt, which are resampled together.
        resamples: Bootstrap samples.
        clusters: The prompt of each text, `[B]`, the same for both; in place of `group`.

    Returns:
        One row per position with `excess` and the interval `low`, `high`; NaN if the teacher's own
        prefixes show no error (`LEAST`).
    """
    width = max(on_student.shape[1], on_teacher.shape[1])
    sums = [
        torch.nn.functional.pad(x.double(), (0, width - x.shape[1])).cumsum(1)
        for x in (on_student, on_teacher)
    ]
    law = [
        w.double() if w is not None else x.new_full((len(x),), 1 / len(x))
        for w, x in ((weight, sums[0]), (teacher_weight, sums[1]))
    ]
    accumulated, expected = (w @ x for w, x in zip(law, sums, strict=True))
    out = pd.DataFrame({"excess": _percent(accumulated, expected).numpy()})
    out["low"] = out["high"] = np.nan
    paired = weight is None and teacher_weight is None and len(sums[0]) == len(sums[1])
    labels = list(clusters) if clusters is not None else [i // group for i in range(len(sums[0]))]
    numbers = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    if paired and (prompts := len(numbers)) > 1:
        which = torch.tensor([numbers[label] for label in labels])
        own, other = (
            torch.zeros(prompts, width, dtype=torch.double).index_add_(0, which, x)
            / (len(x) / prompts)
            for x in sums
        )
        pick = torch.randint(
            prompts, (resamples, prompts), generator=torch.Generator().manual_seed(0)
        )
        share = torch.zeros(resamples, prompts, dtype=torch.double).scatter_add_(
            1, pick, torch.ones(pick.shape, dtype=torch.double)
        )
        drawn = _percent(share @ own / prompts, share @ other / prompts).numpy()
        out["low"], out["high"] = np.quantile(drawn, [0.025, 0.975], axis=0)
    return out


def continuation(
    rollout: Rollout,
    student: Policy,
    teacher: Policy | Writer,
    task: Task,
    at: Sequence[int] | None = None,
    room: float = 1.0,
) -> pd.DataFrame:
    """Let the teacher go on greedily from the first L tokens of each longer text of the student.

    If the teacher has other tokens or only writes, it gets the prefixes as text.

    Args:
        rollout: Texts of the student.
        student: The policy that wrote them.
        teacher: A policy, or a teacher that writes.
        task: Scores the texts.
        at: Lengths L; by default five from 0 to the usual length of a text.
        room: The teacher's tokens per token of the task's length limit.

    Returns:
        One row per length: `texts` (how many are that long), and the verifier's mean scores
        `teacher` (of prefix and continuation) and `student` (of the whole text as it was written).

    Raises:
        MissingPolicy: The task has no verifier.
        OpdlabError: A length is negative, or the task has an environment: a text that goes on from
            the middle of a conversation has nobody to reply to it.
    """
    usual = int(rollout.lengths.float().median())
    lengths = [round(usual * i / 5) for i in range(5)] if at is None else at
    _check_probe(task, lengths)
    rows = []
    for length in sorted(set(lengths)):
        bodies = rollout.completions()
        longer = rollout.select([i for i, body in enumerate(bodies) if len(body) > length])
        if not len(longer):
            continue
        left = max(1, round(room * (task.max_new_tokens - length)))
        prompts = list(longer.prompts)
        begun = [body[:length] for body in longer.completions()]
        continued = _continue(student, teacher, prompts, begun, left)
        means = {
            "teacher": np.mean(task.scores(prompts, continued)),
            "student": np.mean(task.scores(prompts, list(longer.texts))),
        }
        rows.append({"length": length, "texts": len(longer), **means})
    return pd.DataFrame(rows, columns=["length", "texts", "teacher", "student"])


def _check_probe(task: Task, lengths: Sequence[int]) -> None:
    """Refuse what a teacher cannot go on from, or nobody can score."""
    if task.environment is not None:
        raise OpdlabError(
            f"{task.name} has an environment, and a probe that goes on from the middle of a"
            " conversation has nobody to reply to it. Leave the probe out."
        )
    if task.verify is None:
        raise MissingPolicy(
            f"{task.name} has no verifier, so nothing can be scored. Make the task with verify=…."
        )
    for length in lengths:
        if length < 0:
            raise OpdlabError(
                f"continuation got a prefix of {length} tokens. Use lengths of 0 and more."
            )


def _continue(
    student: Policy,
    teacher: Policy | Writer,
    prompts: list[Prompt],
    begun: list[list[int]],
    left: int,
) -> list[str]:
    """Let the teacher add up to `left` tokens to each text that was begun; returns whole texts."""
    policy = as_policy(teacher)
    if policy is not None and not compare_vocabularies(student, policy):
        added = sample(policy, prompts, temperature=0, max_new_tokens=left, prefixes=begun)
        whole = [start + more for start, more in zip(begun, added.completions(), strict=True)]
        return completion_texts(student.tokenizer, whole, policy.weights.eos)
    writer = as_writer(teacher)
    starts = completion_texts(student.tokenizer, begun, student.weights.eos)
    texts = writer.write(prompts, 1, prefixes=starts, max_new_tokens=left, temperature=0.0)
    return [start + text for start, (text,) in zip(starts, texts, strict=True)]


def kls(student: Policy, teacher: Policy, rollout: Rollout) -> dict[str, Tensor]:
    """Compute forward and reverse KL on a rollout.

    Args:
        student: The policy whose divergence is measured.
        teacher: A policy with the same tokens.
        rollout: Texts of either side, `[B, T]`.

    Returns:
        `forward_kl` and `reverse_kl`, `[B, T]` each in nats, on the CPU; zero in the padding and on
        tokens that nobody of the two wrote.
    """
    flat = measure_tokens(rollout, _measure_kls, {"student": student, "teacher": teacher})
    mask = rollout.mask.cpu()
    none = torch.zeros(mask.shape, dtype=torch.float64)
    return {
        name: none.masked_scatter(mask, torch.tensor(value).double()) * rollout.learn.cpu()
        for name, value in flat.items()
    }


def _measure_kls(rows: Rows) -> dict[str, Tensor]:
    student, teacher = rows["student"], rows["teacher"]
    return {
        "forward_kl": forward_kl(student, teacher),
        "reverse_kl": reverse_kl(student, teacher),
    }


def _percent(accumulated: Tensor, expected: Tensor) -> Tensor:
    return torch.where(
        expected > LEAST, 100 * (accumulated - expected) / expected.clamp(min=LEAST), torch.nan
    )


def _padded(values: np.ndarray, width: int, fill: float) -> np.ndarray:
    return np.concatenate([values, np.full(width - len(values), fill, values.dtype)])
