"""OmniOPD: on-policy distillation from a teacher that only writes (arXiv 2606.01476).

    H_t  = - sum_v p(v|y_<t) log p(v|y_<t)        M chunks of C tokens start where it is highest
    k_c  = sum_{i=1..N} φ(y_c, teacher's continuation i of x, y_<c)      φ: similarity in [0, 1]
    π_c  = (k_c + α exp(mean_{t in c} log p(y_t))) / (N + α)             detached: a weight
    L    = - sum_c π_c sum_{t in c} log p(y_t)  +  β sum_{t in no chunk} KL(reference || student)_t

Chunks do not overlap. Both sums are divided by one number (the engine's mean over all tokens):
means of their own would shrink the anchor. The first term trains the expected similarity to the
teacher's continuations, by REINFORCE without a baseline, and (its α part) the student's own
confidence. A student learns nothing here that it never writes, so look at `similarity` beside the
loss, which falls by self-reinforcement alone.

Readers of the paper confirm the formulas, M, N, C, α and β. Our reading: greedy choice of chunks,
characters as the unit of φ, whole chunks only, temperature 1, one normaliser. Entropy and log-prob
are recomputed from the states that the loss pass sees, over the full vocabulary in float32: a
sampler's own may come from other kernels or another precision, and near-ties then choose other
chunks.
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
from opdlab.data.column import Column, Kind
from opdlab.data.conversation import before_turn
from opdlab.data.notes import Chunks
from opdlab.data.prompt import Prompt
from opdlab.data.seeds import seed_of
from opdlab.engine.batch import Batch
from opdlab.engine.rows import Rows
from opdlab.errors import InvalidValue, OpdlabError
from opdlab.losses import entropy, forward_kl
from opdlab.methods.similarity import SIMILARITIES, Similarity, measure
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
    """A chunk that is compared with the teacher's texts.

    Attributes:
        sample: Number of the completion.
        start: Its first token.
        prompt: What the teacher is asked: the prompt, with the turns before the chunk's.
        prefix: The text before it in its turn.
        text: Its text.
        ends: Whether its turn ends in it.
        size: Its bytes.
        mean_logp: Mean log-prob of its tokens under the student, in nats.
    """

    sample: int
    start: int
    prompt: Prompt
    prefix: str
    text: str
    ends: bool
    size: int
    mean_logp: float = field(repr=False)


@dataclass(frozen=True)
class OmniOPD:
    """Learn from the teacher's continuations at the most uncertain places of a completion.

    All weights are positive and only their differences teach, so the similarity of unlike texts is
    noise in the gradient: where a wrong chunk still scores 0.8, lower the learning rate or shorten
    the chunks. The paper's sizes suit answers of 4000 tokens: keep chunks * length at or below a
    quarter of yours. For answers of twenty tokens, measured on the market: OmniOPD(chunks=4,
    continuations=4, length=1, similarity="rouge1", match_length=True).

    Attributes:
        chunks: M, the most chunks of a completion.
        continuations: N, the teacher's texts for each chunk.
        length: C, tokens of a chunk.
        alpha: α, the weight of the student's own prior.
        beta: β, the weight of the anchor.
        similarity: φ: "edit" (characters), "rouge1" (words), or a function of two texts.
        select: The rule for the starts of chunks: the highest "entropy", or "random" places.
        match_length: Cut the teacher's texts to the chunk's number of characters, since C tokens of
            another tokenizer are more or less text. Texts stay whole where the chunk holds the end
            of the completion.
        teacher_tokens: The most tokens of a text, in the teacher's tokens. None is `length`, or,
            with match_length, as many as the longest chunk has bytes.
        temperature: The teacher's; 0 makes all N the same.
        seed: Seed of random places and of the teacher's texts.

    Raises:
        InvalidValue: A value is out of its range.
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

    def plan(self, batch: Batch) -> dict[str, Column]:
        """Ask the teacher for texts, and compare the student's chunks with them.

        Args:
            batch: The step's rollout under all policies.

        Returns:
            `audited` (1 in chunks), `weight` and `similarity` (of the chunk, 0 elsewhere), `[B, T]`
            each.

        Raises:
            OpdlabError: The teacher gave fewer texts than asked for.
        """
        audits = self.schedule(batch)
        texts = self.ask(batch, audits)
        similarity = self.similarity
        if isinstance(similarity, str):
            similarity = SIMILARITIES[similarity]
        audited, weights, similarities = (torch.zeros_like(batch.rollout.logp) for _ in range(3))
        chunks: list[dict[str, Any]] = []
        for audit, written in zip(audits, texts, strict=True):
            phi = [measure(similarity, audit.text, text) for text in written]
            mean_logp = torch.tensor(audit.mean_logp, dtype=torch.float64)
            weight = posterior(math.fsum(phi), len(phi), mean_logp, self.alpha).item()
            where = audit.sample, slice(audit.start, audit.start + self.length)
            audited[where] = 1.0
            weights[where] = weight
            similarities[where] = math.fsum(phi) / len(phi)
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
        _warn(batch, chunks)
        batch.notes["chunks"] = Chunks(chunks, facts={"alpha": self.alpha})
        return {
            "audited": Column(
                audited.long(),
                "whether the token is in a chunk that was compared with the teacher's texts",
                labels=("anchored", "audited"),
            ),
            "weight": Column(
                weights,
                "(k + α p) / (N + α) of the chunk, the weight of its log-probs",
                kind=Kind.AMOUNT,
                less="reinforced little",
                more="reinforced much",
            ),
            "similarity": Column(
                similarities,
                "mean similarity of the chunk to the teacher's texts",
                kind=Kind.AMOUNT,
                less="nothing in common",
                more="equal",
            ),
        }

    def loss(self, rows: Rows) -> Tensor:
        """Compute the weighted cross-entropy in chunks and the anchor elsewhere.

        Args:
            rows: A chunk of `n` tokens, with the columns `audited` and `weight`.

        Returns:
            `[n]`, in nats.
        """
        audit = -rows.weight * rows.logp
        anchor = self.beta * forward_kl(rows.student, rows.reference)  # KL(reference || student)
        return torch.where(rows.audited > 0, audit, anchor)

    def schedule(self, batch: Batch) -> list[Audit]:
        """Choose the chunks of all completions, in order.

        No chunk starts inside a character, since the teacher reads text, and none crosses the end
        of a turn.

        Args:
            batch: The step's rollout under all policies.

        Returns:
            The chunks, completion by completion.
        """
        logp = batch.map(lambda rows: rows.logp, needs=("student",))
        rank = batch.map(lambda rows: entropy(rows.student), needs=("student",))
        if self.select == "random":
            rank = batch.random(seed_of(self.seed, batch.step, SELECT))
        tokenizer = batch.policies["student"].tokenizer
        left, turn = batch.rollout.left_in_turn.tolist(), batch.rollout.turn.tolist()
        out: list[Audit] = []
        for b, ids in enumerate(batch.rollout.completions()):
            pieces = decode_bytes(tokenizer, ids)
            fits = [
                starts_character(piece) and left[b][t] >= self.length
                for t, piece in enumerate(pieces)
            ]
            free = torch.tensor(fits, dtype=torch.bool, device=rank.device)
            allowed = rank[b, : len(ids)].masked_fill(~free, -math.inf)
            for t in select_chunks(allowed, self.length, self.chunks):
                end = t + self.length
                chunk = pieces[t:end]
                text, number = batch.rollout.texts[b], turn[b][t]
                first = next(i for i in range(len(ids)) if turn[b][i] == number)
                is_last = end == len(ids)
                audit = Audit(
                    sample=b,
                    start=t,
                    prompt=before_turn(batch.rollout.prompts[b], text, number),
                    prefix=text_of(pieces[first:t]),
                    text=text_of(chunk),
                    ends=left[b][t] == self.length
                    and (not is_last or batch.rollout.finish[b] == "stop"),
                    size=sum(map(len, chunk)),
                    mean_logp=logp[b, t:end].double().mean().item(),
                )
                out.append(audit)
        return out

    def ask(self, batch: Batch, audits: Sequence[Audit]) -> list[list[str]]:
        """Ask the teacher for N texts per chunk, all at once.

        Args:
            batch: The step's rollout under all policies.
            audits: The chunks.

        Returns:
            For each chunk N texts; with `match_length` cut to its characters unless the completion
            ends there.

        Raises:
            OpdlabError: There are fewer; a text that is missing is no disagreement.
        """
        limit = self.length
        if self.match_length:
            # Over all processes; the end of a text is a token too.
            limit = batch.largest(max((audit.size for audit in audits), default=0)) + 1
        prompts = [audit.prompt for audit in audits]
        n = self.continuations
        texts = batch.write(
            "teacher.text",
            prompts,
            n,
            [audit.sample for audit in audits],
            prefixes=[audit.prefix for audit in audits],
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
        return [self._cut(row, audit) for audit, row in zip(audits, texts, strict=True)]

    def _cut(self, texts: Sequence[str], audit: Audit) -> list[str]:
        """The teacher's texts as they are compared with a chunk."""
        if self.match_length and not audit.ends:
            return [text[: len(audit.text)] for text in texts]
        return list(texts)


def select_chunks(entropy: Tensor, chunk: int, limit: int) -> list[int]:
    """Choose the starts of chunks that do not overlap.

    The highest entropy that leaves room for a chunk goes first, then the highest that overlaps no
    chosen chunk; of equal ones the earliest. A text shorter than `chunk` has none.

    Args:
        entropy: `[T]`; positions of -inf never start a chunk.
        chunk: Tokens of a chunk.
        limit: The most chunks.

    Returns:
        The starts, in order.
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
    """Compute (k + alpha p) / (n + alpha) with p = exp(mean_logp), without gradient.

    Args:
        k: Fractional matches.
        n: Texts of which they are.
        mean_logp: Mean log-prob of the chunk's tokens under the student, in nats.
        alpha: The weight of the student's prior p.

    Returns:
        The weight of the chunk, in the shape of `mean_logp`.
    """
    return ((k + alpha * mean_logp.exp()) / (n + alpha)).detach()


def _warn(batch: Batch, audits: Sequence[dict[str, Any]]) -> None:
    """Warn where the teacher's texts carry no information, in any process.

    They do not if they are all the same, or if there is nothing between a miss and a match.
    """
    same = sum(len(a["similarity"]) > 1 and len(set(a["continuations"])) == 1 for a in audits)
    telling = sum(0.05 < math.fsum(a["similarity"]) / len(a["similarity"]) < 0.95 for a in audits)
    counts = batch.row.new_tensor([len(audits), same, telling])
    total, same, telling = batch.sum(counts).tolist()
    if not total:
        return
    if same == total:
        warnings.warn(
            f"All continuations of each of the {total} chunks are the same. Is the teacher"
            " greedy? One vote counts as N: sample it at temperature 1.",
            stacklevel=4,
        )
    if not telling:
        warnings.warn(
            f"No chunk of {total} has a mean similarity between 0.05 and 0.95, so the weights"
            " tell no chunk from another of its kind. Use another similarity, shorter chunks, or a"
            " teacher that samples.",
            stacklevel=4,
        )
