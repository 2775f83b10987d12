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
from opdlab.errors import InvalidValue, OpdlabError
from opdlab.models.adapters.merging import merged_for_writing
from opdlab.models.continuation import begin
from opdlab.models.forward import group_rows
from opdlab.models.head import Head
from opdlab.models.precision import without_autocast
from opdlab.models.weights import Weights
from opdlab.support.expect import shortened
from opdlab.support.memory import refuse_beyond_memory

DECODED_BEFORE_STOP = 8  # tokens


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
class SampledTexts:
    """Texts that the loop has written, right-padded.

    Attributes:
        ids: Token ids `[B, T]`; zero in the padding, as `logp` and `entropy` are.
        logp: Log-probs of the tokens at temperature 1, in nats, `[B, T]`.
        entropy: Entropies at temperature 1, in nats, `[B, T]`.
        lengths: Tokens of each text `[B]`; the EOS token counts.
        stopped: Whether each text ended by itself, `[B]`; false where the limit cut it.
    """

    ids: Tensor
    logp: Tensor
    entropy: Tensor
    lengths: Tensor
    stopped: Tensor

    @classmethod
    def empty(cls, rows: int, steps: int, device: torch.device) -> SampledTexts:
        """Make room for `rows` texts of at most `steps` tokens.

        Args:
            rows: Number of texts `B`.
            steps: Most tokens per text `T`.
            device: Where the tensors are.

        Returns:
            Texts of zeros that count as full and cut, until something is put there.
        """
        return cls(
            ids=torch.zeros(rows, steps, dtype=torch.long, device=device),
            logp=torch.zeros(rows, steps, device=device),
            entropy=torch.zeros(rows, steps, device=device),
            lengths=torch.full((rows,), steps, device=device),
            stopped=torch.zeros(rows, dtype=torch.bool, device=device),
        )

    @classmethod
    def concat(cls, parts: Sequence[SampledTexts]) -> SampledTexts:
        """Put several batches together, rows in order.

        Args:
            parts: At least one, all of the same width `T`.

        Returns:
            One batch.
        """
        return cls(
            *(torch.cat(column) for column in zip(*(p.tensors() for p in parts), strict=True))
        )

    def put(self, rows: Sequence[int], part: SampledTexts) -> None:
        """Copy the texts of `part` to these rows.

        Args:
            rows: One row number per text of `part`.
            part: Texts of the same width `T`.
        """
        where = torch.as_tensor(rows, device=self.ids.device)
        for mine, theirs in zip(self.tensors(), part.tensors(), strict=True):
            mine[where] = theirs

    def tensors(self) -> tuple[Tensor, ...]:
        """List all fields, in order.

        Returns:
            The tensors themselves.
        """
        return self.ids, self.logp, self.entropy, self.lengths, self.stopped


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
        self, starts: list[list[int]], n: int, uniform: Tensor, room: Tensor | None = None
    ) -> SampledTexts:
        """Write texts, prompts of different length apart where the model cannot pad them.

        Args:
            starts: Token ids of each prompt.
            n: Texts per prompt.
            uniform: The numbers from 0 to 1 that decide every token, `[len(starts) * n, T]`.
            room: The most tokens of each text, `[len(starts) * n]`, from 1 to T; T by default.

        Returns:
            The texts, `[len(starts) * n, T]`.
        """
        with merged_for_writing(self.weights.model, uniform.shape[1]):
            return self._write_groups(starts, n, uniform, room)

    def _write_groups(
        self, starts: list[list[int]], n: int, uniform: Tensor, room: Tensor | None
    ) -> SampledTexts:
        abilities = self.weights.abilities
        mixed = abilities.pads_left or not abilities.caches  # without a cache, `hidden_at` pads
        groups = group_rows([len(start) for start in starts], mixed=mixed)
        if len(groups) == 1:
            return self._write_batch(starts, n, uniform, room)
        out = SampledTexts.empty(uniform.shape[0], uniform.shape[1], self.weights.device)
        for group in groups:
            rows = [i * n + j for i in group for j in range(n)]
            part = None if room is None else room[rows]
            out.put(rows, self._write_batch([starts[i] for i in group], n, uniform[rows], part))
        return out

    def _write_batch(
        self, starts: list[list[int]], n: int, uniform: Tensor, room: Tensor | None
    ) -> SampledTexts:
        """Write texts token by token, all of them side by side."""
        device, (rows, steps) = self.weights.device, uniform.shape
        uniform = uniform.to(device)
        room = None if room is None else room.to(device)
        texts = begin(self.weights.model, starts, n, self.weights.abilities)
        out = SampledTexts.empty(rows, steps, device)
        # The row of the result that each row of the batch writes, and whether its text goes on.
        live = torch.arange(rows, device=device)
        going = torch.ones(rows, dtype=torch.bool, device=device)
        eos = torch.tensor(sorted(self.weights.eos), device=device)
        for t in range(steps):
            may_end = t + 1 > self.config.min_new_tokens or not len(eos)
            token, logp, entropy = draw(
                self.head(texts.states),
                uniform[live, t],
                self.config,
                without=None if may_end else eos,
            )
            out.ids[live, t], out.logp[live, t], out.entropy[live, t] = token, logp, entropy
            ended = torch.isin(token, eos)
            if self.config.stop and t + 1 > self.config.min_new_tokens:
                ended |= self._hold_stop(out.ids[live, : t + 1])
            ended &= going
            out.lengths[live[ended]] = t + 1
            out.stopped[live[ended]] = True
            going = going & ~ended
            if room is not None:
                is_full = going & (room[live] <= t + 1)
                out.lengths[live[is_full]] = t + 1
                going = going & ~is_full
            left = int(going.sum())
            if left == 0 or t + 1 == steps:
                break
            # Shrinking the batch copies the cache, so it is done only when it pays.
            if left <= 0.75 * len(going):
                keep = texts.choose(going)
                if len(keep) <= 0.75 * len(going):
                    texts.keep(keep)
                    live, token, going = live[keep], token[keep], going[keep]
            texts.append(token)
        inside = torch.arange(steps, device=device) < out.lengths[:, None]
        for values in (out.ids, out.logp, out.entropy):
            values *= inside
        return out

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


