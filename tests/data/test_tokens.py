"""Token bytes re-join to the text, whatever the tokenizer."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import opdlab.data
from opdlab.data.tokens import token_bytes
from opdlab.tasks.market import market, tokenizers

TEXTS = [
    "the quick brown fox",
    "🙂 jumps 👩‍👩‍👧",
    "世界 and the lazy dog",
    "naïve café\n\tx = 1;",
    " \u00a0 ",
    "é\u0301",
]


def rejoined(tokenizer, text: str) -> bytes:
    return b"".join(token_bytes(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"]))


@pytest.fixture(scope="module")
def sentencepiece() -> PreTrainedTokenizerFast:
    """SentencePiece's pieces: `▁` for a space, `<0x0A>` for a byte without a piece of its own."""
    pieces = [
        "<s>",
        "</s>",
        "<unk>",
        *[f"<0x{b:02X}>" for b in range(256)],
        *"▁abcdefghijklmnopqrstuvwxyz",
        "▁t",
        "▁th",
        "▁the",
    ]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    tokenizer = Tokenizer(
        models.BPE(
            {p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_bpe(bytes_bpe, text):
    ids = bytes_bpe(text)["input_ids"]
    assert b"".join(token_bytes(bytes_bpe, ids)) == text.encode()
    assert all(token_bytes(bytes_bpe, ids))


@given(text=st.text(max_size=12))
def test_byte_level_bpe_on_any_text(bytes_bpe, text):
    assert rejoined(bytes_bpe, text) == text.encode()


def test_a_character_may_be_split_over_tokens(bytes_bpe):
    pieces = token_bytes(bytes_bpe, bytes_bpe("👩")["input_ids"])
    assert len(pieces) > 1
    assert b"".join(pieces) == "👩".encode()
    with pytest.raises(UnicodeDecodeError):
        pieces[0].decode()


def test_special_and_added_tokens_stand_for_their_own_text(bytes_bpe):
    assert token_bytes(bytes_bpe, [bytes_bpe.eos_token_id]) == [b"<|end|>"]
    more = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(bytes_bpe.backend_tokenizer.to_str()),
        eos_token="<|end|>",
    )
    more.add_tokens([AddedToken("Übung ½", normalized=False), "→", "Ġ!"])
    assert rejoined(more, "the Übung ½→ fox") == "the Übung ½→ fox".encode()
    assert token_bytes(more, more.convert_tokens_to_ids(["Ġ!"])) == ["Ġ!".encode()]


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_with_byte_fallback(sentencepiece, text):
    assert rejoined(sentencepiece, text) == text.encode()


def test_sentencepiece_pieces(sentencepiece):
    assert token_bytes(
        sentencepiece, sentencepiece(" the\n", add_special_tokens=False)["input_ids"]
    ) == [b" the", b"\n"]


@pytest.mark.parametrize("kind", [tokenizers.words, tokenizers.characters])
def test_the_markets_tokenizers(kind):
    tokenizer = kind()
    for prompt in market(secret=True).prompts(5):
        text = prompt.answer
        joined = rejoined(tokenizer, text).decode()
        assert joined.removeprefix(" ") == text
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_ids_that_nobody_has_are_empty(bytes_bpe):
    assert token_bytes(bytes_bpe, [10_000]) == [b""]


def test_data_know_no_models():
    """Rollouts and sums over bytes are tensors; everything else of `opdlab.data` is plain data."""
    for path in Path(opdlab.data.__file__).parent.glob("*.py"):
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add((node.module or "").partition(".")[0])
        heavy = found & {"torch", "transformers", "peft", "accelerate", "tokenizers"}
        with_tensors = path.name in ("rollout.py", "byte_maps.py")
        assert heavy <= ({"torch"} if with_tensors else set()), path.name
