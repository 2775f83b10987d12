"""Checks a model, when a policy is made, against itself: do batches, padding, caches and prefixes
give plain passes' numbers?

Model families differ in what they keep between tokens (attention caches, recurrent states,
compressed blocks) and in what they do about padding. No list of names says which are right; a few
made-up tokens do. Shortcuts that change numbers are not taken (`Abilities`), and a model whose
plain passes cannot be used is refused.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from opdlab.errors import UnsupportedModel
from opdlab.models.continuation import Cached
from opdlab.models.forward import PLAIN, SHORTEST_SHARED_PREFIX, Abilities, hidden_at
from opdlab.models.head import Head, cannot_run

_FINE = {torch.float32, torch.float64}
_CHANGING_ROTARY = (
    "dynamic",
    "longrope",
)  # what transformers computes anew from a batch's longest row

TOY_SIZE = 20_000_000  # parameters

COSTS = {
    "batches": (
        "texts are run one at a time, because a text's numbers depend on the others in its batch"
    ),
    "pads": (
        "texts of different length are scored and trained in separate batches, because padding"
        " changes their numbers"
    ),
    "pads_left": (
        "prompts of different length are sampled in separate batches, because padding changes their"
        " numbers"
    ),
    "caches": (
        "each new token is sampled by running the whole text again, because its cache does not give"
        " the same numbers"
    ),
    "shares_prefix": (
        "the beginning that several prompts share is run again for each of them, because going on"
        " from it changes their numbers"
    ),
}


def check_rotary(model: PreTrainedModel, context_length: int | None) -> None:
    """Refuse rotary embeddings that change as a text grows, unless the context is limited to where
    they do not.

    Raises:
        UnsupportedModel: Rows that fit the context would change the numbers of the tokens before
            them.
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = (
        [rope]
        if "rope_type" in rope
        else [part for part in rope.values() if isinstance(part, dict)]
    )
    for kind in kinds:
        name = kind.get("rope_type", "")
        if name not in _CHANGING_ROTARY:
            continue
        fixed = (
            config.max_position_embeddings
            if name == "dynamic"
            else kind["original_max_position_embeddings"]
        )
        extends = name == "dynamic" or config.max_position_embeddings > fixed
        if (context_length is None and extends) or (context_length or 0) > fixed:
            raise UnsupportedModel(
                f"{type(model).__name__} changes its rotary embedding in rows of more than {fixed}"
                f" tokens (rope_type {name!r}), so that the log-probs of a text change as it grows,"
                " and with the rows beside it. Limit the policy to rows that it does not change"
                f" for: context_length={fixed}, for Policy.load and Policy.of alike."
            )


@dataclass(frozen=True)
class Tolerance:
    """How far logits may lie from those of plain passes, as a share of their spread over positions.

    Rounding moves all positions a little; a wrong state moves all of them a lot. A near tie in a
    router or an index may move single ones far, hence two limits.
    """

    typical: float  # at half of the positions
    worst: float  # at any position

    def allows(self, off: Tensor) -> bool:
        """Whether distances `[positions]` lie within both limits; NaN does not."""
        return bool(off.median() <= self.typical) and bool(off.max() <= self.worst)


# Measured over some 130 random families. In single precision rounding moves no position by more
# than 1e-4; a state that is computed by another formula while sampling moves some by 1e-3. In half
# precision rounding moves half of the positions by at most 0.01 in shallow models and 0.03 in one
# of thirty layers.
FINE = Tolerance(typical=3e-4, worst=3e-4)
COARSE = Tolerance(typical=0.05, worst=0.5)


@torch.no_grad()
def find_abilities(model: PreTrainedModel, head: Head, longest: int | None = None) -> Abilities:
    """Find which shortcuts give the numbers of plain passes.

    Nine passes of a dozen tokens (twenty for toy models) where all of them do.

    Args:
        model: In evaluation mode.
        head: Its output head.
        longest: Tokens that fit its context, if that is limited.

    Raises:
        UnsupportedModel: Plain passes fail, or a token's distribution depends on later tokens.
    """
    kind = _kind(model)
    if kind in _known:
        return _known[kind]
    check = _Check(model, head, longest)
    found = _find(check)
    if check.shows_anything:
        _known[kind] = found
    return found


