"""A local model with its log-probs taken away: what a service that only returns text would be,
without the service.

The model is kept in a table of this module and not in the object, so nothing that can be reached
from a `TextOnly` (attributes, slots, closures, results) leads to weights, logits or log-probs: a
method that trains with it would train with a stranger's API too.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

from opdlab.data.prompt import Prompt
from opdlab.data.tokens import completion_texts
from opdlab.data.written_text import WrittenText
from opdlab.errors import OpdlabError
from opdlab.models.policy import Policy, sample

ROWS_AT_ONCE = 1024  # texts that are written side by side; changes memory and not the texts

_MODELS: WeakKeyDictionary[TextOnly, Policy] = WeakKeyDictionary()


class TextOnly:
    """`policy` reduced to `write`: prompts in, texts out.

    It reads and writes with its own tokenizer and chat template.
    """

    __slots__ = ("__weakref__",)

    def __init__(self, policy: Policy) -> None:
        _MODELS[self] = policy

    def check(self, student: Policy, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
        """Raise EmptyPrompts or ContextTooLong where a prompt does not fit.

        Any tokenizer will do.
        """
        _MODELS[self].encode_all(prompts, room=max_new_tokens)

    def write(
        self,
        prompts: Sequence[Prompt],
        n: int = 1,
        *,
        prefixes: Sequence[str] | None = None,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[list[WrittenText]]:
        """`n` texts a prompt, of at most `max_new_tokens` of the teacher's tokens each; each says
        whether it was cut there.

        prefixes: one unfinished answer a prompt, which the texts continue and do not repeat. The
            text of a special token in
        it is read as text, not as the token. Raises ContextTooLong and EmptyPrompts.
        """
        if n < 1 or (prefixes is not None and len(prefixes) != len(prompts)):
            many = len(prompts if prefixes is None else prefixes)
            raise OpdlabError(
                f"write got n={n} and {many} prefixes for {len(prompts)} prompts. Use n of 1 or"
                " more and one each."
            )
        policy = _MODELS[self]
        begun = [_plain(policy, text) for text in prefixes] if prefixes is not None else None
        rollout = sample(
            policy,
            prompts,
            n,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            prefixes=begun,
            batch_size=max(1, ROWS_AT_ONCE // n),
            writer="teacher",
        )
        if begun is None:
            texts = list(rollout.texts)
        else:
            texts = [
                _after(policy, begun[i // n], ids) for i, ids in enumerate(rollout.completions())
            ]
        written: list[WrittenText] = []
        for text, finish in zip(texts, rollout.finish, strict=True):
            written.append(WrittenText(text, "stop" if finish == "stop" else "length"))
        return [written[i : i + n] for i in range(0, len(written), n)]

    def __repr__(self) -> str:
        return f"TextOnly({_MODELS[self].weights.source or 'a local model'})"


def _plain(policy: Policy, text: str) -> list[int]:
    return list(
        policy.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    )


def _after(policy: Policy, begun: list[int], more: list[int]) -> str:
    """What `more` adds to the text of `begun`: decoded together, since a decoder drops the space
    before a first piece.
    """
    start, whole, bare = completion_texts(
        policy.tokenizer, [begun, begun + more, more], policy.weights.eos
    )
    return whole[len(start) :] if whole.startswith(start) else bare
