"""A language model small enough to be written down: one row of logits per prompt and prefix.

A `Table` stands wherever a method's plan or loss meets a policy: the batch takes its states (an
identity head, so the hidden states are the logits), a plan can have it write on from any tokens.
All in float64. Left out: training; the gradients of `opdlab.exact` are for `table.logits`, and a
step is a new table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opdlab.data.prompt import Prompt
from opdlab.data.rollout import Rollout
from opdlab.data.sampling_config import SamplingConfig
from opdlab.errors import OpdlabError
from opdlab.exact.letters import Letters
from opdlab.models.drawing import draw, refuse_broken
from opdlab.models.graded import States
from opdlab.models.head import Head

LARGEST = 200_000  # completions that are listed at once


@dataclass(frozen=True, eq=False)
class Table:
    """A next-token distribution for each of `S` prefixes: all texts of fewer than `length` tokens.

    Attributes:
        logits: `[X, S, V]`, float64: row `start(prefix)` of prompt `x` is what follows `prefix`.
        prompts: The `X` prompts.
        length: Tokens after which a text ends.
        eos: A token that ends a text before, or None.

    Raises:
        OpdlabError: The logits have another shape or type.
    """

    logits: Tensor
    prompts: tuple[Prompt, ...]
    length: int
    eos: int | None = None

    def __post_init__(self) -> None:
        want = (len(self.prompts), starts(self.vocab, self.length), self.vocab)
        if tuple(self.logits.shape) != want or self.logits.dtype != torch.float64:
            raise OpdlabError(
                f"A table's logits are {list(self.logits.shape)} in {self.logits.dtype} for"
                f" {want[0]} prompts and texts of {self.length} tokens. Give float64 [prompts,"
                f" prefixes, tokens], here {list(want)}."
            )

    @classmethod
    def random(
        cls,
        vocab: int = 3,
        length: int = 3,
        prompts: int | Sequence[Prompt] = 1,
        *,
        seed: int = 0,
        scale: float = 1.0,
        eos: int | None = None,
    ) -> Table:
        """Make a table of normal logits.

        Args:
            vocab: Number of tokens `V`.
            length: Tokens after which a text ends.
            prompts: The number of prompts, or the prompts themselves.
            seed: Seed of the logits.
            scale: Standard deviation of the logits.
            eos: A token that ends a text before, or None.

        Returns:
            The table.
        """
        asked = (
            tuple(Prompt(f"prompt {i}", id=str(i), hint=f"hint {i}") for i in range(prompts))
            if isinstance(prompts, int)
            else tuple(prompts)
        )
        shape = (len(asked), starts(vocab, length), vocab)
        noise = torch.randn(
            shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        return cls(scale * noise, asked, length, eos)

    @property
    def vocab(self) -> int:
        """Number of tokens `V`."""
        return self.logits.shape[-1]

    @property
    def logp(self) -> Tensor:
        """Log-probs `[X, S, V]`."""
        return self.logits.log_softmax(-1)

    @property
    def tokenizer(self) -> Letters:
        """A tokenizer with one token per letter."""
        return Letters(self.vocab, self.eos)

    def add(self, change: Tensor) -> Table:
        """Return the table with `change [X, S, V]` added to its logits.

        Args:
            change: `[X, S, V]`, float64.

        Returns:
            A new table; this one stays as it is.
        """
        return replace(self, logits=self.logits + change)

    def start(self, prefix: Sequence[int]) -> int:
        """Return the index of the row that follows `prefix`.

        Shorter prefixes come first, then the order of counting.

        Args:
            prefix: Token ids, fewer than `length`.

        Returns:
            The index, from 0 (the empty prefix) to S - 1.
        """
        number = 0
        for token in prefix:
            number = number * self.vocab + token
        return starts(self.vocab, len(prefix)) + number

    def place(self, prompt: Prompt) -> int:
        """Return the index of a prompt.

        Args:
            prompt: One of `prompts`.

        Returns:
            The index, from 0 to X - 1.

        Raises:
            OpdlabError: The table was not made for this prompt.
        """
        if prompt not in self.prompts:
            raise OpdlabError(
                f"The table has no row for prompt {prompt.id or prompt.text!r}. Use the prompts"
                " that it was made with."
            )
        return self.prompts.index(prompt)

    def where(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Find prompt and prefix of every completion token.

        `logits[where]` is what the token was drawn from.

        Args:
            rollout: Completions of the table's prompts.

        Returns:
            Index of the prompt and index of the prefix, `[tokens]` each.

        Raises:
            OpdlabError: The table was not made for one of the prompts.
        """
        known = {
            id(prompt): self.place(prompt)
            for prompt in {id(p): p for p in rollout.prompts}.values()
        }
        x = torch.tensor([known[id(prompt)] for prompt in rollout.prompts], dtype=torch.long)
        number, at = torch.zeros_like(x), []
        for t in range(rollout.ids.shape[1]):
            at.append(starts(self.vocab, t) + number)
            number = number * self.vocab + rollout.ids[:, t]
        return x.repeat_interleave(rollout.lengths), torch.stack(at, 1)[rollout.mask]

    def grade(self, rollout: Rollout) -> States:
        """Grade a rollout: its logits `[tokens, V]` behind an identity head.

        Args:
            rollout: Completions of the table's prompts.

        Returns:
            States whose hidden states are the logits, with the gradient of the table's.
        """
        return States(
            self.logits[self.where(rollout)],
            Head(torch.eye(self.vocab, dtype=torch.float64), None, self.vocab),
        )

    def own(self, rollout: Rollout) -> Rollout:
        """Return the same completions with this table's log-probs and entropies.

        They are then as if the table had written them.

        Args:
            rollout: Completions of the table's prompts.

        Returns:
            A new rollout; `logp` and `entropy` are float64, without gradient.
        """
        all_logp = self.logp.detach()[self.where(rollout)]
        logp = all_logp.gather(-1, rollout.ids[rollout.mask][:, None])[:, 0]
        entropy = -(all_logp.exp() * all_logp).sum(-1)
        none = torch.zeros(rollout.ids.shape, dtype=torch.float64)
        return replace(
            rollout,
            logp=none.masked_scatter(rollout.mask, logp),
            entropy=none.masked_scatter(rollout.mask, entropy),
        )

    def sample(
        self,
        prompts: Sequence[Prompt],
        n: int = 1,
        *,
        prefixes: Sequence[Sequence[int]] | None = None,
        batch_size: int | None = None,
        writer: str = "student",
        **options: Any,
    ) -> Rollout:
        """Sample completions as `Policy.sample`, by the same draws.

        A text ends where the table does, however many tokens were asked for.

        Args:
            prompts: Prompts that the table was made for.
            n: Completions per prompt.
            prefixes: Token ids that the texts of each prompt go on from; none by default.
            batch_size: Ignored.
            writer: The name of the writer that the rollout tells.
            options: Options of `SamplingConfig`; `max_new_tokens` is the table's length by default.

        Returns:
            The completions without their prefixes, with log-probs and entropies in nats.
        """
        config = SamplingConfig.of("sample", {"max_new_tokens": self.length, **options})
        begun = [
            list(prefix)
            for prefix in (prefixes if prefixes is not None else [[]] * len(prompts))
            for _ in range(n)
        ]
        asked = [prompt for prompt in prompts for _ in range(n)]
        seeded = torch.Generator().manual_seed(config.seed)
        uniform = torch.rand(
            len(prompts), n, config.max_new_tokens, generator=seeded, dtype=torch.float64
        ).flatten(0, 1)
        bodies: list[list[int]] = [[] for _ in asked]
        places = [self.place(prompt) for prompt in asked]
        for t in range(config.max_new_tokens):
            done = [
                len(start) + t >= self.length or body[-1:] == [self.eos]
                for start, body in zip(begun, bodies, strict=True)
            ]
            going = [i for i, over in enumerate(done) if not over]
            if not going:
                break
            logits = self.logits.detach()[
                [places[i] for i in going], [self.start(begun[i] + bodies[i]) for i in going]
            ]
            drawn = draw(logits, uniform[going, t], config)
            refuse_broken(~torch.isfinite(drawn.entropy).all())
            for i, token in zip(going, drawn.token.tolist(), strict=True):
                bodies[i].append(token)
        whole = make_rollout(
            asked,
            [start + body for start, body in zip(begun, bodies, strict=True)],
            self.tokenizer,
            n,
            writer,
        )
        return _continued(make_rollout(asked, bodies, self.tokenizer, n, writer), self.own(whole))

    def write(
        self,
        prompts: Sequence[Prompt],
        n: int = 1,
        *,
        prefixes: Sequence[str] | None = None,
        **options: Any,
    ) -> list[list[str]]:
        """Write `n` texts per prompt, as a teacher that only writes.

        The texts go on from `prefixes` and do not repeat them.

        Args:
            prompts: Prompts that the table was made for.
            n: Texts per prompt.
            prefixes: A text for each prompt to go on from; none by default.
            options: Options of `SamplingConfig`.

        Returns:
            `n` texts for each prompt.
        """
        begun = (
            None if prefixes is None else [self.tokenizer(text)["input_ids"] for text in prefixes]
        )
        texts = self.sample(prompts, n, prefixes=begun, **options).texts
        return [list(texts[i : i + n]) for i in range(0, len(texts), n)]

    def check(self, *_: object) -> None:
        """Accept every student and all prompts: a table has nothing to prepare.

        Args:
            *_: Ignored.
        """

    def __repr__(self) -> str:
        return f"Table({len(self.prompts)} prompts, {self.vocab} tokens, texts of {self.length})"


