"""Read a server's reply: JSON of modest depth, no name twice, and no error inside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from opdlab.teachers.redaction import plain

AGAIN = (408, 409, 425, 429)  # and 5xx: asking again may help
DEEPEST = 64  # lists and objects within each other; replies of servers have about six


class Fault(Exception):
    """A reply that cannot be used.

    Args:
        what: The fault in words, as the message.
        wait, status, final, paid: See the attributes.

    Attributes:
        wait: Seconds that the server asks us to wait, or None.
        status: The HTTP status; None if there was no reply.
        final: Whether asking again cannot help.
        paid: Whether the server did the work.
    """

    def __init__(
        self,
        what: str,
        *,
        wait: float | None = None,
        status: int | None = 200,
        final: bool = False,
        paid: bool = True,
    ) -> None:
        super().__init__(what)
        self.wait, self.status, self.final, self.paid = wait, status, final, paid


def read_reply(content: bytes) -> dict[str, Any]:
    """Read a reply.

    Args:
        content: The bytes of its body.

    Returns:
        The JSON object.

    Raises:
        Fault: It is no JSON object, nested deeper than `DEEPEST`, or says one name twice.
    """
    try:
        reply = json.loads(content, object_pairs_hook=_object)
    except RecursionError:
        raise Fault(f"the reply is nested deeper than {DEEPEST}") from None
    except ValueError:
        raise Fault("the reply is not JSON") from None
    if not isinstance(reply, dict):
        raise Fault("the reply is not a JSON object")
    level: list[Any] = [reply]
    for _ in range(DEEPEST):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return reply
    raise Fault(f"the reply is nested deeper than {DEEPEST}")


def raise_error_of(answer: Mapping[str, Any]) -> None:
    """Raise Fault if a reply, or one of its choices, carries an error.

    Routers answer so with status 200: `{"error": {"message": "…", "code": 403}}`, or a text in
    place of the object, or the object alone, as `{"object": "error", "message": "…"}`.

    Args:
        answer: A reply, or one of its choices.

    Raises:
        Fault: It carries an error. The message has the server's words.
    """
    error = answer if answer.get("object") == "error" else answer.get("error")
    if not error:  # some servers say `"error": null` in every reply
        return
    said, code = error, None
    if isinstance(error, Mapping):
        said = error.get("message") or dict(error)
        code = next(
            (error[name] for name in ("code", "status", "type") if error.get(name) is not None),
            None,
        )
    number = int(str(code)) if str(code).isdecimal() and len(str(code)) == 3 else None
    shown = f" ({plain(code)})" if isinstance(code, (str, int)) else ""
    final = number is not None and number >= 400 and is_final(number)
    raise Fault(
        f"it answers with an error{shown}: {plain(said)}", status=number or 200, final=final
    )


def is_final(status: int) -> bool:
    """Tell whether asking again cannot help.

    Args:
        status: The HTTP status of a refusal.

    Returns:
        Whether the same request would be refused again.
    """
    return status < 500 and status not in AGAIN


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict of a JSON object, in which a second value of a name would replace the first one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise Fault("the reply says one name twice, so it is not clear which value holds")
    return found


def _inside(value: Any) -> list[Any]:
    inner = value.values() if isinstance(value, dict) else value
    return [one for one in inner if isinstance(one, (dict, list))]
