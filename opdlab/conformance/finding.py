"""The answer to one question about a loss, and the mistakes that have names."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Status(Enum):
    """Name the answer to a question."""

    PASS = "pass"  # nosec B105  # no password
    FAIL = "fail"
    CAUTION = "caution"  # true and worth knowing, but no reason to fail
    SKIP = "skip"  # not asked: it does not apply, or an earlier failure stands before it


@dataclass(frozen=True)
class Finding:
    """The answer to one question.

    Attributes:
        check: Name of the question, such as "padding".
        status: The answer.
        said: The answer as a sentence.
        mistake: Name of the known mistake that it is, one of `MISTAKES`, or "".
    """

    check: str
    status: Status
    said: str
    mistake: str = ""


# What each mistake is, in words for people who have just made it.
MISTAKES = {
    "no_loss": "It cannot be called, returns no number, or has no gradient.",
    "changes_inputs": "It changes its inputs in place.",
    "not_repeatable": "It gives other numbers when it is called again.",
    "shift_by_one": "Each row of logits is compared at the wrong token: not shifted, or twice.",
    "prompt_in_loss": "Tokens of the prompt have a gradient.",
    "padding_in_loss": "Tokens of the padding have a gradient.",
    "one_eos_of_several": "A text is taken to end at one EOS id, and the model has several.",
    "nan_in_padding": "NaN in the padding reaches the loss: a mask that multiplies cannot stop it.",
    "mask_ignored": "Tokens that do not count (such as a tool's) have a gradient.",
    "tokens_dropped": "Some tokens that count have no gradient.",
    "eos_masked": "The token that ends a text has no gradient, as where the mask is ids != pad_id"
    " and padding is EOS.",
    "empty_batch": "A batch in which no token counts gives NaN.",
    "batch_coupling": "The gradient of a text depends on the other texts of its batch.",
    "k1_as_loss": "log p - log q is differentiated as it stands. Its expected gradient is zero.",
    "k3_as_loss": "u - 1 - log u is differentiated as it stands. It trains the forward KL.",
    "blind_advantage": "The advantage is the same for all tokens that could follow a"
    " prefix, such as a detached KL of the position. Its expected gradient is zero.",
    "zero_gradient": "The expected gradient is zero.",
    "missing_pathwise_term": "A number of the sampled token is used as a fixed reward, which drops"
    " how it moves with the student.",
    "wrong_sign": "It climbs the divergence.",
    "swapped_arguments": "Student and teacher are exchanged.",
    "truncated_support": "Log-probs of the top tokens are not renormalised and have no tail: a"
    " reverse KL is then won by leaving the support.",
    "negative_losses_clamped": "A truncated KL is negative at some tokens, and the clamp to zero"
    " takes their gradient away.",
    "tail_ignored": "The mass outside the top tokens has no gradient.",
    "clipped_entries": "Terms of single tokens of the vocabulary are clipped, which changes where"
    " the loss leads, and can turn it around.",
    "cross_entropy_added": "The cross entropy of the sampled token is added.",
    "trains_another": "It trains another divergence than it claims, or none.",
    "moves_at_equality": "It moves a student that equals its teacher.",
    "wrong_scale": "Its gradient is another multiple of the divergence's than the spec says.",
    "mean_over_vocabulary": "It averages over the vocabulary, which divides by V.",
    "temperature_ignored": "The temperature does not reach the loss.",
    "temperature_one_sided": "Only one of the two softmaxes has the temperature.",
    "wrong_temperature": "The gradient at another temperature is not that of the divergence there.",
    "vanishes_at_ends": "Its gradient vanishes as the parameter nears an end of its range, where"
    " another formula takes over: the parameter is also a learning rate.",
    "padding_in_normaliser": "It divides by the padding too.",
    "wrong_normaliser": "It divides by something else than the spec says, or than any that is"
    " known.",
    "local_normaliser": "Each micro-batch or process is divided by its own tokens.",
    "count_ignored": "It takes the number of tokens of all micro-batches and does not divide by"
    " it.",
    "not_finite": "It is NaN or infinite at large logits, where the divergence is not.",
    "nan_at_minus_infinity": "It is NaN where a token is ruled out by a logit of -inf.",
    "wrong_head_gradient": "The fused gradient of the head is not that of its logits.",
    "out_of_time": "The time ended before all questions were asked.",
}
