"""What a task is: a supply of prompts and, where answers can be checked, a verifier."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from opdlab.errors import EmptyPrompts, InvalidValue, OpdlabError
from opdlab.policy import Policy
from opdlab.preflight import find_too_long
from opdlab.prompt import Prompt
from opdlab.rollout import Rollout
from opdlab.tasks.answers import same_answer
from opdlab.tasks.records import read_prompts
from opdlab.tokens import token_bytes
from opdlab.validation import shortened

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Task:
    """`draw(n, seed, split)` gives prompts, `verify(prompt, text)` a score from 0 to 1 (None: cannot be checked).

    `recipe` holds training settings that suit the task's own models, `settings` what tells two variants apart. `types` names the
    ground-truth type of every token of a completion (pieces without their spaces), for worlds in which it is known.
    `pool` holds all prompts of a split, where they can be listed.
    """

    name: str
    draw: Callable[[int, int, Split], list[Prompt]]
    verify: Callable[[Prompt, str], float] | None = None
    max_new_tokens: int = 64
    settings: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    types: Callable[[Sequence[str]], list[str]] | None = None
    pool: Mapping[str, Sequence[Prompt]] = field(default_factory=dict)

    def prompts(self, n: int, seed: int = 0, split: Split = "train") -> list[Prompt]:
        """`n` prompts; the same seed gives the same ones, and the two splits share none. Raises EmptyPrompts for n < 1."""
        if n < 1:
            raise EmptyPrompts(f"Asked {self.name} for {n} prompts. Ask for at least one.")
        return self.draw(n, seed, split)

    def without_too_long(self, *policies: Policy, max_new_tokens: int | None = None) -> Task:
        """Leave out the prompts that do not fit the context of one of `policies`, with a warning that counts them.

        Args:
            policies: Who will read the prompts, each as it will read them: `task.without_too_long(student, teacher.seeing())`.
            max_new_tokens: How many new tokens must fit behind a prompt; the task's own number by default.

        Raises:
            EmptyPrompts: No training prompt is left.
            OpdlabError: The task draws its prompts without end, so they cannot be looked at beforehand.
        """
        if not self.pool:
            raise OpdlabError(
                f"{self.name} does not list its prompts but draws new ones, so none can be left out beforehand. "
                "Make them shorter, or ask for fewer new tokens."
            )
        strange = [policy for policy in policies if not isinstance(policy, Policy)]
        if strange or not policies:
            given = shortened(strange[0]) if strange else "no policy"
            raise InvalidValue(f"without_too_long got {given}. Give the local policies that will read the prompts.")
        room = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        pool = {}
        for split, prompts in self.pool.items():
            too_long = {number for policy in policies for number in find_too_long(policy, prompts, [room] * len(prompts))}
            pool[split] = [prompt for number, prompt in enumerate(prompts) if number not in too_long]
        left_out = sum(map(len, self.pool.values())) - sum(map(len, pool.values()))
        if not pool.get("train"):
            raise EmptyPrompts(f"No training prompt of {self.name} fits with {room} new tokens behind it. Ask for fewer, or shorten them.")
        if left_out:
            warnings.warn(f"{self.name}: {left_out} prompts are too long for {room} new tokens and are left out.", stacklevel=2)
        return replace(self, pool=pool, draw=_draw_from(pool, self.name))

    def token_types(self, rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> list[list[str]]:
        """The ground-truth type of every completion token, a list a row; raises OpdlabError where the task knows none."""
        if self.types is None:
            raise OpdlabError(f"{self.name} knows no token types. The market world does: opdlab.tasks.market(secret=True).")
        pieces = ([p.decode(errors="replace").strip() for p in token_bytes(tokenizer, row)] for row in rollout.completions())
        return [self.types(row) for row in pieces]


def from_records(records: Iterable[Mapping[str, Any]] | str | os.PathLike[str], *, name: str = "records", test: int | float = 0.1,
                 verify: Callable[[Prompt, str], float] | None = None, max_new_tokens: int = 256) -> Task:  # fmt: skip
    """A task from a `datasets.Dataset`, a list of dicts, a DataFrame, a dict of columns or a JSONL file.

    Columns: `prompt` (a text or chat messages), `messages`, `conversations` (ShareGPT) or `text`; optional `answer` or
    `completion`, `hint`, `id`. An assistant's message at the end of a chat is its answer. `docs/data.md` lists all formats;
    what fits none is refused with the record's number and column. `test` prompts (a number, or a share) are kept for
    evaluation. Without `verify`, answers are compared by `same_answer`. It has no recipe of its own: `distill` trains on it with
    the defaults of `Settings`, made for real models (`lr` 1e-4); tiny ones want ten times that.
    """
    prompts = read_prompts(records)
    if verify is None:
        _check_answers(prompts, name)
    kept = round(test * len(prompts)) if isinstance(test, float) else test
    order = random.Random(0).sample(range(len(prompts)), len(prompts))
    pools = {"test": [prompts[i] for i in sorted(order[:kept])], "train": [prompts[i] for i in sorted(order[kept:])]}
    held = {_asked(p) for p in pools["test"]}
    pools["train"] = [p for p in pools["train"] if _asked(p) not in held]  # a repeated prompt is not trained on
    if not pools["train"]:
        raise EmptyPrompts(f"{name} has {len(prompts)} prompts and {kept} are kept for testing. Give more, or a smaller test=.")

    answers = any(p.answer is not None for p in prompts)
    return Task(name, _draw_from(pools, name), verify or (same_answer if answers else None), max_new_tokens, pool=pools)


def _draw_from(pools: Mapping[str, Sequence[Prompt]], name: str) -> Callable[[int, int, Split], list[Prompt]]:
    """Draw from listed prompts: every one before any is drawn again."""

    def draw(n: int, seed: int, split: Split) -> list[Prompt]:
        pool = pools[split]
        if not pool:
            raise EmptyPrompts(f"{name} keeps no prompts for testing. Make it with test=….")
        rounds = [random.Random(f"{seed}/{i}").sample(pool, len(pool)) for i in range(-(-n // len(pool)))]
        return [prompt for order in rounds for prompt in order][:n]

    return draw


def _check_answers(prompts: Sequence[Prompt], name: str) -> None:
    """Raise InvalidValue where only some prompts have an answer: the others could never be answered rightly."""
    without = [prompt.id for prompt in prompts if prompt.answer is None]
    if without and len(without) < len(prompts):
        some = ", ".join(map(repr, without[:5])) + (", …" if len(without) > 5 else "")
        raise InvalidValue(
            f"{name}: {len(without)} of {len(prompts)} records have no answer ({some}), so texts cannot be compared with it. "
            "Give every record an answer, leave these out, or say how texts are judged with verify=…."
        )


def _asked(prompt: Prompt) -> str:
    return repr(prompt.text or prompt.messages)
