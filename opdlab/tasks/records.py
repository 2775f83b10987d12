"""Read the records of a data set as prompts.

`docs/data.md` lists the formats. A record that fits none of them is refused with its number and
column. Columns that nothing reads are named once.
"""

from __future__ import annotations

import gzip
import json
import math
import numbers
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import pandas as pd

from opdlab.data.conversation import FinalText, ToolCall
from opdlab.data.prompt import Prompt, read_hint, read_messages, read_tools
from opdlab.errors import InvalidValue, OpdlabError
from opdlab.models.tool_calls import write_hermes
from opdlab.support.expect import shortened

# Columns that hold the question and the answer; the first that is there counts.
ASKED = ("prompt", "messages", "conversations", "text")
ANSWERED = ("answer", "completion")
# Which of a chat's turns of the assistant are its answer; see `opdlab.tasks.from_records`.
AnswerTurns = Literal["last", "reply", "all"]
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
_OTHER_FILES = {
    b"PAR1": "parquet",
    b"PK\x03\x04": "zip",
    b"ARROW1": "arrow",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
}


def read_prompts(
    records: Any, keep: Sequence[str] = (), turns: AnswerTurns = "last"
) -> list[Prompt]:
    """Read all prompts of a data set.

    Args:
        records: An iterable of records (a `datasets.Dataset`, a list of dicts, a generator), a
            DataFrame, a dict of columns, a list of texts or of `Prompt`s, or the path of a JSONL
            file, which may be gzipped.
        keep: Columns whose values become the prompts' `metadata`; every record needs them.
        turns: Which turns of the assistant are a chat's answer; see `from_records`.

    Returns:
        One prompt per record, in order. An answer of several turns is a `FinalText`.

    Raises:
        InvalidValue: They are something else, or a record cannot be understood. The message names
            its number and column.
        OpdlabError: The file cannot be read. The message names the line.
    """
    prompts: list[Prompt] = []
    numbers_of_ids: dict[str, int] = {}
    unread: dict[str, None] = {}
    answers_twice = 0
    for number, record in enumerate(_records(records)):
        reader = _Record(record, number, keep, turns)
        prompt = reader.prompt()
        if prompt.id in numbers_of_ids:
            raise InvalidValue(
                f"Records {numbers_of_ids[prompt.id]} and {number} have the same id {prompt.id!r}. "
                "Give each record its own id, or leave the column out and they are numbered."
            )
        numbers_of_ids[prompt.id] = number
        unread |= dict.fromkeys(reader.unread)
        answers_twice += reader.leaves_turn_out
        prompts.append(prompt)
    if unread:
        warnings.warn(
            f"Nothing reads the column{'s' * (len(unread) > 1)} {', '.join(unread)}. Prompts are"
            f" read from {', '.join(ASKED)}, answers from {' or '.join(ANSWERED)}, hints from hint,"
            " names from id, tools from tools: rename a column that should count, name it in keep="
            " where it belongs to the prompt, and drop the rest.",
            stacklevel=3,
        )
    if answers_twice:
        warnings.warn(
            f"{answers_twice} chats end with an assistant's message although there is a column for"
            " the answer. The message is left out of the prompt, and the column counts.",
            stacklevel=3,
        )
    return prompts


# Where records come from. Tables of polars and Arrow are known by the method that gives their rows.


@runtime_checkable
class _PolarsTable(Protocol):
    def to_dicts(self) -> Iterable[dict[str, Any]]: ...


@runtime_checkable
class _ArrowTable(Protocol):
    def to_pylist(self) -> Iterable[dict[str, Any]]: ...


@runtime_checkable
class _Array(Protocol):
    """An array or a column of numpy, pandas or torch."""

    def tolist(self) -> Any: ...


def _records(source: Any) -> Iterable[Any]:
    if isinstance(source, (str, os.PathLike)):
        return _of_file(source)
    if isinstance(source, Mapping):
        return _of_mapping(source)
    if isinstance(source, pd.DataFrame):
        return _of_mapping({str(name): source[name].tolist() for name in source.columns})
    if isinstance(source, _PolarsTable):
        return list(source.to_dicts())
    if isinstance(source, _ArrowTable):
        return list(source.to_pylist())
    if isinstance(source, (bytes, Prompt)) or not isinstance(source, Iterable):
        raise InvalidValue(
            f"from_records got {shortened(source)}. Use a data set, a list of dicts, a DataFrame, a"
            " dict of columns, or the path of a JSONL file."
        )
    return source


