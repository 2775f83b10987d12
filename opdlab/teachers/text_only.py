"""A local model with its log-probs taken away, to stand in for a service that only returns text.

The model is kept in a table of this module and not in the object, so nothing that can be reached
from a `TextOnly` (attributes, slots, closures, results) leads to weights, logits or log-probs: a
method that trains with it would train with a stranger's API too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

from opdlab.data.prompt import Prompt
from opdlab.data.sampling_config import SamplingConfig
from opdlab.data.tokens import completion_texts
from opdlab.data.written_text import WrittenText
from opdlab.errors import OpdlabError
from opdlab.models.policy import Policy, as_policy, sample
from opdlab.models.protocols import Writer

ROWS_AT_ONCE = 1024  # texts that are written side by side; changes memory and not the texts

_MODELS: WeakKeyDictionary[TextOnly, Policy] = WeakKeyDictionary()


class TextOnly:
    """A policy reduced to `write`: prompts in, texts out.

    It reads and writes with its own tokenizer and chat template.

    Args:
        policy: The model that writes.
    """

    __slots__ = ("__weakref__",)

    def __init__(self, policy: Policy) -> None:
        _MODELS[self] = policy

    def check(self, student: Policy, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
        """Check before a run that every prompt fits.

        Any tokenizer of the student will do.

        Args:
            student: Not used; other teachers compare its tokenizer with theirs.
            prompts: The prompts of the run.
            max_new_tokens: Length limit of a text, in tokens of this teacher.

        Raises:
            EmptyPrompts: There are no prompts.
            ContextTooLong: A prompt with `max_new_tokens` behind it does not fit.
        """
        _MODELS[self].encode_all(prompts, room=max_new_tokens)

    def write(
        self,
        prompts: Sequence[Prompt],
        n: int = 1,
        *,
        prefixes: Sequence[str] | None = None,
        places: Sequence[int] | None = None,
        **options: Any,
    ) -> list[list[WrittenText]]:
        """Write `n` texts for each prompt; each says whether the length limit cut it.

        Args:
            prompts: The questions.
            n: Texts for each prompt.
            prefixes: One unfinished answer for each prompt, which the texts continue and do not
                repeat. If one spells a special token, that is read as text.
            places: Where each prompt stands in a batch that several processes share, as in
                `Policy.sample`.
            options: Fields of `SamplingConfig`. `max_new_tokens` counts the teacher's tokens. A
                text that ends by one of `stop` keeps it, with nothing behind it.

        Returns:
            One list for each prompt, with `n` texts.

        Raises:
            InvalidValue: An option is not what it must be.
            EmptyPrompts: There are no prompts.
            ContextTooLong: A prompt with its text does not fit the model's context.
            OpdlabError: `n` is below 1, or there is not one prefix for each prompt.
        """
        config = SamplingConfig.of("write", options)
        if n < 1 or (prefixes is not None and len(prefixes) != len(prompts)):
            many = len(prompts if prefixes is None else prefixes)
            raise OpdlabError(
                f"write got n={n} and {many} prefixes for {len(prompts)} prompts. Use n of 1 or"
                " more and one each."
            )
        policy = _MODELS[self]
        begun = None if prefixes is None else [_encode_plain(policy, text) for text in prefixes]
        rollout = sample(
            policy,
            prompts,
            n,
            prefixes=begun,
            batch_size=max(1, ROWS_AT_ONCE // n),
            writer="teacher",
            places=places,
            **config.options(),
        )
        if begun is None:
            texts = list(rollout.texts)
        else:
            texts = [
                _decode_after(policy, begun[i // n], ids)
                for i, ids in enumerate(rollout.completions())
            ]
        written: list[WrittenText] = []
        for text, finish in zip(texts, rollout.finish, strict=True):
            whole = cut_behind_stop(text, config.stop)
            written.append(WrittenText(whole, "stop" if finish == "stop" else "length"))
        return [written[i : i + n] for i in range(0, len(written), n)]

    def __repr__(self) -> str:
        return f"TextOnly({_MODELS[self].weights.source or 'a local model'})"


def as_writer(teacher: Policy | Writer) -> Writer:
    """Return a teacher as one that writes: a policy is reduced to its texts.

    Args:
        teacher: A policy, or any teacher that writes.

    Returns:
        `TextOnly(teacher)` for a policy, else the teacher itself.
    """
    policy = as_policy(teacher)
    return cast(Writer, teacher) if policy is None else TextOnly(policy)


def cut_behind_stop(text: str, stop: Sequence[str]) -> str:
    """Cut a text behind the first of its stop texts, which may end within a token.

    Args:
        text: A written text.
        stop: Stop texts; empty to cut nothing.

    Returns:
        The text up to and including the stop text that ends first.
    """
    ends = [text.find(one) + len(one) for one in stop if one in text]
    return text[: min(ends)] if ends else text


def _encode_plain(policy: Policy, text: str) -> list[int]:
    return list(
        policy.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    )


def _decode_after(policy: Policy, begun: list[int], more: list[int]) -> str:
    """The text that `more` adds to that of `begun`.

    Both are decoded together, since a decoder drops the space before a first piece.
    """
    start, whole, bare = completion_texts(
        policy.tokenizer, [begun, begun + more, more], policy.weights.eos
    )
    return whole[len(start) :] if whole.startswith(start) else bare