def _find(check: _Check) -> Abilities:
    everything = Abilities()
    shortcuts: dict[str, Callable[[], bool]] = {
        "pads": lambda: check.scores(replace(PLAIN, batches=True, pads=True)),
        "shares_prefix": lambda: check.scores(everything, shared=True),
        "pads_left": lambda: check.samples(padded=True),
    }
    found = {name: check.holds(test) for name, test in shortcuts.items()}
    if all(found.values()):
        return everything
    check.refuse_if_not_causal()
    batches = found["pads"] or check.holds(
        lambda: check.scores(replace(PLAIN, batches=True), equal=True)
    )
    caches = found["pads_left"] or check.holds(lambda: check.samples(padded=False))
    return Abilities(
        batches=batches,
        pads=batches and found["pads"],
        pads_left=batches and found["pads_left"],
        caches=batches and caches,
        shares_prefix=batches and found["pads"] and found["shares_prefix"],
    )


def warn_about(model: PreTrainedModel, abilities: Abilities) -> None:
    """Say once which shortcuts a model does without, and what that costs."""
    missing = [field.name for field in fields(Abilities) if not getattr(abilities, field.name)]
    if not abilities.batches:
        missing = ["batches"] + (["caches"] if not abilities.caches else [])
    if missing:
        costs = "; ".join(COSTS[name] for name in missing)
        warnings.warn(
            f"{type(model).__name__}: {costs}. The numbers are right, it takes longer.",
            stacklevel=2,
        )


# Models of one configuration are checked once in a process: copies and snapshots cost nothing.
_known: dict[tuple[Any, ...], Abilities] = {}


def _kind(model: PreTrainedModel) -> tuple[Any, ...]:
    devices = {(str(weight.dtype), weight.device.type) for weight in model.parameters()}
    attention = getattr(model.config, "_attn_implementation", None)
    return type(model), model.config.to_json_string(use_diff=False), frozenset(devices), attention


