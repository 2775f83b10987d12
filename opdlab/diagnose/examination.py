"""Let a student and its teacher write and grade, within an allowance of seconds.

    measure the speed    the teacher begins to answer two prompts, both grade that, the student
                         begins too; this decides how much is asked of how many prompts
    a round              some prompts: the student writes, both grade, the teacher answers alone and
                         from half of the student's text
    the cost of a step   predicted after the first round

Each round is twice as large as the one before, and its time decides how many more prompts fit. All
that has been found is kept in `Evidence` at once, so an interrupt costs only what was being done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd
import torch

from opdlab.data.prompt import Prompt
from opdlab.data.rollout import Rollout, concat_rollouts
from opdlab.data.seeds import seed_of
from opdlab.diagnose.allowance import (
    FIRST_PROMPTS,
    SHARE_OF_COST,
    Allowance,
    Pace,
    Scope,
    choose_scope,
)
from opdlab.diagnose.cost import Cost, cost
from opdlab.diagnose.exposure import continuation
from opdlab.diagnose.first_tokens import (
    FIRST,
    FirstTokens,
    keep_first,
    make_first_tokens,
    measure_pulls,
)
from opdlab.diagnose.overlap import Overlap, agreement
from opdlab.diagnose.probe import measure_tokens
from opdlab.diagnose.tables import make_token_table
from opdlab.engine.rows import Rows
from opdlab.models.policy import Policy, sample
from opdlab.models.same_tokens import compare_vocabularies
from opdlab.tasks import Task
from opdlab.teachers.text_only import as_writer
from opdlab.training.settings import Settings

TOP = 16  # tokens of each side that are compared
FIRST_AT_MOST = 16  # prompts whose first tokens are compared
TEXTS_AT_ONCE = 256


@dataclass(frozen=True)
class Pair:
    """Two local models that are looked at.

    Attributes:
        student: The policy that would train.
        teacher: The policy that would grade.
        task: Where prompts and scores come from.
        k: The student's samples of each prompt.
        planned: The settings of the planned run.
        is_comparable: Whether the teacher can grade the student's tokens.
    """

    student: Policy
    teacher: Policy
    task: Task
    k: int
    planned: Settings
    is_comparable: bool = True

    @property
    def teacher_is_told_more(self) -> bool:
        """True if the teacher reads more than the prompt."""
        return self.teacher.context is not None

    @cached_property
    def has_same_ids(self) -> bool:
        """True if the ids of both stand for the same strings."""
        return not compare_vocabularies(self.student, self.teacher)

    def scores(self, rollout: Rollout) -> np.ndarray:
        """The verifier's scores of a rollout's texts."""
        return np.array(self.task.scores(rollout.prompts, rollout.texts), float)


@dataclass
class Evidence:
    """All that was found so far.

    Attributes:
        written: The student's texts, one rollout per round.
        graded: Those of them that both graded, with the numbers of every token.
        first: Tables of the teacher's first tokens.
        alone: The scores of the teacher's own answers.
        answered: The prompts of these.
        helped: The score of each text on which the teacher went on, averaged over a round, and
            their number.
        half: Tokens of the student's text from which it went on; 0 if it never did.
        answer_limit: The tokens that the teacher's context left for an answer, where that is less
            than the task allows; None where answers could be as long as the task has them.
        cost: The predicted cost of a step.
        scope: What was asked of each prompt; None if the speed is not known yet.
        is_interrupted: Whether the work was stopped from outside.
    """

    written: list[Rollout] = field(default_factory=list)
    graded: list[tuple[Rollout, dict[str, np.ndarray]]] = field(default_factory=list)
    first: list[pd.DataFrame] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    answered: list[Prompt] = field(default_factory=list)
    helped: list[pd.DataFrame] = field(default_factory=list)
    half: int = 0
    answer_limit: int | None = None
    cost: Cost | None = None
    scope: Scope | None = None
    is_interrupted: bool = False

    @property
    def rollout(self) -> Rollout | None:
        """All texts of the student; None if there are none yet."""
        return concat_rollouts(self.written) if self.written else None

    @property
    def graded_rollout(self) -> Rollout | None:
        """The texts that both graded; None if there are none."""
        return concat_rollouts([rollout for rollout, _ in self.graded]) if self.graded else None

    @property
    def overlap(self) -> Overlap | None:
        """The agreement of both on these texts; None if there are none."""
        rollout = self.graded_rollout
        if rollout is None:
            return None
        names = self.graded[0][1]
        columns = {name: np.concatenate([part[name] for _, part in self.graded]) for name in names}
        return Overlap(TOP, make_token_table(rollout, columns))

    @property
    def first_tokens(self) -> FirstTokens | None:
        """The teacher's first tokens; None if they were not compared."""
        return FirstTokens(pd.concat(self.first, ignore_index=True)) if self.first else None


