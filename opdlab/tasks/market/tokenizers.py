"""Real tokenizers of the market: words and digits, characters, and the pieces of tool calls."""

from __future__ import annotations

import re
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
    pieces: list[str],
    split: pre_tokenizers.PreTokenizer,
    decoder: decoders.Decoder,
    specials: list[str] = SPECIALS,
    template: str = TEMPLATE,
) -> PreTrainedTokenizerFast:
    vocab = {piece: i for i, piece in enumerate([*specials, "<unk>", *pieces])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))  # nosec B106  # a token of text
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoder
    # mypy knows no types of the constructor.
    make: Any = PreTrainedTokenizerFast
    made: PreTrainedTokenizerFast = make(
        tokenizer_object=tokenizer,
        pad_token="<pad>",  # nosec B106  # tokens of text
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=specials[2:],
        chat_template=template,
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )
    return made


# The tokenizer of the market with a tool.

AGENT_SPECIALS = ["<pad>", "<eos>", "<system>", "<user>", "<assistant>", "<tool>", "<tools>"]
_CALL_PIECES = ["<tool_call>", "</tool_call>", '{"name": "', '", "arguments": {"item": "']
_CALL_PIECES += ['", "stall": ', "}}", '"}}', ", ", "+", "=", ",", "#", ".", '"', "{", "}", ":"]
_AGENT_WORDS = "price item stall total: buys and at stall# total? cost Error no tool".split()
_AGENT_WORDS += "ValueError not sold here hint".split()
AGENT_TEMPLATE = (
    "{% if tools %}<tools>{% for t in tools %}{{ t['function']['name'] }}{% endfor %}{% endif %}"
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% for c in m['tool_calls'] or [] %}"
    """<tool_call>{{ '{"name": "' + c['function']['name'] + '", "arguments": ' }}"""
    "{{ c['function']['arguments'] | tojson }}{{ '}' }}</tool_call>{% endfor %}"
    "{% if m['role'] == 'assistant' or m['role'] == 'tool' %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def calls() -> PreTrainedTokenizerFast:
    """Make the tokenizer of conversations with a tool: words, digits, and the pieces of a call.

    Calls are written as JSON within `<tool_call>` tags, as Qwen's models write them.

    Returns:
        A tokenizer with special tokens and a chat template that lists tools.
    """
    words = [*world.NAMES, *world.ITEMS, *_AGENT_WORDS]
    pieces = [*_CALL_PIECES, *string.digits, *words, *(f" {word}" for word in words)]
    whole = {*_CALL_PIECES, "total:", "total?", "stall#"}
    fixed = sorted(whole, key=lambda piece: (-len(piece), piece))  # longest first, in one order
    pattern = "|".join(
        [*(f" ?{re.escape(one)}" for one in fixed), " ?[A-Za-z]+", r"[0-9]", r"[\s\S]"]
    )
    return _fast(
        list(dict.fromkeys(pieces)),
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        decoders.Fuse(),
        specials=AGENT_SPECIALS,
        template=AGENT_TEMPLATE,
    )
