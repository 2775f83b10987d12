"""Encode prompts to token ids: texts and chats, with one token of the beginning and no EOS.

A policy reads a prompt as its model was trained to: a chat through the tokenizer's template, a text
with the token of the beginning that the tokenizer puts before it. Both are prompts that the model
goes on from, so there is never an EOS token that the tokenizer added behind them, and never two
tokens of the beginning.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any
from weakref import WeakSet

from transformers import PreTrainedTokenizerBase

from opdlab.data.prompt import PlainText, Prompt, name_of
from opdlab.errors import InvalidValue, OpdlabError
from opdlab.models.plain_text import find_marks
from opdlab.models.templates import (
    Chat,
    apply_template,
    check_template,
    put_system_in_user,
    render_first_form,
    takes_system,
    template_arguments,
    text_arguments,
)

# Tokenizers whose users know that special tokens in a text are read as such.
_warned: WeakSet[PreTrainedTokenizerBase] = WeakSet()


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

    Returns:
        Token ids of each prompt, in the order of `prompts`.

    Raises:
        OpdlabError: A chat cannot be rendered. The message names the prompt.
    """
    texts = [i for i, prompt in enumerate(prompts) if prompt.messages is None]
    chats = [i for i, prompt in enumerate(prompts) if prompt.messages is not None]
    rows: list[list[int]] = [[] for _ in prompts]
    if texts:
        encoded = _encode_texts(tokenizer, [prompts[i] for i in texts], eos)
        for i, row in zip(texts, encoded, strict=True):
            rows[i] = row
    for tools, group in group_by_tools([prompts[i] for i in chats]):
        together = [chats[j] for j in group]
        told = with_tools(tokenizer, tools, options)
        encoded = _encode_chats(tokenizer, [prompts[i] for i in together], told, eos)
        for i, row in zip(together, encoded, strict=True):
            rows[i] = row
    return rows


def group_by_tools(
    prompts: Sequence[Prompt],
) -> list[tuple[tuple[dict[str, Any], ...], list[int]]]:
    """Group prompts that show the same tools.

    Args:
        prompts: The prompts.

    Returns:
        The tools of each group, with the numbers of its prompts.
    """
    groups: dict[str, tuple[tuple[dict[str, Any], ...], list[int]]] = {}
    for number, prompt in enumerate(prompts):
        key = repr(prompt.tools) if prompt.tools else ""
        groups.setdefault(key, (prompt.tools, []))[1].append(number)
    return list(groups.values())


