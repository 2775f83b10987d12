"""One teacher-forced pass of the backbone over prompts and completions: hidden states where completion tokens are predicted."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


def last_hidden(model: PreTrainedModel, starts: list[list[int]], bodies: list[list[int]]) -> Tensor:
    """Right-padded, so that under causal attention padding cannot touch a real token and no mask is needed.

    Without a gradient, what all prompts begin with (a rule, examples, a system message) is run once and not once a row.
    """
    shared = 0 if torch.is_grad_enabled() else _shared(starts)
    ids = [start[shared:] + body for start, body in zip(starts, bodies, strict=True)]
    width = max(map(len, ids))
    batch = torch.tensor([row + [0] * (width - len(row)) for row in ids], device=model.device)
    position = torch.arange(shared, shared + width, device=model.device)[None]
    cache = None
    if shared:
        cache = DynamicCache(config=model.config)
        model.base_model(input_ids=torch.tensor([starts[0][:shared]], device=model.device), past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(ids))
    states = model.base_model(input_ids=batch, position_ids=position, past_key_values=cache, use_cache=cache is not None).last_hidden_state
    ends = [i * width + len(start) - shared - 1 for i, start in enumerate(starts)]
    where = [end + t for end, body in zip(ends, bodies, strict=True) for t in range(len(body))]
    return states.flatten(0, 1)[torch.tensor(where, device=states.device, dtype=torch.long)]


def _shared(starts: list[list[int]]) -> int:
    """How many tokens all prompts begin with, leaving one of each; 0 where that would not pay for another pass."""
    room = min(map(len, starts)) - 1
    tokens = next((i for i, column in enumerate(zip(*starts, strict=False)) if len(set(column)) > 1), room + 1)
    tokens = min(tokens, room)
    return tokens if tokens >= 16 and len(starts) > 1 else 0
