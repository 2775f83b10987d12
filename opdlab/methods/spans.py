"""Distillation from log-probs across tokenizers: both models grade the same bytes of what the
student wrote.

    y     = s_1 s_2 … s_K            the student's text, cut wherever both tokenizers have a boundary (`opdlab.data.alignment`)
    r_k   = log p(s_k | x, before) - log q(s_k | x, before)        all tokens of the span, each model's own; its end is a span too
    A_t   = - r_k                    for every student's token t of s_k; credit="later": - sum_{j >= k} r_j; "all": - sum_j r_j
    L     = - sum_t ratio_t A_t      ratio_t = p(y_t) / sg p(y_t): one, but it carries the gradient

The alignment is that of GOLD and rLLM (by byte offsets); the objective is the sampled reverse KL,
for spans. In expectation

    "all"     the gradient of KL(p || q) over whole texts, whatever the tokenizers: p over the student's token sequences, q over texts
              in the teacher's usual tokenization (what q gives to unusual ones is a constant and
              moves nothing)
    "later"   the same with less variance, where the text so far decides where its spans end (characters, bytes, words)
    "span"    under the same condition the gradient of sum_k KL(p(s_k|before) || q(s_k|before)), the way there held fixed, as OPD's is

With one tokenizer on both sides this is OPD(estimator="sampled"), with "later" at discount 1.
Neglected: q's mass on unusual tokenizations of the same bytes (the student pays for it), texts of
the student's that differ in tokens only (it is paid for writing one text in several ways), and,
where a text was cut off, that its last teacher's token might have been a longer one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from opdlab.data.alignment import Span, decode_bytes, nats_per_byte, one_to_one, spans
from opdlab.data.notes import Alignments
from opdlab.data.prompt import Prompt
from opdlab.data.rollout import Rollout
from opdlab.engine.batch import Batch
from opdlab.engine.rows import Rows
from opdlab.errors import InvalidValue, MissingPolicy, OpdlabError
from opdlab.models.policy import Policy
from opdlab.support.validation import Text, validate

SHOWN = 16  # completions whose alignment is kept in the notes of a step


@dataclass(frozen=True)
class Reading:
    """Completion `sample` of `length` student tokens as the teacher reads it: the text, its ids and
    their bytes, the spans (the end is none of them), and whether the text ends in a way that
    both models can say.
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
        """Token places of every span, ours and theirs; the end is the last."""
        end = [([self.length - 1], [len(self.ids)])] if self.ends else []
        return [(list(s.ours), list(s.theirs)) for s in self.spans] + end


@dataclass(frozen=True)
class SpanOPD:
    """Learn from the log-probs of a teacher that speaks other tokens.

    `credit`: see the module; "span" has the least variance.

    Leaves in the trace: `span` (its number in the text, -1 for a completion that could not be
    aligned), `one_to_one`, `advantage`, `span_kl` (r_k, in equal parts on the student's tokens of
    the span; they sum to log p(y) - log q(y)), and in the notes the share of bytes in 1:1 spans,
    the sampled KL per UTF-8 byte and the spans of some completions. A completion that the teacher's
    tokenizer cannot spell, or with special tokens amid its text, is not trained on, and counted.
    """

    credit: Literal["span", "later", "all"] = "span"

    needs: ClassVar[tuple[str, ...]] = ("teacher.spans",)

    def __post_init__(self) -> None:
        validate("SpanOPD", {"credit": self.credit}, {"credit": Text})
        if self.credit not in ("span", "later", "all"):
            raise InvalidValue(f"SpanOPD got credit={self.credit!r}. Use span, later or all.")

    def plan(self, batch: Batch) -> dict[str, Tensor]:
        readings = _read(batch)
        logp = batch.map(lambda rows: rows.logp, needs=("student",))
        columns = {name: torch.zeros_like(logp) for name in ("advantage", "one_to_one", "span_kl")}
        columns |= {"planned_logp": logp, "span": torch.full_like(logp, -1)}
        shown: list[dict[str, Any]] = []
        for reading, theirs in zip(readings, _teacher_logp(batch, readings), strict=True):
            b = reading.sample
            gap = torch.stack(
                [logp[b, ours].sum() - theirs[other].sum() for ours, other in reading.parts]
            )
            for k, (ours, other) in enumerate(reading.parts):
                columns["advantage"][b, ours] = -_credit(gap, k, self.credit)
                columns["span_kl"][b, ours] = gap[k] / len(ours)
                columns["one_to_one"][b, ours] = float(len(ours) == len(other) == 1)
                columns["span"][b, ours] = k
            if len(shown) < SHOWN:
                shown.append(_shown(reading, gap))
        facts = _summary(batch, readings, columns["span_kl"])
        batch.notes["alignments"] = Alignments(shown, facts=facts)
        return columns

    def loss(self, rows: Rows) -> Tensor:
        ratio = (rows.logp - rows.planned_logp).exp()
        return -ratio * rows.advantage