def starts(vocab: int, length: int) -> int:
    """Count the texts with fewer than `length` tokens: the sum of V^t for t < length.

    Args:
        vocab: Number of tokens `V`.
        length: Number of tokens.

    Returns:
        The number, the empty text among them.
    """
    return sum(vocab**t for t in range(length))


def everything(
    prompts: Sequence[Prompt],
    vocab: int,
    length: int,
    *,
    eos: int | None = None,
    by: Table | None = None,
) -> Rollout:
    """Enumerate every completion of every prompt.

    Args:
        prompts: The prompts.
        vocab: Number of tokens `V`.
        length: Tokens after which a text ends.
        eos: A token that ends a text before; without one there are `V^length` per prompt.
        by: The table with whose log-probs and entropies the rollout comes; None for zeros.

    Returns:
        The completions of all prompts, as many of each.

    Raises:
        OpdlabError: There are more than `LARGEST` completions.
    """
    if len(prompts) * vocab**length > LARGEST:
        raise OpdlabError(
            f"{len(prompts)} prompts and {vocab} tokens at {length} places make"
            f" {len(prompts) * vocab**length} completions; at most {LARGEST} are listed. Use fewer"
            " tokens or shorter texts, as vocab=4, length=3."
        )
    bodies: list[list[int]] = [[]]
    for _ in range(length):
        longer = []
        for body in bodies:
            is_done = bool(body) and body[-1] == eos
            longer += [body] if is_done else [[*body, token] for token in range(vocab)]
        bodies = longer
    asked = [prompt for prompt in prompts for _ in bodies]
    rollout = make_rollout(
        asked, bodies * len(prompts), Letters(vocab, eos), len(bodies), "student"
    )
    return by.own(rollout) if by is not None else rollout


