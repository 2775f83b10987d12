"""What a task is: a supply of prompts and, where answers can be checked, a verifier."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from opdlab.errors import EmptyPrompts, OpdlabError
from opdlab.policy import Prompt
from opdlab.rollout import Rollout
from opdlab.tasks.answers import same_answer
from opdlab.tokens import token_bytes

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Task:
    """`draw(n, seed, split)` gives prompts, `verify(prompt, text)` a score from 0 to 1 (None: cannot be checked).

    `recipe` holds training settings that suit the task's own models, `settings` what tells two variants apart. `types` names the
    ground-truth type of every token of a completion (pieces without their spaces), for worlds in which it is known.
    """

    name: str
    draw: Callable[[int, int, Split], list[Prompt]]
    verify: Callable[[Prompt, str], float] | None = None
    max_new_tokens: int = 64
    settings: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    types: Callable[[Sequence[str]], list[str]] | None = None

    def prompts(self, n: int, seed: int = 0, split: Split = "train") -> list[Prompt]:
        """`n` prompts; the same seed gives the same ones, and the two splits share none. Raises EmptyPrompts for n < 1."""
        if n < 1:
            raise EmptyPrompts(f"Asked {self.name} for {n} prompts. Ask for at least one.")
        return self.draw(n, seed, split)

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
    kept = round(test * len(prompts)) if isinstance(test, float) else test
    order = random.Random(0).sample(range(len(prompts)), len(prompts))
    pools = {"test": [prompts[i] for i in sorted(order[:kept])], "train": [prompts[i] for i in sorted(order[kept:])]}
    held = {_asked(p) for p in pools["test"]}
    pools["train"] = [p for p in pools["train"] if _asked(p) not in held]  # a repeated prompt is not trained on
    if not pools["train"]:
        raise EmptyPrompts(f"{name} has {len(prompts)} prompts and {kept} are kept for testing. Give more, or a smaller test=.")

    def draw(n: int, seed: int, split: Split) -> list[Prompt]:
        pool = pools[split]
        if not pool:
            raise EmptyPrompts(f"{name} keeps no prompts for testing. Make it with test=….")
        rounds = [random.Random(f"{seed}/{i}").sample(pool, len(pool)) for i in range(-(-n // len(pool)))]
        return [prompt for order in rounds for prompt in order][:n]

    answers = any(p.answer is not None for p in prompts)
    return Task(name, draw, verify or (same_answer if answers else None), max_new_tokens)


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


def _asked(prompt: Prompt) -> str:
    return repr(prompt.text or prompt.messages)


def _json(line: str, source: Any, number: int) -> dict[str, Any]:
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError) as error:
        raise OpdlabError(f"{source} line {number} is not a JSON object ({error}). Write one object a line.") from error
