"""Compare the tokens of two policies: whole vocabularies, EOS sets and rendered chats.

No model runs. `check_same_tokens` raises at the first difference, before compute is spent; the
comparisons themselves are there for `opdlab.doctor`, which reports all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from opdlab.errors import OpdlabError, TokenizerMismatch
from opdlab.models.policy import Policy
from opdlab.models.templates import render_chat

# What trains where student and teacher do not read the same tokens.
OTHER_WAYS = (
    "opdlab.teachers.ByteTeacher(teacher) (whole distributions, by bytes), the method SpanOPD()"
    " (sampled tokens, by bytes), or a method that learns from texts alone (OmniOPD(),"
    " SequenceKD())."
)
WAYS = f"Use a teacher of the same family, or one of these: {OTHER_WAYS}"


@dataclass(frozen=True)
class RenderedChat:
    """One chat as two policies read it.

    Attributes:
        student: The student's rendering; "" if it has no template for the chat.
        teacher: The teacher's.
        at: The first character at which they differ; None if they are the same.
    """

    student: str
    teacher: str
    at: int | None


def check_same_tokens(student: Policy, teacher: Policy, name: str = "teacher") -> None:
    """Check that a policy can grade the student's tokens.

    Compares id -> string over the whole vocabulary, EOS sets and rendered chats. Padding rows of
    the head do not matter.

    Args:
        student: The policy that writes.
        teacher: The policy that grades.
        name: The teacher's name, for the error.

    Raises:
        TokenizerMismatch: They differ. The message shows the first difference.
    """
    if student.weights is teacher.weights:
        return
    for i, (ours, theirs) in compare_vocabularies(student, teacher).items():
        raise TokenizerMismatch(
            f"The {name}'s tokenizer differs from the student's: id {i} is {theirs!r} there and"
            f" {ours!r} here. A token-level loss would compare unrelated tokens. {WAYS}"
        )
    if student.weights.eos != teacher.weights.eos:
        raise TokenizerMismatch(
            f"The {name} stops at tokens {_name_stops(teacher)}, the student at"
            f" {_name_stops(student)}: trained like this, lengths run away. Load one of them with"
            " the other's set: Policy.load(…, eos=[…])."
        )
    chat = compare_chats(student, teacher)
    if chat.at is not None:
        raise _template_error(student, teacher, name, chat, chat.at)


def compare_vocabularies(
    student: Policy, teacher: Policy
) -> dict[int, tuple[str | None, str | None]]:
    """Find the token ids that stand for different strings.

    Args:
        student: The policy that writes.
        teacher: The policy that grades.

    Returns:
        The student's and the teacher's string by id, lowest id first; None for an id that one of
        them does not have.
    """
    ours = {i: piece for piece, i in student.tokenizer.get_vocab().items()}
    theirs = {i: piece for piece, i in teacher.tokenizer.get_vocab().items()}
    ids = sorted(ours.keys() | theirs.keys())
    return {i: (ours.get(i), theirs.get(i)) for i in ids if ours.get(i) != theirs.get(i)}


def compare_chats(student: Policy, teacher: Policy) -> RenderedChat:
    """Render chats as each policy reads them, with and without a system message.

    Each is rendered with the arguments that its policy gives to the template.

    Args:
        student: The policy that writes.
        teacher: The policy that grades.

    Returns:
        The first chat that differs; else the one without a system message.
    """
    pairs = [
        RenderedChat(ours, theirs, _find_difference(ours, theirs))
        for ours, theirs in zip(_render_chats(student), _render_chats(teacher), strict=True)
    ]
    return next((pair for pair in pairs if pair.at is not None), pairs[0])


def _find_difference(one: str, other: str) -> int | None:
    """The first character at which two texts differ, or None."""
    if one == other:
        return None
    for at, (here, there) in enumerate(zip(one, other, strict=False)):
        if here != there:
            return at
    return min(len(one), len(other))


def _render_chats(policy: Policy) -> list[str]:
    """Chats as the policy reads them, without and with a system message.

    A chat for which the policy has no template is "".
    """
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    if not policy.chat_template_kwargs.get("continue_final_message"):
        turns = [*turns, {"role": "user", "content": "c"}]
    texts = []
    for chat in (turns, [{"role": "system", "content": "s"}, *turns]):
        try:
            texts.append(render_chat(policy.tokenizer, chat, policy.chat_template_kwargs))
        except OpdlabError:
            texts.append("")
    return texts


def _template_error(
    student: Policy, teacher: Policy, name: str, chat: RenderedChat, at: int
) -> TokenizerMismatch:
    given = ""
    if student.chat_template_kwargs != teacher.chat_template_kwargs:
        given = (
            f" The {name} has chat_template_kwargs={teacher.chat_template_kwargs}, the student"
            f" {student.chat_template_kwargs}."
        )
    return TokenizerMismatch(
        f"The {name}'s chat template differs from the student's from character {at} on:"
        f" {chat.teacher[at : at + 40]!r} there, {chat.student[at : at + 40]!r} here.{given} To"
        f" score the student's form, load the {name} with tokenizer=student.tokenizer (or"
        " chat_template=student.tokenizer.chat_template) and the same chat_template_kwargs, all of"
        f" Policy.load. To let each read its own template: {OTHER_WAYS}"
    )


def _name_stops(policy: Policy) -> str:
    """The tokens that end a policy's texts, in words."""
    convert = policy.tokenizer.convert_ids_to_tokens
    return ", ".join(f"{i} {convert(i)!r}" for i in sorted(policy.weights.eos)) or "none"
