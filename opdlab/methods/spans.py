"""Distillation from log-probs across tokenizers: both models grade the same bytes of a text.

    y     = s_1 s_2 … s_K        the student's text, cut wherever both tokenizers have a boundary
    r_k   = log p(s_k | x, before) - log q(s_k | x, before)
    A_t   = - r_k                for every token t of the student in s_k
    L     = - sum_t ratio_t A_t,         ratio_t = p(y_t) / sg p(y_t): one, with the gradient

r_k sums over all tokens of the span, each model's own; the end of the text is a span too. With
credit="later" A_t is - sum_{j >= k} r_j, with credit="all" - sum_j r_j. The alignment is that of
GOLD and rLLM (by byte offsets, `opdlab.data.alignment`); the objective is the sampled reverse KL,
for spans. In expectation

    "all"    is the gradient of KL(p || q) over whole texts, whatever the tokenizers: p over the
             student's token sequences, q over texts in the teacher's usual tokenization (what q
             gives to unusual ones is a constant and moves nothing)
    "later"  is the same with less variance, where the text so far decides where its spans end
             (characters, bytes, words)
    "span"   is, under the same condition, the gradient of sum_k KL(p(s_k|before) || q(s_k|before))
             with the way there held fixed, as in OPD

With one tokenizer on both sides this is OPD(estimator="sampled"), with "later" at discount 1.
Neglected: q's mass on unusual tokenizations of the same bytes (the student pays for it), texts of
the student that differ in tokens only (it is paid for writing one text in several ways), and, where
a text was cut off, that its last teacher's token might have been a longer one.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from opdlab.data.alignment import Span, decode_bytes, spans
from opdlab.data.column import Column, Kind
from opdlab.data.notes import Alignments
from opdlab.data.prompt import Prompt
from opdlab.data.rollout import Rollout
from opdlab.engine.batch import Batch
from opdlab.engine.rows import Rows
from opdlab.errors import InvalidValue, MissingPolicy, OpdlabError
from opdlab.methods.policy_gradient import (
    advantage_column,
    policy_gradient_loss,
    sampler_column,
)
from opdlab.models.policy import as_policy
from opdlab.models.protocols import SoleTeachers
from opdlab.support.validation import Text, validate

SHOWN = 16  # completions whose alignment is kept in the notes of a step


@runtime_checkable
class Reader(Protocol):
    """A teacher that reads texts in tokens of its own."""

    @property
    def tokenizer(self) -> Any:
        """Cuts a text into the teacher's tokens."""
        ...


@dataclass(frozen=True)
class Reading:
    """A completion as the teacher reads it.

    Attributes:
        sample: Number of the completion.
        length: Its student's tokens.
        text: Its text.
        ids: The teacher's ids of the text.
        pieces: The bytes of these.
        spans: The spans, without the end.
        ends: Whether the text ends in a way that both models can say.
    """

    sample: int
    length: int
    text: str
    ids: list[int]
    pieces: list[bytes]
    spans: list[Span]
    ends: bool

    @property
    def parts(self) -> list[tuple[list[int], list[int]]]:
        """Token places of every span, student's and teacher's; the end is the last."""
        end = [([self.length - 1], [len(self.ids)])] if self.ends else []
        return [(list(s.ours), list(s.theirs)) for s in self.spans] + end