def _of_mapping(source: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """The rows of a dict of columns.

    Dicts of splits and single records are refused, since there are several ways to read them.
    """
    columns = {str(name): _as_list(column) for name, column in source.items()}
    lists = {name: column for name, column in columns.items() if isinstance(column, (list, tuple))}
    asked = [columns[name] for name in ASKED if name in columns]
    if any(not isinstance(column, (list, tuple)) or _is_chat(column) for column in asked):
        raise InvalidValue(
            f"from_records got one record, with the columns {', '.join(columns)}. Put it into a"
            " list."
        )
    if not asked:
        raise InvalidValue(
            f"from_records got a dict with the keys {', '.join(columns) or '(none)'}. Where these"
            f" are splits, give one of them, as records[{next(iter(columns), 'train')!r}]; in a"
            f" dict of columns, name one {', '.join(ASKED)}."
        )
    lengths = {name: len(column) for name, column in lists.items()}
    if len(lists) < len(columns) or len(set(lengths.values())) > 1:
        sizes = {name: lengths.get(name, shortened(columns[name])) for name in columns}
        raise InvalidValue(
            "from_records got columns of different lengths:"
            f" {', '.join(f'{name} {size}' for name, size in sizes.items())}. Give every column one"
            " value a record."
        )
    return (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))


def _as_list(value: Any) -> Any:
    """An array as a list; anything else as it is."""
    return value.tolist() if isinstance(value, _Array) else value


