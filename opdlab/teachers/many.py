"""Several teachers as one: each prompt is graded by its own teacher, or by a mixture of them.

    MultiTeacher({"maths": a, "style": b}, route="subject")             a column of the task
    MultiTeacher({"maths": a, "style": b}, route=lambda prompt: …)      a function of the prompt
    MultiTeacher({"maths": a, "style": b}, route={"maths": 0.7, "style": 0.3})    all, with weights

Every teacher sees only the completions that it grades. To the engine the result is one teacher, so
every method and every divergence trains with it. Routing by domain is MOPD's (TRL, verl, ms-swift
and NeMo-RL have it); mixtures are our reading of "all with weights":

    arithmetic    q = sum_m w_m q_m              forward KL to it has the gradient of
                                                 sum_m w_m KL(q_m || p)
    geometric     q ∝ prod_m q_m^(w_m)           reverse KL to it has the gradient of
                                                 sum_m w_m KL(p || q_m)
"""

from __future__ import annotations

import hashlib
import math
import numbers
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import pandas as pd
import torch
from torch import Tensor

from opdlab.data.prompt import Prompt, name_of
from opdlab.data.rollout import Rollout
from opdlab.data.sampling_config import SamplingConfig
from opdlab.errors import InvalidValue, MissingPolicy, OpdlabError
from opdlab.models.graded import Graded
from opdlab.models.places import takes_places
from opdlab.models.policy import Policy, as_policy
from opdlab.models.protocols import Checked, Grader, RemoteGrader, TopGrader, Writer
from opdlab.models.routed import Mixture, Routed
from opdlab.models.same_tokens import check_same_tokens
from opdlab.support.expect import shortened
from opdlab.support.validation import Unchecked, validate_arguments
from opdlab.teachers.contract import expect_teacher
from opdlab.teachers.logprob_server import LogprobServer
from opdlab.teachers.text_only import as_writer
from opdlab.teachers.text_server import TextServer
from opdlab.teachers.writing import options_for

Route = str | Mapping[str, float] | Callable[[Prompt], Any]
REMEMBERED = 100_000  # prompts whose teachers are kept, to notice a function that changes its mind
# What a run notes of each teacher in its history, as "maths/rows". `reverse_kl` is in nats per
# token (`coarse_reverse_kl` of top log-probs), `reward` the mean score, `paid` tokens of a server.
NUMBERS = ("rows", "tokens", "reverse_kl", "reward", "grade_s", "paid")


@dataclass
class Meter:
    """What a teacher has cost since it was last read.

    Attributes:
        seconds: Time that it took to grade and to write.
        paid: Tokens that its server read and wrote.
    """

    seconds: float = 0.0
    paid: int = 0


