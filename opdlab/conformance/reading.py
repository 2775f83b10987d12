"""Read what a loss trains, exactly: its gradient at every token and prefix of a toy world.

Each token is a text of its own here, so masks and normalisers play no part. Probabilities of
prefixes and tokens come from the tables. The comparison with known divergences is that of
`opdlab.audit`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from opdlab import exact
from opdlab.audit.auditing import describe, find_estimate, find_value
from opdlab.audit.kl import Estimate
from opdlab.audit.references import Comparison, Match, Value, matches
from opdlab.audit.subject import Observation, Subject
from opdlab.conformance.calling import Caller
from opdlab.conformance.texts import Texts, every_prefix, make_pair

WORTH = 1e-5  # relative difference from which two gradients count as different


@dataclass(frozen=True, eq=False)
class Reading:
    """A loss on every token of two tables.

    Attributes:
        name: The loss.
        student: The student.
        teacher: The teacher.
        writer: Who wrote the texts, "student" or "teacher".
        value: The loss of each token after each prefix, `[X, S, V]`.
        slope: Its gradient in the logits of the prefix, `[X, S, V, V]` (token, logit).
    """

    name: str
    student: exact.Table
    teacher: exact.Table
    writer: str
    value: Tensor
    slope: Tensor

    @property
    def tables(self) -> dict[str, exact.Table]:
        """Both policies by name."""
        return {"student": self.student, "teacher": self.teacher}

    @property
    def visits(self) -> Tensor | None:
        """Frequency of each prefix in the teacher's texts; None where the student writes."""
        return None if self.writer == "student" else exact.visits(self.teacher)

    @property
    def chance(self) -> Tensor:
        """Probability of each token after its prefix, by who writes, `[X, S, V]`."""
        return self.tables[self.writer].logp.exp()

    @property
    def each(self) -> Tensor:
        """The expected gradient at each prefix, however often it is visited, `[X, S, V]`."""
        return torch.einsum("xst,xstv->xsv", self.chance, self.slope)

    @property
    def score(self) -> Tensor:
        """Gradient of the log-prob of each token after each prefix, `[X, S, V, V]`."""
        p = self.student.logp.exp()
        return torch.eye(p.shape[-1], dtype=p.dtype) - p[..., None, :]

    @cached_property
    def credit(self) -> Tensor:
        """The number that multiplies the score of each token, `[X, S, V]`; NaN where none does."""
        score = self.score
        found = (self.slope * score).sum(-1) / (score * score).sum(-1)
        rest = (self.slope - found[..., None] * score).norm(dim=-1)
        least = WORTH * self.slope.norm(dim=-1) + 1e-12
        return torch.where(rest <= least, found, torch.nan)

    @property
    def subject(self) -> Subject:
        """The loss as `opdlab.audit` names it."""
        texts = "on the teacher's texts" if self.writer == "teacher" else ""
        return Subject(None, self.name, ("teacher",), self.writer, self.student.length, texts)

    @cached_property
    def seen(self) -> Observation:
        """The same as an observation of `opdlab.audit`, over all tokens of all texts."""
        by = self.tables[self.writer]
        rollout = exact.everything(by.prompts, by.vocab, by.length, by=by)
        law = exact.law(by, rollout).repeat_interleave(rollout.lengths)
        prompt, prefix = by.where(rollout)
        token = rollout.ids[rollout.mask]
        losses = self.value[prompt, prefix, token]
        slopes = self.slope[prompt, prefix, token]
        rms = (law * slopes.square().sum(-1)).sum().sqrt().item()
        gradient = torch.zeros_like(self.student.logits).index_put_(
            (prompt, prefix), law[:, None] * slopes, accumulate=True
        )
        mean = (self.chance * self.value).sum(-1)
        return Observation(gradient, rms, mean, losses, law[:, None] * slopes)

    @cached_property
    def matches(self) -> list[Match]:
        """Comparisons with all known divergences, the closest first."""
        return matches(self.seen.gradient, self.student, {"teacher": self.teacher}, self.visits)

    @cached_property
    def estimate(self) -> Estimate | None:
        """The estimate of the KL that the loss is, or None."""
        if bool(torch.isnan(self.credit).any()):
            return None  # an estimate pushes the sampled token alone
        return find_estimate(self.seen, self.subject, self.tables)

    @cached_property
    def reads_as(self) -> str | None:
        """Name of the divergence that the loss's mean value is, or None."""
        return find_value(self.seen, self.subject, self.tables, rtol=1e-4)

    @property
    def trains(self) -> str | None:
        """Name of the divergence whose gradient it is, or None."""
        best = self.matches[0]
        return best.divergence if best.exact and best.cosine > 0 and not self.is_zero else None

    @property
    def is_zero(self) -> bool:
        """Tell whether the expected gradient is zero but for rounding."""
        return self.seen.length <= max(1e-6 * self.seen.rms, 1e-12)

    @property
    def verdict(self) -> str:
        """Say in a sentence what the loss trains."""
        return describe(self.subject, self.seen, self.matches[0], self.estimate)

    @property
    def noise(self) -> float:
        """Root mean square length of a token's deviation from the mean of its prefix, relative.

        Relative to the root mean square of these means.
        """
        mean = self.each
        away = (self.slope - mean[..., None, :]).square().sum(-1)
        visits = exact.visits(self.tables[self.writer])
        noise = (visits * (self.chance * away).sum(-1)).sum().sqrt()
        length = (visits * mean.square().sum(-1)).sum().sqrt()
        return float(noise / length) if length > 0 else float("inf")

    def match(self, divergence: Value, name: str = "", label: str = "") -> Match:
        """Compare the gradient with that of a divergence, at the prefixes or over whole texts.

        Args:
            divergence: Takes log-probs `[..., V]` of student and teacher and gives `[...]`.
            name: Its name.
            label: Its name in sentences.

        Returns:
            The closer of the two comparisons.
        """
        credits = ("token", "text") if self.visits is None else ("token",)
        found = [
            Comparison(
                self.seen.gradient, self.student, "teacher", self.teacher, credit, self.visits
            ).match(divergence, name, label)
            for credit in credits
        ]
        return max(found, key=lambda match: (match.exact, match.credit == "token", match.cosine))

    def heated(self, temperature: float) -> Reading:
        """Return the reading where student and teacher are these at a temperature.

        Args:
            temperature: Of the softmaxes, with which the tokens are sampled too.

        Returns:
            The same gradients, in logits that are divided by the temperature.
        """
        tables = [
            replace(table, logits=table.logits / temperature)
            for table in (self.student, self.teacher)
        ]
        return replace(self, student=tables[0], teacher=tables[1], slope=self.slope * temperature)

    def slope_of(self, divergence: Value) -> Tensor:
        """Compute the gradient of a divergence at each prefix.

        Args:
            divergence: Takes log-probs `[..., V]` of student and teacher and gives `[...]`.

        Returns:
            `[X, S, V]`.
        """
        leaf = self.student.logits.clone().requires_grad_()
        total = divergence(leaf.log_softmax(-1), self.teacher.logp).sum()
        return torch.autograd.grad(total, leaf)[0]


