"""Make rollouts of given texts, with a policy's tokens."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from weakref import WeakSet

import torch
from transformers import PreTrainedTokenizerBase

from opdlab.data.prompt import Prompt, expect_prompts
from opdlab.data.rollout import Rollout, concat_rollouts
from opdlab.data.written_text import finish_of
from opdlab.models.fingerprints import vocabulary_digest
from opdlab.models.policy import Policy
from opdlab.models.templates import end_token
from opdlab.models.text_conversations import is_conversation, rollout_from_conversations

_warned: WeakSet[PreTrainedTokenizerBase] = WeakSet()


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
    spells a token of the EOS set, it ends there. Warns, once for each tokenizer, if the policy has
    no tokens for a part of a text.

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
        rollout = _rollout_of_texts(policy, prompts, texts, writer)
        _warn_of_unknown_text(policy, rollout)
        return rollout
    asked = [prompts[row] for row in talked]
    parts = [rollout_from_conversations(policy, asked, [*talked.values()], writer, limit)]
    if plain:
        asked = [prompts[row] for row in plain]
        parts.append(_rollout_of_texts(policy, asked, [*plain.values()], writer))
    place = {row: at for at, row in enumerate([*talked, *plain])}
    rollout = concat_rollouts(parts).select([place[row] for row in range(len(texts))])
    _warn_of_unknown_text(policy, rollout)
    return rollout


def _warn_of_unknown_text(policy: Policy, rollout: Rollout) -> None:
    """Warn once for each tokenizer that texts hold what it has no tokens for.

    A student that is trained on such texts learns to write the token of unknown text.
    """
    tokenizer = policy.tokenizer
    unknown = tokenizer.unk_token_id
    # GPT-2 names its end token as that of unknown text too, and never needs the latter.
    if unknown is None or unknown in policy.weights.eos or tokenizer in _warned:
        return
    has_unknown = ((rollout.ids == unknown) & rollout.learn).any(1).tolist()
    lossy = [
        text
        for text, lost in zip(rollout.texts, has_unknown, strict=True)
        if lost and tokenizer.unk_token not in text
    ]
    if not lossy:
        return
    _warned.add(tokenizer)
    warnings.warn(
        f"{len(lossy)} of {len(rollout)} given texts contain characters or words that the student's"
        f" tokenizer cannot write, and these became {tokenizer.unk_token!r}; for example"
        f" {lossy[0][:80]!r}. Training on these texts teaches the student to write"
        f" {tokenizer.unk_token!r}. Leave such texts out, ask their writer for another form, or use"
        " a method that trains on the student's own texts (OmniOPD).",
        stacklevel=3,
    )


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
