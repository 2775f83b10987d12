"""The text that a teacher wrote, together with the reason why it ends."""

from __future__ import annotations

from typing import Literal, get_args

from opdlab.errors import InvalidValue

Finish = Literal["stop", "length"]


class WrittenText(str):
    """Hold a text that knows whether its writer finished it.

    It is the plain text wherever a `str` is wanted.

    Teachers return these from `write`. A text that was cut at its length limit is trained on
    without an EOS token, so that the student does not learn to stop in the middle. Slices and other
    results of `str` methods are plain strings again, so code that changes a text wraps the result:
    `WrittenText(text.strip(), text.finish)`. A plain `str` from a teacher of your own counts as
    finished.

    Args:
        text: The text, without the token that ends it.
        finish: "stop" where the writer ended the text, "length" where it was cut.

    Raises:
        InvalidValue: `finish` is something else.
    """

    finish: Finish

    def __new__(cls, text: str, finish: Finish = "stop") -> WrittenText:
        """Make the text; see the class."""
        if finish not in get_args(Finish):
            raise InvalidValue(f"WrittenText got finish={finish!r}. Use 'stop' or 'length'.")
        written = super().__new__(cls, text)
        written.finish = finish
        return written


def finish_of(text: str) -> Finish:
    """Tell why a teacher's text ends; a plain string counts as finished.

    Args:
        text: The text, a `WrittenText` or a plain string.

    Returns:
        The text's own `finish`, or "stop".
    """
    return text.finish if isinstance(text, WrittenText) else "stop"
