"""Check a model against its own plain passes, when a policy is made.

Model families differ in what they keep between tokens (attention caches, recurrent states,
compressed blocks) and in what they do about padding. No list of names says which are right; a few
made-up tokens do, with batches, padding, caches and shared prefixes. Shortcuts that change numbers
are not taken (`Abilities`), and a model whose plain passes cannot be used is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from opdlab.errors import UnsupportedModel
from opdlab.models.abilities import PLAIN, Abilities
from opdlab.models.continuation import Cached, InPlace, read_prompts
from opdlab.models.forward import hidden_at
from opdlab.models.head import Head, cannot_run
from opdlab.models.micro_batches import make_level
from opdlab.models.parted_cache import split_cache
from opdlab.models.placement import input_device
from opdlab.models.quantization import rounds_coarsely
from opdlab.models.vocabulary import pick_ordinary_tokens

_FINE = {torch.float32, torch.float64}
TOY_SIZE = 20_000_000  # parameters; smaller models are checked on longer texts
LENGTH, TOY_LENGTH = 12, 21  # tokens of a text


@dataclass(frozen=True)
class Tolerance:
    """Say how far logits may lie from those of plain passes.

    Rounding moves all positions a little; a wrong state moves all of them a lot. A near tie in a
    router or an index may move single ones far, hence two limits. Distances are shares of the
    logits' spread over positions.

    Attributes:
        typical: The limit at half of the positions.
        worst: The limit at any position.
    """

    typical: float
    worst: float

    def allows(self, off: Tensor) -> bool:
        """Tell whether distances lie within both limits.

        Args:
            off: One distance per position, `[positions]`, as a share of the logits' spread.

        Returns:
            False where one is NaN, too.
        """
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

    Returns:
        The shortcuts that may be taken; models of one kind are checked once.

    Raises:
        UnsupportedModel: Plain passes fail, or a token's distribution depends on later tokens.
    """
    kind = _kind(model)
    if kind in _known:
        return _known[kind]
    check = _Check(model, head, longest)
    found = _find(check)
    if check.can_tell:
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
        splits = check.holds(lambda: check.samples(padded=True, split=True))
        return replace(everything, splits_cache=splits)
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
        splits_cache=batches
        and caches
        and check.holds(lambda: check.samples(padded=found["pads_left"], split=True)),
    )


# Models of one configuration are checked once in a process: copies and snapshots cost nothing.
_known: dict[tuple[Any, ...], Abilities] = {}


def _kind(model: PreTrainedModel) -> tuple[Any, ...]:
    """Make a key that two models share if one check is enough for both."""
    devices = {(str(weight.dtype), weight.device.type) for weight in model.parameters()}
    # A private setting of transformers, which not every configuration has.
    attention = getattr(model.config, "_attn_implementation", None)
    return type(model), model.config.to_json_string(use_diff=False), frozenset(devices), attention


class _Check:
    """Three made-up texts and their plain passes: two that begin alike, and a shorter one."""

    def __init__(self, model: PreTrainedModel, head: Head, longest: int | None) -> None:
        self.model, self.head = model, head
        kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
        self.is_fine = kinds <= _FINE and not rounds_coarsely(model)
        self.tolerance = FINE if self.is_fine else COARSE
        # Long enough to leave the windows and blocks of toy models; those of real ones are out of
        # reach either way.
        toy = sum(parameter.numel() for parameter in model.parameters()) < TOY_SIZE
        length = TOY_LENGTH if toy else LENGTH
        length = length if longest is None else min(length, longest)
        self.alike = max(1, length - 5)  # tokens that the first two texts share
        self.steps = min(5 if toy else 3, length - self.alike)  # tokens that are sampled
        tokens = pick_ordinary_tokens(model, head.vocab_size, 3 * length)
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
        # Where all logits are equal, as with a head of zeros, no mistake would show.
        self.can_tell = bool(spread.any())
        self.spread = spread.pow(2).mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)

    def holds(self, test: Callable[[], bool]) -> bool:
        """Tell whether the model can take a shortcut and it gives the right numbers."""
        try:
            return test()
        except Exception:  # whatever a family does about an argument that it does not know
            return False

    def scores(self, abilities: Abilities, *, shared: bool = False, equal: bool = False) -> bool:
        """Compare a batch with plain passes.

        Args:
            abilities: The shortcuts to take.
            shared: Take only the two texts that begin alike, and run their beginning once.
            equal: Cut the texts to one length.
        """
        rows = self.rows[:2] if shared else self.rows
        if equal:
            rows = [row[: min(map(len, self.rows))] for row in rows]
        begin = self.alike if shared else 0
        levels = [make_level(rows, begin)] if shared else []
        spans = [range(begin, len(row)) for row in rows]
        got = self._logits(hidden_at(self.model, rows, spans, abilities, levels))
        want = [
            logits[span.start : span.stop] for logits, span in zip(self.plain, spans, strict=False)
        ]
        return self._agree(got, torch.cat(want))

    def samples(self, *, padded: bool, split: bool = False) -> bool:
        """Compare two samples each of two prompts with plain passes.

        One sample of each prompt is dropped after the first token.

        Args:
            padded: Take prompts of different length.
            split: Keep each prompt once for its samples.
        """
        short = len(self.rows[2]) - self.steps
        prompts = [self.alike if padded else short, short]
        texts = [self.rows[0], self.rows[2]]
        starts = [text[:length] for text, length in zip(texts, prompts, strict=True)]
        batch = self._begin_two(starts, split=split)
        # The family may keep its states elsewhere; with small weights no number would show it.
        if not _is_filled(batch.cache):
            return False
        plain = [self.plain[0], self.plain[2]]
        live = [0, 0, 1, 1]  # the text of each row of the batch
        states = [batch.states.clone()]
        want = [plain[i][prompts[i] - 1] for i in live]
        for step in range(self.steps):
            if step == 1:
                batch.keep(torch.tensor([1, 2], device=input_device(self.model)))
                live = [0, 1]
            tokens = [texts[i][prompts[i] + step] for i in live]
            batch.make_room()
            batch.append(torch.tensor(tokens, device=input_device(self.model)))
            states.append(batch.states.clone())  # they may change in place
            want += [plain[i][prompts[i] + step] for i in live]
        return self._agree(self._logits(torch.cat(states)), torch.stack(want))

    def _begin_two(self, starts: list[list[int]], *, split: bool) -> Cached | InPlace:
        """Begin two texts after each prompt."""
        read = read_prompts(self.model, starts)
        if not split:
            return Cached(self.model, read, 2)
        layers = split_cache(read.cache, read.mask)
        if not layers:
            raise NotImplementedError("layers that do more than append")
        # In place, the cache says that it is as long as its room. A family that takes positions
        # from there is right in `Parted` and wrong here, and wrong where kernels are replayed.
        return InPlace(self.model, read, layers, 2)

    def refuse_if_not_causal(self) -> None:
        """Raise UnsupportedModel if later tokens of a text change the numbers of earlier ones."""
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
        """The distances that rounding alone makes in this model.

        Deep models in half precision can exceed the usual limits, and so can loops. Measured on
        plain passes of beginnings of a text, which only rounding can change, unless the model is
        not causal; hence the upper bounds.
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
    """Tell whether a pass has put anything into the cache that it was given."""
    # Layers of transformers' caches differ in what they hold: keys, or states of two kinds.
    for layer in cache.layers:
        recurrent = [
            getattr(layer, f"is_{kind}_states_initialized", {}) for kind in ("conv", "recurrent")
        ]
        if getattr(layer, "is_initialized", False) or any(
            any(states.values()) for states in recurrent
        ):
            return True
    return False
