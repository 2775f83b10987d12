"""Ask why: the input that weighs in a token's log-prob, and the layer where two models part."""

from __future__ import annotations

from opdlab.data.prompt import Prompt
from opdlab.data.reasons import Depth, Reading, Reason
from opdlab.data.rollout import Rollout
from opdlab.data.tokens import token_bytes
from opdlab.errors import InvalidValue
from opdlab.losses import reverse_kl
from opdlab.models.attribution import attribute_log_prob
from opdlab.models.layers import log_probs_by_layer
from opdlab.models.policy import Policy
from opdlab.models.same_tokens import check_same_tokens
from opdlab.support.validation import CountOrZero, validate_arguments


@validate_arguments
def attribute(
    rollout: Rollout,
    student: Policy,
    teacher: Policy,
    sample: CountOrZero,
    position: CountOrZero,
    token: CountOrZero | None = None,
) -> Reason:
    """Weigh what teacher and student read before a token: gradient times input.

    Of log T(y) - log S(y), the first term has a gradient in the teacher's input, the second in the
    student's. A token that a policy is sure of has hardly any gradient, so take one that the two
    disagree on; the default is the sampled one. One row and one backward pass for each policy; the
    layers are run again in it, so that memory does not grow with depth.

    Args:
        rollout: The completions.
        student: The policy that wrote them.
        teacher: Another with the same tokens, with or without a hint.
        sample: Number of the completion.
        position: The token's place in it.
        token: The id of the token asked about; by default the sampled one.

    Returns:
        The weights, over hint, prompt and prefix.

    Raises:
        InvalidValue: There is no such token.
        TokenizerMismatch: The two have other tokens.
    """
    check_same_tokens(student, teacher)
    prefix, sampled = _prefix_of(rollout, sample, position)
    asked = sampled if token is None else token
    if asked >= student.weights.vocab_size:
        raise InvalidValue(
            f"attribute got token={asked}. Use an id from 0 to {student.weights.vocab_size - 1}."
        )
    prompt = rollout.prompts[sample]
    piece = token_bytes(student.tokenizer, [asked])[0].decode("latin-1")
    readings = {
        name: _read(policy, prompt, prefix, asked)
        for name, policy in (("teacher", teacher), ("student", student))
    }
    return Reason(sample, position, asked, piece, **readings)


@validate_arguments
def depth(
    rollout: Rollout,
    student: Policy,
    teacher: Policy,
    sample: CountOrZero,
    position: CountOrZero,
) -> Depth:
    """Measure after which layer two models of one architecture part, by the logit lens.

    Args:
        rollout: The completions.
        student: The policy that wrote them.
        teacher: Another with the same tokens and as many layers.
        sample: Number of the completion.
        position: The token's place in it.

    Returns:
        KL and log-probs by layer; the last ones are those of the models themselves.

    Raises:
        InvalidValue: There is no such token, or the models have other numbers of layers.
        TokenizerMismatch: The two have other tokens.
        UnsupportedModel: The layers of a family are not known.
    """
    check_same_tokens(student, teacher)
    prefix, sampled = _prefix_of(rollout, sample, position)
    prompt = rollout.prompts[sample]
    found = [
        log_probs_by_layer(policy, policy.encode(prompt) + prefix) for policy in (student, teacher)
    ]
    if len(found[0]) != len(found[1]):
        raise InvalidValue(
            f"The student has {len(found[0]) - 1} layers and the teacher {len(found[1]) - 1}, so"
            " no layer stands for another. Compare two models of one architecture."
        )
    ours, theirs = (one.double() for one in found)
    return Depth(
        sample,
        position,
        kl=reverse_kl(ours, theirs).tolist(),
        student=ours[:, sampled].tolist(),
        teacher=theirs[:, sampled].tolist(),
    )


def _prefix_of(rollout: Rollout, sample: int, position: int) -> tuple[list[int], int]:
    """The tokens of a completion before a position, and the one there."""
    if sample >= len(rollout):
        raise InvalidValue(
            f"There is no completion {sample}; the rollout has {len(rollout)}. Use a number from 0"
            f" to {len(rollout) - 1}."
        )
    completion = rollout.completions()[sample]
    if position >= len(completion):
        raise InvalidValue(
            f"Completion {sample} has {len(completion)} tokens, and none at position {position}."
            " Use one of these."
        )
    return completion[:position], completion[position]


def _read(policy: Policy, prompt: Prompt, prefix: list[int], token: int) -> Reading:
    """A policy's log-prob of a token, with the weight of all that it read."""
    start = policy.encode(prompt)
    logp, weights = attribute_log_prob(policy, start + prefix, token)
    parts = [*_parts_of_prompt(start, policy.without_context().encode(prompt))]
    parts += ["prefix"] * len(prefix)
    parts[-1] = "last"
    pieces = [piece.decode("latin-1") for piece in token_bytes(policy.tokenizer, start + prefix)]
    return Reading(logp, pieces, parts, weights.tolist())


def _parts_of_prompt(seen: list[int], bare: list[int]) -> list[str]:
    """The part of each token of a prompt; the hint lies between what both begin and end with."""
    begin = 0
    while begin < min(len(seen), len(bare)) and seen[begin] == bare[begin]:
        begin += 1
    end = 0
    while end < min(len(seen), len(bare)) - begin and seen[-1 - end] == bare[-1 - end]:
        end += 1
    hidden = len(seen) - begin - end
    return ["prompt"] * begin + ["hint"] * hidden + ["prompt"] * end