def with_tools(
    tokenizer: PreTrainedTokenizerBase, tools: Sequence[dict[str, Any]], options: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Add a prompt's tools to the arguments for the template.

    Args:
        tokenizer: Brings the template.
        tools: The schemas; none leaves the arguments as they are.
        options: The policy's arguments for the template.

    Returns:
        The arguments, with `tools`.

    Raises:
        InvalidValue: The template does not read tools.
    """
    if not tools:
        return options
    templates = options.get("chat_template", tokenizer.chat_template)
    source = " ".join(templates.values()) if isinstance(templates, Mapping) else str(templates)
    if templates and not re.search(r"\btools\b", source):
        raise InvalidValue(
            f"The prompt shows the tool {tools[0]['function']['name']!r}, but this tokenizer's chat"
            " template does not read tools. Load the policy with a template that does, as"
            " Policy.load(…, chat_template=opdlab.models.tool_templates.CHATML_WITH_TOOLS) for"
            " models that know <|im_start|>."
        )
    return {**options, "tools": list(tools)}


def _encode_texts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    eos: Collection[int],
) -> list[list[int]]:
    rows = [list(row) for row in tokenizer([prompt.text for prompt in prompts])["input_ids"]]
    added = _find_added_end(tokenizer, eos)
    if added:
        rows = [row[: -len(added)] for row in rows]
    begin = tokenizer.bos_token_id
    if begin is not None:
        rows = [_keep_one_beginning(row, begin) for row in rows]
    ends = _find_ends(tokenizer, eos)
    spelled = next((i for i, row in enumerate(rows) if not ends.isdisjoint(row[1:])), None)
    if spelled is not None and tokenizer not in _warned:
        written_by_template = _find_template_tokens(tokenizer)
        for prompt, row in zip(prompts[spelled:], rows[spelled:], strict=True):
            # A chat that was rendered before, as its markers of roles show, rightly holds the ends
            # of its turns.
            is_rendered = not (written_by_template - ends).isdisjoint(row)
            odd = ends - written_by_template if is_rendered else ends
            _warn_of_special_tokens(tokenizer, prompt, [i for i in row[1:] if i in odd])
    return rows


def _find_added_end(tokenizer: PreTrainedTokenizerBase, eos: Collection[int]) -> list[int]:
    """Find the tokens that the tokenizer puts behind every text, if they would end the prompt."""
    bare, whole = (
        [*tokenizer("a", add_special_tokens=special)["input_ids"]] for special in (False, True)
    )
    if not bare or len(whole) == len(bare):
        return []
    start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), len(whole))
    added = whole[start + len(bare) :]
    return added if set(added) <= {*eos, tokenizer.eos_token_id, tokenizer.sep_token_id} else []


def _keep_one_beginning(row: list[int], begin: int) -> list[int]:
    """Take away a second token of the beginning.

    A text that was rendered before may spell one, and the tokenizer adds its own.
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
    chats = [[dict(message) for message in prompt.messages or ()] for prompt in prompts]
    sanitizes = bool(options.get("sanitize_control_tokens"))
    marks = None if sanitizes else find_marks(tokenizer, chats, options)
    if marks is not None:
        chats = [marks.mark(chat) for chat in chats]
    if not takes_system(tokenizer, prompts, options):
        chats = [put_system_in_user(chat) for chat in chats]
    try:  # all at once, which saves half of the time
        arguments = text_arguments(options)
        rendered_at_once = tokenizer.apply_chat_template(chats, tokenize=False, **arguments)
        texts = [str(text) for text in rendered_at_once]
    except Exception:
        rendered = [
            _render(tokenizer, prompt, chat, options)
            for prompt, chat in zip(prompts, chats, strict=True)
        ]
        chats, texts = [chat for chat, _ in rendered], [text for _, text in rendered]
    if sanitizes:
        arguments = {**template_arguments(options), "return_dict": False}
        return [[*map(int, tokenizer.apply_chat_template(chat, **arguments))] for chat in chats]
    if marks is not None:
        rows = [marks.encode(tokenizer, text) for text in texts]
    else:
        rows = [list(row) for row in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    if tokenizer not in _warned:
        known = {
            str(tokenizer.convert_ids_to_tokens(i)): i
            for i in _find_ends(tokenizer, eos) | _find_template_tokens(tokenizer)
        }
        for prompt in prompts:
            contents = [message["content"] for message in prompt.messages or ()]
            said = "\n".join(one for one in contents if not isinstance(one, PlainText))
            _warn_of_special_tokens(
                tokenizer, prompt, [i for token, i in known.items() if token in said]
            )
    return rows


def _render(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, chat: Chat, options: Mapping[str, Any]
) -> tuple[Chat, str]:
    try:
        check_template(tokenizer, options)
        return render_first_form(tokenizer, chat, options)
    except OpdlabError as error:
        raise OpdlabError(f"Prompt {name_of(prompt)} is a chat, but {error}") from error.__cause__


# Special tokens that a prompt spells.


def _find_ends(tokenizer: PreTrainedTokenizerBase, eos: Collection[int]) -> set[int]:
    """Find the special tokens that begin, end or fill a text.

    A policy may also stop at an ordinary token, as a line break.
    """
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    return special & {*eos, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}


def _find_template_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Find the special or added tokens that the chat template writes around messages."""
    if not tokenizer.chat_template:
        return set()
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    try:
        ids = tokenizer(apply_template(tokenizer, turns, {}), add_special_tokens=False)["input_ids"]
    except Exception:
        return set()
    # Not spaces: Gemma adds line breaks.
    added = {i for token, i in tokenizer.get_added_vocab().items() if not token.isspace()}
    return set(ids) & (added | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id}


def _warn_of_special_tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, ids: Sequence[int]
) -> None:
    """Warn once for each tokenizer that a prompt's text holds special tokens.

    It may not be meant.
    """
    if not ids or tokenizer in _warned:
        return
    _warned.add(tokenizer)
    way = "If it is not meant, take it out of the text."
    if prompt.messages is not None:
        way = (
            "To read such texts letter by letter: Policy.load(…,"
            " chat_template_kwargs={'sanitize_control_tokens': True})."
        )
    warnings.warn(
        f"Prompt {name_of(prompt)} spells the special token"
        f" {tokenizer.convert_ids_to_tokens(ids[0])!r} in its text, and the model reads it as that"
        f" token. {way}",
        stacklevel=2,
    )
