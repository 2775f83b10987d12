"""A teacher behind an OpenAI-compatible server that returns nothing but text.

It writes exactly as many texts as it is asked for, or raises: a server that gives one choice where
two were asked for (`transformers serve`, among others) is counted and asked again. All of it is
remembered on disk, sample by sample, so a run that is repeated or taken up after an error pays for
nothing twice. Left out: streaming, tools, images.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from pydantic import InstanceOf
from transformers import PreTrainedTokenizerBase

from opdlab.data.prompt import Prompt
from opdlab.data.written_text import WrittenText
from opdlab.errors import EmptyPrompts, InvalidValue, OpdlabError, TeacherError
from opdlab.models.policy import Policy
from opdlab.support.expect import shortened
from opdlab.support.validation import (
    Amount,
    Count,
    CountOrZero,
    PositiveShare,
    Text,
    validate_arguments,
)
from opdlab.teachers import asking
from opdlab.teachers.budget import Budget, Usage, worst
from opdlab.teachers.cache import key_of
from opdlab.teachers.redaction import plain
from opdlab.teachers.sampling import NEUTRAL, REFUSED, Sampling, refused_fields, without
from opdlab.teachers.service import Fault, Service

T = TypeVar("T")
# of what the cache holds. In format 1, replies that a server had broken off counted as finished:
# not read again.
FORMAT = 2
PROBES = 3  # prompts that a way of going on is tried on
GREEDY = 48  # tokens of an answer that a way of going on is tried with
# Fields of a request that are not the user's to set, and what sets them.
TAKEN = {
    "model": "model=",
    "n": "write(n=…)",
    "seed": "write(seed=…)",
    "max_tokens": "write(max_new_tokens=…)",
    "max_completion_tokens": "write(max_new_tokens=…)",
    "prompt": "write(prompts)",
    "messages": "write(prompts)",
    "stream": "nothing: replies are read whole",
}
SAMPLE = {
    "generation_config": json.dumps({"do_sample": True, "top_k": 0, "top_p": 1.0})
}  # transformers serve is greedy without


class TextServer:
    """`TextServer("http://127.0.0.1:8000/v1")`, with the environment variable OPDLAB_API_KEY where
    a key is needed.

    model: as the server names it; by default what the server says it is. continue_by: how to go on
        with a student's
    unfinished text, one of `asking.WAYS`; by default what is found to work (see `way`). template: a
    tokenizer whose chat template is the teacher's, for `completion`; by default the student's, if
    it proves right. extra: more fields for every request, as `{"top_k": 50}`; they win over the
    sampling fields that are sent otherwise (temperature and top_p as `write` is told; top_k, min_p
    and all penalties switched off). cache, budget, timeout, retries, concurrency, key_env, quiet:
    see `Service`. Raises InvalidValue for values that cannot be right.
    """

    @validate_arguments
    def __init__(
        self,
        url: Text,
        model: Text | None = None,
        *,
        continue_by: str = "auto",
        template: PreTrainedTokenizerBase | None = None,
        extra: Mapping[str, Any] | None = None,
        cache: Any = "runs/teacher.sqlite",
        budget: InstanceOf[Budget] | None = None,
        **options: Any,
    ) -> None:
        if continue_by not in ("auto", *asking.WAYS):
            raise InvalidValue(
                f"TextServer got continue_by={continue_by!r}. Use auto, {', '.join(asking.WAYS)}."
            )
        known = [field.name for field in dataclasses.fields(Service) if field.name != "url"]
        if unknown := sorted(set(options) - set(known)):
            raise InvalidValue(
                f"TextServer has no option {', '.join(unknown)}. It has model, continue_by,"
                f" template, extra, {', '.join(known)}."
            )
        self.model, self.template, self.extra = model, template, _checked_extra(extra or {})
        self._given = "" if continue_by == "auto" else continue_by
        self.way = self._given  # how it goes on with unfinished answers, once that is known
        self.service = Service(
            url, cache=cache, budget=Budget() if budget is None else budget, **options
        )
        self._names: tuple[str, ...] = ()  # under which the server has answered
        self._limit, self._several = "max_tokens", True
        self._refused: dict[
            str, tuple[str, ...]
        ] = {}  # by path, the sampling fields that the server does not know

    def check(self, student: Policy, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
        """Ask the server for one token: is it there, who is it, how does it want to be asked?

        Any tokenizer will do.
        """
        self.template = self.template or student.tokenizer
        self.meet(prompts)

    def meet(self, prompts: Sequence[Prompt]) -> None:
        """Learn the model's name and what the server understands; once. Raises TeacherError."""
        if self._names:
            return
        if not prompts:
            raise EmptyPrompts("There are no prompts. Give at least one.")
        path, body = asking.request(prompts[0], "", self._given, self.template)
        key = key_of([FORMAT, "meet", self.service.url, self.model, path, body, self.extra])
        known = (
            self.service.cache.get(key) if self.model else None
        )  # a server that names itself may be another one today
        if known is None:
            known = self._met(path, body)
            self.service.cache.put(key, known)
        self.model, self._names = known["model"], tuple(known["names"])
        self._limit, self._several = known["limit"], known["several"]
        self._refused[path] = tuple(known["refused"])
        self.extra = {**known["extra"], **self.extra}

    @validate_arguments
    def write(
        self,
        prompts: Sequence[Prompt],
        n: Count = 1,
        *,
        prefixes: Sequence[str] | None = None,
        max_new_tokens: Count = 64,
        temperature: Amount = 1.0,
        top_p: PositiveShare = 1.0,
        seed: CountOrZero = 0,
    ) -> list[list[WrittenText]]:
        """Exactly `n` texts a prompt, of at most `max_new_tokens` of the teacher's tokens each;
        each says whether it was cut there.

        prefixes: one unfinished answer a prompt, which the texts continue and do not repeat.
            temperature, top_p: how the
        teacher samples; nothing else shapes its distribution but `extra`. Raises InvalidValue,
        TeacherError and BudgetSpent; the answers that came before are kept, and asking again goes
        on from them.
        """
        begun = [""] * len(prompts) if prefixes is None else list(prefixes)
        if len(begun) != len(prompts):
            raise InvalidValue(
                f"write got {len(begun)} prefixes for {len(prompts)} prompts. Use one each, or none"
                " at all."
            )
        asking.check_texts(prompts, begun)
        sampling = Sampling(temperature, top_p)
        self._check_extra_agrees(sampling)
        self.meet(prompts)
        way = self._way(prompts) if any(begun) else self._given
        times: Counter[str] = Counter()  # the same question twice in a call has two answers
        jobs, asked = [], []
        for prompt, prefix in zip(prompts, begun, strict=True):
            path, body = asking.request(prompt, prefix, way, self.template)
            drawn = {self._limit: max_new_tokens, **sampling.fields(), **self.extra}
            question = {
                "format": FORMAT,
                "url": self.service.url,
                "model": self.model,
                "path": path,
                **body,
                **drawn,
                "seed": seed,
            }
            first = times[key_of(question)] * n
            times[key_of(question)] += 1
            keys = [key_of([question, first + j]) for j in range(n)]
            asked.append((prefix, keys))
            left = [key for key in keys if self.service.cache.get(key) is None]
            group = len(left) if self._several else 1
            jobs += [
                partial(self._ask, path, body, max_new_tokens, sampling, left[i : i + group])
                for i in range(0, len(left), max(group, 1))
            ]
        self.service.many(jobs, unit=n if self._several else 1)
        return [[self._written(key, prefix, way) for key in keys] for prefix, keys in asked]

    def _check_extra_agrees(self, sampling: Sampling) -> None:
        """Refuse a temperature or top_p that the fields of `extra` would overrule: one of the two
        would be ignored.
        """
        for name, value in sampling.fields().items():
            if value != NEUTRAL[name] and self.extra.get(name, value) != value:
                raise InvalidValue(
                    f"write got {name}={value}, but this teacher was made with extra={{{name!r}:"
                    f" {self.extra[name]!r}}}. Leave {name} out of extra, or give both the same"
                    " value."
                )

    def _written(self, key: str, prefix: str, way: str) -> WrittenText:
        answer = self._answer(key)
        return WrittenText(asking.continuation(answer["text"], prefix, way), answer["finish"])

    def _answer(self, key: str) -> dict[str, Any]:
        found = self.service.cache.get(key)
        if found is None:
            raise OpdlabError(
                "The cache lost an answer while it was in use. Do not delete it during a run; ask"
                " again."
            )
        return found

    def _ask(
        self,
        path: str,
        body: dict[str, Any],
        limit: int,
        sampling: Sampling,
        keys: list[str],
        retries: int | None = None,
    ) -> None:
        """Fill the cache under `keys`, one text each, in as many requests as the server needs for
        that.
        """
        while keys:
            several = {"n": len(keys)} if len(keys) > 1 else {}
            # a seed of its own for every sample: with one for all, a server that gives one text a
            # request would repeat it
            whole = {**body, self._limit: limit, **several, "seed": int(keys[0][:8], 16) >> 1}
            accept = partial(self._checked, n=len(keys), limit=limit, short=[])
            texts = self.post(
                path, whole, sampling, worst(json.dumps(body), len(keys), limit), accept, retries
            )
            for key, text in zip(keys, texts, strict=False):
                self.service.cache.put(key, text)
            keys = keys[len(texts) :]

    def post(
        self,
        path: str,
        body: Mapping[str, Any],
        sampling: Sampling,
        worst: Usage,
        accept: Callable[[dict[str, Any]], T],
        retries: int | None = None,
        guess: bool = True,
    ) -> T:
        """`Service.post` with the model, all sampling fields that the server knows, and `extra`.

        Fields that it refuses are left out, and remembered once a request without them was
        answered. guess: leave out all fields beyond OpenAI's where the server does not name the one
        that it refuses.
        """
        refused = self._refused.get(path, ())
        while True:
            fields = without(
                {k: v for k, v in sampling.fields().items() if k not in self.extra},
                refused,
                self.service.url,
            )
            whole = {
                **({"model": self.model} if self.model else {}),
                **body,
                **fields,
                **self.extra,
            }
            try:
                answer = self.service.post(path, whole, worst, accept, retries)
            except TeacherError as error:
                more = refused_fields(error, fields, guess)
                if not more:
                    raise
                refused += more
                continue
            self._refused[path] = refused
            return answer

    def named(self, reply: Mapping[str, Any]) -> None:
        """Raise Fault where another model answers than the one that was met."""
        if reply.get("model") not in self._names:
            raise Fault(
                f"another model answered: {plain(reply.get('model'))!r} and not {self._names[0]!r}"
            )

    def _checked(
        self, reply: Mapping[str, Any], n: int, limit: int, short: list[int]
    ) -> list[dict[str, Any]]:
        """The texts of a reply.

        Fewer than asked for may be an accident: taken only when it happens again (`short`).
        """
        self.named(reply)
        texts = asking.choices(reply, n * limit)
        if len(texts) > n:
            raise Fault(
                f"{len(texts)} texts came where {n} {'was' if n == 1 else 'were'} asked for"
            )
        if len(texts) < n and not short:
            short.append(len(texts))
            raise Fault(f"{len(texts)} texts came where {n} were asked for")
        return texts

    # Getting to know a server.

    def _met(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """What one request for two texts of a token shows: names, fields that the server takes,
        whether `n` is served.
        """
        fields, guess = {self._limit: 1, "n": 2}, False
        while True:
            try:
                most = worst(json.dumps(body), 2, 1)
                name, texts = self.post(
                    path, {**body, **fields}, Sampling(), most, self._introduced, guess=guess
                )
                break
            except TeacherError as error:
                fields, guess = _after_refusal(fields, guess, error)
        return {
            "model": self.model or name.removesuffix("@main"),
            "names": [name],
            "extra": SAMPLE if name.endswith("@main") else {},
            "limit": next(iter(fields)),
            "several": texts > 1,
            "refused": list(self._refused[path]),
        }

    def _introduced(self, reply: Mapping[str, Any]) -> tuple[str, int]:
        name, listed = reply.get("model"), reply.get("choices")
        if not isinstance(name, str) or not name or not isinstance(listed, list) or not listed:
            raise Fault("the reply has no model or no choices")
        if self.service.without_key(name) != name:
            raise Fault(
                "the model's name holds the key, which would be kept with the answers", final=True
            )
        for choice in listed:
            asking.check_no_error(choice)
        if len(listed) > 2:
            raise Fault(f"{len(listed)} texts came where 2 were asked for")
        if self.model and not (
            name.startswith(self.model) or self.model.endswith(f"/{name}")
        ):  # a dated snapshot, a router's name
            raise Fault(
                f"the model {plain(name)!r} answered and not {self.model!r}. Name it as the server"
                " does, or leave model= out"
            )
        return name, len(listed)

    def _way(self, prompts: Sequence[Prompt]) -> str:
        """How this server goes on with an unfinished answer: as the user said, else as its own
        greedy answers show, once.
        """
        chats = [prompt for prompt in prompts if prompt.messages is not None]
        if not self.way and chats:
            self.way = self._found(chats[:PROBES])
        return self.way or "completion"

    def _found(self, prompts: Sequence[Prompt]) -> str:
        """The first way that, given half of a greedy answer, goes on with its other half.

        Needs no knowledge of the model.
        """
        try:
            halves = [(prompt, *_halves(self._greedy(prompt, "", ""))) for prompt in prompts]
        except TeacherError as error:
            if error.status is None or error.status >= 500:
                raise
            halves = []  # a server that cannot be greedy shows nothing
        halves = [(prompt, a, b) for prompt, a, b in halves if a and b]
        ways = (
            asking.WAYS[:-1]
            if self.template is not None and self.template.chat_template
            else asking.WAYS[1:-1]
        )
        found = next((way for way in ways if halves and self._works(way, halves)), None)
        if found is None:
            warnings.warn(
                f"{self.service.url} goes on with no unfinished answer in a way that could be shown"
                " to work, so it is told to go on by an instruction, and what it repeats is cut."
                " Texts continue less exactly so; TextServer(continue_by=…) names another way.",
                stacklevel=5,
            )
        return found or "instruct"

    def _works(self, way: str, halves: Sequence[tuple[Prompt, str, str]]) -> bool:
        try:
            right = [
                self._greedy(prompt, a, way).strip().startswith(b.strip()[: asking.SHORTEST_ECHO])
                for prompt, a, b in halves
            ]
        except TeacherError as error:
            if error.status is None:
                raise
            return False
        return sum(right) >= max(
            1, len(right) - 1
        )  # of three, one may differ: a boundary of tokens, or a server that rounds

    def _greedy(self, prompt: Prompt, prefix: str, way: str) -> str:
        path, body = asking.request(prompt, prefix, way, self.template)
        key = key_of(
            [FORMAT, "greedy", self.service.url, self.model, path, body, self._limit, self.extra]
        )
        if self.service.cache.get(key) is None:
            self._ask(path, body, GREEDY, Sampling(temperature=0.0), [key], retries=1)
        return str(self._answer(key)["text"])

    def __repr__(self) -> str:
        return (
            f"TextServer({self.service.url!r}, {self.model!r}, continue_by={self.way or 'auto'!r})"
        )


def _checked_extra(extra: Mapping[str, Any]) -> dict[str, Any]:
    """The user's fields for every request; raises InvalidValue for those that cannot be sent."""
    for name in extra:
        if name in TAKEN:
            raise InvalidValue(
                f"TextServer got extra={{{name!r}: …}}, a field that is set by {TAKEN[name]}. Leave"
                " it out of extra."
            )
    try:
        json.dumps(extra, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidValue(
            f"TextServer got extra={shortened(extra)}, which is no JSON ({error}). Use plain data."
        ) from None
    return dict(extra)


def _halves(text: str) -> tuple[str, str]:
    """The text cut before the space nearest to its middle; nothing where it is too short to tell."""
    spaces = [i for i, c in enumerate(text) if c == " " and text[:i].strip()]
    middle = min(spaces, key=lambda i: abs(i - len(text) // 2), default=len(text) // 2)
    return (text[:middle], text[middle:]) if len(text.strip()) >= 8 else ("", "")


def _after_refusal(
    fields: dict[str, int], guess: bool, error: TeacherError
) -> tuple[dict[str, int], bool]:
    """How to greet a server that refused a greeting: `fields`, and whether to `guess` (see `post`);
    raises the error at the end.

    Where it does not say what it refuses, `n` goes first: without it texts come one at a time,
    which changes none of them.
    """
    if error.status not in REFUSED:
        raise error
    limit, many = next(iter(fields)), {"n": 2}
    if "max_completion_tokens" in str(error) and limit == "max_tokens":
        return {"max_completion_tokens": 1, **many}, False
    if "n" in fields:
        return {limit: 1}, guess
    if not guess:
        return {limit: 1, **many}, True
    raise error