class MultiTeacher:
    """Several teachers that grade as one.

    Args:
        members: Teachers by name: policies (adapters on one base too), hinted views, servers. Names
            are letters, digits and _.
        route: Who grades a prompt: the name of a column that the task keeps
            (`from_records(…, keep=…)`) and that holds the teacher's name; a function of the prompt
            that gives a name, or weights by name; or weights for all prompts.
        mixture: How several teachers of one prompt are mixed, "arithmetic" or "geometric".

    Attributes:
        members: The teachers by name.
        route: As it was given.
        mixture: As it was given.

    Raises:
        InvalidValue: There are fewer than two teachers, a name is none, one cannot teach, or the
            weights are no weights of these teachers.
        MissingPolicy: Teachers with top log-probs alone cannot be mixed.
    """

    @validate_arguments
    def __init__(
        self,
        members: Unchecked[Mapping[str, Any]],
        route: Unchecked[Route] = "teacher",
        mixture: Unchecked[Mixture] = "arithmetic",
    ) -> None:
        if not isinstance(members, Mapping) or len(members) < 2:
            raise InvalidValue(
                f"MultiTeacher got {shortened(members)}. Give two teachers or more by name, as"
                " {'maths': policy, 'style': other}."
            )
        for name, member in members.items():
            if not isinstance(name, str) or not name.isidentifier():
                raise InvalidValue(
                    f"MultiTeacher got a teacher named {shortened(name)}. Use letters, digits and"
                    " _, beginning with a letter."
                )
            if isinstance(member, MultiTeacher):
                raise InvalidValue(
                    f"MultiTeacher got another MultiTeacher as {name!r}. Give all teachers in one."
                )
            expect_teacher(member, "MultiTeacher", f"members[{name!r}]")
        if not (isinstance(mixture, str) and mixture in get_args(Mixture)):
            raise InvalidValue(
                f"MultiTeacher got mixture={shortened(mixture)}. Use arithmetic or geometric."
            )
        if not isinstance(route, str) and not callable(route) and not isinstance(route, Mapping):
            raise InvalidValue(
                f"MultiTeacher got route={shortened(route)}. Use the name of a column, a function"
                " of the prompt, or weights by teacher."
            )
        self.members, self.route, self.mixture = dict(members), route, mixture
        self._routed: dict[bytes, list[float]] = {}
        self._reads_bytes = False
        self._meters = {name: Meter() for name in members}
        if isinstance(route, Mapping):
            self._read_weights(route, "route")

    @property
    def name(self) -> str:
        """The teachers' names, for a model card."""
        return " and ".join(self.members)

    @property
    def k(self) -> int | None:
        """The number of likeliest tokens that all teachers give; None for whole distributions."""
        known = [
            member.k
            for member in self.members.values()
            if isinstance(member, TopGrader) and member.k is not None
        ]
        return min(known, default=None)

    # Routing.

    def weights_of(self, prompts: Sequence[Prompt]) -> Tensor:
        """Return the weight of each teacher for each prompt.

        Args:
            prompts: The prompts.

        Returns:
            `[B, M]` in float64, in the order of `members`; rows sum to 1.

        Raises:
            InvalidValue: The route gives no teacher, or no weights, for a prompt.
        """
        rows, known = [], dict[int, list[float]]()
        for prompt in prompts:  # the completions of one prompt stand side by side
            if id(prompt) not in known:
                known[id(prompt)] = self._same_weights(prompt)
            rows.append(known[id(prompt)])
        return torch.tensor(rows, dtype=torch.float64).view(len(prompts), len(self.members))

    def _same_weights(self, prompt: Prompt) -> list[float]:
        """The weights of a prompt; refuses a function that gives others than it gave before."""
        weights = self._weights_of_one(prompt)
        if not callable(self.route):
            return weights
        said = repr((prompt.id, prompt.text, prompt.messages, prompt.hint, dict(prompt.metadata)))
        key = hashlib.blake2b(said.encode(errors="replace"), digest_size=16).digest()
        before = self._routed.pop(key, None)  # put back behind the others, as the latest
        if before is None:
            before = self._weights_of_one(prompt)
            while len(self._routed) >= REMEMBERED:
                del self._routed[next(iter(self._routed))]
        self._routed[key] = before
        if before != weights:
            raise InvalidValue(
                f"The route of MultiTeacher gives prompt {name_of(prompt)} other teachers than"
                f" before: {self._name_weights(weights)} and {self._name_weights(before)}. A run"
                " that is resumed, or takes a step again, would be graded by others. Let the"
                " function follow from the prompt alone, without randomness or a counter."
            )
        return weights

    def _name_weights(self, weights: Sequence[float]) -> str:
        named = zip(self.members, weights, strict=True)
        return ", ".join(f"{name} {weight:g}" for name, weight in named if weight)

    def _weights_of_one(self, prompt: Prompt) -> list[float]:
        if isinstance(self.route, Mapping):
            return self._read_weights(self.route, "route")
        if isinstance(self.route, str):
            said: Any = prompt.metadata.get(self.route)
            what = f"{self.route} = {shortened(said)}"
            way = (
                f"Keep a column {self.route!r} with one of these names in the task, as"
                f" from_records(…, keep={self.route!r}), or give MultiTeacher route= a function."
            )
        else:
            try:
                said = self.route(prompt)
            except Exception as error:
                raise InvalidValue(
                    f"The route of MultiTeacher failed on prompt {name_of(prompt)}:"
                    f" {type(error).__name__}: {error}. Let it take a prompt and give a name."
                ) from error
            what, way = f"the route {shortened(said)}", "Let the route give one of these names."
        if isinstance(said, Mapping):
            return self._read_weights(said, f"the route of prompt {name_of(prompt)}")
        if not isinstance(said, str) or said not in self.members:
            raise InvalidValue(
                f"Prompt {name_of(prompt)} has {what}, and the teachers are"
                f" {', '.join(self.members)}. {way}"
            )
        return [float(name == said) for name in self.members]

    def _read_weights(self, weights: Mapping[str, Any], where: str) -> list[float]:
        """Weights by name as numbers that sum to 1."""
        values = list(weights.values())
        is_right = set(weights) <= set(self.members) and all(
            isinstance(one, numbers.Real)
            and not isinstance(one, bool)
            and 0 <= float(one) < math.inf
            for one in values
        )
        if not is_right or not 0 < sum(values) < math.inf:
            raise InvalidValue(
                f"MultiTeacher got {where}={shortened(dict(weights))}. Give numbers of at least 0,"
                f" not all 0, for some of {', '.join(self.members)}."
            )
        if self.k is not None and sum(value > 0 for value in values) > 1:
            partial = [n for n, one in self.members.items() if isinstance(one, TopGrader)]
            raise MissingPolicy(
                f"{where}={shortened(dict(weights))} mixes several teachers for one prompt, but"
                f" {partial[0]!r} gives its likeliest tokens only, and a mixture needs whole"
                " distributions. Route each prompt to one teacher, or load that teacher with"
                " Policy.load(…)."
            )
        total = sum(values)
        return [float(weights.get(name, 0.0)) / total for name in self.members]

    def prompts_of(self, name: str, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Return the prompts that a teacher is asked about.

        Args:
            name: The teacher's name.
            prompts: Some prompts.

        Returns:
            Those of them in which it has a weight, in order.
        """
        column = self.weights_of(prompts)[:, list(self.members).index(name)].tolist()
        return [prompt for prompt, weight in zip(prompts, column, strict=True) if weight]

    def by_bytes(self) -> MultiTeacher:
        """Make a view whose teachers read texts in their own tokens, as for `SpanOPD`.

        Returns:
            The view, in which each prompt has one teacher (`sole_teacher`).

        Raises:
            MissingPolicy: A teacher is no local model, or all prompts have several teachers.
        """
        if isinstance(self.route, Mapping) and sum(map(bool, self.route.values())) > 1:
            raise _no_common_spans()

        def local(member: Any) -> Any:
            if as_policy(member) is None:
                raise MissingPolicy(
                    f"{type(member).__name__} has no tokenizer here, and reading a text in its own"
                    " tokens needs one. Load it with Policy.load(…), or use OmniOPD."
                )
            return member

        view = self.map(local)
        view._reads_bytes = True
        return view

    def sole_teacher(self, prompt: Prompt) -> tuple[str, Policy]:
        """Return the teacher of a prompt that has one.

        Args:
            prompt: The prompt.

        Returns:
            Its name, and the teacher.

        Raises:
            MissingPolicy: Several teachers share the prompt.
        """
        weights = self._same_weights(prompt)
        if sum(map(bool, weights)) > 1:
            raise _no_common_spans()
        name = [*self.members][weights.index(max(weights))]
        return name, self.members[name]

    def charging(self, name: str) -> AbstractContextManager[None]:
        """Charge the time of a block to a teacher, for the report.

        Args:
            name: The teacher's name.

        Returns:
            The context of the block.
        """
        return self._metered(name)

    # What a teacher does.

    def check(self, student: Policy, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
        """Check before a run that every teacher can teach its own prompts.

        Args:
            student: The policy being trained.
            prompts: The prompts of the run.
            max_new_tokens: Length limit of a completion, in tokens of the student.

        Raises:
            InvalidValue: A prompt has no teacher.
            TokenizerMismatch: A teacher that grades has other tokens than the student.
            OpdlabError: A teacher cannot read one of its prompts. The message names the teacher.
        """
        if self._reads_bytes:
            for prompt in prompts:
                self.sole_teacher(prompt)
        for name, member in self.members.items():
            own = self.prompts_of(name, prompts)
            local = as_policy(member)
            with _naming(name), self._metered(name):
                if local is not None:
                    if not self._reads_bytes:
                        check_same_tokens(student, local, name)
                    if own:
                        local.encode_all(own, room=max_new_tokens)
                elif isinstance(member, Checked):
                    # A server is compared with the student, whoever's turn comes first.
                    member.check(student, own or list(prompts[:1]), max_new_tokens)

    def grade(self, rollout: Rollout) -> Routed:
        """Let each teacher grade the completions of its own prompts.

        Args:
            rollout: `B` completions, in tokens that all teachers share.

        Returns:
            The grades of `rollout.tokens` tokens, rows in order.

        Raises:
            InvalidValue: A prompt has no teacher.
            OpdlabError: A teacher failed. The message names it.
        """
        return self.begin(rollout)()

    def begin(self, rollout: Rollout) -> Callable[[], Routed]:
        """Let the local teachers grade, and prepare what the servers are to grade.

        Args:
            rollout: `B` completions, in tokens that all teachers share.

        Returns:
            A function that has the servers grade, one after the other, and gives what `grade`
            gives. It may run in another thread: no local model works in it.

        Raises:
            InvalidValue: A prompt has no teacher.
            OpdlabError: A teacher failed. The message names it.
        """
        weights = self.weights_of(rollout.prompts)  # [B, M]
        begun: dict[str, Callable[[], Graded]] = {}
        rows = {name: weights[:, m].nonzero()[:, 0] for m, name in enumerate(self.members)}
        for name, own in rows.items():
            if not len(own):
                continue
            part = rollout.select(own.tolist())
            with _naming(name), self._metered(name):
                grader = self._grader(name, self.members[name])
                if isinstance(grader, RemoteGrader):
                    begun[name] = grader.begin(part)
                else:
                    begun[name] = _already(grader.grade(part))

        def finish() -> Routed:
            parts = {}
            for name, wait in begun.items():
                with _naming(name), self._metered(name):
                    parts[name] = wait()
            return self._join(rollout, weights, rows, parts)

        return finish

    @property
    def asks_servers(self) -> bool:
        """Whether one of the teachers grades on another machine."""
        return any(isinstance(member, RemoteGrader) for member in self.members.values())

    def _join(
        self,
        rollout: Rollout,
        weights: Tensor,
        rows: Mapping[str, Tensor],
        parts: Mapping[str, Graded],
    ) -> Routed:
        """Put the grades of all teachers together.

        Args:
            rollout: `B` completions.
            weights: The weight of each teacher for each of them, `[B, M]`.
            rows: The numbers of the completions that each teacher has graded.
            parts: Their grades, of those teachers that have graded some.
        """
        device = rollout.ids.device
        row = torch.arange(len(rollout)).repeat_interleave(rollout.lengths.cpu())  # [tokens]
        place = torch.full((len(row), len(parts)), -1)
        for m, name in enumerate(parts):
            tokens = torch.isin(row, rows[name])
            place[tokens, m] = torch.arange(int(tokens.sum()))
        names = list(self.members)
        by_token = weights[row][:, [names.index(name) for name in parts]].float()
        vocab_size = max((part.vocab_size for part in parts.values()), default=0)
        k = None if self.k is None else min(self.k, vocab_size)
        return Routed(
            tuple(parts.values()),
            place.to(device),
            by_token.to(device),
            rollout.ids[rollout.mask],
            vocab_size,
            k,
            self.mixture,
            tuple(parts),
        )

    def write(
        self,
        prompts: Sequence[Prompt],
        n: int = 1,
        *,
        prefixes: Sequence[str] | None = None,
        places: Sequence[int] | None = None,
        **options: Any,
    ) -> list[list[str]]:
        """Let each prompt's teacher write `n` texts for it.

        Args:
            prompts: The questions.
            n: Texts for each prompt.
            prefixes: One unfinished answer for each prompt, which the texts continue.
            places: Where each prompt stands in a batch that several processes share.
            options: Fields of `SamplingConfig`.

        Returns:
            One list for each prompt, with `n` texts.

        Raises:
            MissingPolicy: A prompt has several teachers, or its teacher only grades.
            OpdlabError: A teacher failed. The message names it.
        """
        config = SamplingConfig.of("write", options)
        weights = self.weights_of(prompts)
        if bool(((weights > 0).sum(1) > 1).any()):
            raise MissingPolicy(
                "Several teachers share a prompt, and one text has one author. Route each prompt to"
                " one teacher, or use a method that reads distributions, as OPD()."
            )
        out: list[list[str]] = [[] for _ in prompts]
        for m, (name, member) in enumerate(self.members.items()):
            rows = weights[:, m].nonzero()[:, 0].tolist()
            if not rows:
                continue
            with _naming(name), self._metered(name):
                writer = as_writer(member)
                if not isinstance(writer, Writer):
                    raise MissingPolicy(
                        f"{type(member).__name__} only grades. Use a teacher that writes."
                    )
                chosen: dict[str, Any] = options_for(writer, config)
                if takes_places(writer.write):
                    chosen["places"] = [row if places is None else places[row] for row in rows]
                if prefixes is not None:
                    chosen["prefixes"] = [prefixes[row] for row in rows]
                texts = writer.write([prompts[row] for row in rows], n, **chosen)
            for row, written in zip(rows, texts, strict=True):
                out[row] = list(written)
        return out

    # Other views, and the report.

    def map(self, change: Callable[[Any], Any]) -> MultiTeacher:
        """Make the same with every teacher replaced.

        Args:
            change: A function of a teacher that gives another.

        Returns:
            A view with the same names, route and report.
        """
        made = {}
        for name, member in self.members.items():
            with _naming(name):
                made[name] = change(member)
        view = MultiTeacher(made, self.route, self.mixture)
        view._meters, view._routed = self._meters, self._routed
        return view

    def seeing(self, context: Any = None) -> MultiTeacher:
        """Make a view in which every teacher sees privileged information, as `Policy.seeing`.

        Args:
            context: A text, chat messages or a function of prompts; each prompt's own hint by
                default.

        Returns:
            The view.

        Raises:
            MissingPolicy: A teacher is no local model.
        """

        def told(member: Any) -> Policy:
            local = as_policy(member)
            if local is None:
                raise MissingPolicy(
                    f"{type(member).__name__} cannot be told hints; only local models can. Load it"
                    " with Policy.load(…)."
                )
            return local.seeing(context)

        return self.map(told)

    def read_meters(self) -> dict[str, Meter]:
        """Return what each teacher has cost since the last call.

        Returns:
            Seconds and tokens by teacher.
        """
        read = {name: Meter(meter.seconds, meter.paid) for name, meter in self._meters.items()}
        for meter in self._meters.values():
            meter.seconds, meter.paid = 0.0, 0
        return read

    def report(self, history: pd.DataFrame, last: int | None = None) -> pd.DataFrame:
        """Sum up a run's history for each teacher.

        Args:
            history: `run.history`; that of a resumed run holds all its steps.
            last: Look at this many steps at the end; all by default.

        Returns:
            One row for each teacher: `rows` (completions that it graded), `tokens`, `reverse_kl`
            (mean nats per token), `reward` (mean score of these completions, NaN without a
            verifier), `grade_s` (seconds) and `paid` (tokens of its server).
        """
        steps = history if last is None else history.tail(last)
        table = {}
        for name in self.members:
            columns = {
                what: steps.get(f"{name}/{what}", pd.Series(math.nan, steps.index))
                for what in NUMBERS
            }
            table[name] = {
                what: _mean(columns[what], columns["tokens" if what == "reverse_kl" else "rows"])
                if what in ("reverse_kl", "reward")
                else float(columns[what].sum())
                for what in NUMBERS
            }
        return pd.DataFrame.from_dict(table, orient="index").rename_axis("teacher")

    def _grader(self, name: str, member: Any) -> Grader:
        if not isinstance(member, Grader):
            raise MissingPolicy(
                f"{type(member).__name__} only writes. Use a method that learns from texts alone"
                " (OmniOPD, SequenceKD), or a teacher with log-probs."
            )
        return member

    @contextmanager
    def _metered(self, name: str) -> Iterator[None]:
        """Charge the block's seconds and tokens to a teacher, also where it fails."""
        began, before = time.perf_counter(), tokens_paid(self.members[name])
        try:
            yield
        finally:
            self._meters[name].seconds += time.perf_counter() - began
            self._meters[name].paid += tokens_paid(self.members[name]) - before

    def __repr__(self) -> str:
        return f"MultiTeacher({self.members}, route={self.route!r}, mixture={self.mixture!r})"


def _no_common_spans() -> MissingPolicy:
    return MissingPolicy(
        "Several teachers share a prompt, and each cuts a text into spans of its own tokens, so"
        " there is no span whose probabilities could be mixed. Route each prompt to one teacher, or"
        " mix them as ByteTeacher(policy), which tells its distributions in the student's tokens."
    )


def tokens_paid(teacher: Any) -> int:
    """Return how many tokens a teacher's server has charged so far.

    Args:
        teacher: Any teacher.

    Returns:
        Tokens read and written; 0 for a local model.
    """
    text = teacher.text if isinstance(teacher, LogprobServer) else teacher
    return text.service.budget.spent.tokens if isinstance(text, TextServer) else 0


def _mean(values: pd.Series[float], weights: pd.Series[float]) -> float:
    """The weighted mean of the values that are there; NaN for none."""
    there = values.notna() & (weights > 0)
    total = float(weights[there].sum())
    return float((values[there] * weights[there]).sum()) / total if total else math.nan


def _already(graded: Graded) -> Callable[[], Graded]:
    """Make a function that gives grades which are there."""
    return lambda: graded


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Say whose error it is."""
    try:
        yield
    except OpdlabError as error:
        error.args = (f"Teacher {name!r}: {error}", *error.args[1:])
        raise
