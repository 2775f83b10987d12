"""Read the state after every layer at one place, and what the head makes of it (logit lens)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from opdlab.errors import UnsupportedModel
from opdlab.models.forward import find_backbone, hidden_at
from opdlab.models.policy import Policy

# Names that families give to the norm before the head.
NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f")


def log_probs_by_layer(policy: Policy, start: list[int]) -> Tensor:
    """Compute what the head makes of the state after every layer, at the last token.

    The final norm and the head are applied to each state (the logit lens). The last row is the
    policy's own distribution.

    Args:
        policy: The policy.
        start: Token ids of all that it reads.

    Returns:
        Log-probs `[layers + 1, V]` in nats, that of the embeddings first.

    Raises:
        UnsupportedModel: The layers or the final norm of the family are not known.
    """
    with torch.no_grad(), policy.weights.using(policy.adapter) as model:
        layers, norm = _find_layers(model)
        with _states(layers) as states:
            spans = [range(len(start) - 1, len(start))]
            last = hidden_at(model, [start], spans, policy.weights.abilities)
        if len(states) != len(layers) + 1:
            raise UnsupportedModel(
                f"{policy.name} ran {len(states) - 1} layers of {len(layers)} in one pass. The"
                " logit lens needs a model that runs each once."
            )
        normed = [norm(state[:, -1:]).reshape(1, -1) for state in states[:-1]]
        rows = [*normed, last.reshape(1, -1)]
        return torch.cat([policy.head(row).float().log_softmax(-1) for row in rows]).cpu()


def _find_layers(model: Any) -> tuple[list[nn.Module], nn.Module]:
    """The layers of a model in order, and the norm between the last of them and the head."""
    inner = find_backbone(model)
    layers = next(
        (
            list(part)
            for part in inner.children()
            if isinstance(part, nn.ModuleList) and len(part) == model.config.num_hidden_layers
        ),
        None,
    )
    norm = next((getattr(inner, name) for name in NORMS if hasattr(inner, name)), None)
    if layers is None or not isinstance(norm, nn.Module):
        raise UnsupportedModel(
            f"The layers of {type(inner).__name__} could not be found, so there is nothing to read"
            " between them. Use a decoder with a list of layers and a norm before its head."
        )
    return layers, norm


@contextmanager
def _states(layers: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Note what goes into the first layer, and what comes out of every layer, in this block."""
    found: list[Tensor] = []

    def before(module: nn.Module, given: Any, named: Any) -> None:
        found.append(given[0] if given else named["hidden_states"])

    def after(module: nn.Module, given: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    handles = [layers[0].register_forward_pre_hook(before, with_kwargs=True)]
    handles += [layer.register_forward_hook(after) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
