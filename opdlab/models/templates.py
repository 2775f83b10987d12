"""Render prompts to token ids: chat templates with their arguments, and special tokens at the
beginning and the end.

A policy reads a prompt as its model was trained to: a chat through the tokenizer's template, a text
with the token of the beginning that the tokenizer puts before it. Both are prompts that the model
goes on from, so there is never an EOS token that the tokenizer added behind them, and never two
tokens of the beginning.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any
from weakref import WeakSet

from transformers import PreTrainedTokenizerBase

from opdlab.data.prompt import Prompt, name_of
from opdlab.errors import InvalidValue, OpdlabError
from opdlab.support.expect import shortened

Chat = list[dict[str, Any]]

# Arguments of `apply_chat_template` that would change what it returns, and not what the model
# reads.
_RESERVED = {
    "conversation",
    "tokenize",
    "return_dict",
    "return_tensors",
    "return_assistant_tokens_mask",
    "padding",
    "truncation",
    "max_length",
    "tokenizer_kwargs",
}
_READ_BY_TRANSFORMERS = {
    "add_generation_prompt",
    "continue_final_message",
    "sanitize_control_tokens",
    "chat_template",
}
_warned: WeakSet[PreTrainedTokenizerBase] = (
    WeakSet()
)  # tokenizers whose users know that special tokens are read as such


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    options: Mapping[str, Any],
    eos: Collection[int],
) -> list[list[int]]:
    """Encode prompts, many at once.

    Args:
        tokenizer: Brings the chat template.
        prompts: Plain texts, chats, or both.
        options: More arguments for the chat template.
        eos: The tokens that end the policy's texts.

    Raises:
        OpdlabError: A chat cannot be rendered. The message names the prompt.
    """
    rows: list[list[int]] = [[] for _ in prompts]
    for is_chat, which in ((False, _encode_texts), (True, _encode_chats)):
        numbers = [
            i for i, prompt in enumerate(prompts) if (prompt.messages is not None) == is_chat
        ]
        if numbers:
            encoded = which(tokenizer, [prompts[i] for i in numbers], options, eos)
            for i, row in zip(numbers, encoded, strict=True):
                rows[i] = row
    return rows


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Iterable[Mapping[str, Any]],
    options: Mapping[str, Any],
) -> str:
    """Render a chat to the text that the model reads, ready for its answer.

    Templates without a system role (they raise an error, or leave the message out) get its content
    in front of the first user's message, and templates that insist on alternating roles get
    neighbours of one role as one message.

    Raises:
        OpdlabError: The tokenizer has no template, or the template refuses the chat.
    """
    chat = [dict(message) for message in messages]
    _check_template(tokenizer, options)
    return _first_that_renders(tokenizer, chat, options)[1]


def check_template_options(tokenizer: PreTrainedTokenizerBase, options: Any) -> dict[str, Any]:
    """Check the arguments for a chat template when a policy is made, before they are used for the
    first time.

    Raises:
        InvalidValue: One of them is read neither by the template nor by transformers, or the
            template fails with them.
    """
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        raise InvalidValue(
            f"chat_template_kwargs is {shortened(options)}. Use a dict of names and values, as"
            " {'enable_thinking': False}."
        )
    templates = options.get("chat_template", tokenizer.chat_template)
    if not options:
        return {}
    if not templates:
        raise InvalidValue(
            "The tokenizer has no chat template that could read"
            f" chat_template_kwargs={shortened(dict(options))}. Leave them out."
        )
    source = (
        " ".join(map(str, templates.values())) if isinstance(templates, Mapping) else str(templates)
    )
    for name in options:
        if name in _RESERVED:
            raise InvalidValue(
                f"chat_template_kwargs has {name}, which opdlab sets itself. Leave it out."
            )
        if name not in _READ_BY_TRANSFORMERS and not re.search(rf"\b{re.escape(name)}\b", source):
            raise InvalidValue(
                f"chat_template_kwargs has {name}, which this tokenizer's chat template does not"
                " read. Leave it out."
            )
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    probe = turns if options.get("continue_final_message") else turns[:1]
    try:
        _apply(tokenizer, probe, options)
    except Exception as error:
        raise InvalidValue(
            f"The chat template fails with chat_template_kwargs={shortened(dict(options))}:"
            f" {_said(error)}"
        ) from error
    return dict(options)


def end_token(
    tokenizer: PreTrainedTokenizerBase,
    eos: Collection[int],
    chat_template_kwargs: Mapping[str, Any],
    *,
    is_chat: bool,
) -> int | None:
    """Choose the token of an EOS set that ends a policy's answers; None where the set is empty.

    Several models end a turn of a chat with another token than a text: Gemma with `<end_of_turn>`,
    not with `<eos>`. So for a chat it is the first token of the set behind an assistant's turn, as
    the chat template writes it.
    """
    if is_chat:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        options = {
            **chat_template_kwargs,
            "add_generation_prompt": False,
            "continue_final_message": False,
        }
        try:
            asked, answered = (_apply(tokenizer, part, options) for part in (turns[:1], turns))
        except Exception:
            asked = answered = ""  # no template, or one for other chats than this
        behind = tokenizer(answered.removeprefix(asked), add_special_tokens=False)["input_ids"]
        found = next((token for token in behind if token in eos), None)
        if found is not None:
            return int(found)
    if tokenizer.eos_token_id in eos:
        return int(tokenizer.eos_token_id)
    return min(eos, default=None)


# Plain texts.


def _encode_texts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    options: Mapping[str, Any],
    eos: Collection[int],
) -> list[list[int]]:
    rows = [list(row) for row in tokenizer([prompt.text for prompt in prompts])["input_ids"]]
    added = _added_behind(tokenizer, eos)
    if added:
        rows = [row[: -len(added)] for row in rows]
    begin = tokenizer.bos_token_id
    if begin is not None:
        rows = [_with_one_beginning(row, begin) for row in rows]
    ends = _ends(tokenizer, eos)
    spelled = next((i for i, row in enumerate(rows) if not ends.isdisjoint(row[1:])), None)
    if spelled is not None and tokenizer not in _warned:
        written_by_template = _template_tokens(tokenizer)
        for prompt, row in zip(prompts[spelled:], rows[spelled:], strict=True):
            # a chat that was rendered before, as its markers of roles show, rightly holds the ends
            # of its turns
            is_rendered = not (written_by_template - ends).isdisjoint(row)
            _warn_of_special_tokens(
                tokenizer,
                prompt,
                [i for i in row[1:] if i in ends - (written_by_template if is_rendered else set())],
            )
    return rows


def _added_behind(tokenizer: PreTrainedTokenizerBase, eos: Collection[int]) -> list[int]:
    """The tokens that the tokenizer is set to put behind every text, where they would end the
    prompt.
    """
    bare, whole = (
        [*tokenizer("a", add_special_tokens=special)["input_ids"]] for special in (False, True)
    )
    if not bare or len(whole) == len(bare):
        return []
    start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), len(whole))
    added = whole[start + len(bare) :]
    return added if set(added) <= {*eos, tokenizer.eos_token_id, tokenizer.sep_token_id} else []


def _with_one_beginning(row: list[int], begin: int) -> list[int]:
    """A text that was rendered before may spell the token of the beginning, and the tokenizer adds
    its own.
    """
    while row[:2] == [begin, begin]:
        row = row[1:]
    return row


# Chats.


def _encode_chats(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    options: Mapping[str, Any],
    eos: Collection[int],
) -> list[list[int]]:
    sanitize = bool(options.get("sanitize_control_tokens"))
    takes_system = _takes_system(tokenizer, prompts, options)
    chats = [[dict(message) for message in prompt.messages or ()] for prompt in prompts]
    if not takes_system:
        chats = [_with_system_in_user(chat) for chat in chats]
    try:  # all at once, which saves half of the time
        texts = [
            str(text)
            for text in tokenizer.apply_chat_template(
                chats, tokenize=False, **_text_arguments(options)
            )
        ]
    except Exception:
        rendered = [
            _rendered(tokenizer, prompt, chat, options)
            for prompt, chat in zip(prompts, chats, strict=True)
        ]
        chats, texts = [chat for chat, _ in rendered], [text for _, text in rendered]
    if sanitize:
        arguments = {**_arguments(options), "return_dict": False}
        return [[*map(int, tokenizer.apply_chat_template(chat, **arguments))] for chat in chats]
    rows = [list(row) for row in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    if tokenizer not in _warned:
        known = {
            str(tokenizer.convert_ids_to_tokens(i)): i
            for i in _ends(tokenizer, eos) | _template_tokens(tokenizer)
        }
        for prompt in prompts:
            said = "\n".join(message["content"] for message in prompt.messages or ())
            _warn_of_special_tokens(
                tokenizer, prompt, [i for token, i in known.items() if token in said]
            )
    return rows


def _rendered(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, chat: Chat, options: Mapping[str, Any]
) -> tuple[Chat, str]:
    try:
        _check_template(tokenizer, options)
        return _first_that_renders(tokenizer, chat, options)
    except OpdlabError as error:
        raise OpdlabError(f"Prompt {name_of(prompt)} is a chat, but {error}") from error.__cause__


def _check_template(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> None:
    if not tokenizer.chat_template and "chat_template" not in options:
        raise OpdlabError(
            "there is no chat template in the tokenizer. Give plain texts (Prompt(text)), set"
            " tokenizer.chat_template, or load the policy with the tokenizer of a chat model:"
            " Policy.load(…, tokenizer=…)."
        )


def _first_that_renders(
    tokenizer: PreTrainedTokenizerBase, chat: Chat, options: Mapping[str, Any]
) -> tuple[Chat, str]:
    """The chat in the first form that the template accepts, and its text."""
    first: Exception | None = None
    for form in (
        chat,
        _with_system_in_user(chat),
        _with_neighbours_joined(chat),
        _with_neighbours_joined(_with_system_in_user(chat)),
    ):
        if first is not None and form == chat:
            continue
        try:
            return form, _apply(tokenizer, form, options)
        except Exception as error:  # a template may fail in any way
            first = first or error
    assert first is not None
    raise OpdlabError(f"the chat template refuses it: {_said(first)}") from first


def _takes_system(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], options: Mapping[str, Any]
) -> bool:
    """Whether a system message reaches the model.

    Some templates raise an error for one, some leave it out in silence.
    """
    if not any(
        message["role"] == "system" for prompt in prompts for message in prompt.messages or ()
    ):
        return True
    mark = "zq7 system zq7"
    open_end = {**options, "continue_final_message": False}
    try:
        return mark in _apply(
            tokenizer,
            [{"role": "system", "content": mark}, {"role": "user", "content": "a"}],
            open_end,
        )
    except Exception:
        return False


def _with_system_in_user(chat: Chat) -> Chat:
    """The content of a first system message in front of the first user's message."""
    user = next((i for i, message in enumerate(chat) if message["role"] == "user"), None)
    if chat[0]["role"] != "system" or user is None:
        return chat
    told = {**chat[user], "content": f"{chat[0]['content']}\n\n{chat[user]['content']}"}
    return [*chat[1:user], told, *chat[user + 1 :]]


