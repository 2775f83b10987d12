"""What a policy is asked: a plain text or a chat, with an optional reference answer and privileged hint."""

from __future__ import annotations

from dataclasses import dataclass, replace

from opdlab.errors import MissingHint


@dataclass(frozen=True)
class Prompt:
    """What a policy is asked. Give `text` (plain) or `messages` (chat, rendered by the tokenizer's own template).

    `answer` is a reference completion for tasks that have one, `hint` is privileged information that only policies made
    with `.seeing()` ever read, `id` names the prompt in traces.
    """

    text: str | None = None
    messages: tuple[dict[str, str], ...] | None = None
    answer: str | None = None
    hint: str | None = None
    id: str = ""

    def __post_init__(self) -> None:
        if (self.text is None) == (self.messages is None):
            raise ValueError("A Prompt needs either text= or messages=, and not both.")

    def told(self, context: str) -> Prompt:
        """The same prompt with `context` before it: in the system message of a chat, on a line of its own in a text."""
        if self.messages is None:
            return replace(self, text=f"{context}\n{self.text}")
        first = self.messages[0]
        if first["role"] == "system":
            first = {"role": "system", "content": f"{first['content']}\n{context}"}
            return replace(self, messages=(first, *self.messages[1:]))
        return replace(self, messages=({"role": "system", "content": context}, *self.messages))


def own_hint(prompt: Prompt) -> Prompt:
    """The prompt told its own hint; raises MissingHint where it has none."""
    if prompt.hint is None:
        raise MissingHint(
            f"Prompt {prompt.id or (prompt.text or prompt.messages)!r} has no hint, but this policy reads hints. "
            "Give the prompts a hint=, or name one context for all: policy.seeing('…')."
        )
    return prompt.told(prompt.hint)
