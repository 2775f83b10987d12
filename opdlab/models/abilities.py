"""Name the shortcuts that a model can take without changing its numbers."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

_COSTS = {
    "batches": (
        "texts are run one at a time, because a text's numbers depend on the others in its batch"
    ),
    "pads": (
        "texts of different length are scored and trained in separate batches, because padding"
        " changes their numbers"
    ),
    "pads_left": (
        "prompts of different length are sampled in separate batches, because padding changes their"
        " numbers"
    ),
    "caches": (
        "each new token is sampled by running the whole text again, because its cache does not give"
        " the same numbers"
    ),
    "shares_prefix": (
        "the beginning that several prompts share is run again for each of them, because going on"
        " from it changes their numbers"
    ),
}


@dataclass(frozen=True)
class Abilities:
    """Record which shortcuts give a model the numbers of plain passes.

    A plain pass is one row, without padding or cache. `opdlab.models.self_check.find_abilities`
    finds out; a shortcut that is not right is not taken.

    Attributes:
        batches: Rows of equal length side by side. Without it, none of the others holds.
        pads: Rows of different length in one batch, padded on the right (scoring and training).
        pads_left: Prompts of different length in one batch, padded on the left under a mask
            (sampling).
        caches: Going on from a cache whose rows are repeated and picked (sampling).
        shares_prefix: Going on with several tokens from a cache of what all prompts begin with
            (scoring, training, and sampling after prompts of one length).
        splits_cache: Attending to a prompt and to a text in two parts, so that the keys and values
            of a prompt are kept once for all its texts (sampling).
    """

    batches: bool = True
    pads: bool = True
    pads_left: bool = True
    caches: bool = True
    shares_prefix: bool = True
    splits_cache: bool = True


PLAIN = Abilities(
    batches=False,
    pads=False,
    pads_left=False,
    caches=False,
    shares_prefix=False,
    splits_cache=False,
)


def warn_about_missing(abilities: Abilities, model: str) -> None:
    """Warn of the shortcuts that a model does without, and of their cost.

    Args:
        abilities: The shortcuts that are right for the model.
        model: The name of its class.
    """
    missing = [name for name in _COSTS if not getattr(abilities, name)]
    if not abilities.batches:
        missing = ["batches"] + (["caches"] if not abilities.caches else [])
    if missing:
        costs = "; ".join(_COSTS[name] for name in missing)
        warnings.warn(
            f"{model}: {costs}. The numbers are right, it takes longer.",
            stacklevel=2,
        )
