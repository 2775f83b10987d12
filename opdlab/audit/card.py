"""What an audit found: a sentence, warnings, a table; and a small card for a notebook."""

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
    """`verdict`: what the loss trains, in a sentence.

    `flags`: what is wrong with it, a sentence by name; empty is good.

    table: one row a known divergence, with the cosine and the ratio of lengths of the two expected
        gradients, closest first.
    trains: name of the divergence whose gradient it is, or None. reads_as: the one that its value
        is, or None. estimate: which
    use of which estimate it is ("k1 in the reward"), or None. noise: root mean square length of one
    token's gradient, over the length of its mean (infinite where the mean is zero).
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
        """Colours beside the bars are the page's own, so it reads in light and dark; everything is
        escaped.
        """
        flags = "".join(
            f'<li style="margin:.15em 0"><b>{escape(k.replace("_", " "))}</b>: {escape(v)}</li>'
            for k, v in self.flags.items()
        )
        rows = "".join(_row(row) for row in self.table.head(SHOWN).to_dict("records"))
        head = "".join(
            f'<th scope="col" style="{_CELL};opacity:.75">{name}</th>'
            for name in ("divergence", "to", "cosine", "", "length")
        )
        warned = (
            '<ul style="margin:.3em 0;padding-left:1.2em;border-left:3px solid'
            f' {ORANGE}">{flags}</ul>'
            if flags
            else ""
        )
        return (
            '<div style="border:1px solid currentColor;border-radius:6px;padding:.6em'
            ' .9em;max-width:46em;line-height:1.4">'
            '<div style="opacity:.75">audit of <code'
            f' style="color:inherit;background:none">{escape(self.name)}</code></div>'
            '<div style="font-size:1.05em;margin:.2em 0'
            f' .4em"><b>{escape(self.verdict)}</b></div>{warned}'
            "<table"
            f' style="border-collapse:collapse;color:inherit;background:none"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody>'
            "</table></div>"
        )


_CELL = "padding:.1em .7em .1em 0;text-align:left;background:none"


def _row(row: Mapping[str, object]) -> str:
    cosine, ratio = float(str(row["cosine"])), float(str(row["ratio"]))
    side, colour = ("left", BLUE) if cosine > 0 else ("right", ORANGE)
    box = (
        "display:inline-block;width:6em;height:.7em;position:relative;border-bottom:1px solid"
        " currentColor"
    )
    fill = f"position:absolute;top:0;height:.7em;width:{3 * min(abs(cosine), 1):.2f}em;{side}:3em;background:{colour}"
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
