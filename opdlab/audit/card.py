"""The result of an audit: a sentence, warnings, a table; and a small card for a notebook."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape

import pandas as pd

SHOWN = 6  # rows of the card
BLUE, ORANGE = "#0072B2", "#D55E00"


@dataclass(frozen=True, eq=False)
class Audit:
    """The result of an audit.

    Attributes:
        name: The loss.
        verdict: A sentence that says what the loss trains.
        flags: The faults that were found, a sentence each by name; empty is good.
        table: One row per known divergence, with the cosine and the ratio of lengths of the two
            expected gradients, closest first.
        trains: Name of the divergence whose gradient it is, or None.
        reads_as: Name of the divergence that its value is, or None.
        estimate: The use of an estimate of the KL that it is, such as "k1 in the reward", or None.
        noise: Root mean square length of one token's gradient over the length of the mean; infinite
            where the mean is zero.
    """

    name: str
    verdict: str
    flags: Mapping[str, str]
    table: pd.DataFrame = field(repr=False)
    trains: str | None = None
    reads_as: str | None = None
    estimate: str | None = None
    noise: float = math.nan

    def __repr__(self) -> str:
        return "\n".join(
            [f"{self.name}: {self.verdict}", *(f"  ! {said}" for said in self.flags.values())]
        )

    def _repr_html_(self) -> str:
        """Draw the card; colours are the page's own but for the bars, and all text is escaped."""
        flags = "".join(
            f'<li style="margin:.15em 0"><b>{escape(name.replace("_", " "))}</b>:'
            f" {escape(sentence)}</li>"
            for name, sentence in self.flags.items()
        )
        if flags:
            style = f"margin:.3em 0;padding-left:1.2em;border-left:3px solid {ORANGE}"
            flags = f'<ul style="{style}">{flags}</ul>'
        rows = "".join(_row(row) for row in self.table.head(SHOWN).to_dict("records"))
        head = "".join(
            f'<th scope="col" style="{_CELL};opacity:.75">{name}</th>'
            for name in ("divergence", "to", "cosine", "", "length")
        )
        code = f'<code style="{_PLAIN}">{escape(self.name)}</code>'
        return (
            f'<div style="{_CARD}"><div style="opacity:.75">audit of {code}</div>'
            f'<div style="font-size:1.05em;margin:.2em 0 .4em"><b>{escape(self.verdict)}</b></div>'
            f'{flags}<table style="border-collapse:collapse;{_PLAIN}">'
            f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        )


_PLAIN = "color:inherit;background:none"
_CARD = (
    "border:1px solid currentColor;border-radius:6px;padding:.6em .9em;max-width:46em;"
    "line-height:1.4"
)
_CELL = "padding:.1em .7em .1em 0;text-align:left;background:none"


def _row(row: Mapping[str, object]) -> str:
    cosine, ratio = float(str(row["cosine"])), float(str(row["ratio"]))
    side, colour = ("left", BLUE) if cosine > 0 else ("right", ORANGE)
    box = (
        "display:inline-block;width:6em;height:.7em;position:relative;border-bottom:1px solid"
        " currentColor"
    )
    width = 3 * min(abs(cosine), 1)
    fill = f"position:absolute;top:0;height:.7em;width:{width:.2f}em;{side}:3em;background:{colour}"
    bar = f'<span aria-hidden="true" style="{box}"><span style="{fill}"></span></span>'
    text = [
        str(row["divergence"]),
        f"{row['target']}, {row['credit']}",
        f"{cosine:+.3f}",
        f"× {ratio:.3g}",
    ]
    cells = [escape(cell) for cell in text]
    cells.insert(3, bar)
    return "<tr>" + "".join(f'<td style="{_CELL}">{cell}</td>' for cell in cells) + "</tr>"