def _credit(gap: Tensor, k: int, credit: str) -> Tensor:
    """What a token of span `k` answers for."""
    return gap[k] if credit == "span" else gap[k:].sum() if credit == "later" else gap.sum()


def _shown(reading: Reading, gap: Tensor) -> dict[str, Any]:
    """A reading as plain data: the teacher's tokens, and `[start, stop, start, stop]` of every
    span, ours and theirs.
    """
    cuts = [[s.ours.start, s.ours.stop, s.theirs.start, s.theirs.stop] for s in reading.spans]
    teacher = [piece.decode(errors="replace") for piece in reading.pieces]
    return {"sample": reading.sample, "teacher": teacher, "spans": cuts, "kl": gap.tolist()}


def _summary(batch: Batch, readings: Sequence[Reading], span_kl: Tensor) -> dict[str, float]:
    """Share of bytes in 1:1 spans, sampled KL in nats per UTF-8 byte, completions left out."""
    texts = [r.text for r in readings]
    per_byte = nats_per_byte([float(span_kl.sum())], texts) if any(texts) else 0.0
    whole = one_to_one(s for r in readings for s in r.spans)
    return {
        "one_to_one": whole,
        "nats_per_byte": per_byte,
        "left_out": len(batch.rollout) - len(readings),
    }


def _read(batch: Batch) -> list[Reading]:
    """The completions that the teacher's tokenizer spells byte for byte; raises OpdlabError where
    there is none.
    """
    student, teacher = batch.policies["student"], batch.policies["teacher.spans"]
    if not hasattr(teacher, "tokenizer"):
        raise MissingPolicy(
            f"SpanOPD reads the text in the teacher's own tokens, but {type(teacher).__name__} has"
            " no tokenizer here. Load the teacher with Policy.load(…), or use OmniOPD."
        )
    out = []
    for b, ids in enumerate(batch.rollout.completions()):
        ended = bool(ids) and batch.rollout.finish[b] == "stop" and ids[-1] in _ends(student)
        mine = decode_bytes(student.tokenizer, ids[: len(ids) - ended])
        if not all(mine):  # a special token amid the text: the teacher cannot be asked about it
            continue
        try:
            text = b"".join(mine).decode()
            theirs = (
                list(
                    teacher.tokenizer(text, add_special_tokens=False, split_special_tokens=True)[
                        "input_ids"
                    ]
                )
                if text
                else []
            )
            pieces = decode_bytes(teacher.tokenizer, theirs)
            out.append(
                Reading(
                    b,
                    len(ids),
                    text,
                    theirs,
                    pieces,
                    spans(mine, pieces),
                    ended and bool(_ends(teacher)),
                )
            )
        except (
            UnicodeDecodeError,
            OpdlabError,
        ):  # no text in UTF-8, or one with characters that the teacher lacks
            continue
    out = [reading for reading in out if reading.parts]
    if not out:
        raise OpdlabError(
            f"Step {batch.step + 1}: the teacher's tokenizer spells none of the"
            f" {len(batch.rollout)} completions as they were written, as"
            f" {batch.rollout.texts[0][:60]!r}. Use a teacher that knows these characters, or"
            " OmniOPD."
        )
    return out


def _teacher_logp(batch: Batch, readings: Sequence[Reading]) -> list[Tensor]:
    """Log-probs of each text's teacher tokens, and of the end where it ends (by any of the tokens
    that end the teacher's texts).
    """
    teacher = batch.policies["teacher.spans"]
    stops = sorted(_ends(teacher))
    bodies = [r.ids + stops[:1] * r.ends for r in readings]
    rollout = _rollout([batch.rollout.prompts[r.sample] for r in readings], bodies, batch.rollout)
    asked = Batch(rollout, {"student": teacher})
    logp, end = (
        asked.map(lambda rows: rows.logp),
        asked.map(lambda rows: rows.student[:, stops].logsumexp(-1)) if stops else None,
    )
    out = []
    for i, reading in enumerate(readings):
        own = logp[i, : len(bodies[i])].to(batch.rollout.logp)
        if reading.ends and end is not None:
            own[-1] = end[i, len(bodies[i]) - 1]
        out.append(own)
    return out


def _ends(policy: Any) -> frozenset[int]:
    """The tokens that end a policy's texts."""
    if isinstance(policy, Policy):
        return policy.weights.eos
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
