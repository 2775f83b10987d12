"""The causal effect of single tokens on the outcome, by forking the text at each of them.

    V_w(s)      = E[ score of a text that w writes on from the prefix s ]
    effect_t    = V_student(s_t, y_t) - V_student(s_t)

`effect` is what writing y_t at s_t did to the chance of being right: below zero for a token that
did harm. Over a text the effects add up to the outcome less V(prompt). `teacher_effect` is the same
with the teacher writing on: near zero where the teacher repairs what the token did. `rescue` is
V_teacher(s_t) - V_student(s_t): what it would help to let the teacher write on from before the
token.

In exact worlds (`opdlab.exact.Table`) the values are sums over all texts. Elsewhere each V is a
mean over n texts that are sampled, and a difference has Newcombe's interval (Statistics in Medicine
17, 1998, method 10), from Wilson's intervals of both. What has ended has a known score.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from opdlab.data.prompt import Prompt
from opdlab.data.rollout import Rollout
from opdlab.data.seeds import seed_of
from opdlab.data.trace import Trace
from opdlab.engine.batch import Batch
from opdlab.engine.recording import rollout_from_trace
from opdlab.errors import InvalidValue, MissingPolicy
from opdlab.evidence.rules import RULES
from opdlab.exact.laws import law
from opdlab.exact.table import Table, everything
from opdlab.models.protocols import Sampler
from opdlab.support.expect import shortened
from opdlab.support.progress import Progress
from opdlab.support.validation import (
    Amount,
    Count,
    Flag,
    Seed,
    Texts,
    Unchecked,
    validate_arguments,
)
from opdlab.tasks.task import Task
from opdlab.training.intervals import wilson

Values = npt.NDArray[np.float64]


@runtime_checkable
class Forker(Sampler, Protocol):
    """Writes on from a prefix of tokens, and turns tokens into texts."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        ...


RESAMPLED = 300  # bootstrap samples of the completions, for intervals of an AUROC
WRITERS = ("student", "teacher")


@dataclass(frozen=True)
class Value:
    """The chance to be right from a prefix on, `[B, T + 1]` each; NaN behind the end of a text.

    Column t stands before token t, column t + 1 behind it.

    Attributes:
        mean: The estimate.
        low: The lower end of its 95 % interval; equal to `mean` where it is exact.
        high: The upper end.
    """

    mean: Values
    low: Values
    high: Values


