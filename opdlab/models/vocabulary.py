"""Fit the tokens of a tokenizer to the rows of its model.

An id that the model has no row for would be an IndexError in the first step, or a crashed GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opdlab.data.rollout import Rollout
from opdlab.errors import InvalidValue, TokenizerMismatch
from opdlab.models.fingerprints import vocabulary_digest
from opdlab.support.expect import shortened
from opdlab.support.validation import CountOrZero, validate

NAMED = 5  # tokens that a message lists
# Tokens that stand for something else than text, as tokenizers of model families that read more
# than text name them. The families' text models come without rows for them, as Gemma 3 1B does.
PLACEHOLDERS = ("image_token", "video_token", "audio_token")


def check_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse tokens that the tokenizer can produce and the model has no row for.

    The placeholders of images and the like may be missing, since only a text that spells them has
    them; see `check_readable`.

    Args:
        model: The model.
        tokenizer: Its tokenizer.

    Raises:
        TokenizerMismatch: The embeddings or the output head end before the tokenizer's last id.
    """
    rows = count_rows(model)
    placeholders = {getattr(tokenizer, name, None) for name in PLACEHOLDERS}
    missing = sorted(
        (id, token)
        for token, id in tokenizer.get_vocab().items()
        if id >= rows and token not in placeholders
    )
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


def check_readable(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, row: Sequence[int], name: str
) -> None:
    """Refuse a prompt with a token that the model has no row for.

    Args:
        tokenizer: The tokenizer that encoded the prompt.
        vocab_size: How many tokens the model has.
        row: The ids of the prompt, at least one.
        name: The prompt's name, for the error.

    Raises:
        TokenizerMismatch: It holds the placeholder of an image or the like.
    """
    largest = max(row)
    if largest >= vocab_size:
        raise TokenizerMismatch(
            f"Prompt {name} holds {tokenizer.convert_ids_to_tokens(largest)!r} ({largest}), and the"
            f" model has {vocab_size} tokens: it reads text alone. Take that out of the prompt."
        )


def find_eos(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    eos: int | Sequence[int] | None = None,
) -> frozenset[int]:
    """Find the tokens that end a text.

    Args:
        model: The model, whose generation settings may name some.
        tokenizer: Its tokenizer, which may name one.
        eos: Ids that the user gives in place of both.

    Returns:
        Token ids; empty where neither names one.

    Raises:
        InvalidValue: Something given is no token.
    """
    if eos is None:
        # Settings of transformers: none at all, no EOS, one id or several.
        named = getattr(model.generation_config, "eos_token_id", None)
        ids = [named] if isinstance(named, int) else list(named or [])
        # A default of the family may be none of this model's tokens.
        rows = count_rows(model)
        ids = [token for token in ids if 0 <= token < rows]
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        return frozenset(ids)
    given = [eos] if isinstance(eos, int) else eos
    try:
        ids = list(given)
    except TypeError:
        raise InvalidValue(
            f"Policy got eos={shortened(eos)}. Use the ids of tokens, as eos=[2]."
        ) from None
    ids = [validate("Policy", {"eos": token}, {"eos": CountOrZero})["eos"] for token in ids]
    _check_eos(model, tokenizer, ids)
    return frozenset(ids)


def _check_eos(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, eos: Sequence[int]
) -> None:
    """Refuse EOS ids that the model can never write.

    Rows beyond the tokenizer's last token are padding.
    """
    rows = min(count_rows(model), max(tokenizer.get_vocab().values()) + 1)
    for id in eos:
        if not 0 <= id < rows:
            raise InvalidValue(
                f"Policy got eos={list(eos)}, but {type(model).__name__} has tokens from 0 to"
                f" {rows - 1}. Use ids of these."
            )


def count_rows(model: PreTrainedModel) -> int:
    """Count the ids that the model both reads and writes.

    Args:
        model: The model.

    Returns:
        The rows of the smaller one of embeddings and output head.
    """
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = [cast(Tensor, layer.weight) for layer in layers if layer is not None]
    return min(int(weight.shape[0]) for weight in weights)


def pick_ordinary_tokens(model: PreTrainedModel, rows: int, count: int) -> list[int]:
    """Pick ids at random, always the same, for a made-up text.

    Ids that a configuration gives a meaning (padding, an image's place) are left out.

    Args:
        model: The model.
        rows: How many ids there are.
        count: How many to pick.

    Returns:
        `count` ids; one may occur twice.
    """
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


def check_written_with(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, rollout: Rollout, name: str
) -> None:
    """Check that the ids of a rollout are those of a policy's tokenizer.

    Nothing is known of a rollout that was made by hand, so that its ids only have to exist.

    Args:
        tokenizer: The tokenizer of the policy that is to read the rollout.
        vocab_size: How many tokens its model has.
        rollout: The rollout.
        name: The policy's name, for the error.

    Raises:
        TokenizerMismatch: They belong to another tokenizer, or are no tokens of the model.
    """
    if rollout.vocabulary is not None and rollout.vocabulary != vocabulary_digest(tokenizer):
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
