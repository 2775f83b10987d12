"""Two real tokenizers for one world: words and digits, and characters for the black-box teacher."""

from __future__ import annotations

import string
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opdlab.tasks.market import world

SPECIALS = ["<pad>", "<eos>", "<system>", "<user>", "<assistant>"]
_WORDS = "has total and receipt ? . ; = + - sum pays lot hint add take coupon say".split()
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if m['role'] == 'assistant'"
    " %}<eos>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def words() -> PreTrainedTokenizerFast:
    """Make the tokenizer with one token per word or digit.

    `▁` marks the space before it, as SentencePiece does, so pieces re-join exactly.

    Returns:
        A tokenizer with special tokens and a chat template.
    """
    vocab = [
        *world.NAMES,
        *world.ITEMS,
        *world.GAIN,
        *world.LOSS,
        *world.LETTERS,
        *string.digits,
        *_WORDS,
    ]
    return _fast(
        [f"▁{w}" for w in vocab],
        pre_tokenizers.Metaspace(prepend_scheme="always"),
        decoders.Metaspace(prepend_scheme="always"),
    )


def characters() -> PreTrainedTokenizerFast:
    """Make the tokenizer with one token per character: another one for the same texts.

    Returns:
        A tokenizer with special tokens and a chat template.
    """
    alphabet = string.ascii_lowercase + string.digits + " .,;=+-?"
    return _fast(
        list(alphabet), pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"), decoders.Fuse()
    )


def _fast(
    pieces: list[str], split: pre_tokenizers.PreTokenizer, decoder: decoders.Decoder
) -> PreTrainedTokenizerFast:
    vocab = {piece: i for i, piece in enumerate([*SPECIALS, "<unk>", *pieces])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoder
    # mypy knows no types of the constructor.
    make: Any = PreTrainedTokenizerFast
    made: PreTrainedTokenizerFast = make(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=SPECIALS[2:],
        chat_template=TEMPLATE,
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )
    return made
