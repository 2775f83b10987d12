"""A teacher behind an OpenAI-compatible server that returns nothing but text.

It writes exactly as many texts as it is asked for, or raises: a server that gives one choice where two were asked for
(`transformers serve`, among others) is counted and asked again. All of it is remembered on disk, sample by sample, so a
run that is repeated or taken up after an error pays for nothing twice. Left out: streaming, tools, images.
"""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from opdlab.errors import EmptyPrompts, OpdlabError, TeacherError
from opdlab.policy import Policy, Prompt
from opdlab.teachers import asking
from opdlab.teachers.budget import Budget, worst
from opdlab.teachers.cache import Cache, key_of
from opdlab.teachers.service import Fault, Service, plain

PROBES = 3  # prompts that a way of going on is tried on
SAMPLE = {"generation_config": json.dumps({"do_sample": True, "top_k": 0, "top_p": 1.0})}  # transformers serve is greedy without


class TextServer:
    """`TextServer("http://127.0.0.1:8000/v1")`, with the environment variable OPDLAB_API_KEY where a key is needed.

    model: as the server names it; by default what the server says it is. continue_by: how to go on with a student's
    unfinished text, one of `asking.WAYS`; by default what is found to work (see `way`). template: a tokenizer whose chat
    template is the teacher's, for `completion`; by default the student's, if it proves right. extra: more fields for every
    request, as `{"top_p": 1.0}`. cache, budget, timeout, retries, concurrency, key_env, quiet: see `Service`.
    """

    def __init__(self, url: str, model: str | None = None, *, continue_by: str = "auto", template: PreTrainedTokenizerBase | None = None,
                 extra: Mapping[str, Any] | None = None, cache: str | os.PathLike[str] | Cache | None = "runs/teacher.sqlite",
                 budget: Budget | None = None, **options: Any) -> None:  # fmt: skip
        if continue_by not in ("auto", *asking.WAYS):
            raise OpdlabError(f"TextServer got continue_by={continue_by!r}. Use auto, {', '.join(asking.WAYS)}.")
        self.model, self.template, self.extra = model, template, dict(extra or {})
        self._given = "" if continue_by == "auto" else continue_by
        self.way = self._given  # how it goes on with unfinished answers, once that is known
        self.service = Service(url, cache=cache, budget=budget or Budget(), **options)
        self._names: tuple[str, ...] = ()  # under which the server has answered
        self._limit, self._several = "max_tokens", True

    def check(self, student: Policy, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
        """Ask the server for one token: is it there, who is it, how does it want to be asked? Any tokenizer will do."""
        self.template = self.template or student.tokenizer
        self.meet(prompts)

    def meet(self, prompts: Sequence[Prompt]) -> None:
        """Learn the model's name and what the server understands; once. Raises TeacherError."""
        if self._names:
            return
        if not prompts:
            raise EmptyPrompts("There are no prompts. Give at least one.")
        path, body = asking.request(prompts[0], "", self._given, self.template)
        key = key_of(["meet", self.service.url, self.model, path, body, self.extra])
        known = self.service.cache.get(key) if self.model else None  # a server that names itself may be another one today
        if known is None:
            known = self._met(path, body)
            self.service.cache.put(key, known)
        self.model, self._names = known["model"], tuple(known["names"])
        self._limit, self._several = known["limit"], known["several"]
        self.extra = {**known["extra"], **self.extra}

    def write(self, prompts: Sequence[Prompt], n: int = 1, *, prefixes: Sequence[str] | None = None, max_new_tokens: int = 64,
              temperature: float = 1.0, seed: int = 0) -> list[list[str]]:  # fmt: skip
        """Exactly `n` texts a prompt, of at most `max_new_tokens` of the teacher's tokens each.

        prefixes: one unfinished answer a prompt, which the texts continue and do not repeat. Raises TeacherError and
        BudgetSpent; the answers that came before are kept, and asking again goes on from them.
        """
        if n < 1 or max_new_tokens < 1 or temperature < 0 or (prefixes is not None and len(prefixes) != len(prompts)):
            many = len(prompts if prefixes is None else prefixes)
            raise OpdlabError(
                f"write got n={n}, max_new_tokens={max_new_tokens}, temperature={temperature}, {many} prefixes for {len(prompts)} prompts. "
                "Use at least 1, 1 and 0, and one prefix each."
            )
        self.meet(prompts)
        begun = list(prefixes) if prefixes is not None else [""] * len(prompts)
        way = self._way(prompts) if any(begun) else self._given
        sampling = {self._limit: max_new_tokens, "temperature": temperature}
        times: Counter[str] = Counter()  # the same question twice in a call has two answers
        jobs, asked = [], []
        for prompt, prefix in zip(prompts, begun, strict=True):
            path, body = asking.request(prompt, prefix, way, self.template)
            question = {"url": self.service.url, "model": self.model, "path": path, **body, **sampling, **self.extra, "seed": seed}
            first = times[key_of(question)] * n
            times[key_of(question)] += 1
            keys = [key_of([question, first + j]) for j in range(n)]
            asked.append((prefix, keys))
            left = [key for key in keys if self.service.cache.get(key) is None]
            group = len(left) if self._several else 1
            jobs += [partial(self._ask, path, {**body, **sampling}, left[i : i + group]) for i in range(0, len(left), max(group, 1))]
        self.service.many(jobs, unit=n if self._several else 1)
        return [[asking.continuation(self._answer(key), prefix, way) for key in keys] for prefix, keys in asked]

    def _answer(self, key: str) -> str:
        found = self.service.cache.get(key)
        if found is None:
            raise OpdlabError("The cache lost an answer while it was in use. Do not delete it during a run; ask again.")
        return found["text"]

    def _ask(self, path: str, body: dict[str, Any], keys: list[str], retries: int | None = None) -> None:
        """Fill the cache under `keys`, one text each, in as many requests as the server needs for that."""
        while keys:
            limit = body[self._limit]
            several = {"n": len(keys)} if len(keys) > 1 else {}
            # a seed of its own for every sample: with one for all, a server that gives one text a request would repeat it
            whole = {"model": self.model, **body, **several, "seed": int(keys[0][:8], 16) >> 1, **self.extra}
            accept = partial(self._checked, n=len(keys), limit=limit, short=[])
            texts = self.service.post(path, whole, worst(json.dumps(body), len(keys), limit), accept, retries)
            for key, text in zip(keys, texts, strict=False):
                self.service.cache.put(key, text)
            keys = keys[len(texts) :]

    def named(self, reply: Mapping[str, Any]) -> None:
        """Raise Fault where another model answers than the one that was met."""
        if reply.get("model") not in self._names:
            raise Fault(f"another model answered: {plain(reply.get('model'))!r} and not {self._names[0]!r}")

    def _checked(self, reply: Mapping[str, Any], n: int, limit: int, short: list[int]) -> list[dict[str, Any]]:
        """The texts of a reply. Fewer than asked for may be an accident: taken only when it happens again (`short`)."""
        self.named(reply)
        texts = asking.choices(reply, n * limit)
        if len(texts) < n and not short:
            short.append(len(texts))
            raise Fault(f"{len(texts)} texts came where {n} were asked for")
        return texts

    # Getting to know a server.

    def _met(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """What one request for two texts of a token shows: names, the field that limits length, whether `n` is served."""
        fields: dict[str, Any] = {self._limit: 1, "n": 2, "temperature": 1.0}
        while True:
            whole = {**({"model": self.model} if self.model else {}), **body, **fields, **self.extra}
            try:
                name, texts = self.service.post(path, whole, worst(json.dumps(body), 2, 1), self._introduced)
                break
            except TeacherError as error:
                fields = _without_refused(fields, error)
        return {"model": self.model or name.removesuffix("@main"), "names": [name], "extra": SAMPLE if name.endswith("@main") else {},
                "limit": next(iter(fields)), "several": texts > 1}  # fmt: skip

    def _introduced(self, reply: Mapping[str, Any]) -> tuple[str, int]:
        name, listed = reply.get("model"), reply.get("choices")
        if not isinstance(name, str) or not name or not isinstance(listed, list) or not listed:
            raise Fault("the reply has no model or no choices")
        if self.model and not (name.startswith(self.model) or self.model.endswith(f"/{name}")):  # a dated snapshot, a router's name
            raise Fault(f"the model {plain(name)!r} answered and not {self.model!r}. Name it as the server does, or leave model= out")
        return name, len(listed)

    def _way(self, prompts: Sequence[Prompt]) -> str:
        """How this server goes on with an unfinished answer: as the user said, else as its own greedy answers show, once."""
        chats = [prompt for prompt in prompts if prompt.messages is not None]
        if not self.way and chats:
            self.way = self._found(chats[:PROBES])
        return self.way or "completion"

    def _found(self, prompts: Sequence[Prompt]) -> str:
        """The first way that, given half of a greedy answer, goes on with its other half. Needs no knowledge of the model."""
        try:
            halves = [(prompt, *_halves(self._greedy(prompt, "", ""))) for prompt in prompts]
        except TeacherError as error:
            if error.status is None or error.status >= 500:
                raise
            halves = []  # a server that cannot be greedy shows nothing
        halves = [(prompt, a, b) for prompt, a, b in halves if a and b]
        ways = asking.WAYS[:-1] if self.template is not None and self.template.chat_template else asking.WAYS[1:-1]
        found = next((way for way in ways if halves and self._works(way, halves)), None)
        if found is None:
            warnings.warn(
                f"{self.service.url} goes on with no unfinished answer in a way that could be shown to work, so it is told to go on by "
                "an instruction, and what it repeats is cut. Texts continue less exactly so; TextServer(continue_by=…) names another way.",
                stacklevel=5,
            )
        return found or "instruct"

    def _works(self, way: str, halves: Sequence[tuple[Prompt, str, str]]) -> bool:
        try:
            right = [self._greedy(prompt, a, way).strip().startswith(b.strip()[: asking.SHORTEST_ECHO]) for prompt, a, b in halves]
        except TeacherError as error:
            if error.status is None:
                raise
            return False
        return sum(right) >= max(1, len(right) - 1)  # of three, one may differ: a boundary of tokens, or a server that rounds

    def _greedy(self, prompt: Prompt, prefix: str, way: str) -> str:
        path, body = asking.request(prompt, prefix, way, self.template)
        body |= {self._limit: 48, "temperature": 0.0}
        key = key_of(["greedy", self.service.url, self.model, path, body, self.extra])
        if self.service.cache.get(key) is None:
            self._ask(path, body, [key], retries=1)
        return self._answer(key)

    def __repr__(self) -> str:
        return f"TextServer({self.service.url!r}, {self.model!r}, continue_by={self.way or 'auto'!r})"


def _halves(text: str) -> tuple[str, str]:
    """The text cut before the space nearest to its middle; nothing where it is too short to tell."""
    spaces = [i for i, c in enumerate(text) if c == " " and text[:i].strip()]
    middle = min(spaces, key=lambda i: abs(i - len(text) // 2), default=len(text) // 2)
    return (text[:middle], text[middle:]) if len(text.strip()) >= 8 else ("", "")


def _without_refused(fields: dict[str, Any], error: TeacherError) -> dict[str, Any]:
    """The fields of a request without one that the server may have refused; raises the error where there is none left."""
    if error.status in (400, 422) and "max_completion_tokens" in str(error) and "max_tokens" in fields:
        return {"max_completion_tokens": fields["max_tokens"], **{k: v for k, v in fields.items() if k != "max_tokens"}}
    if error.status in (400, 422) and "n" in fields:
        return {k: v for k, v in fields.items() if k != "n"}
    raise error
