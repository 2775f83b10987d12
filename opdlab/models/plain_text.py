"""Keep the text of tools and environments from becoming control tokens.

A tokenizer reads `<|im_end|>` as the token that ends a turn, whoever wrote it. Where a `PlainText`
spells such a token, the spelling is put between two marks before the template renders the chat.
Behind it, what stands between marks is encoded as text, piece by piece. Texts that spell none are
encoded as they always were.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from opdlab.data.prompt import PlainText
from opdlab.errors import OpdlabError

# Characters of no language (Unicode's private use area), from which two are taken as marks.
_PRIVATE = range(0xE000, 0xF900)


def find_control_tokens(
    tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]
) -> dict[str, int]:
    """Find the tokens that no text of a tool may become.

    Args:
        tokenizer: The tokenizer.
        options: Arguments for the chat template; `chat_template` among them replaces its own.

    Returns:
        Ids by spelling: of special tokens, and of added tokens that the chat template writes, as
        `<tool_call>`. The token of unknown text is none of them, since text may become it.
    """
    templates = options.get("chat_template", tokenizer.chat_template)
    source = " ".join(templates.values()) if isinstance(templates, Mapping) else str(templates)
    special = set(tokenizer.all_special_tokens)
    return {
        token.content: number
        for number, token in tokenizer.added_tokens_decoder.items()
        if number != tokenizer.unk_token_id
        and (
            token.special
            or token.content in special
            or (token.content in source and not token.content.isspace())
        )
    }


class Marks:
    """Two characters around the control tokens that a chat's plain texts spell.

    Args:
        chats: The chats; the marks are characters that stand in none of them.
        control: Control tokens by spelling.
    """

    def __init__(
        self, chats: Sequence[Sequence[Mapping[str, Any]]], control: Mapping[str, int]
    ) -> None:
        used = set("".join(_texts_in(chats)))
        free = (chr(one) for one in _PRIVATE if chr(one) not in used)
        self.open, self.close = next(free), next(free)
        self.control = control
        longest_first = sorted(control, key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, longest_first)))
        self._marked = re.compile(f"{self.open}(.*?){self.close}|{self.open}|{self.close}", re.S)

    def mark(self, chat: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Put marks around the control tokens in the plain texts of a chat.

        Args:
            chat: The messages. Of a message whose content is a `PlainText`, every text counts (the
                name of a tool is written by a student), but for the role.

        Returns:
            New messages.
        """
        return [
            {key: value if key == "role" else self._put(value) for key, value in one.items()}
            if isinstance(one.get("content"), PlainText)
            else dict(one)
            for one in chat
        ]

    def _put(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._spelled.sub(lambda found: f"{self.open}{found[0]}{self.close}", value)
        if isinstance(value, Mapping):
            return {self._put(name): self._put(one) for name, one in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._put(one) for one in value]
        return value

    def encode(self, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        """Encode a rendered chat.

        Args:
            tokenizer: The tokenizer.
            text: The chat with its marks.

        Returns:
            Token ids, in which nothing between marks is a control token.

        Raises:
            OpdlabError: The tokenizer has no other way to read what stands between marks.
        """
        ids: list[int] = []
        at = 0
        for found in self._marked.finditer(text):
            ids += _encode_piece(tokenizer, text[at : found.start()], is_first=not at)
            ids += self._encode_letters(tokenizer, found[1] or "")
            at = found.end()
        return ids + _encode_piece(tokenizer, text[at:], is_first=not at)

    def _encode_letters(self, tokenizer: PreTrainedTokenizerBase, spelled: str) -> list[int]:
        """A control token's spelling as text; letter by letter where that is the only way."""
        forbidden = set(self.control.values())
        whole = _encode_piece(tokenizer, spelled, as_text=True)
        if forbidden.isdisjoint(whole):
            return whole
        letters = [i for one in spelled for i in _encode_piece(tokenizer, one, as_text=True)]
        if forbidden.isdisjoint(letters):
            return letters
        raise OpdlabError(
            f"A tool or an environment said {spelled!r}, and this tokenizer cannot read that as"
            " text. Let the environment leave it out."
        )


def find_marks(
    tokenizer: PreTrainedTokenizerBase,
    chats: Sequence[Sequence[Mapping[str, Any]]],
    options: Mapping[str, Any],
) -> Marks | None:
    """Find marks for chats, if a plain text of one spells a control token.

    Args:
        tokenizer: The tokenizer.
        chats: The chats.
        options: Arguments for the chat template.

    Returns:
        The marks; None where no plain text spells a control token, as is usual.
    """
    said = [
        text
        for chat in chats
        for one in chat
        if isinstance(one.get("content"), PlainText)
        for text in _texts_in({key: value for key, value in one.items() if key != "role"})
    ]
    if not said:
        return None
    control = find_control_tokens(tokenizer, options)
    is_spelled = any(token in text for token in control for text in said)
    return Marks(chats, control) if is_spelled else None


def without_control_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Leave the spellings of control tokens out of a text, also those that this would make.

    Args:
        text: The text.
        tokenizer: The tokenizer that will read it, with its chat template.

    Returns:
        The text without them.
    """
    control, before = find_control_tokens(tokenizer, {}), ""
    while text != before:
        before = text
        for spelled in control:
            text = text.replace(spelled, "")
    return text


def _texts_in(value: Any) -> Iterator[str]:
    """All texts within plain data, the names in it among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, one in value.items():
            yield from _texts_in(name)
            yield from _texts_in(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _texts_in(one)


def _encode_piece(
    tokenizer: PreTrainedTokenizerBase, piece: str, is_first: bool = False, as_text: bool = False
) -> list[int]:
    """The ids of a piece of a text.

    Behind a line break that is taken away again, since some tokenizers put a space before a text.
    """
    options = {"add_special_tokens": False, **({"split_special_tokens": True} if as_text else {})}
    if not piece:
        return []
    if not is_first:
        line_break = list(tokenizer("\n", **options)["input_ids"])
        ids = list(tokenizer(f"\n{piece}", **options)["input_ids"])
        if ids[: len(line_break)] == line_break:
            return ids[len(line_break) :]
    return list(tokenizer(piece, **options)["input_ids"])