@dataclass(frozen=True, eq=False)
class Credit:
    """The effects of the tokens of some texts.

    Attributes:
        rollout: The texts.
        values: V by writer, "student" and "teacher" (where there is one).
        scores: By rule, a number for each token, `[tokens]`.
        tokens: The tokens as texts.
        types: The ground-truth type of each token; empty where the task knows none.
        n: Texts for each value; 0 for exact values.
        least: The smallest effect that counts, in chance of being right.
    """

    rollout: Rollout
    values: Mapping[str, Value]
    scores: Mapping[str, Values]
    tokens: Sequence[str]
    types: Sequence[str]
    n: int
    least: float

    @cached_property
    def df(self) -> pd.DataFrame:
        """One row for each token.

        Columns: `sample`, `position`, `token`, `type` (where known), `before` and `after` (the
        student's V), `effect` with `low` and `high`, `matters` (whether the effect is at least
        `least` and its interval excludes zero); with a teacher `teacher_effect`,
        `teacher_effect_low`, `teacher_effect_high` and `rescue`; and the scores of the rules.
        """
        mask = self.rollout.mask.cpu().numpy()
        sample, position = np.nonzero(mask)
        columns: dict[str, Any] = {"sample": sample, "position": position}
        columns["token"] = list(self.tokens)
        if self.types:
            columns["type"] = list(self.types)
        student = self.values["student"]
        columns["before"] = student.mean[:, :-1][mask]
        columns["after"] = student.mean[:, 1:][mask]
        effect, low, high = (part[mask] for part in _difference(student))
        columns |= {"effect": effect, "low": low, "high": high}
        columns["matters"] = (np.abs(effect) >= self.least) & ((low > 0) | (high < 0))
        if "teacher" in self.values:
            teacher = self.values["teacher"]
            ends = (part[mask] for part in _difference(teacher))
            names = ("teacher_effect", "teacher_effect_low", "teacher_effect_high")
            columns |= dict(zip(names, ends, strict=True))
            columns["rescue"] = teacher.mean[:, :-1][mask] - columns["before"]
        return pd.DataFrame({**columns, **self.scores})

    def ranking(self, truth: str = "matters") -> pd.DataFrame:
        """Say how well each rule finds the tokens that matter.

        AUROC is the chance that a token that matters has a higher score than one that does not;
        0.5 is a coin's. Its 95 % interval is a bootstrap over prompts.

        Args:
            truth: What is to be found: "matters"; "harms" (those that matter and lowered the
                chance); or the name of a type, as "skill".

        Returns:
            One row for each rule, the best first: `rule`, `auroc`, `low`, `high`, `found` (the
            share of such tokens among the 5 % of highest score), `tokens` (how many there are) and
            `prompts`.

        Raises:
            InvalidValue: There is no such truth, or there are no such tokens, or no others.
        """
        table = self.df
        is_wanted = self._find(truth)
        if is_wanted.all() or not is_wanted.any():
            raise InvalidValue(
                f"{int(is_wanted.sum())} of {len(table)} tokens are in {truth!r}, so there is"
                " nothing to rank. Take more texts, a larger n, or a smaller least=."
            )
        questions = [self.rollout.prompts[i].id or str(i) for i in table["sample"]]
        _, group = np.unique(questions, return_inverse=True)
        rows = []
        for name in self.scores:
            score = table[name].to_numpy(float)
            low, high = _resampled(score, is_wanted, group)
            count = max(1, int(0.05 * len(score)))
            top = np.argsort(-score, kind="stable")[:count]
            rows.append(
                {
                    "rule": name,
                    "auroc": auroc(score, is_wanted),
                    "low": low,
                    "high": high,
                    "found": float(is_wanted[top].mean()),
                    "tokens": int(is_wanted.sum()),
                    "prompts": int(group.max()) + 1,
                }
            )
        return pd.DataFrame(rows).sort_values("auroc", ascending=False, ignore_index=True)

    def __repr__(self) -> str:
        how = f"{self.n} texts for each prefix" if self.n else "exact"
        table = self.df
        prompts = len({id(prompt) for prompt in self.rollout.prompts})
        lines = [
            f"Credit: {int(table['matters'].sum())} of {len(table)} tokens matter ({how},"
            f" {prompts} prompts)"
        ]
        strongest = table.reindex(table["effect"].abs().sort_values(ascending=False).index)
        for row in strongest.head(8).to_dict("records"):
            lines.append(
                f"{row['sample']}:{row['position']:<4}{row['token']!r:<14}"
                f"{row['effect']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]"
            )
        return "\n".join(lines)

    def _find(self, truth: str) -> npt.NDArray[np.bool_]:
        table = self.df
        if truth == "matters":
            found = table["matters"]
        elif truth == "harms":
            found = table["matters"] & (table["effect"] < 0)
        elif "type" in table and truth in set(table["type"]):
            found = table["type"] == truth
        else:
            known = ["matters", "harms", *sorted(set(self.types))]
            raise InvalidValue(
                f"ranking got truth={shortened(truth)}. Use one of {', '.join(known)}."
            )
        return np.asarray(found, np.bool_)


