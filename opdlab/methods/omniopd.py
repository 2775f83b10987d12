"""OmniOPD: on-policy distillation from a teacher that only writes (arXiv 2606.01476).

    H_t    = - sum_v p(v|y_<t) log p(v|y_<t)                 the chunks start at the M highest, C tokens each, none overlapping
    k_c    = sum_{i=1..N} phi(y_c, teacher's continuation i of x, y_<c)                       phi: text similarity in [0, 1]
    pi_c   = (k_c + alpha exp(mean_{t in c} log p(y_t))) / (N + alpha)                        detached: a weight
    L      = - sum_c pi_c sum_{t in c} log p(y_t)  +  beta sum_{t in no chunk} KL(reference || student)_t

Both sums are divided by one number (the engine's mean over all tokens): means of their own would
shrink the anchor. What the first term trains is the expected similarity to what the teacher would
go on with, by REINFORCE without a baseline, and (its alpha part) the student's own confidence: a
student learns nothing here that it never writes. So look at `similarity` beside the loss, which
falls by self-reinforcement alone.

Confirmed by readers of the paper: the formulas, M, N, C, alpha, beta. Our reading: greedy choice of
chunks, characters as the unit of phi, whole chunks only, temperature 1, one normaliser. Entropy and
log-prob are recomputed from the states that the loss pass sees, over the full vocabulary in
float32: a sampler's own may come from other kernels or another precision, and near-ties then choose
other chunks.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from opdlab.data.alignment import decode_bytes, starts_character, text_of
from opdlab.data.column import Column
from opdlab.data.notes import Chunks
from opdlab.data.seeds import seed_of
from opdlab.engine.batch import Batch
from opdlab.engine.rows import Rows
from opdlab.errors import InvalidValue, OpdlabError
from opdlab.losses.divergences import entropy, forward_kl
from opdlab.methods.similarity import SIMILARITIES, Similarity, checked
from opdlab.support.validation import (
    Finite,
    Flag,
    Seed,
    Temperature,
    Whole,
    validate,
    validate_fields,
)

SELECT, ASK = 4000, 4001  # uses of randomness, see `seed_of`


@dataclass(frozen=True)
class Audit:
    """A chunk of completion `sample`: where it starts, the text before it, its own, and whether the
    completion ends in it.
    """

    sample: int
    start: int
    prefix: str
    text: str
    ends: bool
    size: int
    mean_logp: float = field(repr=False)


@dataclass(frozen=True)
class OmniOPD:
    """Learn from `continuations` (N) texts at each of at most `chunks` (M) places of `length` (C)
    tokens a completion.

    similarity: "edit" (characters), "rouge1" (words), or a function of two texts. select:
        "entropy", or "random" places.
    match_length: cut the teacher's texts to the chunk's number of characters, since C tokens of
        another tokenizer are more or
    less text; where the chunk holds the end of the completion they stay whole. teacher_tokens: how
    long they may be in the teacher's tokens; by default `length`, and with match_length as many as
    the longest chunk has bytes. temperature: the teacher's; 0 makes all N the same. The paper's
    sizes suit 4000-token answers: keep chunks * length at or below a quarter of yours.

    All weights are positive and only their differences teach, so what similarity gives to unlike
    texts is noise in the gradient: where a wrong chunk still scores 0.8, lower the learning rate or
    shorten the chunks. Answers of twenty tokens, measured on the market: OmniOPD(chunks=4,
    continuations=4, length=1, similarity="rouge1", match_length=True).
    """

    chunks: Whole = 10
    continuations: Whole = 10
    length: Whole = 50
    alpha: Finite = 1.0
    beta: Finite = 0.1
    similarity: str | Similarity = "edit"
    select: Literal["entropy", "random"] = "entropy"
    match_length: Flag = False
    teacher_tokens: Whole | None = None
    temperature: Finite = 1.0
    seed: Seed = 0

    needs: ClassVar[tuple[str, ...]] = ("teacher.text", "reference")

    def __post_init__(self) -> None:
        known = isinstance(self.similarity, str) and self.similarity in SIMILARITIES
        if self.select not in ("entropy", "random") or not (callable(self.similarity) or known):
            raise InvalidValue(
                f"OmniOPD got similarity={self.similarity!r}, select={self.select!r}. Use edit,"
                " rouge1 or a function of two texts (a resumed run must be given it again), and"
                " entropy or random."
            )
        validate_fields(self)
        sizes = (
            self.chunks,
            self.continuations,
            self.length,
            1 if self.teacher_tokens is None else self.teacher_tokens,
        )
        if min(sizes) < 1 or min(self.alpha, self.beta, self.temperature) < 0:
            raise InvalidValue(
                f"{self} is not possible. Use at least one of each size, and alpha, beta and"
                " temperature of 0 or more."
            )
        validate("OmniOPD", {"temperature": self.temperature}, {"temperature": Temperature})
        if self.temperature == 0:
            warnings.warn(
                "OmniOPD(temperature=0): a greedy teacher says the same N times, so one vote counts"
                " as N. Use 1.",
                stacklevel=3,
            )

    def plan(self, batch: Batch) -> dict[str, Tensor | Column]:
        audits = self.schedule(batch)
        texts = self.ask(batch, audits)
        similarity = (
            SIMILARITIES[self.similarity] if isinstance(self.similarity, str) else self.similarity
        )
        columns: dict[str, Any] = {
            name: torch.zeros_like(batch.rollout.logp)
            for name in ("audited", "weight", "similarity")
        }
        chunks: list[dict[str, Any]] = []
        for audit, written in zip(audits, texts, strict=True):
            phi = [checked(similarity, audit.text, text) for text in written]
            weight = posterior(
                math.fsum(phi),
                len(phi),
                torch.tensor(audit.mean_logp, dtype=torch.float64),
                self.alpha,
            ).item()
            where = audit.sample, slice(audit.start, audit.start + self.length)
            for name, value in (
                ("audited", 1.0),
                ("weight", weight),
                ("similarity", math.fsum(phi) / len(phi)),
            ):
                columns[name][where] = value
            chunks.append(
                {
                    "sample": audit.sample,
                    "start": audit.start,
                    "length": self.length,
                    "text": audit.text,
                    "continuations": written,
                    "similarity": phi,
                    "prior": math.exp(audit.mean_logp),
                    "weight": weight,
                }
            )
        _warn(chunks)
        batch.notes["chunks"] = Chunks(chunks, facts={"alpha": self.alpha})
        audited = Column(
            columns["audited"].long(),
            "whether the token is in a chunk that was compared with the teacher's texts",
            labels=("anchored", "audited"),
        )
        return columns | {"audited": audited}

    def loss(self, rows: Rows) -> Tensor:
        audit = -rows.weight * rows.logp
        anchor = self.beta * forward_kl(rows.student, rows.reference)  # KL(reference || student)
        return torch.where(rows.audited > 0, audit, anchor)

    def schedule(self, batch: Batch) -> list[Audit]:
        """The chunks of all completions, in order.

        None starts inside a character: the teacher reads text.
        """
        logp, rank = (
            batch.map(fn, needs=("student",))
            for fn in (lambda rows: rows.logp, lambda rows: entropy(rows.student))
        )
        if self.select == "random":
            rank = torch.rand(
                rank.shape,
                generator=torch.Generator().manual_seed(seed_of(self.seed, batch.step, SELECT)),
            )
        tokenizer, out = batch.policies["student"].tokenizer, []
        for b, ids in enumerate(batch.rollout.completions()):
            pieces = decode_bytes(tokenizer, ids)
            free = torch.tensor([starts_character(piece) for piece in pieces], device=rank.device)
            for t in select_chunks(
                rank[b, : len(ids)].masked_fill(~free, -math.inf), self.length, self.chunks
            ):
                end = t + self.length
                said, ends = pieces[t:end], end == len(ids) and batch.rollout.finish[b] == "stop"
                mean = logp[b, t:end].double().mean().item()
                out.append(
                    Audit(b, t, text_of(pieces[:t]), text_of(said), ends, sum(map(len, said)), mean)
                )
        return out

    def ask(self, batch: Batch, audits: Sequence[Audit]) -> list[list[str]]:
        """N texts an audit, all asked for at once.

        Raises OpdlabError for fewer: a text that is missing is no disagreement.
        """
        if not audits:
            return []
        limit = (
            max(a.size for a in audits) + 1 if self.match_length else self.length
        )  # the end of a text is a token too
        prompts, n = [batch.rollout.prompts[a.sample] for a in audits], self.continuations
        texts = batch.policies["teacher.text"].write(
            prompts,
            n,
            prefixes=[a.prefix for a in audits],
            max_new_tokens=self.teacher_tokens or limit,
            temperature=self.temperature,
            seed=seed_of(self.seed, batch.step, ASK),
        )
        counts = [len(row) for row in texts]
        if counts != [n] * len(audits):
            short = next((c for c in counts if c != n), None)
            raise OpdlabError(
                f"Step {batch.step + 1}: the teacher gave"
                f" {'no answer to some chunks' if short is None else f'{short} texts'}, not {n} for"
                f" each of {len(audits)} chunks. Nothing was trained on it: ask a teacher that"
                " gives all n, or lower continuations."
            )
        cut = lambda a, text: text[: len(a.text)] if self.match_length and not a.ends else text
        return [[cut(a, text) for text in row] for a, row in zip(audits, texts, strict=True)]


def select_chunks(entropy: Tensor, chunk: int, limit: int) -> list[int]:
    """Starts of at most `limit` chunks of `chunk` tokens, none overlapping, in order; `entropy
    [T]`.

    The highest entropy that leaves room for a chunk goes first, then the highest that overlaps no
    chosen chunk; of equal ones the earliest. Positions of -inf never start a chunk. A text shorter
    than `chunk` has none.
    """
    chosen: list[int] = []
    values = entropy.tolist()
    for t in sorted(range(len(values) - chunk + 1), key=lambda t: -values[t]):
        if (
            len(chosen) < limit
            and values[t] > -math.inf
            and all(abs(t - other) >= chunk for other in chosen)
        ):
            chosen.append(t)
    return sorted(chosen)


def posterior(k: Tensor | float, n: int, mean_logp: Tensor, alpha: float) -> Tensor:
    """(k + alpha p) / (n + alpha), p = exp(mean_logp):

    `k` fractional matches of `n`, and the student's own prior. Detached.
    """
    return ((k + alpha * mean_logp.exp()) / (n + alpha)).detach()


def _warn(audits: Sequence[dict]) -> None:
    """Say so where the teacher's texts carry no information: all the same, or nothing between a
    miss and a match.
    """
    if not audits:
        return
    if all(len(a["similarity"]) > 1 and len(set(a["continuations"])) == 1 for a in audits):
        warnings.warn(
            f"All continuations of each of the {len(audits)} chunks are the same. Is the teacher"
            " greedy? One vote counts as N: sample it at temperature 1.",
            stacklevel=4,
        )
    if not any(0.05 < math.fsum(a["similarity"]) / len(a["similarity"]) < 0.95 for a in audits):
        warnings.warn(
            f"No chunk of {len(audits)} has a mean similarity between 0.05 and 0.95, so the weights"
            " tell no chunk from another of its kind. Use another similarity, shorter chunks, or a"
            " teacher that samples.",
            stacklevel=4,
        )
