"""What a task is: a supply of prompts and, where answers can be checked, a verifier."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from opdlab.errors import EmptyPrompts, MissingPolicy, OpdlabError
from opdlab.prompt import Prompt
from opdlab.rollout import Rollout
from opdlab.settings import seed_of
from opdlab.tasks.epochs import epoch_order
from opdlab.tasks.scoring import check_callable, score_text
from opdlab.tasks.splits import check_disjoint, distinct, question_of, split_prompts
from opdlab.tokens import token_bytes
from opdlab.validation import Count, Text, Whole, shortened, validate

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Task:
    """A supply of prompts and, where answers can be checked, a verifier.

    Ask it through its methods (`prompts`, `training_batch`, `score`), which check what the user's functions return.

    Attributes:
        name: Names the task in tables and errors.
        draw: `draw(n, seed, split)` gives `n` prompts of the split "train" or "test", the same ones for the same seed. It must
            give each question to one split only. Fewer test prompts than asked for are fine, if there are no more.
        verify: `verify(prompt, text)` gives a score from 0 to 1. None: nothing can be checked.
        max_new_tokens: How long answers may be, in the student's tokens.
        settings: What tells two variants of the task apart.
        recipe: Training settings that suit the task's own models.
        types: Names the ground-truth type of every token of a completion (pieces without their spaces), for worlds in which it
            is known.
        pool: All prompts of a split, where they can be listed. Training passes over `pool["train"]` in epochs; without it,
            `draw` is asked for fresh prompts in every step.
    """

    name: str
    draw: Callable[[int, int, Split], Iterable[Prompt]]
    verify: Callable[[Prompt, str], Any] | None = None
    max_new_tokens: int = 64
    settings: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    types: Callable[[Sequence[str]], list[str]] | None = None
    pool: Mapping[str, Sequence[Prompt]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        validate("Task", {"name": self.name}, {"name": Text})
        check_callable(self.draw, ("n", "seed", "split"), f"Task {self.name!r}", "draw")
        if self.verify is not None:
            check_callable(self.verify, ("prompt", "text"), f"Task {self.name!r}", "verify")
        length = validate(f"Task {self.name!r}", {"max_new_tokens": self.max_new_tokens}, {"max_new_tokens": Count})
        object.__setattr__(self, "max_new_tokens", length["max_new_tokens"])
        check_disjoint(self.pool, self.name)

    def prompts(self, n: int, seed: int = 0, split: Split = "train") -> list[Prompt]:
        """Draw `n` prompts; the same seed gives the same ones.

        Held-out prompts are distinct: of a test split with fewer than `n` questions, all of them are given, each once.

        Raises:
            EmptyPrompts: `n` is below 1, or there are no prompts.
            OpdlabError: The task's own `draw` gives something else than it was asked for.
        """
        checked = validate(self.name, {"n": n, "seed": seed, "split": split}, {"n": Whole, "seed": Whole, "split": Split})
        if checked["n"] < 1:
            raise EmptyPrompts(f"Asked {self.name} for {n} prompts. Ask for at least one.")
        return self._drawn(**checked)

    def training_batch(self, size: int, step: int, seed: int) -> list[Prompt]:
        """The prompts of training step `step` (from 0), `size` of them for all processes together.

        A task that lists its prompts is passed over in epochs: each prompt is drawn once before any is drawn twice. Others
        draw fresh prompts. Nothing is remembered between steps, so any step can be asked for at any time.
        """
        if "train" not in self.pool:
            return self.prompts(size, seed_of(seed, step, 0))
        prompts = self.pool["train"]
        return [prompts[i] for i in epoch_order(len(prompts), size, seed).batch(step)]

    def warn_of_repeats(self, size: int) -> None:
        """Warn where a batch of `size` prompts must ask some of them twice, since there are fewer to train on."""
        count = len(self.pool.get("train", ()))
        if 0 < count < size:
            warnings.warn(
                f"{self.name} has {count} training prompts and a step asks {size}, so every step asks some of them twice or more "
                f"often. Use batch={count} or less (for all processes together), or n= for several completions of each prompt.",
                stacklevel=4,
            )

    def score(self, prompt: Prompt, text: str) -> float:
        """The verifier's score of a text, from 0 to 1.

        Raises:
            MissingPolicy: The task has no verifier.
            BadVerifier: The verifier fails, or returns anything but a number from 0 to 1.
        """
        if self.verify is None:
            raise MissingPolicy(f"{self.name} has no verifier, so nothing can be scored. Make the task with verify=….")
        return score_text(self.verify, prompt, text, self.name)

    def scores(self, prompts: Iterable[Prompt], texts: Iterable[str]) -> list[float]:
        """`score` of each prompt's text."""
        return [self.score(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]

    def _drawn(self, n: int, seed: int, split: Split) -> list[Prompt]:
        """What `draw` gives, checked against its contract."""
        given = self.draw(n, seed, split)
        asked = f"{self.name} was asked for {n} {split} prompts and its draw"
        if isinstance(given, Prompt | str | bytes | Mapping) or not isinstance(given, Iterable):
            raise OpdlabError(f"{asked} returned {shortened(given)}. Let it return a list of opdlab.Prompt.")
        # a generator may be endless: no more than needed is taken from it
        prompts = list(itertools.islice(given, n)) if isinstance(given, Iterator) else list(given)
        strange = [p for p in prompts if not isinstance(p, Prompt)]
        if strange:
            raise OpdlabError(f"{asked} gave {shortened(strange[0])} among them. Let it return opdlab.Prompt objects only.")
        if not prompts:
            raise EmptyPrompts(f"{asked} gave none. Let it return a list of opdlab.Prompt.")
        if len(prompts) > n or (len(prompts) < n and split == "train"):
            raise OpdlabError(
                f"{asked} gave {len(prompts)}. Let it return as many as it is asked for. Where there are no more, ask for fewer, or "
                "make the task with opdlab.tasks.from_prompts, which passes over its prompts in epochs."
            )
        return distinct(prompts) if split == "test" else prompts

    def token_types(self, rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> list[list[str]]:
        """The ground-truth type of every completion token, a list a row; raises OpdlabError where the task knows none."""
        if self.types is None:
            raise OpdlabError(f"{self.name} knows no token types. The market world does: opdlab.tasks.market(secret=True).")
        pieces = ([p.decode(errors="replace").strip() for p in token_bytes(tokenizer, row)] for row in rollout.completions())
        return [self.types(row) for row in pieces]


def from_records(records: Iterable[Mapping[str, Any]] | str | os.PathLike[str], *, name: str = "records", test: int | float = 0.1,
                 verify: Callable[[Prompt, str], float] | None = None, max_new_tokens: int = 256) -> Task:  # fmt: skip
    """A task from a `datasets.Dataset`, a list of dicts or a JSONL file.

    Columns: `prompt` (a text or chat messages) or `text` / `messages`; optional `answer`, `hint`, `id`. `test` prompts (a
    number, or a share) are kept for evaluation. Without `verify`, answers are compared by `same_answer`. It has no recipe of its
    own: `distill` trains on it with the defaults of `Settings`, made for real models (`lr` 1e-4); tiny ones want ten times that.
    """
    if isinstance(records, (str, os.PathLike)):
        lines = Path(records).read_text(encoding="utf-8").split("\n")  # not splitlines: JSON may hold U+2028
        records = [_json(line, records, i) for i, line in enumerate(lines, 1) if line.strip()]
    prompts = [_prompt(record, i) for i, record in enumerate(records)]
    return from_prompts(prompts, name=name, test=test, verify=verify, max_new_tokens=max_new_tokens)


def from_prompts(
    prompts: Iterable[Prompt],
    *,
    name: str = "prompts",
    test: int | float = 0.1,
    verify: Callable[[Prompt, str], Any] | None = None,
    max_new_tokens: int = 256,
) -> Task:
    """Make a task of a list of prompts, which training passes over in epochs.

    Args:
        prompts: All prompts. Those that ask the same are one question, and lie in one split.
        name: The task's name.
        test: How many questions to hold out for evaluation, as a number or as a share.
        verify: Scores a text. Without it, texts are compared with the prompts' answers by `same_answer`; where a question
            comes with several answers, a text is right if it agrees with any of them.
        max_new_tokens: How long answers may be.

    Raises:
        EmptyPrompts: Nothing is left to train on.
    """
    prompts = list(prompts)
    strange = [p for p in prompts if not isinstance(p, Prompt)]
    if strange:
        raise OpdlabError(f"{name} got {shortened(strange[0])} among its prompts. Give opdlab.Prompt objects, or use from_records.")
    pools = split_prompts(prompts, test, name)

    def draw(n: int, seed: int, split: Split) -> list[Prompt]:
        pool = pools[split]
        if not pool:
            raise EmptyPrompts(f"{name} keeps no prompts for testing. Make it with test=….")
        if split == "test":
            return random.Random(f"{seed}/0").sample(pool, len(pool))[:n]
        return [pool[i] for i in epoch_order(len(pool), 1, seed).first(n)]

    return Task(name, draw, verify or _by_answer(prompts, name), max_new_tokens, pool=pools)


def _by_answer(prompts: Sequence[Prompt], name: str) -> Callable[[Prompt, str], float] | None:
    """`same_answer`, or one that accepts any of a question's answers where there are several; None without answers."""
    answers: dict[str, set[str]] = {}
    for prompt in prompts:
        if prompt.answer is not None:
            answers.setdefault(question_of(prompt), set()).add(prompt.answer)
    several = [sorted(found) for found in answers.values() if len(found) > 1]
    if not several:
        return same_answer if answers else None
    warnings.warn(
        f"{name}: {len(several)} prompts come with several different answers (one of them with {shortened(several[0])}). A text "
        "counts as right if it agrees with any of them. Keep one answer a prompt, or say how texts are judged with verify=….",
        stacklevel=3,
    )

    def any_answer(prompt: Prompt, text: str) -> float:
        """The best score of `same_answer` among the answers that the prompt comes with."""
        known = answers.get(question_of(prompt)) or {prompt.answer}
        return max(same_answer(replace(prompt, answer=answer), text) for answer in known)

    return any_answer


_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def same_answer(prompt: Prompt, text: str) -> float:
    """1.0 where the last number of the text equals that of the answer; texts without numbers are compared whole."""
    want, got = _NUMBER.findall(prompt.answer or ""), _NUMBER.findall(text)
    if want:
        return float(bool(got) and float(got[-1].replace(",", "")) == float(want[-1].replace(",", "")))
    return float(" ".join(text.split()).casefold() == " ".join((prompt.answer or "").split()).casefold())


def _prompt(record: Mapping[str, Any], i: int) -> Prompt:
    asked = next((record[k] for k in ("prompt", "messages", "text") if record.get(k)), None)
    if asked is None:
        raise OpdlabError(f"Record {i} has no prompt; its columns are {', '.join(record)}. Name one prompt, text or messages.")
    rest = {k: record.get(k) for k in ("answer", "hint")}
    rest = {k: None if v is None else str(v) for k, v in rest.items()}
    ident = str(record.get("id", i))
    if isinstance(asked, str):
        return Prompt(text=asked, id=ident, **rest)
    return Prompt(messages=tuple({"role": str(m["role"]), "content": str(m["content"])} for m in asked), id=ident, **rest)


def _json(line: str, source: Any, number: int) -> dict[str, Any]:
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError) as error:
        raise OpdlabError(f"{source} line {number} is not a JSON object ({error}). Write one object a line.") from error
