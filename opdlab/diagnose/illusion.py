"""The illusion index: the share of the gain from hints that stays on the training prompts.

The index is opdlab's, after DOPD's account.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from opdlab.diagnose.privilege import Privilege
from opdlab.diagnose.tables import ALL, to_html
from opdlab.errors import OpdlabError

LEAST = 0.01  # nats per token: a smaller fall on the training prompts says nothing


@dataclass(frozen=True, eq=False)
class Illusion:
    """The share of a gain from hints that holds on other prompts.

    Attributes:
        table: By (measurement, type): the falls of KL(T_xp || S_x) since the first measurement,
            `train_fall` and `held_out_fall`, and the `index`; NaN if it is undefined.
    """

    table: pd.DataFrame

    @property
    def index(self) -> float:
        """The index of all tokens, at the last measurement.

        At 0 everything transfers, at 1 nothing does; above 1, held-out prompts got worse.
        """
        return float(self.table["index"].xs(ALL, level="type").iloc[-1])

    @property
    def sentence(self) -> str:
        """Both falls and the index, in words."""
        last = self.table.xs(self.table.index[-1][0], level="measurement")
        train, held = last.loc[ALL, ["train_fall", "held_out_fall"]]
        text = (
            f"KL(T_xp || S_x) fell by {train:.3f} nats per token on training prompts and by"
            f" {held:.3f} on held-out ones: "
        )
        if np.isnan(self.index):
            return (
                text
                + f"the illusion index is undefined (it takes a fall above {LEAST} in training)."
            )
        parts = last["index"].drop(ALL).dropna()
        worst = f"; worst on {parts.idxmax()} tokens, {parts.max():.2f}" if len(parts) else ""
        return text + f"illusion index {self.index:.2f} (0: all of it transfers, 1: none{worst})."

    def __str__(self) -> str:
        return self.sentence

    def __repr__(self) -> str:
        return f"Illusion(index {self.index:.3g})"

    def _repr_html_(self) -> str:
        return to_html(self.sentence, self.table)


def illusion(train: Sequence[Privilege], held_out: Sequence[Privilege]) -> Illusion:
    """Compute the illusion index by token type.

    II = 1 - (held-out fall of KL(T_xp || S_x)) / (its fall on training prompts). It is undefined
    (NaN) if the training fall is not above `LEAST`: there was nothing to transfer.

    Args:
        train: `privilege` of the same student before, during (as often as you like) and after
            training, on prompts that it trains on.
        held_out: The same at the same moments, on other prompts.

    Returns:
        A table by measurement and type, with both falls in nats per token and the index.

    Raises:
        OpdlabError: There are fewer than two measurements, or their numbers differ.
    """
    if len(train) != len(held_out) or len(train) < 2:
        raise OpdlabError(
            f"illusion got {len(train)} measurements on training prompts and {len(held_out)} on"
            " held-out ones. Give at least two of each, taken at the same moments."
        )
    train_kl = [measured.table["forward_kl"] for measured in train]
    held_out_kl = [measured.table["forward_kl"] for measured in held_out]
    parts = {}
    for i in range(1, len(train)):
        falls = {
            "train_fall": train_kl[0] - train_kl[i],
            "held_out_fall": held_out_kl[0] - held_out_kl[i],
        }
        part = pd.DataFrame(falls).reindex(train_kl[0].index)
        part["index"] = (1 - part["held_out_fall"] / part["train_fall"]).where(
            part["train_fall"] > LEAST
        )
        parts[i] = part
    return Illusion(pd.concat(parts, names=["measurement", "type"]))
