"""Losses that look at the wrong tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from opdlab.conformance.case import Case
from opdlab.conformance.contract import Kind, Sequences
from opdlab.conformance.spec import Spec


def _token_losses(student: Tensor, teacher: Tensor) -> Tensor:
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp_min(1)


def pad_is_eos(student: Tensor, teacher: Tensor, sequences: Sequences) -> Tensor:
    """Count the tokens that are not the padding token, which may also end a text."""
    counts = (sequences.labels != -100) & (sequences.ids != sequences.pad_id)
    return _mean(_token_losses(student, teacher)[:, :-1], counts[:, 1:])


def unshifted(student: Tensor, teacher: Tensor, sequences: Sequences) -> Tensor:
    """Compare row i of the logits at token i, not at token i + 1."""
    return _mean(_token_losses(student, teacher), sequences.labels != -100)


def prompts_too(student: Tensor, teacher: Tensor, sequences: Sequences) -> Tensor:
    """Count all real tokens, those of the prompt among them."""
    counts = sequences.attention_mask.bool()
    both = counts[:, 1:] & counts[:, :-1]
    return _mean(_token_losses(student, teacher)[:, :-1], both)


def widest_prompt(student: Tensor, teacher: Tensor, sequences: Sequences) -> Tensor:
    """Cut the prompt away at the width of the longest one of the batch."""
    begin = sequences.prompt_width
    counts = (sequences.labels != -100)[:, begin:]
    return _mean(_token_losses(student, teacher)[:, begin - 1 : -1], counts)


def one_eos_of_two(student: Tensor, teacher: Tensor, sequences: Sequences) -> Tensor:
    """End a text at the first of several EOS ids, and count what stands behind the others."""
    wanted = sequences.labels != -100
    first = wanted.long().argmax(-1, keepdim=True)
    inside = (torch.arange(wanted.shape[1]) >= first) & wanted.any(-1, keepdim=True)
    is_end = inside & torch.isin(sequences.ids, torch.tensor(sequences.eos_ids[:1]))
    counts = inside & (is_end.cumsum(-1) - is_end.long() == 0)
    return _mean(_token_losses(student, teacher)[:, :-1], counts[:, 1:])


def padding_too(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Take the mean over all positions."""
    return _token_losses(student, teacher).mean()


def holes_too(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Make the mask anew from the lengths, so that tokens of tools in the middle count."""
    last = (mask.long() * torch.arange(1, mask.shape[1] + 1)).amax(-1, keepdim=True)
    return _mean(_token_losses(student, teacher), torch.arange(mask.shape[1]) < last)


REVERSE = Spec(Kind.SEQUENCES, trains="reverse_kl")

MASKS = (
    Case(
        "pad equals EOS",
        pad_is_eos,
        REVERSE,
        "eos_masked",
        "huggingface/trl#6357 (GKD, GOLD), pytorch/torchtune#2967.",
    ),
    Case("shift by one", unshifted, REVERSE, "shift_by_one", "modelscope/ms-swift#8436."),
    Case("prompt in the loss", prompts_too, REVERSE, "prompt_in_loss", "huggingface/trl#2058."),
    Case(
        "prompts cut at the widest",
        widest_prompt,
        REVERSE,
        "tokens_dropped",
        "huggingface/trl#2058: shorter prompts lose the first tokens of their completions.",
    ),
    Case(
        "one of several EOS ids",
        one_eos_of_two,
        REVERSE,
        "one_eos_of_several",
        "huggingface/trl#7039.",
    ),
    Case(
        "padding in the loss",
        padding_too,
        Spec(trains="reverse_kl"),
        "padding_in_loss",
        "huggingface/trl#2058 and later.",
    ),
    Case(
        "tool's tokens in the loss",
        holes_too,
        Spec(trains="reverse_kl"),
        "mask_ignored",
        "A mask made of lengths: the masked tool results of huggingface/trl#6723 would count.",
    ),
)