def examine(pair: Pair, asked: Sequence[Prompt], seed: int, allowance: Allowance) -> Evidence:
    """Ask a pair as much as fits into the allowance.

    Args:
        pair: The two models.
        asked: The prompts that may be asked.
        seed: Seed of the student's texts.
        allowance: The seconds that there are.

    Returns:
        What was found. After an interrupt it is what was found until then.
    """
    evidence = Evidence()
    try:
        _ask_in_rounds(pair, list(asked), seed, allowance, evidence)
    except KeyboardInterrupt:
        evidence.is_interrupted = True
    return evidence


def whole_scope(pair: Pair) -> Scope:
    """Return all that could be asked of each prompt.

    Args:
        pair: The two models.

    Returns:
        The scope for an allowance without end.
    """
    has_scores = pair.task.verify is not None
    graded = pair.k if pair.is_comparable else 0
    return Scope(pair.k, graded, pair.planned.max_new_tokens, has_scores, has_scores)


def _ask_in_rounds(
    pair: Pair, asked: list[Prompt], seed: int, allowance: Allowance, evidence: Evidence
) -> None:
    whole = whole_scope(pair)
    pace = _measure_pace(pair, asked[:FIRST_PROMPTS], seed, allowance, evidence)
    for_rounds = allowance.left - SHARE_OF_COST * allowance.seconds * pair.is_comparable
    scope, prompts = choose_scope(whole, pace, for_rounds, len(asked))
    evidence.scope = scope
    _plan(allowance, prompts, pace.per_prompt(scope))
    size = min(FIRST_PROMPTS, prompts)
    while size > 0:
        began, before = allowance.spent, allowance.done
        part = asked[before : before + size]
        _ask(pair, part, scope, seed_of(seed, before, 0), allowance, evidence)
        allowance.done += len(part)
        each = (allowance.spent - began) / len(part)
        if not before:
            _predict_cost(pair, allowance, evidence)
        rest = min(len(asked) - allowance.done, int(min(allowance.left / each, len(asked))))
        _plan(allowance, allowance.done + rest, each)
        # A round that is over in a moment needs no sign of life within it.
        size = rest if rest * each < 5 else min(rest, allowance.done)


def _plan(allowance: Allowance, prompts: int, each: float) -> None:
    """Note how many prompts will have been asked at the end, and when that will be."""
    allowance.progress.total = prompts
    allowance.expect((prompts - allowance.done) * each)


def _measure_pace(
    pair: Pair, prompts: list[Prompt], seed: int, allowance: Allowance, evidence: Evidence
) -> Pace:
    """Let both write a few tokens; the teacher's show at once whether the student knows them."""
    student, teacher = pair.student, pair.teacher
    with allowance.stage("the teacher begins to answer", [teacher], FIRST) as teachers:
        begun = sample(teacher, prompts, max_new_tokens=FIRST, temperature=0)
    lengths = [len(teacher.encode(prompt)) for prompt in prompts]
    prompt = float(np.mean(lengths))
    read = compare = 0.0
    if pair.is_comparable:
        with allowance.stage("both grade its first tokens", [student, teacher]) as grades:
            _compare_first(pair, begun, evidence)
        tokens = sum(lengths) + begun.tokens
        # Reading and comparing are not told apart: both are in one pass over very few tokens.
        read = grades.seconds / tokens
        compare = read
    with allowance.stage("the student begins to answer", [student], FIRST) as students:
        sample(student, prompts, pair.k, max_new_tokens=FIRST, seed=seed)
    return Pace(pair.k, students, teachers, read, compare, prompt)


