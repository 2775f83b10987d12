"""Answer questions about a saved trace on the terminal: `opdlab trace FILE worst`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opdlab.commands.output import Output
from opdlab.data.labels import load_labelled
from opdlab.errors import InvalidValue
from opdlab.viz import questions
from opdlab.viz.markup import format_number


def ask_trace(
    file: Path,
    question: str,
    about: Sequence[str],
    output: Output,
    *,
    by: str = "",
    n: int = 10,
    context: int = 8,
) -> None:
    """Ask a trace something and print the answer.

    Args:
        file: The trace's file.
        question: "describe", "worst", "where" or "compare".
        about: The conditions of "where", or the other file of "compare".
        output: Where to print; its `result` becomes the answer.
        by: The channel that "worst" and "compare" go by; "" for the first.
        n: The largest number of tokens that are listed.
        context: Tokens of text before and after each.

    Raises:
        OpdlabError: The question and what it is about do not go together, or the trace has no such
            channel.
    """
    if question in ("describe", "worst") and about:
        raise InvalidValue(
            f"opdlab trace {question} got {about[0]!r}. Leave it out; conditions belong to"
            " 'where', a second file to 'compare'."
        )
    if by and question in ("describe", "where"):
        raise InvalidValue(f"opdlab trace {question} goes by no channel. Leave --by out.")
    trace = load_labelled(file)
    if question == "describe":
        answer = questions.describe(trace)
    elif question == "worst":
        answer = questions.worst(trace, by, n, context)
    elif question == "where":
        if not about:
            raise InvalidValue("opdlab trace where got no condition. Add one: 'reverse_kl > 1'.")
        answer = questions.where(trace, about, n, context)
    else:
        if len(about) != 1:
            raise InvalidValue(
                f"opdlab trace compare got {len(about)} other files. Give one: opdlab trace"
                " before.parquet compare after.parquet."
            )
        answer = questions.compare(trace, load_labelled(about[0]), by, n, context)
    output.result = answer
    if not output.is_json:
        for line in _lines(answer):
            output.say(line)


def _lines(answer: dict[str, Any]) -> list[str]:
    """The answer in words, a line each."""
    question = answer["question"]
    if question == "describe":
        head = f"{answer['tokens']} tokens of {len(answer['completions'])} completions under"
        lines = [f"{head} {', '.join(answer['policies'])}"]
        for channel in answer["channels"]:
            counts = channel.get("counts")
            told = (
                ", ".join(f"{name} {count}" for name, count in counts.items())
                if counts is not None
                else f"mean {_said(channel['mean'])}, {_said(channel['least'])} to"
                f" {_said(channel['most'])} {channel['unit']}"
            )
            lines.append(f"  {channel['key']}: {told.strip()}")
        return lines
    lines = []
    if question == "where":
        share = answer["share_of_tokens"] or 0.0
        lines.append(f"{answer['count']} tokens, {100 * share:.1f} % of all")
        lines += [
            f"  {100 * share:.1f} % of {key}"
            for key, share in answer["share_of"].items()
            if share is not None
        ]
    if question == "compare":
        lines += [
            f"  {one['key']}: {_said(one['first'])} then {_said(one['second'])} {one['unit']}"
            for one in answer["means"]
        ]
        if not answer["same_tokens"]:
            lines.append("The tokens differ, so no token is compared.")
    return lines + [_token_line(record, answer.get("by", "")) for record in answer["tokens"]]


def _token_line(record: dict[str, Any], by: str) -> str:
    place = f"completion {record['sample']}, position {record['position']}"
    text = f"{record['before']}[{record['token']}]{record['after']}"
    if "change" in record:
        value = f"{_said(record['first'])} then {_said(record['second'])}"
    else:
        value = _said(record["values"][by]) if by else ""
    return f"{place}: {value + '  ' if value else ''}{' '.join(text.split())}"


def _said(value: float | str | None) -> str:
    if isinstance(value, float):
        return format_number(value)
    return "–" if value is None else value
