"""The texts that a sampling loop writes, and its notes while it writes them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opdlab.models.drawing import Drawn


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


class TextsInProgress:
    """Texts that are being written side by side, with all that changes from token to token.

    Everything is a tensor on the device and changes in place, so that a round of the loop can be
    recorded as a CUDA graph and nothing waits for the device until somebody asks for `count_going`.

    Args:
        uniform: The numbers from 0 to 1 that decide every token, `[rows, T]`.
        eos: Ids of the tokens that end a text.
        limits: The most tokens of each text, `[rows]`, from 1 to T; None for T.
        device: Where the model is.

    Attributes:
        out: The texts; those that go on count as full.
        eos: Ids of the tokens that end a text.
        token: The token that each text of the batch got last, `[B]`.
        step: Number of tokens that have been drawn, `[1]`.
        live: The row of `out` that each text of the batch writes, `[B]`.
        going: Whether each text of the batch goes on, `[B]`.
        is_broken: Whether any logits of texts that go on held no distribution, a single value.
    """

    def __init__(
        self,
        uniform: Tensor,
        eos: Collection[int],
        limits: Tensor | None,
        device: torch.device,
    ) -> None:
        rows, self.steps = uniform.shape
        self.eos = torch.tensor(sorted(eos), dtype=torch.long, device=device)
        self.uniform = uniform.to(device)
        full = torch.full((rows,), self.steps, device=device)
        self.limits = full if limits is None else limits.to(device)
        self.out = SampledTexts.empty(rows, self.steps, device)
        self.token = torch.zeros(rows, dtype=torch.long, device=device)
        self.step = torch.zeros(1, dtype=torch.long, device=device)
        self.live = torch.arange(rows, device=device)
        self.going = torch.ones(rows, dtype=torch.bool, device=device)
        self.is_broken = torch.zeros((), dtype=torch.bool, device=device)

    def next_uniform(self) -> Tensor:
        """Read the numbers that decide the next token of each text of the batch.

        Returns:
            `[B]`, in float64.
        """
        return self.uniform[self.live, self.step.expand_as(self.live)]

    def put(self, drawn: Drawn) -> None:
        """Write down the next token of each text of the batch.

        A text that has ended gets tokens too, as long as it is in the batch; `finish` drops them.

        Args:
            drawn: The tokens, `[B]`.
        """
        place = (self.live, self.step.expand_as(self.live))
        for column, values in zip(
            (self.out.ids, self.out.logp, self.out.entropy), drawn, strict=True
        ):
            column.index_put_(place, values.to(column.dtype))
        self.token.copy_(drawn.token)
        self.is_broken.logical_or_((self.going & ~torch.isfinite(drawn.entropy)).any())
        self.step.add_(1)

    def end(self, ended: Tensor) -> None:
        """End some texts with the token that was put last, and those that are full.

        Args:
            ended: Whether each text of the batch ends by itself, `[B]`.
        """
        ended = ended & self.going
        done = ended | (self.going & (self.limits[self.live] <= self.step))
        lengths = torch.where(done, self.step, self.out.lengths[self.live])
        self.out.lengths.index_put_((self.live,), lengths)
        self.out.stopped.index_put_((self.live,), ended | self.out.stopped[self.live])
        self.going.logical_and_(~done)

    def written(self) -> Tensor:
        """Read what the texts of the batch have so far. This waits for the device.

        Returns:
            Token ids, `[B, tokens]`.
        """
        return self.out.ids[self.live, : int(self.step)]

    def count_going(self) -> int:
        """Count the texts that go on. This waits for the device.

        Returns:
            The number of texts.
        """
        return int(self.going.sum())

    def keep(self, rows: Tensor) -> None:
        """Go on with some texts of the batch only.

        Args:
            rows: Their numbers, in order.
        """
        self.live, self.token = self.live[rows], self.token[rows]
        self.going = self.going[rows]

    def finish(self) -> SampledTexts:
        """Set everything behind the texts' ends to zero.

        Returns:
            The texts.
        """
        behind = torch.arange(self.steps, device=self.step.device) >= self.out.lengths[:, None]
        for values in (self.out.ids, self.out.logp, self.out.entropy):
            values.masked_fill_(behind, 0)  # whatever is there, NaN too
        return self.out