def make_rollout(
    prompts: Sequence[Prompt], bodies: Sequence[list[int]], tokenizer: Letters, n: int, writer: str
) -> Rollout:
    """Make a rollout of given completions; log-probs and entropies are zeros.

    Args:
        prompts: The prompt of each completion.
        bodies: Token ids of each completion, as many.
        tokenizer: Turns ids into texts, and knows the EOS token.
        n: Completions per prompt.
        writer: The name of the writer of all.

    Returns:
        The rollout, of `B` completions.
    """
    width = max(1, *map(len, bodies))
    ids = torch.tensor([body + [0] * (width - len(body)) for body in bodies])
    none = torch.zeros(ids.shape, dtype=torch.float64)
    finish = tuple(
        "stop" if body and body[-1] == tokenizer.eos_token_id else "length" for body in bodies
    )
    texts = tuple(tokenizer.batch_decode(bodies, skip_special_tokens=True))
    lengths = torch.tensor([len(body) for body in bodies])
    return Rollout(
        tuple(prompts), ids, lengths, none, none.clone(), finish, texts, (writer,) * len(bodies), n
    )


def _continued(rollout: Rollout, whole: Rollout) -> Rollout:
    """The numbers of `whole` for the end of each text that `rollout` is."""
    values: dict[str, Any] = {}
    for name in ("logp", "entropy"):
        ends = [
            row[:b][b - a :]
            for row, a, b in zip(
                getattr(whole, name), rollout.lengths.tolist(), whole.lengths.tolist(), strict=True
            )
        ]
        values[name] = torch.zeros(rollout.ids.shape, dtype=torch.float64).masked_scatter(
            rollout.mask, torch.cat(ends)
        )
    return replace(rollout, **values)
