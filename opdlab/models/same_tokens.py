"""Check that two policies use the same tokens, before compute is spent."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from opdlab.errors import OpdlabError, TokenizerMismatch
from opdlab.models.policy import Policy
from opdlab.models.templates import render_chat


def check_same_tokens(student: Policy, teacher: Policy, name: str = "teacher") -> None:
    """Check that two policies use the same tokens.

    Compares the text of every id, the EOS sets and a rendered chat. Padding rows of the head do not
    matter.

    Args:
        student: The policy that is trained.
        teacher: The policy that is to grade its tokens.
        name: The teacher's name, for the error.

    Raises:
        TokenizerMismatch: They differ. The message shows the first difference.
    """
    if student.weights is teacher.weights:
        return
    ours, theirs = student.tokenizer, teacher.tokenizer
    mine, other = ({i: piece for piece, i in t.get_vocab().items()} for t in (ours, theirs))
    for i in sorted(mine.keys() | other.keys()):
        if mine.get(i) != other.get(i):
            raise TokenizerMismatch(
                f"The {name}'s tokenizer differs from the student's: id {i} is {other.get(i)!r}"
                f" there and {mine.get(i)!r} here. A token-level loss would compare unrelated"
                " tokens. Use a teacher of the same family, or one that only writes."
            )
    if student.weights.eos != teacher.weights.eos:
        there = _list_tokens(theirs, teacher.weights.eos)
        here = _list_tokens(ours, student.weights.eos)
        raise TokenizerMismatch(
            f"The {name} stops at tokens {there}, the student at {here}: trained like this, lengths"
            " run away. Load one of them with the other's set: Policy.load(…, eos=[…])."
        )
    _check_same_template(student, teacher, name)


def _check_same_template(student: Policy, teacher: Policy, name: str) -> None:
    """Compare chats as each policy renders them, with its own arguments for the template."""
    theirs, ours = _render_chats(teacher), _render_chats(student)
    for there, here in zip(theirs, ours, strict=True):
        if there == here:
            continue
        pairs = enumerate(zip(there, here, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), min(len(there), len(here)))
        given = ""
        if student.chat_template_kwargs != teacher.chat_template_kwargs:
            given = (
                f" The {name} has chat_template_kwargs={teacher.chat_template_kwargs}, the student"
                f" {student.chat_template_kwargs}."
            )
        raise TokenizerMismatch(
            f"The {name}'s chat template differs from the student's from character {at} on:"
            f" {there[at : at + 40]!r} there, {here[at : at + 40]!r} here.{given} To score the"
            f" student's form, load the {name} with tokenizer=student.tokenizer and the same"
            " chat_template_kwargs (both of Policy.load); to let each read its own template, use"
            " the method SpanOPD()."
        )


def _render_chats(policy: Policy) -> list[str]:
    """Render a chat as the policy reads it, without and with a system message.

    A text is empty where the policy has no template for that chat.
    """
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    goes_on = policy.chat_template_kwargs.get("continue_final_message")
    asked = turns if goes_on else [*turns, {"role": "user", "content": "c"}]
    texts = []
    for chat in (asked, [{"role": "system", "content": "s"}, *asked]):
        try:
            texts.append(render_chat(policy.tokenizer, chat, policy.chat_template_kwargs))
        except OpdlabError:
            texts.append("")
    return texts


def _list_tokens(tokenizer: PreTrainedTokenizerBase, ids: frozenset[int]) -> str:
    return ", ".join(f"{i} {tokenizer.convert_ids_to_tokens(i)!r}" for i in sorted(ids)) or "none"
