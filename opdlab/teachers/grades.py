"""Read a server's log-probs of a prompt, in the two forms that servers have for them.

Everything is checked and nothing is believed.

prompt_logprobs   vLLM: a list with one {token id: {"logprob": …, "rank": …, "decoded_token": …}}
                  per prompt token, null for the first
echo              legacy completions with `echo` and `logprobs`: tokens, token_logprobs,
                  top_logprobs; names are strings, or "token_id:17" if the server can (vLLM)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opdlab.teachers.redaction import plain
from opdlab.teachers.reply import Fault

# No model gives less. Lower numbers stand for "no probability", as -9999.0 at OpenAI and vLLM.
LEAST = -500.0
SLACK = 1e-3  # error that a server's rounding may add to a log-prob or a sum of probabilities


@dataclass(frozen=True)
class Names:
    """A tokenizer's strings, to read servers that name tokens by them.

    Attributes:
        strings: The string of every token id.
        ids: The ids that decode to a string.
    """

    strings: tuple[str, ...]
    ids: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, vocab: int) -> Names:
        """Decode each of the `vocab` token ids.

        Args:
            tokenizer: The student's tokenizer.
            vocab: Number of token ids to decode, from 0 on.

        Returns:
            The strings by id, and the ids by string.
        """
        strings = tuple(tokenizer.batch_decode([[i] for i in range(vocab)]))
        ids: dict[str, tuple[int, ...]] = {}
        for i, string in enumerate(strings):
            ids[string] = (*ids.get(string, ()), i)
        return cls(strings, ids)

    def find(self, name: str) -> int:
        """Return the id that a server means by `name`.

        Args:
            name: A token's string, or `token_id:` and a number.

        Returns:
            The token id.

        Raises:
            Fault: The name fits no token, or several.
        """
        if name.startswith("token_id:"):
            return _id(name[len("token_id:") :])
        found = self.ids.get(name, ())
        if len(found) != 1:
            raise Fault(
                f"the server names a token {plain(name)!r}, which is {len(found)} of the student's"
                " tokens. Serve the teacher with vLLM, which names tokens by id",
                final=True,
            )
        return found[0]


def read_logprobs(
    choice: Mapping[str, Any], ids: Sequence[int], way: str, names: Names
) -> list[dict[int, float]]:
    """Read the log-probs at each token of `ids` but the first.

    Args:
        choice: The reply's one choice.
        ids: The token ids that were sent.
        way: One of `logprob_server.WAYS`.
        names: The student's tokens.

    Returns:
        For each token, log-probs by id: of the likeliest tokens and of the token itself.

    Raises:
        Fault: The reply is something else.
    """
    if way == "prompt_logprobs":
        listed = choice.get("prompt_logprobs")
        if not isinstance(listed, list) or len(listed) != len(ids):
            raise Fault(
                f"prompt_logprobs has {len(listed) if isinstance(listed, list) else 'no'} entries"
                f" for {len(ids)} tokens"
            )
        seen = choice.get("prompt_token_ids")
        if isinstance(seen, list) and seen != list(ids):
            raise Fault("the server graded other token ids than were sent")
        return [_by_id(entry) for entry in listed[1:]]
    listed = choice.get("logprobs")
    said = [
        listed.get(name) if isinstance(listed, dict) else None
        for name in ("tokens", "token_logprobs", "top_logprobs")
    ]
    columns = [column if isinstance(column, list) else [] for column in said]
    lengths = [len(column) for column in columns]
    # The token that had to be written may be among them.
    if len(set(lengths)) > 1 or lengths[0] not in (len(ids), len(ids) + 1):
        raise Fault(
            f"the echo has {lengths} tokens, log-probs and top log-probs for {len(ids)} tokens"
        )
    rows = list(zip(*columns, ids, strict=False))
    return [_by_name(name, logp, top, token, names) for name, logp, top, token in rows[1:]]


def make_table(
    entries: Sequence[Mapping[int, float]], ids: Sequence[int], k: int, vocab: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Make tensors of the log-probs at some tokens.

    Args:
        entries: For each token, log-probs by id.
        ids: The tokens themselves.
        k: Number of the likeliest tokens to keep.
        vocab: Number of tokens of the student.

    Returns:
        The ids `[n, k]` of the likeliest tokens, their log-probs `[n, k]`, and those of the tokens
        themselves `[n]`. Log-probs are float32.

    Raises:
        Fault: The entries are no grades of these tokens.
    """
    k = min(k, vocab)
    order = [sorted(entry, key=lambda i: (-entry[i], i)) for entry in entries]
    for entry, ranked, token in zip(entries, order, ids, strict=True):
        if not all(0 <= i < vocab for i in ranked):
            raise Fault(
                f"the server names token {max(ranked)}, and the student has {vocab}: these are"
                " other tokenizers",
                final=True,
            )
        if token not in entry:
            raise Fault(
                f"the server graded other tokens than were sent: id {token} has no log-prob"
            )
        if len(ranked) < k:
            raise Fault(
                f"the server gives {len(ranked)} log-probs a token where {k} were asked for: ask"
                f" for k={len(ranked)}",
                final=True,
            )
        if len(ranked) > k + 1 or (
            len(ranked) == k + 1 and entry[token] > entry[ranked[k]] + SLACK
        ):
            raise Fault(
                f"the server gives {len(ranked)} log-probs for a token, and they are not the {k}"
                " likeliest and its own",
                final=True,
            )
        if sum(map(math.exp, entry.values())) > 1 + SLACK:
            raise Fault("the server's probabilities sum to more than one")
    kept = [ranked[:k] for ranked in order]
    top = [[entry[i] for i in row] for entry, row in zip(entries, kept, strict=True)]
    sampled = [entry[token] for entry, token in zip(entries, ids, strict=True)]
    return (
        torch.tensor(kept).view(-1, k),
        torch.tensor(top, dtype=torch.float32).view(-1, k),
        torch.tensor(sampled, dtype=torch.float32),
    )