@dataclass(frozen=True)
class SpanOPD:
    """Learn from the log-probs of a teacher with another tokenizer.

    Of several teachers (`MultiTeacher`) each reads the completions of its own prompts in its own
    tokens. A mixture of teachers for one prompt is refused: their tokens cut a text into different
    spans, so there is no span whose probabilities could be mixed.

    A completion that the teacher's tokenizer cannot spell, or with special tokens amid its text, is
    not trained on, and counted. The notes hold the share of bytes in 1:1 spans, the sampled KL per
    UTF-8 byte and the spans of some completions.

    Attributes:
        credit: The spans that a token answers for: "span", its own (least variance), "later", its
            own and those after, or "all".

    Raises:
        InvalidValue: There is no such credit.
    """

    credit: Literal["span", "later", "all"] = "span"

    needs: ClassVar[tuple[str, ...]] = ("teacher.spans",)

    def __post_init__(self) -> None:
        validate("SpanOPD", {"credit": self.credit}, {"credit": Text})
        if self.credit not in ("span", "later", "all"):
            raise InvalidValue(f"SpanOPD got credit={self.credit!r}. Use span, later or all.")

    def plan(self, batch: Batch) -> dict[str, Column]:
        """Align the tokens of student and teacher, and compute the advantage of each span.

        Args:
            batch: The step's rollout under all policies.

        Returns:
            `advantage` (nats), `span_kl` (nats), `span`, `one_to_one` and `sampler_logp` (nats),
            `[B, T]` each. `span_kl` is r_k in equal parts on the student's tokens of the span; over
            a completion it sums to log p(y) - log q(y). `span` is -1 where a completion could not
            be aligned.

        Raises:
            OpdlabError: The teacher's tokenizer spells none of the completions.
            MissingPolicy: The teacher has no tokenizer.
        """
        teachers = _teachers(batch)
        readings = _read(batch, teachers)
        logp = batch.map(lambda rows: rows.logp, needs=("student",))
        advantage, one_to_one, span_kl = (torch.zeros_like(logp) for _ in range(3))
        number = torch.full_like(logp, -1)
        kept: list[dict[str, Any]] = []
        is_read = torch.zeros_like(batch.mask)
        is_read[[reading.sample for reading in readings], 0] = True
        place = batch.number(is_read)[:, 0].tolist()  # of each text among those of all processes
        for reading, theirs in zip(readings, _teacher_logp(batch, readings, teachers), strict=True):
            b = reading.sample
            r = torch.stack(
                [logp[b, ours].sum() - theirs[other].sum() for ours, other in reading.parts]
            )
            for k, (ours, other) in enumerate(reading.parts):
                advantage[b, ours] = -_credit(r, k, self.credit)
                span_kl[b, ours] = r[k] / len(ours)
                one_to_one[b, ours] = float(len(ours) == len(other) == 1)
                number[b, ours] = k
            if place[b] < SHOWN:
                kept.append(_describe(reading, r))
        facts = _summarize(batch, readings, span_kl)
        batch.notes["alignments"] = Alignments(kept, facts=facts)
        formula = "log q − log p of the span" + _CREDITS[self.credit]
        return {
            "advantage": advantage_column(advantage, formula),
            "span_kl": Column(
                span_kl,
                "log p − log q of the span, in equal parts on its tokens",
                unit="nats",
                kind=Kind.SIGNED,
                compares=("teacher.spans", "student"),
                less="teacher wants it more",
                more="student wants it more",
            ),
            "span": Column(number, "number of the span in the text, −1 for a text left out"),
            "one_to_one": Column(
                one_to_one, "whether the span is one token for both models", kind=Kind.FLAG
            ),
            "sampler_logp": sampler_column(logp),
        }

    def loss(self, rows: Rows) -> Tensor:
        """Compute the policy-gradient loss -ratio A.

        Args:
            rows: A chunk of `n` tokens, with the columns `advantage` and `sampler_logp`.

        Returns:
            `[n]`.
        """
        return policy_gradient_loss(rows)


_CREDITS = {"span": "", "later": " and of those after", "all": "s of the whole text"}


def _credit(r: Tensor, k: int, credit: str) -> Tensor:
    """The sum of the log-ratios that a token of span `k` answers for."""
    if credit == "span":
        return r[k]
    return r[k:].sum() if credit == "later" else r.sum()


def _describe(reading: Reading, r: Tensor) -> dict[str, Any]:
    """A reading as plain data; a span is `[start, stop, start, stop]`, student's and teacher's."""
    cuts = [[s.ours.start, s.ours.stop, s.theirs.start, s.theirs.stop] for s in reading.spans]
    teacher = [piece.decode(errors="replace") for piece in reading.pieces]
    return {"sample": reading.sample, "teacher": teacher, "spans": cuts, "kl": r.tolist()}


def _summarize(batch: Batch, readings: Sequence[Reading], span_kl: Tensor) -> dict[str, float]:
    """Share of bytes in 1:1 spans, sampled KL in nats per UTF-8 byte, completions left out.

    Over all processes.
    """
    size = sum(len(reading.text.encode()) for reading in readings)
    found = [span for reading in readings for span in reading.spans]
    local = [
        size,
        float(span_kl.double().sum()),
        sum(span.size for span in found),
        sum(span.size for span in found if span.single),
        len(batch.rollout) - len(readings),
    ]
    everyone = batch.sum(torch.tensor(local, dtype=torch.float64, device=span_kl.device))
    size, kl, spanned, single, left_out = everyone.tolist()
    return {
        "one_to_one": single / spanned if spanned else 1.0,
        "nats_per_byte": kl / size if size else 0.0,
        "left_out": int(left_out),
    }


def _teachers(batch: Batch) -> list[tuple[str, Any]]:
    """The teacher of each completion, with its name; "" where all have the same.

    Raises MissingPolicy where one has no tokenizer here.
    """
    prompts, teacher = batch.rollout.prompts, batch.policies["teacher.spans"]
    if isinstance(teacher, SoleTeachers):
        found = [teacher.sole_teacher(prompt) for prompt in prompts]
    else:
        found = [("", teacher)] * len(prompts)
    for _, one in found:
        if not isinstance(one, Reader):
            raise MissingPolicy(
                f"SpanOPD reads the text in the teacher's own tokens, but {type(one).__name__} has"
                " no tokenizer here. Load the teacher with Policy.load(…), or use OmniOPD."
            )
    return found


