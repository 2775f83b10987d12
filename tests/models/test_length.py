"""Memory grows with the length of a text, and not with its square: no [B, 1, T, T] mask exists."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import opdlab as opd
from opdlab.data.rollout import Rollout


class Largest(TorchDispatchMode):
    """Note the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (list, tuple)) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return made


def rollout(lengths: list[int], vocab: int) -> Rollout:
    """Random completions of these lengths."""
    count, width = len(lengths), max(lengths)
    ids = torch.randint(5, vocab, (count, width), generator=torch.Generator().manual_seed(0))
    zero = torch.zeros(count, width)
    return Rollout(
        prompts=tuple(opd.Prompt("ana has 4 7 apples", id=str(i)) for i in range(count)),
        ids=ids,
        lengths=torch.tensor(lengths),
        logp=zero,
        entropy=zero,
        finish=("length",) * count,
        texts=("",) * count,
        writer=("student",) * count,
    )


def largest(policy: opd.Policy, lengths: list[int]) -> int:
    """Numbers of the largest tensor while a rollout is read, forward and back."""
    text = rollout(lengths, len(policy.tokenizer))
    embeddings = policy.weights.model.get_input_embeddings().weight.requires_grad_()
    with Largest() as seen:
        torch.autograd.grad(policy.hidden(text).sum(), embeddings)
    return seen.numel


def test_the_largest_tensor_grows_with_the_length(make_policy):
    tokenizer = make_policy().tokenizer
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
    )
    policy = opd.Policy.of(LlamaForCausalLM(config), tokenizer)
    for share in (1.0, 0.6):  # of the longest: with padding too
        short, long = (largest(policy, [n, int(share * n), n]) for n in (512, 2048))
        assert long <= 4.2 * short
        assert long < 2048 * 2048
