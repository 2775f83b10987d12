"""Make the requests that ask a server for text, and read its replies.

A server can be asked to go on with an unfinished answer in these ways:

completion   the chat rendered to text, with the unfinished answer at its end (/completions)
prefill      the unfinished answer as last message, to be continued: the fields of vLLM and SGLang
             (/chat/completions)
prefix       the same as DeepSeek and Mistral spell it: `"prefix": true` in the message
instruct     the unfinished answer as a message of the assistant, then a plain request to go on;
             repetitions of it are cut
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from opdlab.data.conversation import ToolCall
from opdlab.data.prompt import PlainText, Prompt
from opdlab.errors import InvalidValue, OpdlabError
from opdlab.models.plain_text import without_control_tokens
from opdlab.models.tool_calls import write_hermes
from opdlab.teachers.redaction import plain
from opdlab.teachers.reply import Fault, raise_error_of

WAYS = ("completion", "prefill", "prefix", "instruct")
GO_ON = (
    "Your last message was cut off. Go on from exactly where it stops, with the very next"
    " character, in the same style. Write only what comes next: do not repeat anything, do not"
    " start over, do not comment."
)
# Finish reasons of answers that are whole or cut. Together and older TGI say "eos" and "eos_token"
# for "stop".
FINISHED = {"stop": "stop", "eos": "stop", "eos_token": "stop", "length": "length"}  # nosec B105  # no password
LONGEST_TOKEN = 1024  # characters
SHORTEST_ECHO = 12  # characters: a shorter repetition may be the text itself


def make_request(
    prompt: Prompt, prefix: str, way: str, template: PreTrainedTokenizerBase | None
) -> tuple[str, dict[str, Any]]:
    """Make the request for an answer to `prompt`, going on from `prefix` if there is one.

    Args:
        prompt: The question.
        prefix: An unfinished answer, or "".
        way: The way to ask for more of it, one of `WAYS`.
        template: Renders the chat for "completion".

    Returns:
        The path and the body, without model and sampling fields.

    Raises:
        OpdlabError: The chat must be rendered, and there is no template.
    """
    if prompt.messages is None:
        return "/completions", {"prompt": f"{prompt.text}{prefix}"}
    if way == "completion":
        return "/completions", {
            "prompt": render_chat(prompt, template) + _harmless(prefix, template)
        }
    messages = api_messages(prompt.messages)
    told: dict[str, Any] = {"tools": list(prompt.tools)} if prompt.tools else {}
    if not prefix:
        return "/chat/completions", {"messages": messages, **told}
    begun: dict[str, Any] = {"role": "assistant", "content": prefix}
    if way == "prefill":
        told |= {"continue_final_message": True, "add_generation_prompt": False}
        return "/chat/completions", {"messages": [*messages, begun], **told}
    if way == "prefix":
        return "/chat/completions", {"messages": [*messages, begun | {"prefix": True}], **told}
    asked = [*messages, begun, {"role": "user", "content": GO_ON}]
    return "/chat/completions", {"messages": asked, **told}


def api_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Write messages as servers read them: calls with ids, and arguments as JSON texts.

    Args:
        messages: The messages of a chat, tool calls and their results among them.

    Returns:
        New messages; those without calls are as they were.
    """
    written: list[dict[str, Any]] = []
    waiting: list[str] = []  # ids of calls whose results are still to come
    for number, message in enumerate(messages):
        one = dict(message)
        if one.get("tool_calls"):
            calls = []
            for place, call in enumerate(one["tool_calls"]):
                inner = call.get("function", call)
                given = inner.get("arguments", {})
                text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
                name = str(call.get("id") or f"call_{number}_{place}")
                waiting.append(name)
                function = {"name": inner["name"], "arguments": text}
                calls.append({"id": name, "type": "function", "function": function})
            one["tool_calls"] = calls
        elif one["role"] == "tool" and waiting:
            name = waiting.pop(0)
            one.setdefault("tool_call_id", name)
        written.append(one)
    return written


