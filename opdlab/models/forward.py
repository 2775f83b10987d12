"""Teacher-forced passes of the backbone: hidden states where completion tokens are predicted.

Every pass of a model in opdlab goes through `run_backbone`. The functions here take the shortcuts
(one batch for rows of different length, one pass for what all prompts begin with) that `Abilities`
says are right for the model, and run rows apart where they are not.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

SHORTEST_SHARED_PREFIX = 16  # tokens; sharing fewer does not pay for another pass


@dataclass(frozen=True)
class Abilities:
    """Which shortcuts give a model the numbers of plain passes: one row at a time, without padding
    or cache.

    `opdlab.models.compatibility.find_abilities` finds out. A shortcut that is not right is not
    taken.

    Attributes:
        batches: Rows of equal length side by side. Without it, none of the others holds.
        pads: Rows of different length in one batch, padded on the right (scoring and training).
        pads_left: Prompts of different length in one batch, padded on the left under a mask
            (sampling).
        caches: Going on from a cache whose rows are repeated and picked (sampling).
        shares_prefix: Going on with several tokens from a cache of what all prompts begin with
            (scoring).
    """

    batches: bool = True
    pads: bool = True
    pads_left: bool = True
    caches: bool = True
    shares_prefix: bool = True


PLAIN = Abilities(batches=False, pads=False, pads_left=False, caches=False, shares_prefix=False)


def backbone(model: PreTrainedModel) -> Any:
    """The model without its head.

    Its output has `last_hidden_state`, what the head is applied to.
    """
    inner = model.base_model
    if inner is model:  # some families keep it under another name than the one that they announce
        inner = next(child for child in model.children() if isinstance(child, PreTrainedModel))
    return inner


def run_backbone(
    model: PreTrainedModel,
    ids: Tensor,
    *,
    positions: Tensor | None = None,
    mask: Tensor | None = None,
    cache: DynamicCache | None = None,
) -> Tensor:
    """Hidden states `[B, T, H]` for token ids `[B, T]`, going on from `cache` and adding to it if
    there is one.

    Arguments that a family does not have (positions, where it uses none) are left out.
    """
    inner = backbone(model)
    cache_name, known = _signature(cast(Hashable, type(inner)))
    options = {
        "attention_mask": mask,
        "position_ids": positions,
        cache_name: cache,
        "use_cache": cache is not None,
    }
    if known is not None:
        options = {name: value for name, value in options.items() if name in known}
    return inner(input_ids=ids, **options).last_hidden_state


@functools.cache
def _signature(kind: Hashable) -> tuple[str, frozenset[str] | None]:
    """How a backbone calls its cache, and which arguments it takes (None: any)."""
    parameters = inspect.signature(kind.forward).parameters  # type: ignore[attr-defined]
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    # State-space models name their cache differently, and would ignore one under the usual name.
    name = "cache_params" if "cache_params" in parameters else "past_key_values"
    return name, None if takes_any else frozenset(parameters)


def last_hidden(
    model: PreTrainedModel,
    starts: list[list[int]],
    bodies: list[list[int]],
    abilities: Abilities | None = None,
) -> Tensor:
    """Hidden states `[tokens, H]` where the tokens of `bodies` are predicted, each after its prompt
    in `starts`.

    Without a gradient, what all prompts begin with (a rule, examples, a system message) is run once
    and not once a row.
    """
    abilities = abilities or Abilities()
    rows = [start + body for start, body in zip(starts, bodies, strict=True)]
    # The state at a token predicts the next one, so a body's states begin at the prompt's last
    # token.
    spans = [range(len(start) - 1, len(row) - 1) for start, row in zip(starts, rows, strict=True)]
    shared = 0 if torch.is_grad_enabled() or not abilities.shares_prefix else _shared(starts)
    return hidden_at(model, rows, spans, abilities, shared)


def hidden_at(
    model: PreTrainedModel,
    rows: list[list[int]],
    spans: list[range],
    abilities: Abilities,
    shared: int = 0,
) -> Tensor:
    """Hidden states `[positions, H]` at the positions `spans[i]` of row `i`, rows in order.

    The first `shared` tokens must be the same in all rows; they are run once.
    """
    groups = group_rows([len(row) for row in rows], mixed=abilities.pads, batches=abilities.batches)
    if len(groups) == 1:
        return _one_batch(model, rows, spans, shared)
    parts: list[Tensor | None] = [None] * len(rows)
    for group in groups:
        states = _one_batch(model, [rows[i] for i in group], [spans[i] for i in group], 0)
        for i, part in zip(group, states.split([len(spans[i]) for i in group]), strict=True):
            parts[i] = part
    return torch.cat([part for part in parts if part is not None])


def group_rows(lengths: Sequence[int], *, mixed: bool, batches: bool = True) -> list[list[int]]:
    """Which rows run side by side: all of them (`mixed`), those of equal length, or (without
    `batches`) none.
    """
    if not batches:
        return [[i] for i in range(len(lengths))]
    if mixed:
        return [list(range(len(lengths)))]
    groups: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        groups.setdefault(length, []).append(i)
    return list(groups.values())


def _one_batch(
    model: PreTrainedModel, rows: list[list[int]], spans: list[range], shared: int
) -> Tensor:
    """Right-padded, so that under causal attention padding cannot touch a real token and no mask is
    needed.
    """
    width = max(map(len, rows)) - shared
    batch = torch.tensor(
        [row[shared:] + [0] * (width + shared - len(row)) for row in rows], device=model.device
    )
    positions = torch.arange(shared, shared + width, device=model.device)[None]
    cache = None
    if shared:
        cache = DynamicCache(config=model.config)
        run_backbone(model, torch.tensor([rows[0][:shared]], device=model.device), cache=cache)
        repeat_cache(cache, 1, len(rows), model.device)
    states = run_backbone(model, batch, positions=positions, cache=cache)
    where = [i * width + t - shared for i, span in enumerate(spans) for t in span]
    return states.flatten(0, 1)[torch.tensor(where, device=states.device, dtype=torch.long)]


def repeat_cache(cache: DynamicCache, rows: int, repeats: int, device: torch.device) -> None:
    """Each of the cache's `rows` `repeats` times, in place."""
    pick_rows(cache, torch.arange(rows, device=device).repeat_interleave(repeats))


def pick_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Only the cache's `rows`, in that order, in place.

    Written as a reordering, the one operation on rows that recurrent layers have too.
    """
    cache.reorder_cache(cast(torch.LongTensor, rows))


def _shared(starts: list[list[int]]) -> int:
    """How many tokens all prompts begin with, leaving one of each; 0 where that would not pay for
    another pass.
    """
    room = min(map(len, starts)) - 1
    tokens = next(
        (i for i, column in enumerate(zip(*starts, strict=False)) if len(set(column)) > 1), room + 1
    )
    tokens = min(tokens, room)
    return tokens if tokens >= SHORTEST_SHARED_PREFIX and len(starts) > 1 else 0
