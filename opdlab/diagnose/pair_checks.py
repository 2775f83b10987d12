"""Check a pair of models without running either: tokens, stops, templates, heads, room.

The comparisons are those of `opdlab.models.same_tokens` and of the checks before a run, which
refuse a pair at the first difference. Here each is a `Check` of its own and nothing is raised, so
that all differences of a pair can be read at once.
"""

from __future__ import annotations

from collections.abc import Sequence

from opdlab.data.prompt import Prompt
from opdlab.diagnose.checks import Check, State
from opdlab.models.policy import Policy, find_too_long
from opdlab.models.same_tokens import compare_chats, compare_vocabularies

WRITES = (
    "Use a method that needs only its texts (OmniOPD, SequenceKD), or one that grades the bytes"
    " both share (SpanOPD)."
)


def check_pair(
    student: Policy, teacher: Policy, prompts: Sequence[Prompt], room: int
) -> list[Check]:
    """Run all checks of this module, in order.

    Args:
        student: The policy that would train.
        teacher: The policy that would grade.
        prompts: Prompts that they would be asked.
        room: New tokens that must fit behind a prompt.

    Returns:
        One check per comparison.
    """
    return [
        check_tokens(student, teacher),
        check_stops(student, teacher),
        check_templates(student, teacher, prompts),
        check_heads(student, teacher),
        check_room(student, teacher, prompts, room),
    ]


def check_tokens(student: Policy, teacher: Policy) -> Check:
    """Compare the strings that the ids stand for in both vocabularies, and not the sizes.

    Args:
        student: The policy that would train.
        teacher: The policy that would grade.

    Returns:
        "ok", or "stop" if an id differs.
    """
    ours, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    differences = compare_vocabularies(student, teacher)
    if not differences:
        return Check("tokens", "ok", f"the same {len(ours)} ids stand for the same strings")
    first, (here, there) = next(iter(differences.items()))
    ids = len(set(ours.values()) | set(theirs.values()))
    return Check(
        "tokens",
        "stop",
        f"id {first} is {here!r} in the student and {there!r} in the teacher; {len(differences)} of"
        f" {ids} ids differ, {len(ours.keys() & theirs.keys())} strings are in both vocabularies",
        f"Token by token they cannot be compared. {WRITES}",
    )


def check_stops(student: Policy, teacher: Policy) -> Check:
    """Compare the sets of tokens that end a text.

    Args:
        student: The policy that would train.
        teacher: The policy that would grade.

    Returns:
        "ok"; "warn" if the student has no stop token; "note" if the sets differ and so do the
        vocabularies; "stop" if only the sets differ.
    """
    ours, theirs = _list_stops(student), _list_stops(teacher)
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
    if compare_vocabularies(student, teacher):
        return Check("stop tokens", "note", f"{found}, in vocabularies of their own")
    return Check(
        "stop tokens",
        "stop",
        found,
        "Lengths would run away. Load one with the other's set, Policy.load(…, eos=[…]), and teach"
        " the student to end like that first (a short SFT).",
    )


def check_templates(student: Policy, teacher: Policy, prompts: Sequence[Prompt]) -> Check:
    """Compare a chat as each of them reads it.

    Args:
        student: The policy that would train.
        teacher: The policy that would grade.
        prompts: Prompts that they would be asked.

    Returns:
        "ok"; "stop" if the student has no template for chats, or the forms differ; "note" if they
        may differ, since the vocabularies do or one model reads both forms.
    """
    chats = any(prompt.messages is not None for prompt in prompts)
    if chats and not student.tokenizer.chat_template:
        return Check(
            "template",
            "stop",
            "the prompts are chats and the student's tokenizer has no chat template",
            "Give prompts as text, or load it with a tokenizer that has one: Policy.load(…,"
            " tokenizer=…).",
        )
    both = compare_chats(student, teacher)
    if both.at is None:
        if not both.student:
            return Check("template", "ok", "neither has one; prompts are plain text")
        return Check("template", "ok", "a chat looks the same to both")
    found = (
        f"from character {both.at} on the student's is {both.student[both.at : both.at + 30]!r} and"
        f" the teacher's {both.teacher[both.at : both.at + 30]!r}"
    )
    if compare_vocabularies(student, teacher):
        return Check("template", "note", f"{found}, each for a vocabulary of its own")
    if student.weights is teacher.weights:
        return Check("template", "note", f"{found}: one model that reads two forms")
    return Check(
        "template",
        "stop",
        found,
        "The teacher would grade texts in a form it never saw. Load it with"
        " tokenizer=student.tokenizer and the same chat_template_kwargs, or use the teacher's"
        " form.",
    )


def check_heads(student: Policy, teacher: Policy) -> Check:
    """Count the rows of the output heads beyond the last token.

    These rows are padding and are cut.

    Args:
        student: The policy that would train.
        teacher: The policy that would grade.

    Returns:
        "ok", or "note" if there are such rows.
    """
    rows = [policy.head.weight.shape[0] for policy in (student, teacher)]
    spare = [rows[0] - student.weights.vocab_size, rows[1] - teacher.weights.vocab_size]
    if not any(spare):
        return Check("head rows", "ok", f"{_show_both(rows)}, one per token")
    return Check(
        "head rows",
        "note",
        f"{rows[0]} and {rows[1]}, of which {spare[0]} and {spare[1]} stand for no token; they are"
        " cut",
    )


def check_room(student: Policy, teacher: Policy, prompts: Sequence[Prompt], room: int) -> Check:
    """Check that every prompt with its completion fits both contexts.

    Args:
        student: The policy that would train.
        teacher: The policy that would grade.
        prompts: Prompts that they would be asked.
        room: New tokens that must fit behind a prompt.

    Returns:
        "ok", or "stop" if a prompt does not fit.
    """
    pair = (student, teacher)
    longest = [max(len(policy.encode(prompt)) for prompt in prompts) for policy in pair]
    limits = [policy.weights.context_length for policy in pair]
    found = (
        f"prompts of up to {_show_both(longest)} tokens and {room} to come, in a context of"
        f" {_show_both(limits)}"
    )
    behind = [room] * len(prompts)
    is_too_long = any(find_too_long(policy, prompts, behind) for policy in pair)
    state: State = "stop" if is_too_long else "ok"
    remedy = "Shorten the prompts or hints, or lower max_new_tokens." * is_too_long
    return Check("room", state, found, remedy)


def _list_stops(policy: Policy) -> str:
    convert = policy.tokenizer.convert_ids_to_tokens
    return ", ".join(repr(convert(i)) for i in sorted(policy.weights.eos)) or "nothing"


def _show_both(pair: Sequence[int | None]) -> str:
    """The student's number, and the teacher's if it is another."""
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]} ({pair[1]} for the teacher)"
