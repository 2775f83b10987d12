"""Sample texts from a model, all texts of a batch side by side.

The loop shares a prompt's prefill among its samples, drops finished rows from the batch, samples by
inverse CDF from one uniform number per token, and returns the log-probs and entropies that it has
at hand anyway. The uniform numbers depend on seed, row, position and max_new_tokens only: the same
seed gives the same text whatever other rows the batch holds, up to rounding.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opdlab.data.sampling_config import SamplingConfig
from opdlab.data.tokens import completion_texts
from opdlab.errors import InvalidValue
from opdlab.models.adapters.merging import merged_for_writing
from opdlab.models.continuation import Continuation, begin
from opdlab.models.drawing import draw, refuse_broken
from opdlab.models.forward import group_rows
from opdlab.models.head import Head
from opdlab.models.replay import Repeat, can_replay
from opdlab.models.sampled_texts import SampledTexts, TextsInProgress
from opdlab.models.weights import Weights
from opdlab.support.expect import shortened
from opdlab.support.memory import refuse_beyond_memory

DECODED_BEFORE_STOP = 8  # tokens

SHRINK_AT = 0.75  # the share of the batch that goes on, at which the rest is dropped
TOKENS_PER_LOOK = 16  # on a GPU, between two looks whether texts have ended


def read_prefixes(prefixes: Any, prompts: int, vocab_size: int) -> list[list[int]]:
    """Read the token ids that each prompt's completion goes on from.

    Args:
        prefixes: As the user gave them: lists, tuples, arrays or tensors.
        prompts: How many prompts there are.
        vocab_size: How many token ids there are.

    Returns:
        Token ids for each prompt, as plain ints.

    Raises:
        InvalidValue: There is not one list for each prompt, or something in them is no token id.
    """
    advice = "Use one list of token ids for each prompt, as [[5, 17], []]."
    if hasattr(prefixes, "tolist"):  # arrays and tensors of any library
        prefixes = prefixes.tolist()
    if isinstance(prefixes, (str, bytes)) or not isinstance(prefixes, Sequence):
        raise InvalidValue(f"sample got prefixes={shortened(prefixes)}. {advice}")
    if len(prefixes) != prompts:
        raise InvalidValue(f"sample got {len(prefixes)} prefixes for {prompts} prompts. {advice}")
    rows = []
    for i, prefix in enumerate(prefixes):
        row = prefix.tolist() if hasattr(prefix, "tolist") else prefix
        ids = list(row) if isinstance(row, Sequence) and not isinstance(row, (str, bytes)) else None
        if ids is None or not all(
            isinstance(token, numbers.Integral) and 0 <= int(token) < vocab_size for token in ids
        ):
            raise InvalidValue(
                f"sample got prefixes[{i}]={shortened(prefix)}, which are no token ids of the"
                f" policy (0 to {vocab_size - 1}). {advice}"
            )
        rows.append([int(token) for token in ids])
    return rows


@dataclass(frozen=True)
class SamplingLoop:
    """Sample from a model.

    Attributes:
        weights: The model and its tokenizer, with the adapter in force that `head` belongs to.
        head: The output head.
        config: How tokens are drawn.
    """

    weights: Weights
    head: Head
    config: SamplingConfig

    def run(
        self,
        starts: list[list[int]],
        n: int,
        batch_size: int | None = None,
        places: Sequence[int] | None = None,
    ) -> SampledTexts:
        """Write `n` texts after each prompt; text `j` of prompt `i` is row `i * n + j`.

        Args:
            starts: Token ids of each prompt.
            n: Texts per prompt.
            batch_size: Prompts held in memory at once; all by default.
            places: Where each prompt stands in a batch that others write too; its random numbers
                are those of that place. 0, 1, 2, … by default.

        Returns:
            The texts, `[len(starts) * n, max_new_tokens]`.
        """
        size = min(batch_size or len(starts), len(starts))
        self._refuse_too_many(len(starts), n, size)
        uniform = self.draw_uniform(len(starts), n, places)
        parts = []
        for i in range(0, len(starts), size):
            part = uniform[i : i + size].flatten(0, 1)
            parts.append(self.write(starts[i : i + size], n, part))
        return SampledTexts.concat(parts)

    def _refuse_too_many(self, prompts: int, n: int, size: int) -> None:
        """Refuse texts that cannot fit the memory, `n` for each prompt, `size` prompts at once.

        Counted are the numbers that are kept for each token of all texts (id, log-prob and entropy,
        and on the CPU a random number), and the logits of one token of the texts that are written
        at once.
        """
        device, tokens = self.weights.device, prompts * n * self.config.max_new_tokens
        kept = (24.0 if device.type == "cpu" else 16.0) * tokens
        at_once = 4.0 * size * n * self.weights.vocab_size
        batches_help = size > 1 and at_once > kept
        refuse_beyond_memory(
            f"Sampling {prompts * n:,} texts of up to {self.config.max_new_tokens:,} tokens",
            kept + at_once,
            device,
            "Hold fewer prompts at once with batch_size=, or ask for fewer texts."
            if batches_help
            else "Ask for fewer or shorter texts at a time.",
        )

    def draw_uniform(self, count: int, n: int, places: Sequence[int] | None = None) -> Tensor:
        """Draw the numbers from 0 to 1 that decide every token.

        Args:
            count: Number of prompts.
            n: Texts per prompt.
            places: As in `run`.

        Returns:
            `[count, n, max_new_tokens]` in float64, on the CPU.
        """
        rows = range(count) if places is None else places
        shape = (max(rows) + 1, n, self.config.max_new_tokens)
        seeded = torch.Generator().manual_seed(self.config.seed)
        uniform = torch.rand(shape, generator=seeded, dtype=torch.float64)
        return uniform if places is None else uniform[list(places)]

    def write(
        self, starts: list[list[int]], n: int, uniform: Tensor, limits: Tensor | None = None
    ) -> SampledTexts:
        """Write texts, prompts of different length apart where the model cannot pad them.

        Args:
            starts: Token ids of each prompt.
            n: Texts per prompt.
            uniform: The numbers from 0 to 1 that decide every token, `[len(starts) * n, T]`.
            limits: The most tokens of each text, `[len(starts) * n]`, from 1 to T; T by default.

        Returns:
            The texts, `[len(starts) * n, T]`.
        """
        with merged_for_writing(self.weights.model, uniform.shape[1]):
            return self._write_groups(starts, n, uniform, limits)

    def _write_groups(
        self, starts: list[list[int]], n: int, uniform: Tensor, limits: Tensor | None
    ) -> SampledTexts:
        abilities = self.weights.abilities
        mixed = abilities.pads_left or not abilities.caches  # without a cache, `hidden_at` pads
        groups = group_rows([len(start) for start in starts], mixed=mixed)
        if len(groups) == 1:
            return self._write_batch(starts, n, uniform, limits)
        out = SampledTexts.empty(uniform.shape[0], uniform.shape[1], self.weights.device)
        for group in groups:
            rows = [i * n + j for i in group for j in range(n)]
            part = None if limits is None else limits[rows]
            out.put(rows, self._write_batch([starts[i] for i in group], n, uniform[rows], part))
        return out

    def _write_batch(
        self, starts: list[list[int]], n: int, uniform: Tensor, limits: Tensor | None
    ) -> SampledTexts:
        """Write texts token by token, all of them side by side."""
        model, device, steps = self.weights.model, self.weights.device, uniform.shape[1]
        progress = TextsInProgress(uniform, self.weights.eos, limits, device)
        # A stop text is looked for by the tokenizer, after every token.
        replays = not self.config.stop and can_replay(model)
        texts = begin(
            model, starts, n, self.weights.abilities, limits=progress.limits, replay=replays
        )
        looks_each_token = bool(self.config.stop) or not (replays or device.type == "cuda")
        look_every = 1 if looks_each_token else TOKENS_PER_LOOK

        def write_token(may_end: bool) -> None:
            texts.append(progress.token)
            self._draw_token(texts, progress, may_end)

        repeat = Repeat(write_token, device) if texts.stays_in_place else None
        self._draw_token(texts, progress, self._may_end(0))
        for t in range(1, steps):
            if t % look_every == 0:
                refuse_broken(progress.is_broken)
                going = progress.count_going()
                if going == 0:
                    break
                # Shrinking the batch copies the cache, so it is done only when it pays.
                most = SHRINK_AT * len(progress.live)
                if going <= most and len(keep := texts.choose(progress.going)) <= most:
                    texts.keep(keep)
                    progress.keep(keep)
            texts.make_room()
            if repeat is None:
                write_token(self._may_end(t))
            else:
                repeat(self._may_end(t), layout=texts.layout)
        refuse_broken(progress.is_broken)
        return progress.finish()

    def _may_end(self, t: int) -> bool:
        """Tell whether token `t` may end a text."""
        return t + 1 > self.config.min_new_tokens

    def _draw_token(self, texts: Continuation, progress: TextsInProgress, may_end: bool) -> None:
        """Draw the next token of each text, and see which texts end with it."""
        eos = progress.eos
        without = None if may_end or not len(eos) else eos
        uniform = progress.next_uniform()
        progress.put(draw(self.head(texts.states), uniform, self.config, without))
        # Not `isin`, which waits for the device where there are many of them.
        ended = (progress.token[:, None] == eos).any(1)
        if self.config.stop and may_end:
            ended |= self._hold_stop(progress.written())
        progress.end(ended)

    def _hold_stop(self, ids: Tensor) -> Tensor:
        """Tell which texts, given as ids `[n, t]`, hold a stop text now; `[n]`."""
        # A stop text that the last token completes lies within as many tokens as it has bytes. Some
        # more are decoded, because tokenizers treat the first piece of a text in their own way.
        window = max(len(stop.encode()) for stop in self.config.stop) + DECODED_BEFORE_STOP
        texts = completion_texts(self.weights.tokenizer, ids[:, -window:].tolist(), ())
        held = [any(stop in text for stop in self.config.stop) for text in texts]
        return torch.tensor(held, device=ids.device)


def find_stop(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop: Sequence[str]
) -> int | None:
    """Find the first token that completes a stop text, as the sampling loop does.

    Args:
        tokenizer: The tokenizer of the ids.
        ids: Token ids of a text.
        stop: The stop texts.

    Returns:
        The number of tokens up to it; None if no stop text occurs.
    """
    window = max(len(text.encode()) for text in stop) + DECODED_BEFORE_STOP
    pieces = [list(ids[max(0, t + 1 - window) : t + 1]) for t in range(len(ids))]
    texts = completion_texts(tokenizer, pieces, ())
    held = (t + 1 for t, text in enumerate(texts) if any(one in text for one in stop))
    return next(held, None)
