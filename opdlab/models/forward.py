"""Run the backbone over whole texts: hidden states where completion tokens are predicted.

Every pass of a model in opdlab goes through `run_backbone`. The functions here take the shortcuts
(one batch for rows of different length, one pass for what all prompts begin with) that `Abilities`
says are right for the model, and run rows apart where they are not.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Hashable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from opdlab.models.abilities import Abilities
from opdlab.models.micro_batches import Level, find_levels, pass_cost
from opdlab.models.placement import input_device
from opdlab.models.prefix_cache import begin_cache, carries_gradient, continue_cache
from opdlab.models.recomputation import recomputes_in_transformers

# Hidden states that a layer keeps of a token for its backward pass, at the least.
STATES_PER_TOKEN = 16
SHORTEST_SHARED_PREFIX = 8  # tokens; sharing fewer does not pay for another pass


def find_backbone(model: PreTrainedModel) -> Any:
    """Find the part of a model below its head.

    Its output has `last_hidden_state`, to which the head is applied.

    Args:
        model: A causal language model of transformers.

    Returns:
        The module that computes the hidden states.
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
    """Run the backbone. Arguments that a family does not have are left out.

    Args:
        model: The model, with the adapter in force that is meant.
        ids: Token ids `[B, T]`.
        positions: The place of each token in its text, `[B, T]` or `[1, T]`.
        mask: `[B, P + T]`, 1 on real tokens of the cache (`P` of them) and of `ids`.
        cache: The states of the tokens before; those of `ids` are added to it.

    Returns:
        Hidden states `[B, T, H]`.
    """
    inner = find_backbone(model)
    cache_name, known = _signature(cast(Hashable, type(inner)))
    options = {
        "attention_mask": mask,
        "position_ids": positions,
        cache_name: cache,
        "use_cache": cache is not None,
    }
    if known is not None:
        options = {name: value for name, value in options.items() if name in known}
    hidden: Tensor = inner(input_ids=ids, **options).last_hidden_state
    return hidden


@functools.cache
def _signature(kind: Hashable) -> tuple[str, frozenset[str] | None]:
    """The name of a backbone's cache argument, and the arguments that it takes (None: any)."""
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
    """Run prompts with their completions.

    Beginnings that several prompts share (a system message, examples, a prompt with several
    samples) are run once and not once per row, where that saves more than it costs; the gradient of
    all rows flows back through them.

    Args:
        model: The model.
        starts: Token ids of each prompt.
        bodies: Token ids of each completion.
        abilities: The shortcuts that may be taken; all by default.

    Returns:
        Hidden states `[tokens, H]` where the tokens of `bodies` are predicted, rows in order.
    """
    abilities = abilities or Abilities()
    rows = [start + body for start, body in zip(starts, bodies, strict=True)]
    # The state at a token predicts the next one, so the states begin at the prompt's last token.
    spans = [range(len(start) - 1, len(row) - 1) for start, row in zip(starts, rows, strict=True)]
    levels: list[Level] = []
    if may_share(model, abilities):
        levels = find_levels(starts, pass_cost(input_device(model).type))
    if levels and not _is_worth_its_mask(levels, rows, model.config.get_text_config().hidden_size):
        levels = []
    return hidden_at(model, rows, spans, abilities, levels)


def _is_worth_its_mask(
    levels: Sequence[Level], rows: Sequence[list[int]], hidden_size: int
) -> bool:
    """Tell whether the states of the tokens that are not run are more than the attention's mask.

    Whole texts need no mask, and those that go on from a cache need one: transformers makes one of
    `[B, 1, T, P + T]`, and each layer may keep it for the backward pass.
    """
    length, width = levels[-1].length, max(map(len, rows))
    mask = len(rows) * (width - length) * width
    saved = (len(rows) - len(levels[-1].rows)) * length
    return mask <= saved * STATES_PER_TOKEN * hidden_size


def may_share(model: PreTrainedModel, abilities: Abilities) -> bool:
    """Tell whether beginnings may be run once for several rows in the present grad mode.

    Args:
        model: The model.
        abilities: The shortcuts that may be taken.

    Returns:
        False also where a gradient is asked for that does not flow through the model's cache, or
        where transformers runs layers again, which goes without any cache.
    """
    if not abilities.shares_prefix:
        return False
    if not torch.is_grad_enabled():
        return True
    return carries_gradient(begin_cache(model)) and not recomputes_in_transformers(model)