def render_chat(prompt: Prompt, template: PreTrainedTokenizerBase | None) -> str:
    """Render a chat as the text that the teacher's model reads, ready for its answer.

    The token of the beginning is left out, since a server adds it itself.

    Args:
        prompt: A prompt of messages.
        template: The tokenizer of the teacher's model; None if it is not known.

    Returns:
        The text, which ends where the answer begins.

    Raises:
        OpdlabError: There is no template.
    """
    if template is None or not template.chat_template:
        raise OpdlabError(
            "To go on by completion, the chat must be written as the teacher's model reads it, and"
            " no template is known. Give TextServer(…, template=AutoTokenizer.from_pretrained(…)),"
            " or another continue_by=."
        )
    tools: dict[str, Any] = {"tools": list(prompt.tools)} if prompt.tools else {}
    text = str(
        template.apply_chat_template(
            [_as_text(message, template) for message in prompt.messages or ()],
            tokenize=False,
            add_generation_prompt=True,
            **tools,
        )
    )
    return text.removeprefix(template.bos_token or "")


def _as_text(message: Mapping[str, Any], template: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A message whose text, if a tool or an environment said it, names no control token."""
    content = message["content"]
    if not isinstance(content, PlainText):
        return dict(message)
    return {**message, "content": without_control_tokens(content, template)}


def _harmless(text: str, template: PreTrainedTokenizerBase | None) -> str:
    """The text without the names of special tokens: a student may write `<eos>` by letters."""
    special = template.all_special_tokens if template is not None else ()
    before = ""
    while text != before:  # leaving one out may make another
        before = text
        for one in special:
            text = text.replace(one, "")
    return text


def read_continuation(text: str, prefix: str, way: str) -> str:
    """Return the part of a reply that goes on from `prefix`.

    Args:
        text: The text of a reply.
        prefix: The unfinished answer that was sent.
        way: The way in which the server was asked, one of `WAYS`.

    Returns:
        The text; for "instruct", without a repetition of the prefix.
    """
    return without_echo(text, prefix) if way == "instruct" else text


def without_echo(text: str, prefix: str) -> str:
    """Cut from the start of `text` its longest repetition of the end of `prefix`, or of all of it.

    Repetitions under `SHORTEST_ECHO` characters are left.

    Args:
        text: The text of a reply.
        prefix: The unfinished answer that was sent.

    Returns:
        The rest of the text, or all of it if it repeats nothing.
    """
    begun, said = prefix.rstrip(), text.lstrip()
    if begun and said.startswith(begun):
        return said[len(begun) :]
    for length in range(min(len(begun), len(said)), SHORTEST_ECHO - 1, -1):
        if begun.endswith(said[:length]):
            return said[length:]
    return text


def check_texts(prompts: Sequence[Prompt], prefixes: Sequence[str]) -> None:
    """Check that every prompt and prefix can be sent.

    Args:
        prompts: The questions.
        prefixes: One unfinished answer for each prompt, or "".

    Raises:
        InvalidValue: One holds half of a character (a lone surrogate), which is no text.
    """
    for i, (prompt, prefix) in enumerate(zip(prompts, prefixes, strict=True)):
        parts = [
            prompt.text or "",
            *(str(message.get("content")) for message in prompt.messages or ()),
            prefix,
        ]
        for part in parts:
            broken = find_lone_surrogate(part)
            if broken is not None:
                raise InvalidValue(
                    f"Prompt {prompt.id or i!r} holds {part[broken]!a}, half of a character, which"
                    " no tokenizer reads. Mend the text."
                )


def find_lone_surrogate(text: str) -> int | None:
    """Return where the text holds half of a character, or None.

    Args:
        text: Any text.

    Returns:
        The index of the first half of a character; None if the text is whole.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def read_choices(reply: Mapping[str, Any], most: int) -> list[dict[str, Any]]:
    """Read the texts of a reply.

    An empty text is an answer only if the model stopped at once. If it is the only one, the count
    of tokens must bear that out.

    Args:
        reply: The reply.
        most: The tokens that were asked for, over all texts.

    Returns:
        `{"text": …, "finish": …}` for each text.

    Raises:
        Fault: One is no whole answer.
    """
    listed = reply.get("choices")
    if not isinstance(listed, list) or not listed:
        raise Fault("the reply has no choices")
    return [_choice(choice, reply.get("usage"), len(listed), most) for choice in listed]


def check_no_error(choice: Any) -> None:
    """Check that a choice of a reply carries no error.

    Args:
        choice: A choice of the reply; anything but a dict passes.

    Raises:
        Fault: It carries an error. The message has the server's words.
    """
    if isinstance(choice, dict):
        raise_error_of(choice)


def read_finish(choice: Any) -> str:
    """Return "stop" for a whole answer and "length" for one that was cut.

    Servers say `abort` or `error` if they gave up, `content_filter` if they hold something back,
    `tool_calls` if the text is not the answer, and null if they do not know.

    Args:
        choice: A choice of the reply.

    Returns:
        "stop" or "length".

    Raises:
        Fault: The answer was broken off.
    """
    said = choice.get("finish_reason") if isinstance(choice, dict) else None
    if isinstance(said, str) and said in FINISHED:
        return FINISHED[said]
    if said == "content_filter":
        raise Fault("the server withheld the text (content_filter)")
    raise Fault(
        f"the server broke the text off (finish_reason {plain(said)}), so it is no whole answer"
    )


def _choice(choice: Any, usage: Any, n: int, most: int) -> dict[str, Any]:
    """One text with its finish; raises Fault if it is no whole answer."""
    check_no_error(choice)
    said = choice.get("message", choice) if isinstance(choice, dict) else None
    text = (
        (said.get("content") if "message" in choice else said.get("text"))
        if isinstance(said, dict)
        else None
    )
    if isinstance(said, dict) and said.get("tool_calls"):
        text = _read_calls(said)
    reason = plain(choice.get("finish_reason") if isinstance(choice, dict) else None)
    written = usage.get("completion_tokens") if isinstance(usage, dict) else None
    count = written if type(written) is int and written >= 0 else None
    if isinstance(choice, dict) and isinstance(text, str):
        has_calls = isinstance(said, dict) and bool(said.get("tool_calls"))
        ends_with_calls = has_calls and choice.get("finish_reason") == "tool_calls"
        finish = "stop" if ends_with_calls else read_finish(choice)
    else:
        raise Fault(
            f"a text is missing (finish_reason {reason}). Where the model thinks first, switch that"
            " off or allow more tokens"
        )
    if count is not None and count > most:
        raise Fault(f"the server wrote {count} tokens where {most} were asked for")
    if len(text) > most * LONGEST_TOKEN:
        raise Fault(f"a text has {len(text):,} characters where {most} tokens were asked for")
    # The end of a turn may take two tokens.
    stopped = finish == "stop" and (n > 1 or (count is not None and count <= 2))
    if not text and not stopped:
        raise Fault(
            f"a text is empty (finish_reason {reason}). Where the model thinks first, switch that"
            " off or allow more tokens"
        )
    if finish == "length":
        text = _without_half_character(text)
    broken = find_lone_surrogate(text)
    if broken is not None:
        raise Fault(f"a text holds {text[broken]!a}, half of a character")
    return {"text": text, "finish": finish}


def _read_calls(said: Mapping[str, Any]) -> str:
    """The calls that a server has read out of a text, written as a text again."""
    calls = []
    for call in said["tool_calls"] if isinstance(said["tool_calls"], list) else ():
        inner = call.get("function") if isinstance(call, dict) else None
        name = inner.get("name") if isinstance(inner, dict) else None
        given = inner.get("arguments") or {} if isinstance(inner, dict) else None
        try:
            arguments = json.loads(given) if isinstance(given, str) else given
        except ValueError:
            arguments = None
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise Fault(f"a tool call cannot be read: {plain(call)}")
        calls.append(ToolCall(name, arguments))
    return write_hermes(str(said.get("content") or ""), calls)


def _without_half_character(text: str) -> str:
    """A cut text without the half of a character that it may end with.

    That is U+FFFD for bytes, and a surrogate for UTF-16.
    """
    whole = text.rstrip("\ufffd")
    return whole[:-1] if whole and 0xD800 <= ord(whole[-1]) < 0xDC00 else whole