def read_names(choice: Mapping[str, Any], ids: Sequence[int], way: str) -> list[str | None]:
    """Return the server's names for the tokens of a prompt, all but the first.

    Args:
        choice: A choice of the reply.
        ids: The token ids that were sent.
        way: The form of the log-probs, "prompt_logprobs" or "echo".

    Returns:
        One name for each of `ids[1:]`; None where the server gives no name.
    """
    if way != "prompt_logprobs":
        return [
            name if isinstance(name, str) and not name.startswith("token_id:") else None
            for name in choice["logprobs"]["tokens"][1 : len(ids)]
        ]
    entries = [
        entry.get(str(i)) for entry, i in zip(choice["prompt_logprobs"][1:], ids[1:], strict=True)
    ]
    found = [entry.get("decoded_token") if isinstance(entry, dict) else None for entry in entries]
    return [name if isinstance(name, str) else None for name in found]


def _by_id(entry: Any) -> dict[int, float]:
    if not isinstance(entry, dict):
        raise Fault("a token of the prompt has no log-probs")
    listed = [
        (_id(name), _logp(value.get("logprob") if isinstance(value, dict) else value))
        for name, value in entry.items()
    ]
    return _distinct(listed)


def _by_name(name: Any, logp: Any, top: Any, token: int, names: Names) -> dict[int, float]:
    """Log-probs by id at an echoed token, which must be the token that was sent."""
    if not isinstance(name, str) or not isinstance(top, dict):
        raise Fault("a token of the echo has no log-probs")
    same = (
        _id(name[len("token_id:") :]) == token
        if name.startswith("token_id:")
        else name == names.strings[token]
    )
    if not same:
        raise Fault(
            f"the server graded other tokens than were sent: {plain(name)!r} and not"
            f" {names.strings[token]!r}"
        )
    own = _logp(logp)
    if name in top and abs(_logp(top[name]) - own) > SLACK:
        raise Fault(
            f"the server gives the token {plain(name)!r} two log-probs, {own:g} and"
            f" {plain(top[name])}"
        )
    rest = [(names.find(other), _logp(value)) for other, value in top.items() if other != name]
    return _distinct([*rest, (token, own)])


def _distinct(listed: Sequence[tuple[int, float]]) -> dict[int, float]:
    """Log-probs by id; raises Fault if an id stands twice, since one of the two would be lost."""
    found: dict[int, float] = {}
    for token, logp in listed:
        if token in found:
            raise Fault(f"the server lists token {token} twice for one position")
        found[token] = logp
    return found


def _id(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or len(text) > 9:
        raise Fault(f"{plain(text)!r} is not a token id")
    return int(text)


def _logp(value: Any) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or (isinstance(value, float) and not math.isfinite(value))
        or value > SLACK
    ):
        raise Fault(f"a log-prob is {plain(value)}")
    if value < LEAST:
        raise Fault(
            f"a log-prob is {plain(value)}, which servers send for a token without any probability:"
            " nothing can be learned from it"
        )
    return min(0.0, float(value))