def _ask(
    pair: Pair,
    prompts: list[Prompt],
    scope: Scope,
    seed: int,
    allowance: Allowance,
    evidence: Evidence,
) -> None:
    """Ask one round of prompts, and keep each answer as soon as it is there."""
    student, teacher = pair.student, pair.teacher
    with allowance.stage("the student writes", [student], scope.length):
        rollout = sample(
            student,
            prompts,
            scope.k,
            max_new_tokens=scope.length,
            seed=seed,
            batch_size=max(1, TEXTS_AT_ONCE // scope.k),
            **pair.task.sample_options,
        )
    evidence.written.append(rollout)
    if pair.is_comparable and scope.graded:
        rows = [i for i in range(len(rollout)) if i % scope.k < scope.graded]
        chosen = rollout.select(rows)
        if chosen.tokens:
            with allowance.stage("both grade its texts", [student, teacher]):
                columns = measure_tokens(chosen, _measure, {"student": student, "teacher": teacher})
            evidence.graded.append((chosen, columns))
    _ask_teacher(pair, prompts, rollout, scope, allowance, evidence)


def _measure(rows: Rows) -> dict[str, torch.Tensor]:
    return agreement(TOP)(rows) | {"reward": rows.logp_of("teacher") - rows.logp}


def _ask_teacher(
    pair: Pair,
    prompts: list[Prompt],
    rollout: Rollout,
    scope: Scope,
    allowance: Allowance,
    evidence: Evidence,
) -> None:
    """Let the teacher answer alone, and from half of the student's text."""
    student, teacher, task = pair.student, pair.teacher, pair.task
    room = _room(pair, rollout)
    length = max(1, round(room * task.max_new_tokens)) if scope.asks_teacher else FIRST
    left = _context_left(teacher, prompts)
    if left is not None and left < length:
        length = evidence.answer_limit = left
    begun: Rollout | None = None
    if scope.asks_teacher or pair.is_comparable:
        with allowance.stage("the teacher answers", [teacher], length):
            begun, texts = _answer(pair, prompts, length)
        if scope.asks_teacher:
            evidence.alone += task.scores(prompts, texts)
            evidence.answered += prompts
    seen = sum(table["prompt"].nunique() for table in evidence.first)
    if pair.is_comparable and begun is not None and seen < FIRST_AT_MOST and allowance.done:
        with allowance.stage("both grade its first tokens", [student, teacher]):
            _compare_first(pair, keep_first(begun), evidence)
    # Nobody replies to a text that goes on from the middle of a conversation.
    asks_half = scope.asks_half and task.environment is None
    if scope.asks_teacher and asks_half and evidence.answer_limit is None:
        firsts = rollout.select(range(0, len(rollout), scope.k))
        evidence.half = evidence.half or max(1, int(firsts.lengths.float().median()) // 2)
        with allowance.stage("the teacher goes on from the student's half", [teacher], length):
            helped = continuation(firsts, student, teacher, task, at=[evidence.half], room=room)
        evidence.helped.append(helped)


def _context_left(teacher: Policy, prompts: Sequence[Prompt]) -> int | None:
    """Tokens that the teacher's context leaves behind the longest prompt; None for no limit.

    It is at least 1, since the check of the room has passed before.
    """
    limit = teacher.weights.context_length
    if limit is None:
        return None
    return max(1, limit - max(len(teacher.encode(prompt)) for prompt in prompts))


def _answer(pair: Pair, prompts: list[Prompt], length: int) -> tuple[Rollout | None, Sequence[str]]:
    """The teacher's likeliest answers, as a rollout where the student has the same ids."""
    if pair.has_same_ids:
        turns = pair.task.sample_options
        rollout = sample(pair.teacher, prompts, max_new_tokens=length, temperature=0, **turns)
        return rollout, rollout.texts
    written = as_writer(pair.teacher).write(prompts, 1, max_new_tokens=length, temperature=0.0)
    return None, [row[0] for row in written]


def _compare_first(pair: Pair, begun: Rollout, evidence: Evidence) -> None:
    """Compare both on the first tokens that the teacher would write."""
    graders = {"student": pair.student, "teacher": pair.teacher}
    columns = measure_tokens(begun, measure_pulls, graders)
    start = sum(table["prompt"].nunique() for table in evidence.first)
    evidence.first.append(make_first_tokens(begun, columns, pair.student, start))


def _predict_cost(pair: Pair, allowance: Allowance, evidence: Evidence) -> None:
    rollout = evidence.rollout
    if not pair.is_comparable or rollout is None or not rollout.tokens:
        return
    with allowance.stage("a step is tried in parts", [pair.student, pair.teacher]):
        evidence.cost = cost(pair.student, pair.teacher, rollout, pair.planned)


def _room(pair: Pair, rollout: Rollout) -> float:
    """The teacher's tokens per token of the student, with a quarter to spare.

    It is 1 if their tokens are the same.
    """
    if pair.has_same_ids:
        return 1.0
    ours, theirs = (
        sum(len(policy.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
        for policy, texts in ((pair.student, rollout.texts), (pair.teacher, rollout.texts))
    )
    return max(1.0, 1.25 * theirs / max(ours, 1))