def _read(batch: Batch, teachers: Sequence[tuple[str, Any]]) -> list[Reading]:
    """The completions that their teacher's tokenizer spells byte for byte.

    Raises OpdlabError where there is none.
    """
    student = batch.policies["student"]
    readings = [_read_one(batch, b, student, teacher) for b, (_, teacher) in enumerate(teachers)]
    out = [reading for reading in readings if reading is not None and reading.parts]
    spelled, asked = batch.sum(batch.row.new_tensor([len(out), len(readings)])).tolist()
    if not spelled:  # in any process
        raise OpdlabError(
            f"Step {batch.step + 1}: the teacher's tokenizer spells none of the"
            f" {asked} completions as they were written, as"
            f" {batch.rollout.texts[0][:60]!r}. Use a teacher that knows these characters, or"
            " OmniOPD."
        )
    return out


def _read_one(batch: Batch, b: int, student: Any, teacher: Any) -> Reading | None:
    """One completion as the teacher reads it; None where it cannot be asked about it."""
    length = int(batch.rollout.lengths[b])
    ids = batch.rollout.ids[b, :length].tolist()
    ended = bool(ids) and batch.rollout.finish[b] == "stop" and ids[-1] in _ends(student)
    mine = decode_bytes(student.tokenizer, ids[: length - ended])
    if not all(mine):  # a special token amid the text
        return None
    try:
        text = b"".join(mine).decode()
        theirs: list[int] = []
        if text:
            theirs = list(
                teacher.tokenizer(text, add_special_tokens=False, split_special_tokens=True)[
                    "input_ids"
                ]
            )
        pieces = decode_bytes(teacher.tokenizer, theirs)
        aligned = spans(mine, pieces)
    except (UnicodeDecodeError, OpdlabError):
        # The bytes are no text in UTF-8, or hold characters that the teacher's tokenizer lacks.
        return None
    return Reading(b, length, text, theirs, pieces, aligned, ended and bool(_ends(teacher)))


def _teacher_logp(
    batch: Batch, readings: Sequence[Reading], teachers: Sequence[tuple[str, Any]]
) -> list[Tensor]:
    """Log-probs of each text in its teacher's tokens, and of its end; each teacher reads its own.

    Empty where another process has all readings.
    """
    group = batch.policies["teacher.spans"]
    found: dict[int, Tensor] = {}
    for name in dict.fromkeys(teachers[reading.sample][0] for reading in readings):
        own = [reading for reading in readings if teachers[reading.sample][0] == name]
        policy = teachers[own[0].sample][1]
        with group.charging(name) if isinstance(group, SoleTeachers) else nullcontext():
            graded = _logp_of_one(batch, own, policy)
        found |= {reading.sample: logp for reading, logp in zip(own, graded, strict=True)}
    return [found[reading.sample] for reading in readings]


def _logp_of_one(batch: Batch, readings: Sequence[Reading], teacher: Any) -> list[Tensor]:
    """Log-probs of texts in one teacher's tokens, and of their end.

    Any of the tokens that end the teacher's texts will do.
    """
    stops = sorted(_ends(teacher))
    bodies = [r.ids + stops[:1] * r.ends for r in readings]
    rollout = _rollout([batch.rollout.prompts[r.sample] for r in readings], bodies, batch.rollout)
    asked = Batch(rollout, {"student": teacher})
    logp = asked.map(lambda rows: rows.logp)
    end = asked.map(lambda rows: rows.student[:, stops].logsumexp(-1)) if stops else None
    out = []
    for i, reading in enumerate(readings):
        own = logp[i, : len(bodies[i])].to(batch.rollout.logp)
        if reading.ends and end is not None:
            own[-1] = end[i, len(bodies[i]) - 1]
        out.append(own)
    return out


def _ends(policy: Any) -> frozenset[int]:
    """The tokens that end a policy's texts."""
    local = as_policy(policy)
    if local is not None:
        return local.weights.eos
    return frozenset([policy.tokenizer.eos_token_id]) - {None}


def _rollout(prompts: Sequence[Prompt], bodies: Sequence[list[int]], like: Rollout) -> Rollout:
    """Token ids as a rollout: what a policy grades."""
    width = max(1, *map(len, bodies))
    ids = torch.tensor(
        [body + [0] * (width - len(body)) for body in bodies], device=like.ids.device
    )
    none = torch.zeros(ids.shape, dtype=like.logp.dtype, device=ids.device)
    lengths = torch.tensor([len(body) for body in bodies], device=ids.device)
    n = len(bodies)
    return Rollout(
        tuple(prompts), ids, lengths, none, none.clone(), ("stop",) * n, ("",) * n, ("student",) * n
    )