def hidden_at(
    model: PreTrainedModel,
    rows: list[list[int]],
    spans: list[range],
    abilities: Abilities,
    levels: Sequence[Level] = (),
) -> Tensor:
    """Run rows of tokens, in as few batches as the model's abilities allow.

    Args:
        model: The model.
        rows: Token ids of each row.
        spans: The positions of each row whose states are wanted.
        abilities: The shortcuts that may be taken.
        levels: The beginnings that are run once, of at most as many tokens as stand before each
            span. They count where all rows run in one batch.

    Returns:
        Hidden states `[positions, H]`, rows in order.
    """
    groups = group_rows([len(row) for row in rows], mixed=abilities.pads, batches=abilities.batches)
    if len(groups) == 1:
        return _one_batch(model, rows, spans, levels)
    parts: list[Tensor | None] = [None] * len(rows)
    for group in groups:
        states = _one_batch(model, [rows[i] for i in group], [spans[i] for i in group], ())
        sizes = [len(spans[i]) for i in group]
        for i, part in zip(group, torch.split(states, sizes), strict=True):
            parts[i] = part
    return torch.cat([part for part in parts if part is not None])


def group_rows(lengths: Sequence[int], *, mixed: bool, batches: bool = True) -> list[list[int]]:
    """Choose which rows run side by side.

    Args:
        lengths: Tokens of each row.
        mixed: Whether rows of different length may; otherwise only those of equal length do.
        batches: Whether any rows may.

    Returns:
        Groups of row numbers.
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
    model: PreTrainedModel, rows: list[list[int]], spans: list[range], levels: Sequence[Level]
) -> Tensor:
    """Run rows side by side; see `hidden_at`."""
    device = input_device(model)
    cache, shared = run_levels(model, rows, levels), levels[-1].length if levels else 0
    # Right-padded: under causal attention padding cannot touch a real token, so no mask is needed.
    width = max(map(len, rows)) - shared
    batch = torch.tensor(
        [row[shared:] + [0] * (width + shared - len(row)) for row in rows], device=device
    )
    positions = torch.arange(shared, shared + width, device=device)[None]
    states = run_backbone(model, batch, positions=positions, cache=cache)
    where = [i * width + t - shared for i, span in enumerate(spans) for t in span]
    return states.flatten(0, 1)[torch.tensor(where, device=states.device, dtype=torch.long)]


def run_levels(
    model: PreTrainedModel, rows: Sequence[list[int]], levels: Sequence[Level]
) -> DynamicCache | None:
    """Run the beginnings of rows, each distinct one once.

    Args:
        model: The model.
        rows: Token ids of each row.
        levels: The beginnings, shortest first.

    Returns:
        The cache with which the rows go on, once; None where there are no levels.
    """
    if not levels:
        return None
    device = input_device(model)
    cache, begun = begin_cache(model), 0
    for level, following in zip(levels, [*levels[1:], None], strict=True):
        ids = [rows[i][begun : level.length] for i in level.rows]
        positions = torch.arange(begun, level.length, device=device)[None]
        run_backbone(model, torch.tensor(ids, device=device), positions=positions, cache=cache)
        begun = level.length
        places = level.places
        if following is not None:
            places = tuple(places[i] for i in following.rows)
        rows_of_cache = torch.tensor(places, device=device)
        cache = continue_cache(cache, begun, rows_of_cache, is_last=following is None)
    return cache


def run_shared(
    model: PreTrainedModel, rows: Sequence[list[int]], shared: int
) -> DynamicCache | None:
    """Run the tokens that all rows begin with, once, for rows that are written token by token.

    Args:
        model: The model.
        rows: Token ids of each row.
        shared: How many tokens all rows begin with.

    Returns:
        A cache of them without gradient, repeated for each row; None where there are none.
    """
    if not shared:
        return None
    device = input_device(model)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        run_backbone(model, torch.tensor([rows[0][:shared]], device=device), cache=cache)
    repeat_cache(cache, 1, len(rows), device)
    return cache


def repeat_cache(cache: DynamicCache, rows: int, repeats: int, device: torch.device) -> None:
    """Repeat each of the cache's `rows` `repeats` times, in place.

    Args:
        cache: The cache of `rows` texts.
        rows: Number of texts in the cache.
        repeats: Copies of each; they stand side by side.
        device: The cache's device.
    """
    pick_rows(cache, torch.arange(rows, device=device).repeat_interleave(repeats))


def pick_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Keep only these rows of the cache, in that order, in place.

    Written as a reordering, the one operation on rows that recurrent layers have too.

    Args:
        cache: The cache.
        rows: Numbers of the rows `[B']`; a row may be taken several times.
    """
    cache.reorder_cache(cast(torch.LongTensor, rows))


def count_shared(starts: Sequence[list[int]]) -> int:
    """Count the tokens that all prompts begin with, leaving at least one of each prompt.

    Args:
        starts: Token ids of each prompt.

    Returns:
        The number of tokens; 0 where sharing them would not pay for another pass.
    """
    room = min(map(len, starts)) - 1
    tokens = next(
        (i for i, column in enumerate(zip(*starts, strict=False)) if len(set(column)) > 1), room + 1
    )
    tokens = min(tokens, room)
    return tokens if tokens >= SHORTEST_SHARED_PREFIX and len(starts) > 1 else 0