def _of_file(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file, or of a JSON file with one list."""
    text = _text_of(path)
    if text.lstrip().startswith("["):
        try:
            whole = _parsed(text)
        except (ValueError, RecursionError):
            whole = None  # perhaps a list in the first of several lines: the line is named below
        if isinstance(whole, list) and all(isinstance(record, dict) for record in whole):
            yield from whole
            return
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON may hold U+2028
        if not line.strip():
            continue
        try:
            record = _parsed(line)
            if not isinstance(record, dict):
                raise ValueError(f"it is a {type(record).__name__}")
        except RecursionError:
            raise OpdlabError(
                f"{path} line {number} is nested too deeply to be read. Write one flat object a"
                " line."
            ) from None
        except ValueError as error:
            raise OpdlabError(
                f"{path} line {number} is not a JSON object ({error}). Write one object a line."
            ) from error
        yield record


def _text_of(path: str | os.PathLike[str]) -> str:
    try:
        data = Path(path).read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise OpdlabError(
            f"The records {shortened(os.fspath(path))} cannot be read: {reason}. Give the path of a"
            " JSONL file."
        ) from error
    for start, kind in _OTHER_FILES.items():
        if data.startswith(start):
            raise OpdlabError(
                f"{path} is a {kind} file. Write the records as JSONL, or load them with the"
                " datasets library and give the data set."
            )
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise OpdlabError(
            f"{path} line {line} is no UTF-8 (byte {error.start} of the file). Save the file as"
            " UTF-8."
        ) from error


def _parsed(text: str) -> Any:
    """Parse JSON. Numbers stay as they are written, since an answer may have more than 17 digits.

    Raises:
        ValueError: It is no JSON, or an object has a key twice.
    """
    return json.loads(
        text, object_pairs_hook=_without_repeats, parse_float=Decimal, parse_int=Decimal
    )


def _without_repeats(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"it has the key {shortened(name)} twice")
    return dict(pairs)


# One record.


class _Record:
    """A record that is being read; it remembers which of its columns were.

    Attributes:
        columns: Its values by column.
        number: Its number, for errors.
        keep: Columns that become the prompt's metadata.
        turns: Which turns of the assistant are a chat's answer.
        present: The columns that are not missing.
        read: Names of the columns that were read, or need not be.
        leaves_turn_out: Whether an assistant's last message gave way to a column with the answer.
    """

    def __init__(
        self, record: Any, number: int, keep: Sequence[str] = (), turns: AnswerTurns = "last"
    ) -> None:
        if isinstance(record, (str, Prompt)):
            record = {"prompt": record}
        if not isinstance(record, Mapping):
            raise InvalidValue(
                f"Record {number} is {shortened(record)}. Use a dict, as {{'prompt': '…', 'answer':"
                " '…'}, or a text."
            )
        self.columns = {str(name): value for name, value in record.items()}
        self.number, self.keep, self.turns = number, keep, turns
        self.present = {
            name: value for name, value in self.columns.items() if not _is_missing(value)
        }
        self.read = {*ASKED, *ANSWERED, "hint", "id", "tools"} - self.present.keys()
        self.leaves_turn_out = False

    @property
    def unread(self) -> list[str]:
        """Columns that nothing has read."""
        return [name for name in self.columns if name not in self.read]

    def prompt(self) -> Prompt:
        """Read the record as a prompt.

        Raises:
            InvalidValue: A column holds something else than it should.
            OpdlabError: It has no prompt.
        """
        column = self._column_asked()
        asked = self._value(column)
        if isinstance(asked, Prompt):
            asked = asked if asked.id else replace(asked, id=str(self.number))
            added = {k: self._kept(k) for k in self.keep if k not in asked.metadata}
            return replace(asked, metadata={**asked.metadata, **added}) if added else asked
        answer = self._answer()
        rest = {"hint": self._of("hint", read_hint), "id": self._of("id", _id) or str(self.number)}
        rest["metadata"] = {name: self._kept(name) for name in self.keep}
        rest["tools"] = self._of("tools", _tools) or ()
        if isinstance(asked, str):
            return self._make(column, text=asked, answer=answer, **rest)
        if not isinstance(asked, (list, tuple)):
            raise self._wrong(
                column, f"it is {shortened(asked)}. Use a text, or a list of chat messages"
            )
        return self._of_chat(column, answer, rest)

    def _kept(self, name: str) -> Any:
        """The value of a column that becomes metadata."""
        if name not in self.present:
            there = shortened(self.columns[name]) if name in self.columns else "not there"
            raise InvalidValue(
                f"Record {self.number}, column {name}: it is {there}, and keep= names it. Give"
                " every record a value, or leave the column out of keep."
            )
        return _with_plain_numbers(self._value(name))

    def _column_asked(self) -> str:
        """The column that holds the question."""
        for name in ASKED:
            if name in self.present:
                return name
        empty = [name for name in ASKED if name in self.columns][:1]
        said = "".join(f"Its {name} is {shortened(self.columns[name])}. " for name in empty)
        raise OpdlabError(
            f"Record {self.number} has no prompt; its columns are {', '.join(self.columns)}."
            f" {said}Name one {', '.join(ASKED)}."
        )

    def _of_chat(self, column: str, answer: str | None, rest: dict[str, Any]) -> Prompt:
        """The prompt of a chat, whose last message may be the assistant's answer."""
        messages = self._of(column, _messages)
        cut = _find_answer(messages, self.turns)
        if cut is not None:
            said = messages[cut:]
            text = _text_of_turn(said[-1]) if answer is None else answer
            return self._make(column, messages=messages[:cut], answer=FinalText(text, said), **rest)
        last = messages[-1]
        if len(messages) > 1 and last["role"] == "assistant" and not last.get("tool_calls"):
            self.leaves_turn_out = answer is not None
            answer = messages[-1]["content"] if answer is None else answer
            messages = messages[:-1]
        if messages[-1].get("tool_calls"):
            raise self._wrong(
                column,
                "the chat ends with a tool call. End it before that turn (the student makes the"
                " call itself, with an environment), or after the answer; to train on the call, say"
                " turns='all'",
            )
        if messages[-1]["role"] == "assistant":
            raise self._wrong(
                column,
                "the chat asks nothing before its answer. Let a user's message stand before the"
                " assistant's",
            )
        answer = answer if answer and answer.strip() else None
        return self._make(column, messages=messages, answer=answer, **rest)

    def _answer(self) -> str | None:
        column = next((name for name in ANSWERED if name in self.present), None)
        return None if column is None else self._of(column, _answer)

    def _value(self, column: str) -> Any:
        """The value of a column, which counts as read."""
        self.read.add(column)
        return _as_list(self.present[column])

    def _of(self, column: str, read: Callable[[Any], Any]) -> Any:
        """The value of a column as `read` understands it; None if it is missing."""
        if column not in self.present:
            return None
        try:
            return read(self._value(column))
        except InvalidValue as error:
            raise self._wrong(column, str(error).rstrip(".")) from None

    def _make(self, column: str, **fields: Any) -> Prompt:
        try:
            return Prompt(**fields)
        except InvalidValue as error:
            raise self._wrong(column, str(error).rstrip(".")) from None

    def _wrong(self, column: str, what: str) -> InvalidValue:
        return InvalidValue(f"Record {self.number}, column {column}: {what}.")


def _is_missing(value: Any) -> bool:
    """Tell whether it is None, an empty text or list, NaN, or pandas' sign for a missing cell."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, (list, tuple, Mapping)):
        return not value
    return isinstance(value, (float, Decimal)) and math.isnan(value)


def _is_chat(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], Mapping)


def _messages(chat: Any) -> tuple[dict[str, Any], ...]:
    """Chat messages, also as ShareGPT writes them, with `from` and `value`."""
    if isinstance(chat, (list, tuple)):
        chat = [_turn(_with_plain_numbers(turn), number) for number, turn in enumerate(chat)]
    return tuple(_calls(message) for message in read_messages(chat))


def _find_answer(messages: Sequence[Mapping[str, Any]], turns: AnswerTurns) -> int | None:
    """Where the answer of several turns begins; None where the last message alone is one."""
    roles = [message["role"] for message in messages]
    if turns == "last" or roles[-1] != "assistant":
        return None
    users = [place for place, role in enumerate(roles) if role == "user"]
    start = users[-1] + 1 if turns == "reply" and users else 0
    found = roles.index("assistant", start)
    return found if found > 0 else None


def _text_of_turn(message: Mapping[str, Any]) -> str:
    """The text of an assistant's turn; its calls as Hermes models write them."""
    calls = []
    for call in message.get("tool_calls") or ():
        inner = call.get("function", call)
        calls.append(ToolCall(inner["name"], inner.get("arguments") or {}))
    return write_hermes(str(message["content"]), calls) if calls else str(message["content"])


def _with_plain_numbers(value: Any) -> Any:
    """The same with Python's own numbers.

    Templates write parts of a message, as tool calls, as JSON.
    """
    if isinstance(value, Mapping):
        return {name: _with_plain_numbers(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_plain_numbers(one) for one in value]
    if isinstance(value, Decimal):
        is_whole = value == value.to_integral_value() and "." not in str(value)
        return int(value) if is_whole else float(value)
    return value


def _turn(turn: Any, number: int) -> Any:
    if not isinstance(turn, Mapping) or turn.get("from") is None or turn.get("role") is not None:
        return turn
    role = _SHAREGPT_ROLES.get(str(turn["from"]))
    if role is None:
        raise InvalidValue(
            f"messages[{number}] is from {shortened(turn['from'])}. Use one of"
            f" {', '.join(_SHAREGPT_ROLES)}."
        )
    return {"role": role, "content": turn.get("value")}


def _tools(value: Any) -> tuple[dict[str, Any], ...]:
    """Schemas of tools: a list, or the JSON of one, as data sets of mixed schemas store it."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise InvalidValue(
                "the tools are a text that is no JSON. Use a list of schemas"
            ) from None
    return read_tools([_without_none(tool) for tool in _with_plain_numbers(value)])


def _without_none(value: Any) -> Any:
    """The same without empty entries: tables fill up the fields of other records' schemas."""
    if isinstance(value, Mapping):
        return {name: _without_none(one) for name, one in value.items() if one is not None}
    if isinstance(value, (list, tuple)):
        return [_without_none(one) for one in value]
    return value


def _calls(message: dict[str, Any]) -> dict[str, Any]:
    """The same message, with the arguments of its calls as objects, as templates want them.

    Data sets and servers store them as JSON texts, or with empty entries for other tools.
    """
    calls = message.get("tool_calls")
    if not isinstance(calls, (list, tuple)):
        return message
    read = []
    for call in calls:
        inner = call.get("function", call) if isinstance(call, Mapping) else {}
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise InvalidValue(
                f"the tool call is {shortened(call)}. Use {{'type': 'function', 'function':"
                " {'name': …, 'arguments': {…}}}"
            )
        arguments = inner.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                raise InvalidValue(
                    f"the arguments of the tool call {inner['name']} are no JSON"
                ) from None
        whole = {**_without_none(inner), "arguments": _without_none(arguments)}
        read.append({**_without_none(call), "function": whole} if "function" in call else whole)
    return {**message, "tool_calls": read}


def _answer(value: Any) -> str:
    """An answer: a text, a number, or an assistant's message."""
    if isinstance(value, Mapping):
        value = [value]
    if _is_chat(value):
        messages = _messages(value)
        if len(messages) > 1 or messages[0]["role"] != "assistant":
            raise InvalidValue(
                f"{len(messages)} messages are no answer. Use one message of the assistant, or a"
                " text"
            )
        return str(messages[0]["content"])
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return str(Decimal(int(value)))  # Python writes no int of more than 4300 digits
    if isinstance(value, (str, bool, numbers.Real, Decimal)):
        return str(value)
    raise InvalidValue(f"the answer is {shortened(value)}. Use one text or number")


def _id(value: Any) -> str:
    """A name: a text or a whole number, which pandas may have made a float."""
    if (
        isinstance(value, (numbers.Integral, float, Decimal))
        and not isinstance(value, bool)
        and value == int(value)
    ):
        return str(int(value))
    if not isinstance(value, str):
        raise InvalidValue(f"the id is {shortened(value)}. Use a text or a whole number")
    return value
