"""The illusion index: how much of what training on hints won stays on the training prompts
(opdlab's, after DOPD's account).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from opdlab.diagnose.privilege import Privilege
from opdlab.diagnose.probe import ALL, render
from opdlab.errors import OpdlabError

LEAST = 0.01  # nats a token: a smaller fall on the training prompts says nothing


@dataclass(frozen=True, eq=False)
class Illusion:
    """`table`, by (measurement, type): the falls of KL(T_xp || S_x) since the first measurement and
    the `index`; nan: undefined.
    """

    table: pd.DataFrame

    @property
    def index(self) -> float:
        """Of all tokens, at the last measurement: 0, everything transfers; 1, nothing does; above,
        held-out prompts got worse.
        """
        return float(self.table["index"].xs(ALL, level="type").iloc[-1])

    @property
    def sentence(self) -> str:
        last = self.table.xs(self.table.index[-1][0], level="measurement")
        train, held = last.loc[ALL, ["train_fall", "held_out_fall"]]
        text = (
            f"KL(T_xp || S_x) fell by {train:.3f} nats a token on training prompts and by"
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
        return render(self.sentence, self.table)


def illusion(train: Sequence[Privilege], held_out: Sequence[Privilege]) -> Illusion:
    """II = 1 - (held-out fall of KL(T_xp || S_x)) / (its fall on training prompts), by token type.

    train, held_out: `privilege` of the same student before, during (as many as you like) and after
        training, on the prompts it
    trains on and on others. Undefined (nan) where the training fall is not above `LEAST`: there was
    nothing to transfer.
    """
    if len(train) != len(held_out) or len(train) < 2:
        raise OpdlabError(
            f"illusion got {len(train)} measurements on training prompts and {len(held_out)} on"
            " held-out ones. Give at least two of each, taken at the same moments."
        )
    kls = [[m.table["forward_kl"] for m in series] for series in (train, held_out)]
    parts = {}
    for i in range(1, len(train)):
        falls = [series[0] - series[i] for series in kls]
        part = pd.DataFrame({"train_fall": falls[0], "held_out_fall": falls[1]}).reindex(
            kls[0][0].index
        )
        part["index"] = (1 - part["held_out_fall"] / part["train_fall"]).where(
            part["train_fall"] > LEAST
        )
        parts[i] = part
    return Illusion(pd.concat(parts, names=["measurement", "type"]))
