"""Read what an engine has written, with the same meaning as `Policy.sample`.

Token ids and log-probs are taken as they come back: nothing is tokenised again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opdlab.data.sampling_config import SamplingConfig
from opdlab.errors import SamplerError
from opdlab.models.forward import last_hidden
from opdlab.models.policy import Policy
from opdlab.models.sampled_texts import SampledTexts
from opdlab.models.sampling import find_stop

# The mean gap in nats per token at which engine and student hold different models. One model in
# bfloat16 and in float32 is apart by a twentieth of it or less.
OTHER_MODEL = 0.5
PROBED = 24  # ids of the vocabulary in the prompt that is tried
TRIED = SamplingConfig(max_new_tokens=16)


@dataclass(frozen=True)
class Completion:
    """Hold the text that an engine wrote after one prompt.

    Attributes:
        ids: Token ids; the one that ended the text counts.
        logp: Their log-probs at temperature 1, in nats, as the engine computed them.
        finish: The engine's word for the end: "stop" or "length".
    """

    ids: Sequence[int]
    logp: Sequence[float]
    finish: str


@dataclass(frozen=True)
class Order:
    """What an engine is asked to write after one prompt.

    Attributes:
        start: Token ids of the prompt, with what is written already behind it.
        n: The number of texts.
        room: The most tokens of each.
        seed: The seed of the texts.
    """

    start: list[int]
    n: int
    room: int
    seed: int


def read_texts(
    student: Policy,
    completions: Sequence[Completion],
    rooms: Sequence[int],
    config: SamplingConfig,
) -> SampledTexts:
    """Read completions as texts that the student's own loop might have written.

    Args:
        student: The policy whose tokens they are.
        completions: The completions.
        rooms: The most tokens of each.
        config: The sampling settings.

    Returns:
        The texts, without entropies, which engines do not give.

    Raises:
        SamplerError: A completion is none that these settings allow.
    """
    device = student.weights.device
    written = SampledTexts.empty(len(completions), max(rooms), device)
    for row, (completion, room) in enumerate(zip(completions, rooms, strict=True)):
        fitting = replace(config, max_new_tokens=room)
        length, has_ended = measure(student, completion, fitting)
        written.ids[row, :length] = torch.tensor(completion.ids[:length], device=device)
        written.logp[row, :length] = torch.tensor(completion.logp[:length], device=device)
        written.lengths[row], written.stopped[row] = length, has_ended
    return written


def measure(student: Policy, completion: Completion, config: SamplingConfig) -> tuple[int, bool]:
    """Find where a completion ends by the rules of `Policy.sample`: at EOS, stop text or limit.

    Args:
        student: The policy whose tokens these are.
        completion: The completion.
        config: The sampling settings.

    Returns:
        Its number of tokens, and whether it ended by itself.

    Raises:
        SamplerError: It breaks off before, or holds something that is no token with a log-prob.
    """
    ids, vocab = completion.ids, student.weights.vocab_size
    if not ids or len(completion.logp) != len(ids):
        raise SamplerError(
            f"The sampler gave {len(completion.logp)} log-probs for a completion of"
            f" {len(ids)} tokens. Each token needs one."
        )
    if foreign := [token for token in ids if not 0 <= token < vocab]:
        raise SamplerError(
            f"The sampler wrote the token id {foreign[0]}, and {student.name} has {vocab} tokens."
            " Serve the student's own model: rows of the output head beyond the tokenizer must have"
            " no probability."
        )
    broken = [value for value in completion.logp if not (math.isfinite(value) and value < 1e-3)]
    if broken:
        raise SamplerError(f"The sampler gave {broken[0]} as the log-prob of a token it had drawn.")
    ends = [t + 1 for t, token in enumerate(ids) if token in student.weights.eos]
    if config.stop and (stop := find_stop(student.tokenizer, ids, config.stop)) is not None:
        ends.append(stop)
    # A stop text that the engine saw counts too: its pieces may decode otherwise on the way.
    if config.stop and completion.finish == "stop":
        ends.append(len(ids))
    length = min([*ends, config.max_new_tokens])
    if length > len(ids) or (not ends and len(ids) != config.max_new_tokens):
        raise SamplerError(
            f"The sampler broke a text off after {len(ids)} of {config.max_new_tokens} tokens,"
            f" without a token or a text that ends it (it says {completion.finish!r}). Give it room"
            " for prompt and completion (max_model_len)."
        )
    return length, bool(ends) and min(ends) <= config.max_new_tokens


def probe_ids(student: Policy) -> list[int]:
    """Make a prompt of ids from all over the vocabulary, to try an engine with.

    Args:
        student: The policy whose tokens it is made of.

    Returns:
        Token ids, without special tokens.
    """
    special = {*student.tokenizer.all_special_ids, *student.weights.eos}
    ids = [token for token in range(student.weights.vocab_size) if token not in special]
    limit = student.weights.context_length or PROBED + TRIED.max_new_tokens
    most = max(1, min(PROBED, limit - TRIED.max_new_tokens))
    return ids[:: -(-len(ids) // most)]


def mean_gap(student: Policy, start: list[int], completions: Sequence[Completion]) -> float:
    """Compare an engine's log-probs with the student's own.

    Args:
        student: The policy that the engine should hold.
        start: Token ids of the prompt.
        completions: What the engine wrote after it.

    Returns:
        The mean size of the difference per token, in nats.
    """
    bodies = [list(completion.ids) for completion in completions]
    token = torch.tensor([token for body in bodies for token in body])
    theirs = torch.tensor([value for one in completions for value in one.logp])
    weights = student.weights
    with torch.no_grad(), weights.using(student.adapter) as model:
        hidden = last_hidden(model, [start] * len(bodies), bodies, weights.abilities)
        own: Tensor = student.head(hidden).log_softmax(-1).float().cpu()
    return float((own.gather(-1, token[:, None])[:, 0] - theirs).abs().mean())