@validate_arguments
def credit(
    texts: Unchecked[Rollout | Trace],
    student: Unchecked[Any],
    teacher: Unchecked[Any] = None,
    task: Unchecked[Task | None] = None,
    *,
    prompts: Unchecked[Sequence[Prompt] | None] = None,
    n: Count = 16,
    rules: Texts | None = None,
    least: Amount = 0.1,
    seed: Seed = 0,
    quiet: Flag = False,
) -> Credit:
    """Measure what each token of some texts did to the chance of being right.

        opd.credit(student.sample(task.prompts(8)), student, teacher, task)

    Student and teacher each write on n times from every prefix, and the task judges the texts. Two
    tables of `opdlab.exact` need no samples: their values are exact. A text of T tokens costs
    2 n T continuations.

    Args:
        texts: The student's texts: a rollout, or a trace with `prompts=`.
        student: The policy, or table, that wrote them.
        teacher: Another that can write on from a prefix of the student's tokens; None for none.
        task: Judges the texts.
        prompts: The prompts of a trace, in order; a trace does not keep their answers.
        n: Texts that each writes from each prefix.
        rules: Names of `RULES` that are scored; by default all that student and teacher allow.
        least: The smallest effect that counts, in chance of being right.
        seed: Seed of the texts.
        quiet: Whether to show no progress.

    Returns:
        Effects with intervals, token by token, and how well rules find those that matter.

    Raises:
        MissingPolicy: The task has no verifier, or somebody cannot write on.
        InvalidValue: An argument is not what it must be.
    """
    rollout = _rollout_of(texts, prompts)
    if not isinstance(task, Task) or task.verify is None:
        raise MissingPolicy(
            f"credit got task={shortened(task)}. Give a task with a verifier, which says what the"
            " outcome is."
        )
    if bool(rollout.turn.any()) or task.environment is not None:
        raise InvalidValue("credit forks texts of one turn, and these have several. Use others.")
    writers = {"student": student} | ({} if teacher is None else {"teacher": teacher})
    for name, writer in writers.items():
        if isinstance(writer, type) or not isinstance(writer, Forker):
            raise MissingPolicy(
                f"credit got {name}={shortened(writer)}, which cannot write on from a prefix of"
                " tokens. Use a local policy."
            )
    is_exact = all(isinstance(writer, Table) for writer in writers.values())
    scores = {} if not rules and rules is not None else _score(rollout, writers, task, rules)
    if is_exact:
        values = {name: exact_values(rollout, one, task) for name, one in writers.items()}
    else:
        values = _sampled_values(rollout, writers, task, n, seed, quiet)
    tokenizer = student.tokenizer
    pieces = [tokenizer.decode([i]) for row in rollout.completions() for i in row]
    types: list[str] = []
    if task.types is not None:
        types = [one for row in task.token_types(rollout, tokenizer) for one in row]
    return Credit(rollout, values, scores, pieces, types, 0 if is_exact else n, least)


def exact_values(rollout: Rollout, writer: Table, task: Task) -> Value:
    """Compute V of every prefix of some texts, over all texts of a table.

    Args:
        rollout: Texts of the table's prompts.
        writer: The table that writes on.
        task: Judges the texts.

    Returns:
        The values; their intervals have no width.
    """
    whole = everything(writer.prompts, writer.vocab, writer.length, eos=writer.eos, by=writer)
    chance = law(writer, whole).detach().numpy()
    score = np.asarray(task.scores(whole.prompts, whole.texts), float)
    rows = [tuple(row) for row in whole.completions()]
    places = [writer.place(prompt) for prompt in whole.prompts]
    mass: dict[tuple[int, tuple[int, ...]], tuple[float, float]] = {}
    for i, row in enumerate(rows):
        for t in range(len(row) + 1):
            key = places[i], row[:t]
            old = mass.get(key, (0.0, 0.0))
            mass[key] = old[0] + chance[i], old[1] + chance[i] * score[i]
    out = np.full((len(rollout), rollout.ids.shape[1] + 1), np.nan)
    for b, body in enumerate(rollout.completions()):
        place = writer.place(rollout.prompts[b])
        for t in range(len(body) + 1):
            total, right = mass[place, tuple(body[:t])]
            out[b, t] = right / total if total > 0 else math.nan
    return Value(out, out, out)


def _sampled_values(
    rollout: Rollout, writers: Mapping[str, Any], task: Task, n: int, seed: int, quiet: bool
) -> dict[str, Value]:
    """V of every prefix, by sampling; prefixes of one length are written on side by side."""
    shape = len(rollout), rollout.ids.shape[1] + 1
    found = {name: np.full((3, *shape), np.nan) for name in writers}
    known = np.asarray(task.scores(rollout.prompts, rollout.texts), float)
    lengths = rollout.lengths.tolist()
    bodies = rollout.completions()
    bar = Progress(shape[1] * len(writers), "credit", "prefix", quiet)
    done = 0
    for use, (name, writer) in enumerate(writers.items()):
        for t in range(shape[1]):
            going = [b for b in range(shape[0]) if lengths[b] > t]
            for b in range(shape[0]):
                if lengths[b] == t:
                    found[name][:, b, t] = known[b]
            if going:
                means = _write_on(rollout, bodies, going, t, writer, task, n, seed_of(seed, t, use))
                for b, mean in zip(going, means, strict=True):
                    ends = wilson(min(1.0, max(0.0, mean)), n)
                    found[name][:, b, t] = mean, ends.low, ends.high
            done += 1
            bar.update(done)
    bar.close()
    return {name: Value(*parts) for name, parts in found.items()}