def read(
    caller: Caller,
    name: str,
    *,
    seed: int = 0,
    apart: float | None = None,
    gradient_only: bool = False,
    **values: float,
) -> Reading:
    """Call a loss on every token after every prefix of a world.

    Args:
        caller: The loss.
        name: Its name.
        seed: Seed of the world.
        apart: As in `make_pair`.
        gradient_only: Whether the value of each token may be left at NaN. One call then does for
            all tokens, unless the loss lets them depend on each other.
        values: The temperature, or the divergence's parameter, by name.

    Returns:
        The reading.
    """
    spec = caller.spec
    student, teacher = make_pair(spec.vocab, seed, apart=apart)
    shape = (*student.logits.shape, student.vocab)
    texts = every_prefix(student, teacher)
    if not spec.reads_tokens:  # one token stands for all that could follow
        texts = texts.part(slice(None, None, student.vocab))
    slopes = _in_one_call(caller, texts, values) if gradient_only else None
    value = torch.full((len(texts.ids),), torch.nan, dtype=torch.float64)
    if slopes is None:
        seen = [caller(texts.part(slice(i, i + 1)), values=values) for i in range(len(texts.ids))]
        value = torch.stack([one.value.sum().double() for one in seen])
        slopes = torch.stack([one.gradient[0, 0].double() for one in seen])
    wide = (*shape[:2], -1)
    return Reading(
        name,
        student,
        teacher,
        spec.writer,
        value.view(*wide).expand(shape[:3]),
        slopes.view(*wide, student.vocab).expand(shape),
    )


def _in_one_call(caller: Caller, texts: Texts, values: Mapping[str, float]) -> Tensor | None:
    """Gradients `[n, V]` of texts of one token in one batch, scaled as if each were alone.

    None if some of them, called alone, have another direction or scale.
    """
    whole = caller(texts, values=values).gradient[:, 0].double()
    rows = torch.linspace(0, len(whole) - 1, 5).long().tolist()
    alone = [caller(texts.part(slice(i, i + 1)), values=values).gradient[0, 0] for i in rows]
    some, own = whole[rows], torch.stack(alone).double()
    length = some.square().sum()
    if not bool(length > 0):
        return None
    scale = (some * own).sum() / length
    is_same = float((scale * some - own).norm()) <= WORTH * float(own.norm())
    return scale * whole if is_same else None