def _with_neighbours_joined(chat: Chat) -> Chat:
    """Neighbouring messages of one role as one message."""
    groups = [list(group) for _, group in groupby(chat, key=lambda message: message["role"])]
    return [
        {**group[0], "content": "\n\n".join(message["content"] for message in group)}
        for group in groups
    ]


def _apply(tokenizer: PreTrainedTokenizerBase, chat: Chat, options: Mapping[str, Any]) -> str:
    return str(tokenizer.apply_chat_template(chat, tokenize=False, **_text_arguments(options)))


def _text_arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that matter for the text."""
    return {
        name: value
        for name, value in _arguments(options).items()
        if name != "sanitize_control_tokens"
    }


def _arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """The template's arguments: it opens an answer, unless it goes on with one."""
    return {"add_generation_prompt": not options.get("continue_final_message"), **options}


def _said(error: Exception) -> str:
    return f"{' '.join(str(error).split()).rstrip('.') or type(error).__name__}."


# Special tokens that a prompt spells.


def _ends(tokenizer: PreTrainedTokenizerBase, eos: Collection[int]) -> set[int]:
    """The special tokens that begin, end or fill a text.

    A policy may also stop at an ordinary token, as a line break.
    """
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    return special & {*eos, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}


def _template_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens of their own (special or added) that the chat template writes around messages."""
    if not tokenizer.chat_template:
        return set()
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    try:
        ids = tokenizer(_apply(tokenizer, turns, {}), add_special_tokens=False)["input_ids"]
    except Exception:
        return set()
    added = {
        i for token, i in tokenizer.get_added_vocab().items() if not token.isspace()
    }  # Gemma adds line breaks
    return set(ids) & (added | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id}


def _warn_of_special_tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, ids: Sequence[int]
) -> None:
    """Say once for each tokenizer that a prompt's text holds special tokens, since it may not be
    meant.
    """
    if not ids or tokenizer in _warned:
        return
    _warned.add(tokenizer)
    way = (
        "If it is not meant, take it out of the text."
        if prompt.messages is None
        else (
            "To read such texts letter by letter: Policy.load(…,"
            " chat_template_kwargs={'sanitize_control_tokens': True})."
        )
    )
    warnings.warn(
        f"Prompt {name_of(prompt)} spells the special token"
        f" {tokenizer.convert_ids_to_tokens(ids[0])!r} in its text, and the model reads it as that"
        f" token. {way}",
        stacklevel=2,
    )