class _Check:
    """Three made-up texts and their plain passes.

    The first two begin alike, the third is shorter.
    """

    def __init__(self, model: PreTrainedModel, head: Head, longest: int | None) -> None:
        self.model, self.head = model, head
        self.is_fine = all(parameter.dtype in _FINE for parameter in model.parameters())
        self.tolerance = FINE if self.is_fine else COARSE
        # Long enough to leave the windows and blocks of toy models; those of real ones are out of
        # reach either way.
        toy = sum(parameter.numel() for parameter in model.parameters()) < TOY_SIZE
        length = SHORTEST_SHARED_PREFIX + 5 if toy else 12
        length = length if longest is None else min(length, longest)
        self.alike = max(1, length - 5)  # tokens that the first two texts share
        self.steps = min(5 if toy else 3, length - self.alike)  # tokens that are sampled
        tokens = ordinary_tokens(model, head.rows, 3 * length)
        first, other, third = tokens[:length], tokens[length : 2 * length], tokens[2 * length :]
        self.rows = [
            first,
            [*first[: self.alike], *other][: length - 2],
            third[: max(1 + self.steps, length // 2)],
        ]
        try:
            self.plain = [
                self._logits(hidden_at(model, [row], [range(len(row))], PLAIN)) for row in self.rows
            ]
        except Exception as error:
            raise cannot_run(model, error) from error
        spread = torch.cat([logits - logits.mean(0) for logits in self.plain])
        self.shows_anything = bool(
            spread.any()
        )  # not where all logits are equal, as with a head of zeros
        self.spread = spread.pow(2).mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)

    def holds(self, test: Callable[[], bool]) -> bool:
        """Whether a shortcut gives the right numbers; one that the model cannot take at all gives
        none.
        """
        try:
            return test()
        except Exception:  # whatever a family does about an argument that it does not know
            return False

    def scores(self, abilities: Abilities, *, shared: bool = False, equal: bool = False) -> bool:
        """Compare a batch of all texts (with `equal`: cut to one length; with `shared`: of those
        that begin alike).
        """
        rows = self.rows[:2] if shared else self.rows
        if equal:
            rows = [row[: min(map(len, self.rows))] for row in rows]
        begin = self.alike if shared else 0
        spans = [range(begin, len(row)) for row in rows]
        got = self._logits(hidden_at(self.model, rows, spans, abilities, shared=begin))
        want = [
            logits[span.start : span.stop] for logits, span in zip(self.plain, spans, strict=False)
        ]
        return self._agree(got, torch.cat(want))

    def samples(self, *, padded: bool) -> bool:
        """Compare two samples of two prompts, of which one each goes on after the first token."""
        short = len(self.rows[2]) - self.steps
        prompts = [self.alike if padded else short, short]
        texts = [self.rows[0], self.rows[2]]
        batch = Cached(
            self.model, [text[:length] for text, length in zip(texts, prompts, strict=True)], n=2
        )
        if not _is_filled(batch.cache):
            # the family keeps its states elsewhere; with small weights the numbers might not show
            # it
            return False
        live = [0, 0, 1, 1]
        states, want = (
            [batch.states],
            [self.plain[0 if i == 0 else 2][prompts[i] - 1] for i in live],
        )
        for step in range(self.steps):
            if step == 1:
                batch.keep(torch.tensor([1, 2], device=self.model.device))
                live = [0, 1]
            batch.append(
                torch.tensor([texts[i][prompts[i] + step] for i in live], device=self.model.device)
            )
            states.append(batch.states)
            want += [self.plain[0 if i == 0 else 2][prompts[i] + step] for i in live]
        return self._agree(self._logits(torch.cat(states)), torch.stack(want))

    def refuse_if_not_causal(self) -> None:
        """Raise UnsupportedModel where the beginning of a text has other numbers than in the whole
        text.
        """
        row = self.rows[0]
        for length in {max(1, len(row) // 2), max(1, len(row) - 1)}:
            got = self._logits(hidden_at(self.model, [row[:length]], [range(length)], PLAIN))
            if not self._agree(got, self.plain[0][:length]):
                raise UnsupportedModel(
                    f"{type(self.model).__name__} is not causal: a token's distribution changes"
                    " with the tokens after it. Use a causal language model (for BERT-like models:"
                    " is_decoder=True)."
                )

    def _logits(self, states: Tensor) -> Tensor:
        return self.head(states).float()

    def _agree(self, got: Tensor, want: Tensor) -> bool:
        off = self._off(got, want)
        return self.tolerance.allows(off) or self.rounding.allows(off)

    def _off(self, got: Tensor, want: Tensor) -> Tensor:
        return (got - want).pow(2).mean(-1).sqrt() / self.spread

    @functools.cached_property
    def rounding(self) -> Tolerance:
        """What rounding does to this model: deep ones in half precision can exceed the usual
        limits, loops too.

        Measured on plain passes of beginnings of a text, which only rounding can change, unless the
        model is not causal; hence the upper bounds.
        """
        row, offs = self.rows[0], []
        for length in (1, 2, 3, len(row) // 2):
            got = self._logits(hidden_at(self.model, [row[:length]], [range(length)], PLAIN))
            offs.append(self._off(got, self.plain[0][:length]))
        off = torch.cat(offs)
        most = (
            Tolerance(typical=0.01, worst=0.05)
            if self.is_fine
            else Tolerance(typical=0.3, worst=1.0)
        )
        return Tolerance(
            min(4 * float(off.median()), most.typical), min(4 * float(off.max()), most.worst)
        )


def _is_filled(cache: DynamicCache) -> bool:
    """Whether a pass has put anything into the cache that it was given."""
    for layer in cache.layers:
        recurrent = [
            getattr(layer, f"is_{kind}_states_initialized", {}) for kind in ("conv", "recurrent")
        ]
        if getattr(layer, "is_initialized", False) or any(
            any(states.values()) for states in recurrent
        ):
            return True
    return False


def ordinary_tokens(model: PreTrainedModel, rows: int, count: int) -> list[int]:
    """Made-up ids without those that a configuration gives a meaning (padding, an image's place)."""
    config = model.config
    special: set[Any] = set()
    for part in (config, config.get_text_config()):
        special |= {
            value
            for name, value in vars(part).items()
            if isinstance(value, int) and "token" in name
        }
    ordinary = [id for id in range(min(rows, 4096)) if id not in special] or list(range(rows))
    picked = torch.randint(len(ordinary), (count,), generator=torch.Generator().manual_seed(0))
    return [ordinary[i] for i in picked.tolist()]