def draw(
    logits: Tensor, uniform: Tensor, config: SamplingConfig, without: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample by inverse CDF; a token without probability is never drawn.

    Args:
        logits: `[n, V]`.
        uniform: Numbers from 0 to 1, `[n]`.
        config: Temperature and which tokens are kept.
        without: Ids of tokens that are not drawn; None for none.

    Returns:
        Token ids `[n]`, and their log-probs and the entropies at temperature 1 without any filter,
        in nats.

    Raises:
        OpdlabError: The logits hold no distribution (NaN, +inf).
    """
    p = logits.softmax(-1)
    # The likeliest token has the log-prob `top - norm`: no second pass of exponentials.
    top, log_top = logits.amax(-1, keepdim=True), p.amax(-1, keepdim=True).log()
    norm = top - log_top
    with without_autocast(logits.device):  # which would round vecdot to bfloat16
        entropy = norm[:, 0] - torch.linalg.vecdot(p, logits)
        if not bool(torch.isfinite(entropy).all()):  # 0 * -inf is NaN
            if not bool(torch.isfinite(norm).all()):
                raise OpdlabError(
                    "The model's logits hold NaN or infinity while sampling. Check its weights,"
                    " dtype and learning rate."
                )
            finite = logits.clamp(min=torch.finfo(logits.dtype).min)
            entropy = norm[:, 0] - torch.linalg.vecdot(p, finite)
    allowed = logits if without is None else logits.index_fill(-1, without, -torch.inf)
    if config.temperature == 0:
        token = allowed.argmax(-1)
    else:
        if config.temperature != 1 or without is not None:
            p = (allowed / config.temperature).softmax(-1)
        token = _invert(_keep_likeliest(p, config), uniform)
    # Not less `norm`, which is rounded to the size of the logits: a sure token's log-prob is tiny.
    logp = logits.gather(-1, token[:, None]) - top + log_top
    return token, logp[:, 0], entropy


def _invert(p: Tensor, uniform: Tensor) -> Tensor:
    """Find the first token at which the cumulative probability passes `uniform` of the whole."""
    cdf = p.cumsum(-1)
    whole = cdf[:, -1]
    # Rounding must not reach the end.
    last = whole.nextafter(torch.zeros_like(whole))
    point = (uniform * whole).to(cdf.dtype).minimum(last)
    return torch.searchsorted(cdf, point[:, None], right=True)[:, 0]


def _keep_likeliest(p: Tensor, config: SamplingConfig) -> Tensor:
    """Set the probability of filtered tokens to zero: first top_k, then top_p, then min_p."""
    if 0 < config.top_k < p.shape[-1]:
        ids = p.topk(config.top_k, -1).indices
        p = torch.zeros_like(p).scatter_(-1, ids, p.gather(-1, ids))
        p = p / p.sum(-1, keepdim=True)
    if config.top_p < 1:
        ordered, ids = p.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= config.top_p] = 0.0
        p = torch.zeros_like(p).scatter_(-1, ids, ordered)
    if config.min_p > 0:
        p = p.masked_fill(p < config.min_p * p.amax(-1, keepdim=True), 0.0)
    return p
