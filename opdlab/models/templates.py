"""Render chats to texts through a tokenizer's chat template, with the template's arguments.

Templates fail in many ways on chats that they were not written for; the functions here try other
forms of the chat before they raise an error.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import transformers
from transformers import PreTrainedTokenizerBase

from opdlab.data.prompt import Prompt
from opdlab.errors import InvalidValue, OpdlabError
from opdlab.support.expect import shortened

Chat = list[dict[str, Any]]

# Arguments of `apply_chat_template` that would change its result, and not the text of the chat.
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


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Iterable[Mapping[str, Any]],
    options: Mapping[str, Any],
) -> str:
    """Render a chat to the text that the model reads, ready for its answer.

    Templates without a system role (they raise an error, or leave the message out) get its content
    in front of the first user's message, and templates that insist on alternating roles get
    neighbours of one role as one message.

    Args:
        tokenizer: Brings the template.
        messages: The chat.
        options: More arguments for the template.

    Returns:
        The text, special tokens included.

    Raises:
        OpdlabError: The tokenizer has no template, or the template refuses the chat.
    """
    chat = [dict(message) for message in messages]
    check_template(tokenizer, options)
    return render_first_form(tokenizer, chat, options)[1]


def can_sanitize(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether transformers can read spelled special tokens letter by letter: from 5.20 on."""
    parameters = inspect.signature(tokenizer.apply_chat_template).parameters
    return "sanitize_control_tokens" in parameters