def _write_on(
    rollout: Rollout,
    bodies: Sequence[Sequence[int]],
    going: Sequence[int],
    t: int,
    writer: Any,
    task: Task,
    n: int,
    seed: int,
) -> list[float]:
    """The mean score of n texts that go on from the first t tokens of each completion."""
    prompts = [rollout.prompts[b] for b in going]
    prefixes = [list(bodies[b][:t]) for b in going]
    room = max(1, task.max_new_tokens - t)
    ends = writer.sample(prompts, n, prefixes=prefixes, max_new_tokens=room, seed=seed)
    whole = [[*prefixes[i // n], *body] for i, body in enumerate(ends.completions())]
    texts = writer.tokenizer.batch_decode(whole, skip_special_tokens=True)
    scores = task.scores([prompt for prompt in prompts for _ in range(n)], texts)
    means: list[float] = np.asarray(scores, float).reshape(len(going), n).mean(1).tolist()
    return means


def _score(
    rollout: Rollout, writers: Mapping[str, Any], task: Task, rules: Iterable[str] | None
) -> dict[str, Values]:
    """The rules' numbers of every token."""
    unknown = sorted(set(rules or ()) - set(RULES))
    if unknown:
        raise InvalidValue(
            f"credit has no rule {', '.join(map(shortened, unknown))}. Use some of"
            f" {', '.join(RULES)}."
        )
    if rules is None:
        without_teacher = ("entropy", "lowest", "random")
        is_local = not any(isinstance(writer, Table) for writer in writers.values())
        rules = [
            name
            for name in RULES
            if ("teacher" in writers or name in without_teacher)
            and (is_local or name != "distance")
        ]
    batch = Batch(rollout, writers, task)
    mask = rollout.mask
    return {name: RULES[name](batch).to(mask.device)[mask].double().cpu().numpy() for name in rules}


def _rollout_of(texts: Any, prompts: Sequence[Prompt] | None) -> Rollout:
    if isinstance(texts, Rollout):
        if prompts is not None:
            raise InvalidValue(
                "credit got prompts= beside a rollout, which has its own. Leave it out."
            )
        return texts
    if not isinstance(texts, Trace):
        raise InvalidValue(
            f"credit got texts={shortened(texts)}. Give a rollout (student.sample(prompts)) or a"
            " trace with its prompts=."
        )
    if prompts is None:
        raise InvalidValue(
            "credit got a trace, which does not keep the answers of its prompts. Give prompts= as"
            " well, in the order of its texts."
        )
    return rollout_from_trace(texts, prompts)


def _difference(value: Value) -> tuple[Values, Values, Values]:
    """Estimate what each token changes, `[B, T]`, with Newcombe's interval."""
    p, q = value.mean[:, 1:], value.mean[:, :-1]
    low = p - q - np.hypot(p - value.low[:, 1:], value.high[:, :-1] - q)
    high = p - q + np.hypot(value.high[:, 1:] - p, q - value.low[:, :-1])
    return p - q, low, high


def auroc(score: Values, is_wanted: npt.NDArray[np.bool_]) -> float:
    """Compute the chance that a wanted token has a higher score than another; ties count half.

    Args:
        score: `[tokens]`.
        is_wanted: `[tokens]`.

    Returns:
        From 0 to 1; NaN where one of the two kinds is missing.
    """
    wanted = int(is_wanted.sum())
    others = len(score) - wanted
    if not wanted or not others:
        return math.nan
    ranks = stats.rankdata(score)
    return float((ranks[is_wanted].sum() - wanted * (wanted + 1) / 2) / (wanted * others))


def _resampled(
    score: Values, is_wanted: npt.NDArray[np.bool_], group: npt.NDArray[np.intp]
) -> tuple[float, float]:
    """The 95 % percentile interval of an AUROC, with prompts drawn again."""
    rng = np.random.default_rng(0)
    rows = [np.flatnonzero(group == one) for one in range(int(group.max()) + 1)]
    found = []
    for _ in range(RESAMPLED):
        at = np.concatenate([rows[i] for i in rng.integers(0, len(rows), len(rows))])
        found.append(auroc(score[at], is_wanted[at]))
    low, high = np.nanquantile(found, [0.025, 0.975])
    return float(low), float(high)
