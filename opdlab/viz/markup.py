"""The static half of a lens: coloured tokens, legend and peaks as plain HTML, for where no script
runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

import numpy as np

from opdlab.data.trace import Trace
from opdlab.viz.channels import Channel
from opdlab.viz.glyphs import Group, clean

# Colour and strongest alpha by side. One set for light and dark pages: black or white text on it
# keeps 4.5 to 1.
INK = {
    "teacher": ((0, 114, 178), 0.70),  # #0072B2
    "student": ((213, 94, 0), 0.62),  # #D55E00
    "amount": ((138, 111, 192), 0.62),  # #8A6FC0
    "minus": ((128, 128, 128), 0.45),
}
# Kinds: neither blue nor orange, which mean teacher and student, and a kind of underline each.
KINDS = (
    (0, 158, 115),
    (204, 121, 167),
    (176, 160, 0),
    (110, 125, 150),
    (150, 90, 60),
    (120, 180, 60),
    (220, 80, 90),
    (60, 190, 200),
)
INK |= {f"k{i}": (rgb, 0.5) for i, rgb in enumerate(KINDS)}
LINES = ("solid", "dotted", "dashed", "double", "wavy")
WHOLE = 1200  # groups that the static strip holds whole
_STEPS = 12  # cells of the legend on each side of zero


def side(kind: str, value: float) -> str:
    """Whose colour a value has."""
    if kind == "category":
        return f"k{int(value) % len(KINDS)}" if value >= 0 else "minus"
    negative, positive = {"ratio": ("student", "teacher"), "signed": ("minus", "amount")}.get(
        kind, ("amount", "amount")
    )
    return positive if value > 0 else negative


def weight(value: float, limit: float, kind: str = "amount") -> float:
    """How strong the colour is, 0 to 1: the square root of the size, so that middling values show;
    of bins, their place.
    """
    if math.isnan(value):
        return 0.0
    if kind == "category":
        return 1.0
    return min(1.0, abs(value) / limit if kind == "ordinal" else math.sqrt(abs(value) / limit))


def strip(groups: Sequence[Group], channel: Channel, limit: float) -> str:
    """The tokens, coloured; their text content is the text itself (NUL, which HTML cannot hold,
    apart).

    Of texts longer than `WHOLE` groups the beginning and what surrounds the peaks, with the rest
    counted.
    """
    values, out, at = list(_strongest(groups, channel)), [], 0
    shown = _shown(values)
    for i in [*shown, len(groups)]:
        if i > at:
            out.append(f'<span class="opd-soft"> … {i - at:,} more … </span>')
        if i < len(groups):
            out.append(_glyph(groups[i], channel.kind, values[i], limit))
        at = i + 1
    return "".join(out)


def legend(channel: Channel, limit: float) -> str:
    """The colour scale from its least to its most, with the unit; of kinds, the mark and name of
    each.
    """
    if channel.names:
        return _key(channel, limit)
    ends = range(-_STEPS, _STEPS + 1) if channel.kind != "amount" else range(_STEPS + 1)
    cells = "".join(
        '<span class="opd-cell"'
        f' style="{_tint(channel.kind, i * limit / _STEPS, limit)}">&nbsp;</span>'
        for i in ends
    )
    ticks = [f"−{number(limit)}"] * (channel.kind != "amount") + [
        "0",
        f"{number(limit)} {channel.unit}",
    ]
    meaning = f"{channel.less} ↔ {channel.more}" if channel.less else ""
    return (
        f'<div class="opd-legend"><span>{escape(channel.label)}</span> <span'
        f' class="opd-scale">{cells}</span> '
        f"<span>{' … '.join(map(escape, ticks))}</span> <span>{escape(meaning)}</span></div>"
    )


def sparkline(channel: Channel, width: int = 64) -> str:
    """The size of the channel along the text; where many tokens share a character it shows the
    largest.

    Of kinds it shows numbers, from 1 in the order of their names; the commonest where many tokens
    share one.
    """
    if channel.kind == "category":
        parts = np.array_split(
            np.nan_to_num(channel.values, nan=-1).astype(int), min(width, len(channel.values) or 1)
        )
        commonest = [
            int(np.bincount(part[part >= 0]).argmax()) if (part >= 0).any() else -1
            for part in parts
        ]
        return "".join("·" if c < 0 else str(c + 1) for c in commonest)
    size = np.nan_to_num(np.abs(channel.values), nan=0.0, posinf=np.inf)
    bins = np.array_split(size, min(width, len(size))) if len(size) else []
    return "".join(
        "▁▂▃▄▅▆▇█"[min(7, int(8 * weight(float(b.max()), channel.limit, channel.kind)))]
        for b in bins
    )


def sparkline_of(trace: Trace, channel: Channel, row: int) -> list[str]:
    """The sparkline of the completion that a row lies in, as a line of its own; none where there is
    no such row.
    """
    samples = trace.column("sample")
    if not 0 <= row < len(samples):
        return []
    values = channel.values[samples == samples[row]]
    return [
        f"{sparkline(Channel('', '', values, fixed=channel.limit))} {channel.label} along"
        f" completion {samples[row]}"
    ]


def number(value: float, sign: bool = False) -> str:
    """Three significant digits, with a real minus."""
    if not math.isfinite(value):
        return "–" if math.isnan(value) else "∞" if value > 0 else "−∞"
    text = np.format_float_positional(value, 3, fractional=False, trim="-")
    if abs(value) < 0.0005 and value:
        return "<0.001" if value > 0 else ">−0.001"
    return ("+" if sign and value > 0 else "") + text.replace("-", "−")


def said(value: float, channel: Channel) -> str:
    """A value of a channel, without its unit: signed where it has two sides, its name where it has
    names.
    """
    if channel.names:
        return channel.names[int(value)] if value >= 0 else "–"
    return number(value, channel.kind in ("ratio", "signed"))


def safe(text: str) -> str:
    """Text as HTML that reads back as that text: markup escaped, CR kept, NUL (which HTML cannot
    hold) dropped.
    """
    return escape(clean(text)).replace("\r", "&#13;").replace("\0", "")


def title(text: str) -> str:
    """The title of a view, where it has one."""
    return f'<div class="opd-title">{safe(text)}</div>' if text else ""


def _key(channel: Channel, limit: float) -> str:
    cells = [
        '<span class="opd-kind"'
        f' style="{_tint(channel.kind, i, limit)}">&nbsp;{safe(mark)}&nbsp;</span>'
        + ("" if mark == name else f" <span>{safe(name)}</span>")
        for i, (mark, name) in enumerate(zip(channel.marks, channel.names, strict=True))
    ]
    return f'<div class="opd-legend"><span>{safe(channel.label)}</span> {" ".join(cells)}</div>'


def _shown(values: Sequence[float]) -> Sequence[int]:
    """Which groups the static strip holds."""
    if len(values) <= WHOLE:
        return range(len(values))
    size = np.nan_to_num(np.abs(values), nan=0.0)
    near = {
        j for i in np.argsort(-size, kind="stable")[:12].tolist() for j in range(i - 12, i + 13)
    }
    return sorted((near & set(range(len(values)))) | set(range(WHOLE // 2)))


def _strongest(groups: Sequence[Group], channel: Channel) -> Iterator[float]:
    at = 0
    for group in groups:
        yield max(
            channel.values[at : at + group.tokens].tolist(),
            key=lambda v: -1.0 if math.isnan(v) else abs(v),
        )
        at += group.tokens


def _glyph(group: Group, kind: str, value: float, limit: float) -> str:
    look = "opd-ink opd-special" if group.special else "opd-ink"
    parts = "".join(
        (
            safe(raw)
            if seen == raw
            else f'<span class="opd-mark" data-mark="{safe(seen)}">{safe(raw)}</span>'
        )
        for seen, raw in group.parts
    )
    tint = _tint(kind, value, limit)
    if not tint and not group.special:
        return group.lead + parts
    return f'{group.lead}<span class="{look}" style="{tint}">{parts}</span>'


def _tint(kind: str, value: float, limit: float) -> str:
    (r, g, b), strongest = INK[side(kind, value)]
    alpha = weight(value, limit, kind) * strongest
    line = (
        f";text-decoration:underline {LINES[int(value) % len(LINES)]}"
        if kind == "category" and value >= 0
        else ""
    )
    return f"background-color:rgba({r},{g},{b},{alpha:.3f}){line}" if alpha >= 0.02 else ""
