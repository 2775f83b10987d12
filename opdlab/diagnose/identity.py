"""Do two models speak the same tokens?

What can be told without running either: ids, stops, templates, heads, room.

The same rules as `policy.check_same_tokens`, which refuses a pair at the first difference; here
each is looked at by itself and nothing is raised, so that all differences of a pair can be read at
once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from opdlab.data.prompt import Prompt
from opdlab.models.policy import Policy

State = Literal["ok", "note", "warn", "stop", "none"]
WRITES = (
    "Use a method that needs only its texts (OmniOPD, SequenceKD), or one that grades the bytes"
    " both share (SpanOPD)."
)


@dataclass(frozen=True)
class Check:
    """One thing looked at:

    `ok`; `note`, worth knowing; `warn`, mend this first; `stop`, OPD cannot work; `none`, not
    looked at.
    """

    name: str
    state: State
    finding: str
    remedy: str = ""


@dataclass(frozen=True)
class Sides:
    """One chat as both tokenizers render it, and the first character at which they differ (None:
    nowhere).
    """

    student: str
    teacher: str
    at: int | None


CHAT = (
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
)


def identity(student: Policy, teacher: Policy, prompts: Sequence[Prompt], room: int) -> list[Check]:
    """All checks of this module, in order. room: tokens to come after a prompt."""
    return [
        tokens(student, teacher),
        stops(student, teacher),
        templates(student, teacher, prompts),
        heads(student, teacher),
        contexts(student, teacher, prompts, room),
    ]


def tokens(student: Policy, teacher: Policy) -> Check:
    """id -> string over both vocabularies, not their sizes."""
    ours, theirs = (
        {i: piece for piece, i in policy.tokenizer.get_vocab().items()}
        for policy in (student, teacher)
    )
    differ = [i for i in sorted(ours.keys() | theirs.keys()) if ours.get(i) != theirs.get(i)]
    if not differ:
        return Check("tokens", "ok", f"the same {len(ours)} ids stand for the same strings")
    first, shared = differ[0], len(set(ours.values()) & set(theirs.values()))
    return Check(
        "tokens",
        "stop",
        f"id {first} is {ours.get(first)!r} in the student and {theirs.get(first)!r} in the"
        f" teacher; {len(differ)} of {len(ours.keys() | theirs.keys())} ids differ, {shared}"
        " strings are in both vocabularies",
        f"Token by token they cannot be compared. {WRITES}",
    )


def stops(student: Policy, teacher: Policy) -> Check:
    """The sets of tokens that end a text."""
    ours, theirs = (_listed(policy) for policy in (student, teacher))
    found = f"the student ends with {ours}, the teacher with {theirs}"
    if not student.weights.eos:
        return Check(
            "stop tokens",
            "warn",
            f"{found}: every text runs to the limit",
            "Load the student with Policy.load(…, eos=[…]).",
        )
    if ours == theirs and student.weights.eos == teacher.weights.eos:
        return Check("stop tokens", "ok", f"both end with {ours}")
    if tokens(student, teacher).state == "stop":
        return Check("stop tokens", "note", f"{found}, in vocabularies of their own")
    return Check(
        "stop tokens",
        "stop",
        found,
        "Lengths would run away. Load one with the other's set, Policy.load(…, eos=[…]), and "
        "teach the student to end like that first (a short SFT).",
    )


def sides(student: Policy, teacher: Policy, chat: Sequence[dict[str, str]] = CHAT) -> Sides:
    """A chat, with what asks for an answer after it, under both templates; a tokenizer without one
    renders nothing.
    """
    ours, theirs = (_rendered(policy, chat) for policy in (student, teacher))
    at = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
        min(len(ours), len(theirs)),
    )
    return Sides(ours, theirs, at if ours != theirs else None)


def templates(student: Policy, teacher: Policy, prompts: Sequence[Prompt]) -> Check:
    both = sides(student, teacher)
    chats = any(prompt.messages is not None for prompt in prompts)
    if chats and not student.tokenizer.chat_template:
        return Check(
            "template",
            "stop",
            "the prompts are chats and the student's tokenizer has no chat template",
            "Give prompts as text, or load it with a tokenizer that has one: Policy.load(…,"
            " tokenizer=…).",
        )
    if both.at is not None:
        found = (
            f"from character {both.at} on the student's is {both.student[both.at : both.at + 30]!r}"
            f" and the teacher's {both.teacher[both.at : both.at + 30]!r}"
        )
        if tokens(student, teacher).state == "stop":
            return Check("template", "note", f"{found}, each for a vocabulary of its own")
        return Check(
            "template",
            "stop",
            found,
            "The teacher would grade texts in a form it never saw. Load it with"
            " tokenizer=student.tokenizer, or use the teacher's form.",
        )
    if not both.student:
        return Check("template", "ok", "neither has one; prompts are plain text")
    return Check("template", "ok", "a chat looks the same to both")


def heads(student: Policy, teacher: Policy) -> Check:
    """Rows of the output head beyond the last token: padding, which is cut."""
    rows = [policy.head.weight.shape[0] for policy in (student, teacher)]
    spare = [
        row - policy.weights.vocab_size
        for row, policy in zip(rows, (student, teacher), strict=True)
    ]
    if not any(spare):
        return Check("head rows", "ok", f"{_both(rows)}, one a token")
    return Check(
        "head rows",
        "note",
        f"{rows[0]} and {rows[1]}, of which {spare[0]} and {spare[1]} stand for no token; they"
        " are cut",
    )


def contexts(student: Policy, teacher: Policy, prompts: Sequence[Prompt], room: int) -> Check:
    """Does the longest prompt with `room` tokens after it fit both?"""
    longest = [max(map(len, map(policy.encode, prompts))) for policy in (student, teacher)]
    limits = [policy.weights.context_length for policy in (student, teacher)]
    found = (
        f"prompts of up to {_both(longest)} tokens and {room} to come, in a context of"
        f" {_both(limits)}"
    )
    if any(
        limit is not None and n + room > limit for n, limit in zip(longest, limits, strict=True)
    ):
        return Check(
            "room", "stop", found, "Shorten the prompts or hints, or lower max_new_tokens."
        )
    return Check("room", "ok", found)


def _rendered(policy: Policy, chat: Sequence[dict[str, str]]) -> str:
    tokenizer = policy.tokenizer
    if not tokenizer.chat_template:
        return ""
    return str(
        tokenizer.apply_chat_template(
            [dict(m) for m in chat], tokenize=False, add_generation_prompt=True
        )
    )


def _listed(policy: Policy) -> str:
    return (
        ", ".join(
            repr(policy.tokenizer.convert_ids_to_tokens(i)) for i in sorted(policy.weights.eos)
        )
        or "nothing"
    )


def _both(pair: Sequence[int | None]) -> str:
    """The student's number, and the teacher's where it is another."""
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]} ({pair[1]} for the teacher)"
