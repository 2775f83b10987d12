"""Gradient times input: how much each input token weighs in a log-prob, in one backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from opdlab.errors import InvalidValue
from opdlab.models.forward import hidden_at
from opdlab.models.policy import Policy
from opdlab.models.recomputation import recomputable_layers, recompute_layers


def attribute_log_prob(policy: Policy, start: list[int], token: int) -> tuple[float, Tensor]:
    """Compute the gradient of a next token's log-prob, times the input embeddings.

        a_i = e_i · ∂ log p(token | start) / ∂ e_i

    Memory does not grow with the depth of the model: each layer keeps its input alone and runs
    once more in the backward pass. No weight gets a gradient.

    Args:
        policy: The policy.
        start: Token ids of all that it reads.
        token: The next token.

    Returns:
        The log-prob in nats, and `[len(start)]`, the weight of each input token in nats.

    Raises:
        InvalidValue: The model has no input embeddings that can be read.
    """
    with policy.weights.using(policy.adapter) as model:
        can_recompute = bool(recomputable_layers(model))
        with (
            torch.enable_grad(),
            _without_weights(model),
            recompute_layers(model, can_recompute),
            _embeddings(model) as found,
        ):
            spans = [range(len(start) - 1, len(start))]
            hidden = hidden_at(model, [start], spans, policy.weights.abilities)
            logp = policy.head(hidden).float().log_softmax(-1)[0, token]
            if len(found) != 1:
                raise InvalidValue(
                    f"The input embeddings of {policy.name} were read {len(found)} times in one"
                    " pass. Attribution needs a model that reads them once."
                )
            (slope,) = torch.autograd.grad(logp, found[0])
    weights = (slope.float() * found[0].detach().float()).sum(-1).flatten()
    return float(logp.detach()), weights.cpu()


@contextmanager
def _without_weights(model: nn.Module) -> Iterator[None]:
    """Let no weight ask for a gradient in this block, so that none is made."""
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in learning:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in learning:
            weight.requires_grad_(True)


@contextmanager
def _embeddings(model: Any) -> Iterator[list[Tensor]]:
    """Make the output of the input embeddings a leaf in this block, and yield those seen."""
    found: list[Tensor] = []

    def keep(module: nn.Module, given: Any, output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        found.append(leaf)
        return leaf

    handle = model.get_input_embeddings().register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()
