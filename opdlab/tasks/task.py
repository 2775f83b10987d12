"""Tasks: a supply of prompts and, if answers can be checked, a verifier."""

from __future__ import annotations

import itertools
import os
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from transformers import PreTrainedTokenizerBase

from opdlab.data.conversation import Environment
from opdlab.data.prompt import Prompt, expect_prompts
from opdlab.data.rollout import Rollout
from opdlab.data.seeds import seed_of
from opdlab.data.tokens import token_bytes
from opdlab.errors import EmptyPrompts, InvalidValue, MissingPolicy, OpdlabError
from opdlab.models.policy import Policy, as_policy, find_too_long
from opdlab.models.replies import check_environment, with_tools
from opdlab.support.expect import shortened
from opdlab.support.memory import refuse_beyond_memory
from opdlab.support.validation import Count, Text, Texts, Whole, validate
from opdlab.tasks.answers import same_answer
from opdlab.tasks.epochs import epoch_order
from opdlab.tasks.records import AnswerTurns, read_prompts
from opdlab.tasks.scoring import check_callable, score_text
from opdlab.tasks.splits import check_disjoint, distinct, question_of, split_prompts
from opdlab.tasks.verifiers import VERIFIERS

Split = Literal["train", "test"]
LEAST_BYTES_OF_PROMPT = 400  # a Prompt in Python's memory, its texts not counted


