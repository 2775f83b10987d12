"""A teacher behind an OpenAI-compatible server that returns nothing but text.

It writes exactly as many texts as it is asked for, or raises: if a server gives one choice for two
that were asked for (as `transformers serve` does), it is asked again. Every text is kept on disk,
so a run that is repeated or taken up after an error pays for nothing twice. Left out: streaming,
tools, images.
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
from opdlab.data.sampling_config import SamplingConfig
from opdlab.data.written_text import WrittenText
from opdlab.errors import EmptyPrompts, InvalidValue, OpdlabError, TeacherError
from opdlab.models.policy import Policy
from opdlab.support.expect import shortened
from opdlab.support.validation import Addresses, Count, Text, Unchecked, validate_arguments
from opdlab.teachers import asking
from opdlab.teachers.budget import Budget, Usage, worst
from opdlab.teachers.cache import key_of
from opdlab.teachers.greeting import Introduction, greet, read_name
from opdlab.teachers.redaction import plain
from opdlab.teachers.reply import Fault
from opdlab.teachers.sampling import (
    KEEP_STOP,
    NEUTRAL,
    refused_fields,
    refuses_number,
    sampling_fields,
    without_refused,
)
from opdlab.teachers.service import Service, split_urls
from opdlab.teachers.ways import find_way

T = TypeVar("T")
# The format of the cache's rows. In format 1, replies that a server had broken off counted as
# finished, so they are not read again.
FORMAT = 2
PROBES = 3  # prompts that a way of going on is tried on
GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=48)  # an answer that a way is tried with
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


class TextServer:
    """A teacher that writes, as `TextServer("http://127.0.0.1:8000/v1")`.

    If the server needs a key, put it into the environment variable OPDLAB_API_KEY.

    Args:
        url: The server's address, with its /v1; or a list of the addresses of servers of the same
            model, which share the requests (see `opdlab.teachers.servers`). Answers are kept under
            the first address, so the others may come and go between runs.
        model: The model's name at the server; by default the one that answers.
        continue_by: The way to ask the server to go on with an unfinished text, one of
            `asking.WAYS`; by default the first that is found to work (see the attribute `way`).
        template: A tokenizer with the teacher's chat template, for `continue_by="completion"`; by
            default the student's, if it proves right.
        extra: Further fields for every request, as `{"repetition_penalty": 1.1}`. They win over
            the sampling fields, which are all sent: those of `write`, and penalties switched off.
        cache: Where answers are kept; see `Service`.
        budget: Limits on what may be spent; none by default.
        options: Fields of `Service`: `timeout`, `retries`, `concurrency`, `key_env`, `quiet`.

    Attributes:
        model: The model's name, once it is known.
        way: The way to ask for more of an unfinished answer, once it is known.
        service: The connection, with the cache and the budget.

    Raises:
        InvalidValue: A value cannot be right.
    """

    @validate_arguments
    def __init__(
        self,
        url: Addresses,
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
        taken = ("url", "replicas")
        known = [field.name for field in dataclasses.fields(Service) if field.name not in taken]
        if unknown := sorted(set(options) - set(known)):
            raise InvalidValue(
                f"TextServer has no option {', '.join(unknown)}. It has model, continue_by,"
                f" template, extra, {', '.join(known)}."
            )
        self.model, self.template, self.extra = model, template, _checked_extra(extra or {})
        self._given = "" if continue_by == "auto" else continue_by
        self.way = self._given
        first, replicas = split_urls(url)
        options |= {"cache": cache, "budget": Budget() if budget is None else budget}
        self.service = Service(first, replicas=replicas, **options)
        self._names: tuple[str, ...] = ()  # under which the server has answered
        self._limit, self._several = "max_tokens", True
        # by path, the sampling fields that the server does not know
        self._refused: dict[str, tuple[str, ...]] = {}

    def check(self, student: Policy, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
        """Ask the server for one token, to learn its model's name and how it wants to be asked.

        Any tokenizer of the student will do.

        Args:
            student: Its tokenizer renders chats if the server was made without a `template`.
            prompts: The prompts of the run; the first one is asked.
            max_new_tokens: Not used; a server's context is not known.

        Raises:
            EmptyPrompts: There are no prompts.
            TeacherError: The server gives no usable answer.
        """
        self.template = self.template or student.tokenizer
        self.meet(prompts)

    def meet(self, prompts: Sequence[Prompt]) -> None:
        """Learn the model's name and which fields the server understands, once.

        Args:
            prompts: Prompts of which the first one is asked.

        Raises:
            EmptyPrompts: There are no prompts.
            TeacherError: The server gives no usable answer.
        """
        if self._names:
            return
        if not prompts:
            raise EmptyPrompts("There are no prompts. Give at least one.")
        path, body = asking.make_request(prompts[0], "", self._given, self.template)
        key = key_of([FORMAT, "meet", self.service.url, self.model, path, body, self.extra])
        # A server that names its model itself may have another one today.
        kept = self.service.cache.get(key) if self.model else None
        if kept is None:
            met = self._greet(path, body)
            self.service.cache.put(key, met.as_json())
        else:
            met = Introduction.of_json(kept)
        self.model, self._names = met.model, met.names
        self._limit, self._several = met.limit, met.several
        self._refused[path] = met.refused
        self.extra = {**met.extra, **self.extra}
        self.service.compare = partial(self._meet_again, path, body)

    def _meet_again(self, path: str, body: dict[str, Any]) -> None:
        """Check that one of several servers answers under the name that was met."""

        def read(reply: dict[str, Any]) -> None:
            self.check_model(reply)
            read_name(reply, self.model, self.service.without_key)

        most = worst(json.dumps(body), 1, 1)
        self.post(path, {**body, self._limit: 1}, SamplingConfig(), most, read, retries=1)

    @validate_arguments
    def write(
        self,
        prompts: Sequence[Prompt],
        n: Count = 1,
        *,
        prefixes: Sequence[str] | None = None,
        places: Unchecked[Sequence[int] | None] = None,
        **options: Unchecked[Any],
    ) -> list[list[WrittenText]]:
        """Write exactly `n` texts for each prompt; each says whether the length limit cut it.

        If an error stops this, the answers that came before are kept, and asking again goes on
        from them.

        Args:
            prompts: The questions.
            n: Texts for each prompt.
            prefixes: One unfinished answer for each prompt, which the texts continue and do not
                repeat.
            places: Where each prompt stands in a batch that several processes share. Here they
                change nothing: every request has a seed of its own, which follows from `seed` and
                the question.
            options: Fields of `SamplingConfig`. `max_new_tokens` counts the teacher's tokens. With
                `stop`, the server is asked to keep the stop text at the end of a text, as samplers
                here do (vLLM's `include_stop_str_in_output`). A server that refuses this field is
                refused; one that ignores it leaves the stop text out. Nothing else shapes the
                teacher's distribution but `extra`.

        Returns:
            One list for each prompt, with `n` texts.

        Raises:
            InvalidValue: An option is not what it must be, or contradicts `extra`.
            OpdlabError: The server cannot honour an option.
            TeacherError: The server gives no usable answer.
            BudgetSpent: The next request may not fit the budget.
        """
        config = SamplingConfig.of("write", options)
        begun = [""] * len(prompts) if prefixes is None else list(prefixes)
        if len(begun) != len(prompts):
            raise InvalidValue(
                f"write got {len(begun)} prefixes for {len(prompts)} prompts. Use one each, or none"
                " at all."
            )
        asking.check_texts(prompts, begun)
        self._check_extra_agrees(config)
        self.meet(prompts)
        way = self._way(prompts) if any(begun) else self._given
        times: Counter[str] = Counter()  # the same question twice in a call has two answers
        jobs, asked = [], []
        for prompt, prefix in zip(prompts, begun, strict=True):
            path, body = asking.make_request(prompt, prefix, way, self.template)
            drawn = {self._limit: config.max_new_tokens, **sampling_fields(config), **self.extra}
            question = {
                "format": FORMAT,
                "url": self.service.url,
                "model": self.model,
                "path": path,
                **body,
                **drawn,
                "seed": config.seed,
            }
            first = times[key_of(question)] * n
            times[key_of(question)] += 1
            keys = [key_of([question, first + j]) for j in range(n)]
            asked.append((prefix, keys))
            left = [key for key in keys if self.service.cache.get(key) is None]
            group = len(left) if self._several else 1
            jobs += [
                partial(self._ask, path, body, config, left[i : i + group])
                for i in range(0, len(left), max(group, 1))
            ]
        self.service.many(jobs, unit=n if self._several else 1)
        return [[self._written(key, prefix, way) for key in keys] for prefix, keys in asked]

    def _check_extra_agrees(self, config: SamplingConfig) -> None:
        """Refuse an option that a field of `extra` would overrule: one of the two would be ignored.

        `extra` may say not to keep the stop text.
        """
        for name, value in sampling_fields(config).items():
            if name == KEEP_STOP or value == NEUTRAL.get(name):
                continue
            if self.extra.get(name, value) != value:
                raise InvalidValue(
                    f"write got {name}={value}, but this teacher was made with extra={{{name!r}:"
                    f" {self.extra[name]!r}}}. Leave {name} out of extra, or give both the same"
                    " value."
                )

    def _written(self, key: str, prefix: str, way: str) -> WrittenText:
        answer = self._answer(key)
        return WrittenText(asking.read_continuation(answer["text"], prefix, way), answer["finish"])

    def _answer(self, key: str) -> dict[str, Any]:
        found: dict[str, Any] | None = self.service.cache.get(key)
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
        config: SamplingConfig,
        keys: list[str],
        retries: int | None = None,
    ) -> None:
        """Fill the cache under `keys`, one text each, in as many requests as the server needs."""
        limit = config.max_new_tokens
        while keys:
            several = {"n": len(keys)} if len(keys) > 1 else {}
            # Every sample has a seed of its own: with one seed for all, a server that gives one
            # text for each request would repeat it.
            whole = {**body, self._limit: limit, **several, "seed": int(keys[0][:8], 16) >> 1}
            accept = partial(self._read_texts, n=len(keys), limit=limit, short=[])
            most = worst(json.dumps(body), len(keys), limit)
            try:
                texts = self.post(path, whole, config, most, accept, retries)
            except TeacherError as error:
                if len(keys) == 1 or not refuses_number(error):
                    raise
                # llama.cpp takes as many as it has slots: from here on, one text for each request.
                self._several = False
                for key in keys:
                    self._ask(path, body, config, [key], retries)
                return
            for key, text in zip(keys, texts, strict=False):
                self.service.cache.put(key, text)
            keys = keys[len(texts) :]

    def post(
        self,
        path: str,
        body: Mapping[str, Any],
        config: SamplingConfig,
        worst: Usage,
        accept: Callable[[dict[str, Any]], T],
        retries: int | None = None,
        guess: bool = True,
        largest: int | None = None,
    ) -> T:
        """Post a request with the model, all sampling fields that the server knows, and `extra`.

        Fields that the server refuses are left out. They are remembered once a request without them
        was answered.

        Args:
            path: Behind the server's url.
            body: The request without model and sampling fields.
            config: The sampling settings; length and seed stand in `body`.
            worst: The most that the request can use.
            accept: Reads the reply; raises Fault for a reply that cannot be used.
            retries: Most times to ask again; by default the service's own number.
            guess: Whether to leave out all fields beyond OpenAI's if the server does not name the
                one that it refuses.
            largest: Most bytes of the reply; see `Service.post`.

        Returns:
            The value that `accept` returns.

        Raises:
            OpdlabError: The server refuses a field that was given a value of its own.
            TeacherError: No usable reply came.
            BudgetSpent: The request may not fit the budget.
        """
        refused = self._refused.get(path, ())
        named = {"model": self.model} if self.model else {}
        wanted = sampling_fields(config)
        wanted = {name: value for name, value in wanted.items() if name not in self.extra}
        while True:
            fields = without_refused(wanted, refused, self.service.url)
            whole = {**named, **body, **fields, **self.extra}
            try:
                answer = self.service.post(path, whole, worst, accept, retries, largest)
            except TeacherError as error:
                more = refused_fields(error, fields, guess)
                if not more:
                    raise
                refused += more
                continue
            self._refused[path] = refused
            return answer

    def check_model(self, reply: Mapping[str, Any]) -> None:
        """Check that the model that was met answers, and not another one.

        Args:
            reply: The server's reply.

        Raises:
            Fault: Another model answers.
        """
        if reply.get("model") not in self._names:
            raise Fault(
                f"another model answered: {plain(reply.get('model'))!r} and not {self._names[0]!r}"
            )

    def _read_texts(
        self, reply: Mapping[str, Any], n: int, limit: int, short: list[int]
    ) -> list[dict[str, Any]]:
        """The texts of a reply.

        Fewer than asked for may be an accident, so they are taken only if it happens again, which
        `short` remembers.
        """
        self.check_model(reply)
        texts = asking.read_choices(reply, n * limit)
        if len(texts) > n:
            raise Fault(
                f"{len(texts)} texts came where {n} {'was' if n == 1 else 'were'} asked for"
            )
        if any(self.service.holds_key(text["text"]) for text in texts):
            raise Fault("a text holds the key, which would be kept with the answers", final=True)
        if len(texts) < n and not short:
            short.append(len(texts))
            raise Fault(f"{len(texts)} texts came where {n} were asked for")
        return texts

    # Getting to know a server.

    def _greet(self, path: str, body: dict[str, Any]) -> Introduction:
        """Get to know the server by a question to which it need not give more than one token."""
        most = worst(json.dumps(body), 2, 1)
        read = partial(read_name, model=self.model, without_key=self.service.without_key)

        def ask(fields: dict[str, int], guess: bool) -> tuple[str, int]:
            whole = {**body, **fields}
            return self.post(path, whole, SamplingConfig(), most, read, guess=guess)

        met = greet(ask, self._limit)
        return dataclasses.replace(met, model=self.model or met.model, refused=self._refused[path])

    def _way(self, prompts: Sequence[Prompt]) -> str:
        """The way to ask for more of an unfinished answer: as the user said, or a trial shows."""
        chats = [prompt for prompt in prompts if prompt.messages is not None]
        if not self.way and chats:
            self.way = self._find_way(chats[:PROBES])
        return self.way or "completion"

    def _find_way(self, prompts: Sequence[Prompt]) -> str:
        """Find a way by trial; if none works, ask for more by an instruction."""
        renders = self.template is not None and self.template.chat_template
        ways = asking.WAYS[:-1] if renders else asking.WAYS[1:-1]
        found = find_way(prompts, ways, self._greedy)
        if found is None:
            warnings.warn(
                f"{self.service.url} goes on with no unfinished answer in a way that could be shown"
                " to work, so it is told to go on by an instruction, and what it repeats is cut."
                " Texts continue less exactly so; TextServer(continue_by=…) names another way.",
                stacklevel=5,
            )
        return found or "instruct"

    def _greedy(self, prompt: Prompt, prefix: str, way: str) -> str:
        path, body = asking.make_request(prompt, prefix, way, self.template)
        key = key_of(
            [FORMAT, "greedy", self.service.url, self.model, path, body, self._limit, self.extra]
        )
        if self.service.cache.get(key) is None:
            self._ask(path, body, GREEDY, [key], retries=1)
        return str(self._answer(key)["text"])

    def __repr__(self) -> str:
        return (
            f"TextServer({self.service.shown_url}, {self.model!r},"
            f" continue_by={self.way or 'auto'!r})"
        )


def _checked_extra(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return the user's fields for every request; raise InvalidValue if one cannot be sent."""
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
