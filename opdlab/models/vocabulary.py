"""Checks that a tokenizer's ids exist in its model: a missing row is an IndexError in the first
step, or a crashed GPU.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import cast
from weakref import WeakKeyDictionary

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opdlab.data.rollout import Rollout
from opdlab.errors import InvalidValue, TokenizerMismatch

_KNOWN: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, str]] = (
    WeakKeyDictionary()
)  # hashing 150,000 tokens takes 0.1 s
NAMED = 5  # tokens that a message lists


def check_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse tokens that the tokenizer can produce and the model has no row for.

    Raises:
        TokenizerMismatch: The embeddings or the output head end before the tokenizer's last id.
    """
    rows = vocabulary_rows(model)
    missing = sorted((id, token) for token, id in tokenizer.get_vocab().items() if id >= rows)
    if not missing:
        return
    named = ", ".join(f"{token!r} ({id})" for id, token in missing[:NAMED])
    more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
    tokens = "a token" if len(missing) == 1 else f"{len(missing)} tokens"
    raise TokenizerMismatch(
        f"The tokenizer has {tokens} that {type(model).__name__} lacks: {named}{more}. The model"
        f" has {rows} rows, for ids up to {rows - 1}. Give the model rows for them first:"
        f" model.resize_token_embeddings({missing[-1][0] + 1}); or use the tokenizer that the model"
        " was trained with."
    )


def check_eos(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, eos: Sequence[int]
) -> None:
    """Refuse EOS ids that the model can never write: rows beyond the tokenizer's last token are
    padding.

    Raises:
        InvalidValue: An id is negative, or beyond the last row or token.
    """
    rows = min(vocabulary_rows(model), max(tokenizer.get_vocab().values()) + 1)
    for id in eos:
        if not 0 <= id < rows:
            raise InvalidValue(
                f"Policy got eos={list(eos)}, but {type(model).__name__} has tokens from 0 to"
                f" {rows - 1}. Use ids of these."
            )


def vocabulary_rows(model: PreTrainedModel) -> int:
    """How many ids the model both reads and writes."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = [cast(Tensor, layer.weight) for layer in layers if layer is not None]
    return min(int(weight.shape[0]) for weight in weights)


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A short text that two tokenizers share exactly if every id is the same string in both."""
    size, known = _KNOWN.get(tokenizer, (-1, ""))
    if size != len(tokenizer):  # tokens can be added
        listed = json.dumps(sorted(tokenizer.get_vocab().items()))
        known = hashlib.sha256(listed.encode()).hexdigest()[:16]
        _KNOWN[tokenizer] = len(tokenizer), known
    return known


def check_written_with(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, rollout: Rollout, name: str
) -> None:
    """Check that the ids of a rollout are those of a policy's tokenizer.

    Of a rollout made by hand nothing is known.

    Args:
        tokenizer: The tokenizer of the policy that is to read the rollout.
        vocab_size: How many tokens its model has.
        rollout: What was written.
        name: The policy's name, for the error.

    Raises:
        TokenizerMismatch: They belong to another tokenizer, or are no tokens of the model.
    """
    if rollout.vocabulary is not None and rollout.vocabulary != fingerprint(tokenizer):
        raise TokenizerMismatch(
            f"The rollout was written with another tokenizer than that of {name}, so its ids would"
            " be read as unrelated tokens. Score it with the policy that wrote it, or write its"
            " texts with these tokens: opdlab.rollout_from_texts(policy, rollout.prompts,"
            " rollout.texts)."
        )
    largest = int(rollout.ids[rollout.mask].max()) if rollout.tokens else 0
    if largest >= vocab_size:
        raise TokenizerMismatch(
            f"The rollout holds the token id {largest}, but {name} has {vocab_size} tokens. Score"
            " it with the policy that wrote it."
        )