def check_template_options(tokenizer: PreTrainedTokenizerBase, options: Any) -> dict[str, Any]:
    """Check the arguments for a chat template when a policy is made, before they are used.

    Args:
        tokenizer: Brings the template.
        options: As the user gave them.

    Returns:
        The arguments as a dict.

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
    if "sanitize_control_tokens" in options and not can_sanitize(tokenizer):
        raise InvalidValue(
            "chat_template_kwargs has sanitize_control_tokens, which transformers"
            f" {transformers.__version__} does not know. Install transformers 5.20 or newer."
        )
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    probe = turns if options.get("continue_final_message") else turns[:1]
    try:
        apply_template(tokenizer, probe, options)
    except Exception as error:
        raise InvalidValue(
            f"The chat template fails with chat_template_kwargs={shortened(dict(options))}:"
            f" {_message(error)}"
        ) from error
    return dict(options)


def end_token(
    tokenizer: PreTrainedTokenizerBase,
    eos: Collection[int],
    chat_template_kwargs: Mapping[str, Any],
    *,
    is_chat: bool,
) -> int | None:
    """Choose the token of an EOS set that ends a policy's answers.

    Several models end a turn of a chat with another token than a text: Gemma with `<end_of_turn>`,
    not with `<eos>`. So for a chat it is the first token of the set behind an assistant's turn, as
    the chat template writes it.

    Args:
        tokenizer: Brings the template.
        eos: The tokens that end the policy's texts.
        chat_template_kwargs: The policy's arguments for the template.
        is_chat: Whether the prompt is a chat.

    Returns:
        A token id; None where the set is empty.
    """
    if is_chat:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        options = {
            **chat_template_kwargs,
            "add_generation_prompt": False,
            "continue_final_message": False,
        }
        try:
            asked, answered = (
                apply_template(tokenizer, part, options) for part in (turns[:1], turns)
            )
        except Exception:
            asked = answered = ""  # no template, or one for other chats than this
        behind = tokenizer(answered.removeprefix(asked), add_special_tokens=False)["input_ids"]
        found = next((token for token in behind if token in eos), None)
        if found is not None:
            return int(found)
    if tokenizer.eos_token_id in eos:
        return int(tokenizer.eos_token_id)
    return min(eos, default=None)


def check_template(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> None:
    """Check that there is a template for chats.

    Args:
        tokenizer: Brings the template.
        options: Arguments for the template; `chat_template` among them counts as one.

    Raises:
        OpdlabError: There is none.
    """
    if not tokenizer.chat_template and "chat_template" not in options:
        raise OpdlabError(
            "there is no chat template in the tokenizer. Give plain texts (Prompt(text)), set"
            " tokenizer.chat_template, or load the policy with the tokenizer of a chat model:"
            " Policy.load(…, tokenizer=…)."
        )


def render_first_form(
    tokenizer: PreTrainedTokenizerBase, chat: Chat, options: Mapping[str, Any]
) -> tuple[Chat, str]:
    """Render a chat in the first form that the template accepts.

    The forms are: as it is, with the system message in the user's turn, with neighbours of one role
    joined, and with both changes.

    Args:
        tokenizer: Brings the template.
        chat: The messages.
        options: More arguments for the template.

    Returns:
        The chat in that form, and its text.

    Raises:
        OpdlabError: The template accepts none.
    """
    first: Exception | None = None
    for form in (
        chat,
        put_system_in_user(chat),
        _join_neighbours(chat),
        _join_neighbours(put_system_in_user(chat)),
    ):
        if first is not None and form == chat:
            continue
        try:
            return form, apply_template(tokenizer, form, options)
        except Exception as error:  # a template may fail in any way
            first = first or error
    assert first is not None
    raise OpdlabError(f"the chat template refuses it: {_message(first)}") from first


def takes_system(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], options: Mapping[str, Any]
) -> bool:
    """Tell whether a system message reaches the model.

    Some templates raise an error for one, some leave it out in silence.

    Args:
        tokenizer: Brings the template.
        prompts: Chats and texts; without a system message among them nothing is tried.
        options: More arguments for the template.

    Returns:
        True as well if no prompt has a system message.
    """
    if not any(
        message["role"] == "system" for prompt in prompts for message in prompt.messages or ()
    ):
        return True
    mark = "zq7 system zq7"
    open_end = {**options, "continue_final_message": False}
    try:
        return mark in apply_template(
            tokenizer,
            [{"role": "system", "content": mark}, {"role": "user", "content": "a"}],
            open_end,
        )
    except Exception:
        return False


def put_system_in_user(chat: Chat) -> Chat:
    """Put the content of a first system message in front of the first user's message.

    Args:
        chat: At least one message.

    Returns:
        The chat without its system message; the chat itself if it has none, or no user's message.
    """
    user = next((i for i, message in enumerate(chat) if message["role"] == "user"), None)
    if chat[0]["role"] != "system" or user is None:
        return chat
    both = {**chat[user], "content": f"{chat[0]['content']}\n\n{chat[user]['content']}"}
    return [*chat[1:user], both, *chat[user + 1 :]]


def _join_neighbours(chat: Chat) -> Chat:
    """Make one message of neighbours of one role."""
    groups = [list(group) for _, group in groupby(chat, key=lambda message: message["role"])]
    return [
        {**group[0], "content": "\n\n".join(message["content"] for message in group)}
        for group in groups
    ]


def apply_template(
    tokenizer: PreTrainedTokenizerBase, chat: Chat, options: Mapping[str, Any]
) -> str:
    """Render a chat as it is; the template may raise any error.

    Args:
        tokenizer: Brings the template.
        chat: The messages.
        options: More arguments for the template.

    Returns:
        The text.
    """
    return str(tokenizer.apply_chat_template(chat, tokenize=False, **text_arguments(options)))


def text_arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """Choose the arguments that matter for the text.

    Args:
        options: Arguments that the policy gives to the template.

    Returns:
        All but `sanitize_control_tokens`, completed by `template_arguments`.
    """
    return {
        name: value
        for name, value in template_arguments(options).items()
        if name != "sanitize_control_tokens"
    }


def template_arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the template's arguments: it opens an answer, unless it goes on with one.

    Args:
        options: Arguments that the policy gives to the template; they count before the default.

    Returns:
        The arguments with `add_generation_prompt`.
    """
    return {"add_generation_prompt": not options.get("continue_final_message"), **options}


def _message(error: Exception) -> str:
    return f"{' '.join(str(error).split()).rstrip('.') or type(error).__name__}."
