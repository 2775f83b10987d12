"""A teacher's distributions in the tokens of a student with another tokenizer.

The log-probs `[n, V]` of a chunk are made of the teacher's hidden states when they are asked for,
as those of `States` are. Beside them, memory is `[m, V']` for the `m` nodes of the chunk's paths
(one for most tokens) and the teacher's vocabulary `V'`, and a table `[V']` for each of at most
`opdlab.data.byte_maps.KEPT` beginnings of a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from opdlab.data.byte_maps import Table
from opdlab.models.graded import States


@dataclass(frozen=True)
class Node:
    """One place in the teacher's reading of what may come next.

    Attributes:
        state: The row of the teacher's states.
        table: What becomes there of each of the teacher's tokens.
        parent: The node that led here, as its number in the path; -1 for the first.
        token: The teacher's token that led here.
        known: Bytes that the teacher's next token is known to begin with, since the student stands
            within it. Only tokens that fit count.
        before: Bytes that come before the teacher's next token and after the student's place.
        is_first: Whether the teacher's next token is the first of its text.
    """

    state: int
    table: Table
    parent: int = -1
    token: int = -1
    known: bytes = b""
    before: bytes = b""
    is_first: bool = False


AT_ONCE = 256  # tokens of the student that are looked through at once
_Member = tuple[int, Node, int, Tensor, list[int]]  # token, node, its number, weight, tokens taken
Path = tuple[Node, ...]  # the first node, and those that open tokens lead to


@dataclass
class Sums:
    """What was translated, over all chunks since the last grading.

    Attributes:
        tokens: Number of the student's tokens.
        unresolved: Sum over them of the probability that is only bounded.
        residual: Sum over them of the probability of text that no token of the student begins.
        inexact: Number of tokens with more than `EXACT` unresolved.
    """

    tokens: int = 0
    unresolved: float = 0.0
    residual: float = 0.0
    inexact: int = 0


EXACT = 1e-6  # a probability below which a target counts as exact


@dataclass(frozen=True)
class Translated:
    """A teacher's grades of a rollout in the student's tokens.

    Attributes:
        states: The teacher's states, at all places that the paths name.
        paths: The path of each of the student's tokens, `n` of them.
        vocab_size: Number of the student's tokens, `V`.
        floor: Probability that is spread evenly over all tokens, so that none has zero.
        device: The device for the log-probs.
        sums: Where to count what was translated.
    """

    states: States
    paths: Sequence[Path]
    vocab_size: int
    floor: float
    device: torch.device
    sums: Sums = field(default_factory=Sums)

    def part(self, piece: slice | Tensor) -> Translated:
        """Take the grades of some tokens.

        Args:
            piece: A slice or indices of tokens.

        Returns:
            The grades of these tokens.
        """
        if isinstance(piece, slice):
            chosen = self.paths[piece]
        else:
            chosen = [self.paths[i] for i in piece.tolist()]
        return Translated(self.states, chosen, self.vocab_size, self.floor, self.device, self.sums)

    def logp(self) -> Tensor:
        """Compute log-probs `[n, V]`.

        Returns:
            In nats; a distribution, since text that no token begins is spread evenly.
        """
        mass, residual, _ = self.masses()
        even = (residual + self.floor)[:, None] / self.vocab_size
        return ((mass + even) / (1 + self.floor)).log().to(self.device)

    def masses(self) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the probability of each of the student's tokens, before anything is spread.

        Returns:
            `[n, V]`, with the residual and the unresolved part of it, `[n]` each.
        """
        out = torch.zeros(0)
        unresolved = torch.zeros(0)
        for members, share in self._shares():
            if not len(out):
                out = share.new_zeros(len(self.paths), self.vocab_size + 2)
                unresolved = share.new_zeros(len(self.paths))
            table = members[0][1].table
            target, is_open = table.target.to(out.device), table.is_open.to(out.device)
            row = torch.tensor([i for i, *_ in members], device=out.device)
            moved = out.new_zeros(len(members), out.shape[1]).index_add_(1, target, share)
            out.index_add_(0, row, moved)
            unresolved.index_add_(0, row, share[:, is_open].sum(1))
        if not len(out):
            out, unresolved = torch.zeros(0, self.vocab_size + 2), torch.zeros(0)
        residual = out[:, self.vocab_size]
        self.sums.tokens += len(self.paths)
        self.sums.unresolved += float(unresolved.sum())
        self.sums.residual += float(residual.sum())
        self.sums.inexact += int((unresolved > EXACT).sum())
        return out[:, : self.vocab_size], residual, unresolved

    def open_tokens(self, least: float) -> list[tuple[int, int, int]]:
        """Find the teacher's tokens that leave the student's open.

        Args:
            least: The probability from which one counts.

        Returns:
            The student's token, the node of its path and the teacher's token, for each.
        """
        found = []
        for start in range(0, len(self.paths), AT_ONCE):
            for members, share in self.part(slice(start, start + AT_ONCE))._shares():
                is_open = members[0][1].table.is_open.to(share.device)
                for m, token in ((share >= max(least, EXACT)) & is_open).nonzero().tolist():
                    i, _, number, *_ = members[m]
                    found.append((start + i, number, token))
        return found

    def _shares(self) -> Iterator[tuple[list[_Member], Tensor]]:
        """Nodes with one table, and the probability of each of the teacher's tokens there.

        Tokens that go on in a node of their own have none.
        """
        if not self.paths:
            return
        rows = sorted({node.state for path in self.paths for node in path})
        place = {state: i for i, state in enumerate(rows)}
        index = torch.tensor(rows, device=self.states.hidden.device, dtype=torch.long)
        probs = self.states.part(index).logp().float().exp()  # [m, V of the teacher]
        groups: dict[int, list[_Member]] = {}
        for i, path in enumerate(self.paths):
            weights: list[Tensor] = []
            for number, node in enumerate(path):
                weight = probs.new_ones(())
                if node.parent >= 0:
                    above = place[path[node.parent].state]
                    weight = weights[node.parent] * probs[above, node.token]
                if node.known:
                    here = probs[place[node.state]]
                    fits = node.table.target.to(here.device) <= self.vocab_size
                    weight = weight / here[fits].sum().clamp(min=torch.finfo(here.dtype).tiny)
                weights.append(weight)
                taken = [one.token for one in path if one.parent == number]
                groups.setdefault(id(node.table), []).append((i, node, number, weight, taken))
        for members in groups.values():
            state = torch.tensor([place[node.state] for _, node, *_ in members]).to(probs.device)
            weight = torch.stack([weight for *_, weight, _ in members])
            share = probs[state] * weight[:, None]
            for m, (*_, taken) in enumerate(members):
                share[m, taken] = 0.0
            yield members, share
