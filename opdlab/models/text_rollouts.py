"""Make rollouts of given texts, with a policy's tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from opdlab.data.prompt import Prompt, expect_prompts
from opdlab.data.rollout import Rollout, concat_rollouts
from opdlab.data.written_text import finish_of
from opdlab.models.fingerprints import vocabulary_digest
from opdlab.models.policy import Policy
from opdlab.models.templates import end_token
from opdlab.models.text_conversations import is_conversation, rollout_from_conversations


def rollout_from_texts(
    policy: Policy,
    prompts: Sequence[Prompt],
    texts: Sequence[str],
    writer: str = "answer",
    limit: int | None = None,
) -> Rollout:
    """Make a rollout of given texts, for supervised training and for looking.

    A `FinalText` of several messages, or with calls of tools, is a conversation in the ids of the
    policy's chat template, and all its assistant's turns are learned. Other texts are encoded as
    they are, behind the prompt.

    A finished text ends with a token of the policy's own EOS set. A text that its writer had to cut
    (a `WrittenText` with finish "length") is left open, and counts as cut. Where a text itself
    spells a token of the EOS set, it ends there.

    To grade the texts of a trace again, use `rollout_from_trace`.

    Args:
        policy: Its tokenizer makes the tokens.
        prompts: The prompt of each text.
        texts: One text per prompt; plain strings count as finished.
        writer: Who wrote them, for the trace.
        limit: The most tokens of a conversation after its prompt; None for no limit.

    Returns:
        A rollout with one completion per prompt; `logp` and `entropy` are zero, since nobody
        sampled.
    """
    prompts = expect_prompts(prompts, "rollout_from_texts")
    talked = {row: text for row, text in enumerate(texts) if is_conversation(text)}
    plain = {row: text for row, text in enumerate(texts) if row not in talked}
    if not talked:
        return _rollout_of_texts(policy, prompts, texts, writer)
    asked = [prompts[row] for row in talked]
    parts = [rollout_from_conversations(policy, asked, [*talked.values()], writer, limit)]
    if plain:
        asked = [prompts[row] for row in plain]
        parts.append(_rollout_of_texts(policy, asked, [*plain.values()], writer))
    place = {row: at for at, row in enumerate([*talked, *plain])}
    return concat_rollouts(parts).select([place[row] for row in range(len(texts))])


def _rollout_of_texts(
    policy: Policy, prompts: Sequence[Prompt], texts: Sequence[str], writer: str
) -> Rollout:
    """The rollout of texts of one turn each."""
    tokenizer, eos = policy.tokenizer, policy.weights.eos
    chats = [prompt.messages is not None for prompt in prompts]
    ends = {}
    for is_chat in set(chats):
        ends[is_chat] = end_token(tokenizer, eos, policy.chat_template_kwargs, is_chat=is_chat)
    ids, finish = [], []
    for text, end in zip(texts, map(ends.get, chats), strict=True):
        row = list(tokenizer(str(text), add_special_tokens=False)["input_ids"])
        first = next((t for t, token in enumerate(row) if token in eos), None)
        is_cut = first is None and finish_of(text) == "length"
        ids.append(row[:first] + ([] if is_cut or end is None else [end]))
        finish.append("length" if is_cut else "stop")
    device = policy.weights.device
    width = max(1, *map(len, ids))
    padded = torch.tensor([row + [0] * (width - len(row)) for row in ids], device=device)
    zeros = torch.zeros(padded.shape, device=device)
    return Rollout(
        prompts=tuple(prompts),
        ids=padded,
        lengths=torch.tensor([len(row) for row in ids], device=device),
        logp=zeros,
        entropy=zeros.clone(),
        finish=tuple(finish),
        texts=tuple(str(text) for text in texts),
        writer=(writer,) * len(ids),
        vocabulary=vocabulary_digest(tokenizer),
    )
