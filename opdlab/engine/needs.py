"""Read the names in a method's `needs`: a policy, whether it sees hints, and what is asked of it.

    teacher             its log-probs on the student's tokens
    teacher+hint        the same, but the teacher sees each prompt's hint
    teacher.text        only the texts that it writes (any tokenizer, any server)
    teacher.spans       its log-probs on the same bytes, in its own tokens (any tokenizer)

The policy is `student`, `teacher`, `reference`, `ema`, or a name of the user's own that `policies=`
gives.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from opdlab.errors import InvalidValue
from opdlab.support.expect import shortened

HINT = "+hint"
KNOWN = ("student", "teacher", "reference", "ema")
# `rows.token` and the like mean something else in a loss, and `answer` is the writer of the
# reference answers.
_TAKEN = ("answer", "columns", "distributions", "logp", "logp_of", "on", "token")
_POLICY = re.compile(r"[^\W\d][\w-]*")


class Access(Enum):
    """The access to a policy that a method asks for.

    Log-probs on the student's tokens, written texts, or log-probs on spans of bytes.
    """

    LOGITS = ""
    TEXT = ".text"
    SPANS = ".spans"


@dataclass(frozen=True)
class Need:
    """One distribution that a method reads.

    `str(need)` is the name by which `rows` and `batch` know it.

    Attributes:
        policy: Name of the policy, e.g. "teacher".
        hinted: Whether the policy sees each prompt's hint.
        access: The policy's kind of answer: log-probs on the student's tokens by default.
    """

    policy: str
    hinted: bool = False
    access: Access = Access.LOGITS

    def __str__(self) -> str:
        return f"{self.policy}{HINT * self.hinted}{self.access.value}"


def parse_need(name: Any, owner: str = "needs") -> Need:
    """Read one name.

    Args:
        name: As a method writes it, e.g. "teacher+hint".
        owner: The method that states the name, for the error.

    Returns:
        The need; `str` of it is `name`.

    Raises:
        InvalidValue: It is no text, its suffix is unknown, or it combines what cannot be combined.
    """
    if not isinstance(name, str):
        raise InvalidValue(
            f"{owner} names {shortened(name)} in `needs`. Use names of policies, as ('teacher',"
            " 'reference')."
        )
    policy = re.split(r"[+.]", name, maxsplit=1)[0]
    suffix = name[len(policy) :]
    if not _POLICY.fullmatch(policy):
        raise InvalidValue(
            f"{owner} names {shortened(name)} in `needs`, which is no name of a policy. Use"
            " letters, digits and _, as 'teacher' or 'maths'."
        )
    if policy in _TAKEN:
        raise InvalidValue(
            f"{owner} names {name!r} in `needs`, but {policy!r} means something else in a loss. Use"
            " another name."
        )
    forms = {
        str(need): need
        for need in (
            Need(policy),
            Need(policy, True),
            Need(policy, access=Access.TEXT),
            Need(policy, access=Access.SPANS),
        )
    }
    if name in forms:
        return forms[name]
    if HINT in suffix and (Access.TEXT.value in suffix or Access.SPANS.value in suffix):
        other = Access.TEXT if Access.TEXT.value in suffix else Access.SPANS
        plain = f"{policy}{other.value}"
        raise InvalidValue(
            f"{owner} names {name!r} in `needs`, but '+hint' and {other.value!r} cannot be"
            f" combined. Name {plain!r}, and give distill policies={{{plain!r}: …}} a policy that"
            f" sees the hint, as {_hinted_policy(other)}."
        )
    raise InvalidValue(
        f"{owner} names {name!r} in `needs`, and {suffix!r} is no suffix. Use"
        f" {', '.join(map(repr, forms))}."
    )


def parse_needs(names: Any, owner: str = "needs") -> tuple[Need, ...]:
    """Read all names of a method's `needs`, each once, in order.

    Args:
        names: A method's `needs`.
        owner: The method's name, for the error.

    Returns:
        The needs in order, without repeats.

    Raises:
        InvalidValue: It is one bare text or no sequence, or a name cannot be read (see
            `parse_need`).
    """
    if isinstance(names, str):
        raise InvalidValue(
            f"{owner} has needs={names!r}, which is one text. Write a tuple of names:"
            f" needs=({names!r},)."
        )
    if not isinstance(names, Sequence) or isinstance(names, bytes):
        raise InvalidValue(
            f"{owner} has needs={shortened(names)}. Write a tuple of names of policies, as"
            " needs=('teacher',)."
        )
    return tuple(dict.fromkeys(parse_need(name, owner) for name in names))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Ask whether a similar known name was meant.

    Args:
        name: A name that is not known.
        known: The names that are.

    Returns:
        A question with a space behind it, or "" where no known name is similar.
    """
    by_lower_case = {one.lower(): one for one in known}
    close = difflib.get_close_matches(name.lower(), list(by_lower_case), n=1)
    return f"Did you mean {by_lower_case[close[0]]!r}? " if close else ""


def _hinted_policy(access: Access) -> str:
    return (
        "opdlab.teachers.TextOnly(teacher.seeing())"
        if access is Access.TEXT
        else "teacher.seeing()"
    )