@dataclass(frozen=True)
class Task:
    """A supply of prompts and, if answers can be checked, a verifier.

    Ask it through its methods (`prompts`, `training_batch`, `score`), which check what the user's
    functions return.

    Attributes:
        name: Names the task in tables and errors.
        draw: `draw(n, seed, split)` gives `n` prompts of the split "train" or "test", the same ones
            for the same seed. It must give each question to one split only. Fewer test prompts than
            asked for are fine, if there are no more.
        verify: `verify(prompt, text)` gives a score from 0 to 1. None: nothing can be checked.
        max_new_tokens: Length limit of an answer, in the student's tokens.
        settings: Settings that tell two variants of the task apart.
        recipe: Training settings that suit the task's own models.
        types: Names the ground-truth type of every token of a completion (pieces without their
            spaces), for worlds in which it is known.
        environment: Replies between the student's turns, as `Tools(function)`. Its tools are shown
            in every prompt that shows none of its own, and `max_new_tokens` limits whole
            conversations. None: an answer is one turn.
        pool: All prompts of a split, where they can be listed. Training passes over `pool["train"]`
            in epochs; without it, `draw` is asked for fresh prompts in every step.
        origin: How a config file writes the task: its `name` with options, or `records` with the
            arguments of `from_records`. Empty for a task that no config can write.
        feedback: `feedback(prompt, text)` says in words what is wrong with a text, or None. `SDPO`
            tells it the student as a hint.
    """

    name: str
    draw: Callable[[int, int, Split], Iterable[Prompt]]
    verify: Callable[[Prompt, str], Any] | None = None
    max_new_tokens: int = 64
    settings: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    types: Callable[[Sequence[str]], list[str]] | None = None
    environment: Environment | None = None
    pool: Mapping[str, Sequence[Prompt]] = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    feedback: Callable[[Prompt, str], str | None] | None = None

    def __post_init__(self) -> None:
        validate("Task", {"name": self.name}, {"name": Text})
        check_callable(self.draw, ("n", "seed", "split"), f"Task {self.name!r}", "draw")
        if self.verify is not None:
            check_callable(self.verify, ("prompt", "text"), f"Task {self.name!r}", "verify")
        if self.feedback is not None:
            check_callable(self.feedback, ("prompt", "text"), f"Task {self.name!r}", "feedback")
        length = validate(
            f"Task {self.name!r}",
            {"max_new_tokens": self.max_new_tokens},
            {"max_new_tokens": Count},
        )
        object.__setattr__(self, "max_new_tokens", length["max_new_tokens"])
        if self.environment is not None:
            check_environment(self.environment)
            shown = {
                split: with_tools(prompts, self.environment) for split, prompts in self.pool.items()
            }
            object.__setattr__(self, "pool", shown)
        check_disjoint(self.pool, self.name)

    def prompts(self, n: int, seed: int = 0, split: Split = "train") -> list[Prompt]:
        """Draw `n` prompts; the same seed gives the same ones.

        Held-out prompts are distinct: of a test split with fewer than `n` questions, all of them
        are given, each once.

        Args:
            n: Number of prompts.
            seed: Decides which prompts are drawn.
            split: "train", or "test" for held-out prompts.

        Returns:
            `n` prompts, or fewer of a small test split.

        Raises:
            EmptyPrompts: `n` is below 1, or there are no prompts.
            OpdlabError: The task's own `draw` gives something else than it was asked for.
            InvalidValue: An argument is of the wrong kind.
        """
        checked = validate(
            self.name,
            {"n": n, "seed": seed, "split": split},
            {"n": Whole, "seed": Whole, "split": Split},
        )
        if checked["n"] < 1:
            raise EmptyPrompts(f"Asked {self.name} for {n} prompts. Ask for at least one.")
        return self._drawn(**checked)

    def training_batch(self, size: int, step: int, seed: int) -> list[Prompt]:
        """Return the prompts of a training step.

        A task that lists its prompts is passed over in epochs: each prompt is drawn once before any
        is drawn twice. Others draw fresh prompts. Nothing is remembered between steps, so any step
        can be asked for at any time.

        Args:
            size: Prompts for all processes together.
            step: The step, from 0.
            seed: The run's seed.

        Returns:
            `size` prompts, the same for the same arguments.
        """
        if "train" not in self.pool:
            return self.prompts(size, seed_of(seed, step, 0))
        prompts = self.pool["train"]
        return [prompts[i] for i in epoch_order(len(prompts), size, seed).batch(step)]

    @property
    def sample_options(self) -> dict[str, Any]:
        """Options of `Policy.sample` that the task asks for: its environment, if it has one."""
        return {} if self.environment is None else {"environment": self.environment}

    def warn_of_repeats(self, size: int) -> None:
        """Warn if a batch of `size` prompts must ask some of them twice.

        Args:
            size: Prompts per step, for all processes together.
        """
        count = len(self.pool.get("train", ()))
        if 0 < count < size:
            warnings.warn(
                f"{self.name} has {count} training prompts and a step asks {size}, so every step"
                f" asks some of them twice or more often. Use batch={count} or less, or n= for"
                " several completions of each prompt.",
                stacklevel=4,
            )

    def score(self, prompt: Prompt, text: str) -> float:
        """Let the verifier score a text, from 0 to 1.

        Args:
            prompt: The question.
            text: The text to grade.

        Returns:
            The score, from 0 to 1.

        Raises:
            MissingPolicy: The task has no verifier.
            BadVerifier: The verifier fails, or returns anything but a number from 0 to 1.
        """
        if self.verify is None:
            raise MissingPolicy(
                f"{self.name} has no verifier, so nothing can be scored. Make the task with"
                " verify=…."
            )
        return score_text(self.verify, prompt, text, self.name)

    def scores(self, prompts: Iterable[Prompt], texts: Iterable[str]) -> list[float]:
        """Score each prompt's text.

        Args:
            prompts: The questions.
            texts: One text for each prompt.

        Returns:
            One score from 0 to 1 for each text.

        Raises:
            InvalidValue: There is not one text for each prompt.
        """
        prompts = expect_prompts(prompts, "task.scores")
        if isinstance(texts, Iterator):
            texts = list(texts)
        texts = list(validate("task.scores", {"texts": texts}, {"texts": Texts})["texts"])
        if len(prompts) != len(texts):
            raise InvalidValue(
                f"task.scores got {len(texts)} texts for {len(prompts)} prompts. Give one text for"
                " each prompt."
            )
        return [self.score(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]

    def _drawn(self, n: int, seed: int, split: Split) -> list[Prompt]:
        """The prompts that `draw` gives, checked against its contract."""
        if split == "train" or split not in self.pool:  # of listed test prompts, all are as many
            refuse_beyond_memory(
                f"Asking {self.name} for {n:,} prompts",
                n * LEAST_BYTES_OF_PROMPT,
                torch.device("cpu"),
                "Ask for fewer.",
            )
        given = self.draw(n, seed, split)
        asked = f"{self.name} was asked for {n} {split} prompts and its draw"
        if isinstance(given, Prompt | str | bytes | Mapping) or not isinstance(given, Iterable):
            raise OpdlabError(
                f"{asked} returned {shortened(given)}. Let it return a list of opdlab.Prompt."
            )
        # A generator may be endless, so no more than needed is taken from it.
        prompts = list(itertools.islice(given, n)) if isinstance(given, Iterator) else list(given)
        strange = [p for p in prompts if not isinstance(p, Prompt)]
        if strange:
            raise OpdlabError(
                f"{asked} gave {shortened(strange[0])} among them. Let it return opdlab.Prompt"
                " objects only."
            )
        if not prompts:
            raise EmptyPrompts(f"{asked} gave none. Let it return a list of opdlab.Prompt.")
        if len(prompts) > n or (len(prompts) < n and split == "train"):
            raise OpdlabError(
                f"{asked} gave {len(prompts)}. Let it return as many as it is asked for. Where"
                " there are no more, ask for fewer, or make the task with"
                " opdlab.tasks.from_prompts, which passes over its prompts in epochs."
            )
        if self.environment is not None:
            prompts = with_tools(prompts, self.environment)
        return distinct(prompts) if split == "test" else prompts

    def without_too_long(self, *policies: Policy, max_new_tokens: int | None = None) -> Task:
        """Leave out the prompts that do not fit the context of a policy; a warning counts them.

        Args:
            policies: The readers of the prompts, each as it will read them:
                `task.without_too_long(student, teacher.seeing())`.
            max_new_tokens: Number of new tokens that must fit behind a prompt; the task's own by
                default.

        Returns:
            A copy of the task without these prompts, in both splits.

        Raises:
            EmptyPrompts: No training prompt is left.
            OpdlabError: The task draws its prompts without end, so they cannot be looked at
                beforehand.
            InvalidValue: No policy is given, or something else than a local policy.
        """
        if not self.pool:
            raise OpdlabError(
                f"{self.name} does not list its prompts but draws new ones, so none can be left out"
                " beforehand. Make them shorter, or ask for fewer new tokens."
            )
        strange = [policy for policy in policies if as_policy(policy) is None]
        if strange or not policies:
            given = shortened(strange[0]) if strange else "no policy"
            raise InvalidValue(
                f"without_too_long got {given}. Give the local policies that will read the prompts."
            )
        room = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        pool = {}
        for split, prompts in self.pool.items():
            too_long = {
                number
                for policy in policies
                for number in find_too_long(policy, prompts, [room] * len(prompts))
            }
            pool[split] = [
                prompt for number, prompt in enumerate(prompts) if number not in too_long
            ]
        left_out = sum(map(len, self.pool.values())) - sum(map(len, pool.values()))
        if not pool.get("train"):
            raise EmptyPrompts(
                f"No training prompt of {self.name} fits with {room} new tokens behind it. Ask for"
                " fewer, or shorten them."
            )
        if left_out:
            warnings.warn(
                f"{self.name}: {left_out} prompts are too long for {room} new tokens and are left"
                " out.",
                stacklevel=2,
            )
        return replace(self, pool=pool, draw=_draw_from(pool, self.name), origin={})

    def token_types(self, rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> list[list[str]]:
        """Return the ground-truth type of every completion token.

        Args:
            rollout: The completions.
            tokenizer: Their tokenizer.

        Returns:
            One list for each completion.

        Raises:
            OpdlabError: The task knows no types.
        """
        if self.types is None:
            raise OpdlabError(
                f"{self.name} knows no token types. The market world does:"
                " opdlab.tasks.market(secret=True)."
            )
        pieces = (
            [p.decode(errors="replace").strip() for p in token_bytes(tokenizer, row)]
            for row in rollout.completions()
        )
        return [self.types(row) for row in pieces]


def from_records(
    records: Iterable[Mapping[str, Any]] | str | os.PathLike[str],
    *,
    name: str = "records",
    test: int | float = 0.1,
    verify: Callable[[Prompt, str], float] | None = None,
    max_new_tokens: int = 256,
    keep: str | Sequence[str] = (),
    environment: Environment | None = None,
    turns: AnswerTurns | None = None,
) -> Task:
    """Make a task of a data set.

    The columns are `prompt` (a text or chat messages), `messages`, `conversations` (ShareGPT) or
    `text`, and optionally `answer` or `completion`, `hint`, `id`, `tools`. An assistant's message
    at the end of a chat is its answer. `docs/data.md` lists all formats.

    The task has no recipe of its own: `distill` trains on it with the defaults of `Settings`, made
    for real models (`lr` 1e-4); tiny ones want ten times that.

    Args:
        records: A `datasets.Dataset`, a list of dicts, a DataFrame, a dict of columns, or the path
            of a JSONL file.
        name: The task's name.
        test: Number or share of the questions to hold out for evaluation.
        verify: Scores a text. Without it, texts are compared with the answers by `same_answer`.
        max_new_tokens: Length limit of an answer, in tokens.
        keep: Columns whose values become each prompt's `metadata`, such as the subject by which a
            `MultiTeacher` chooses its teacher.
        environment: Replies between the student's turns; see `Task`.
        turns: Which of a chat's turns of the assistant are its answer, which `SFT` trains on; what
            stands before them is the prompt. "last" is the last message alone (the default without
            an environment), "reply" everything behind the last message of a user, calls of tools
            and their results among it (the default with one), "all" everything from the
            assistant's first turn on.

    Returns:
        A task that lists its prompts.

    Raises:
        InvalidValue: A record fits no format, or only some have an answer. The message names the
            record's number and column.
        EmptyPrompts: Nothing is left to train on.
    """
    columns = [keep] if isinstance(keep, str) else keep
    keep = tuple(validate("from_records", {"keep": columns}, {"keep": Texts})["keep"])
    if turns is not None and not (isinstance(turns, str) and turns in get_args(AnswerTurns)):
        raise InvalidValue(f"from_records got turns={shortened(turns)}. Use last, reply or all.")
    prompts = read_prompts(records, keep, turns or ("last" if environment is None else "reply"))
    if verify is None:
        _check_answers(prompts, name)
    task = from_prompts(
        prompts,
        name=name,
        test=test,
        verify=verify,
        max_new_tokens=max_new_tokens,
        environment=environment,
    )
    origin = _origin(records, task, test, verify, keep)
    if origin and turns is not None:
        origin["turns"] = turns
    return replace(task, origin=origin)


def _origin(
    records: Any, task: Task, test: int | float, verify: Any, keep: Sequence[str]
) -> dict[str, Any]:
    """Describe a task of records as a config does; empty unless it is a file, judged by name."""
    named = [name for name, function in VERIFIERS.items() if function is verify]
    is_own = task.environment is not None or (verify is not None and not named)
    if not isinstance(records, (str, os.PathLike)) or is_own:
        return {}
    judge = {"verify": named[0]} if named else {}
    return {
        "records": os.path.abspath(records),
        "name": task.name,
        "test": test,
        "max_new_tokens": task.max_new_tokens,
        **judge,
        **({"keep": list(keep)} if keep else {}),
    }


def from_prompts(
    prompts: Iterable[Prompt],
    *,
    name: str = "prompts",
    test: int | float = 0.1,
    verify: Callable[[Prompt, str], Any] | None = None,
    max_new_tokens: int = 256,
    environment: Environment | None = None,
) -> Task:
    """Make a task of a list of prompts, which training passes over in epochs.

    Args:
        prompts: All prompts. Those that ask the same are one question, and lie in one split.
        name: The task's name.
        test: Number or share of the questions to hold out for evaluation.
        verify: Scores a text. Without it, texts are compared with the prompts' answers by
            `same_answer`; where a question comes with several answers, a text is right if it agrees
            with any of them.
        max_new_tokens: Length limit of an answer, in tokens.
        environment: Replies between the student's turns; see `Task`.

    Returns:
        A task that lists its prompts.

    Raises:
        EmptyPrompts: Nothing is left to train on.
        OpdlabError: Something among the prompts is no `Prompt`.
    """
    prompts = list(prompts)
    strange = [p for p in prompts if not isinstance(p, Prompt)]
    if strange:
        raise OpdlabError(
            f"{name} got {shortened(strange[0])} among its prompts. Give opdlab.Prompt objects, or"
            " use from_records."
        )
    pools = split_prompts(prompts, test, name)
    return Task(
        name,
        _draw_from(pools, name),
        _by_answer(prompts, name) if verify is None else verify,
        max_new_tokens,
        environment=environment,
        pool=pools,
    )


def _draw_from(
    pools: Mapping[str, Sequence[Prompt]], name: str
) -> Callable[[int, int, Split], list[Prompt]]:
    """Draw from listed prompts: every one before any is drawn again."""

    def draw(n: int, seed: int, split: Split) -> list[Prompt]:
        pool = pools[split]
        if not pool:
            raise EmptyPrompts(f"{name} keeps no prompts for testing. Make it with test=….")
        if split == "test":
            return random.Random(f"{seed}/0").sample(pool, len(pool))[:n]
        return [pool[i] for i in epoch_order(len(pool), 1, seed).first(n)]

    return draw


def _by_answer(prompts: Sequence[Prompt], name: str) -> Callable[[Prompt, str], float] | None:
    """A verifier that compares with the prompts' answers; None if there are none.

    If a question comes with several answers, any of them is right.
    """
    answers: dict[str, set[str]] = {}
    for prompt in prompts:
        if prompt.answer is not None:
            answers.setdefault(question_of(prompt), set()).add(prompt.answer)
    several = [sorted(found) for found in answers.values() if len(found) > 1]
    if not several:
        return same_answer if answers else None
    warnings.warn(
        f"{name}: {len(several)} prompts come with several different answers (one of them with"
        f" {shortened(several[0])}). A text counts as right if it agrees with any of them. Keep one"
        " answer a prompt, or say how texts are judged with verify=….",
        stacklevel=3,
    )

    def any_answer(prompt: Prompt, text: str) -> float:
        """Return the best score of `same_answer` among the answers of the prompt's question."""
        known = answers.get(question_of(prompt))
        if not known:
            return same_answer(prompt, text)
        return max(same_answer(replace(prompt, answer=answer), text) for answer in known)

    return any_answer


def _check_answers(prompts: Sequence[Prompt], name: str) -> None:
    """Raise InvalidValue if only some prompts have an answer: the others could never be right."""
    without = [prompt.id for prompt in prompts if prompt.answer is None]
    if without and len(without) < len(prompts):
        some = ", ".join(map(repr, without[:5])) + (", …" if len(without) > 5 else "")
        raise InvalidValue(
            f"{name}: {len(without)} of {len(prompts)} records have no answer ({some}), so texts"
            " cannot be compared with it. Give every record an answer, leave these out, or say how"
            " texts are judged with verify=…."
        )
