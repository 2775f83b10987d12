"""The static half of views: coloured tokens, legend and peaks as HTML, for where no script runs."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np

from opdlab.data.trace import Trace
from opdlab.viz.channel import Channel
from opdlab.viz.glyphs import Group, clean_text

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
KIND_ALPHA = 0.5
INK |= {f"k{i}": (rgb, KIND_ALPHA) for i, rgb in enumerate(KINDS)}
BARS = "▁▂▃▄▅▆▇█"
LINES = ("solid", "dotted", "dashed", "double", "wavy")
REPLY_STYLE = "opacity:0.6;font-style:italic"  # of what a tool or a user said
STRIP_STYLE = "white-space:pre-wrap;font-family:monospace;line-height:1.9"
WHOLE = 1200  # groups that the static strip holds whole
# Below the static half of a view that a script would draw. A script that runs replaces it, and the
# style sheet shows it only after a while, so that nobody sees it who has scripts.
BARE_NOTE = (
    '<div class="opd-bare">A still picture: no script runs here. The view responds in a trusted'
    " notebook, in a page of its own, and as a live view.</div>"
)
_STEPS = 12  # cells of the legend on each side of zero


def colour_of(kind: str, value: float) -> str:
    """Return the colour of a value, a key of `INK`.

    Args:
        kind: The kind of the channel (`Channel.kind`).
        value: The value; of a category, the place of its name.

    Returns:
        A key of `INK`.
    """
    if kind == "category":
        return f"k{int(value) % len(KINDS)}" if value >= 0 else "minus"
    negative, positive = {"ratio": ("student", "teacher"), "signed": ("minus", "amount")}.get(
        kind, ("amount", "amount")
    )
    return positive if value > 0 else negative


def strength_of(value: float, limit: float, kind: str = "amount") -> float:
    """Return how strong the colour of a value is, from 0 to 1.

    The square root of the size, so that middling values show; of ordinals, their place.

    Args:
        value: The value.
        limit: The size that gets full colour.
        kind: The kind of the channel (`Channel.kind`).

    Returns:
        The strength; 0 for NaN, and 1 for all values of categories.
    """
    if math.isnan(value):
        return 0.0
    if kind == "category":
        return 1.0
    return min(1.0, abs(value) / limit if kind == "ordinal" else math.sqrt(abs(value) / limit))


def draw_strip(
    groups: Sequence[Group],
    channel: Channel,
    limit: float,
    learned: Sequence[bool] | np.ndarray | None = None,
) -> str:
    """Return the tokens as coloured HTML.

    Its text content is the text itself, apart from NUL, which HTML cannot hold. Of texts longer
    than `WHOLE` groups it holds the beginning and the neighbours of the peaks, and counts the rest.

    Args:
        groups: The tokens, as `group_pieces` gives them.
        channel: The channel that colours, one value per token.
        limit: The size that gets full colour.
        learned: Which tokens the student wrote, `[n]`; the others are greyed. None: all.

    Returns:
        Markup of the tokens, escaped.
    """
    values, out, at = list(_strongest(groups, channel)), [], 0
    rows = list(accumulate((group.tokens for group in groups), initial=0))
    shown = _shown(values)
    for i in [*shown, len(groups)]:
        if i > at:
            out.append(f'<span class="opd-soft"> … {i - at:,} more … </span>')
        if i < len(groups):
            glyph = _glyph(groups[i], channel, values[i], limit)
            is_own = learned is None or learned[rows[i]]
            out.append(glyph if is_own else f'<span style="{REPLY_STYLE}">{glyph}</span>')
        at = i + 1
    return "".join(out)


def draw_strip_box(
    groups: Sequence[Group],
    channel: Channel,
    limit: float,
    finish: str | None = None,
    learned: Sequence[bool] | np.ndarray | None = None,
) -> str:
    """Return `draw_strip` in its box, with the finish reason where one is given.

    Args:
        groups: The tokens, as `group_pieces` gives them.
        channel: The channel that colours, one value per token.
        limit: The size that gets full colour.
        finish: The reason why the completion ended; None shows nothing.
        learned: Which tokens the student wrote, `[n]`; the others are greyed. None: all.

    Returns:
        A `<div>` of class `opd-strip`.
    """
    ended = "" if finish is None else f' data-finish="{escape(finish)}"'
    colours = draw_strip(groups, channel, limit, learned)
    return f'<div class="opd-strip"{ended} dir="auto" style="{STRIP_STYLE}">{colours}</div>'


def draw_prompt(text: str) -> str:
    """Return a prompt as HTML.

    Args:
        text: The text, not escaped.

    Returns:
        A `<div>`.
    """
    return f'<div class="opd-prompt" style="white-space:pre-wrap" dir="auto">{escape(text)}</div>'


def draw_words(text: str) -> str:
    """Return a line of words under a picture, as HTML.

    Args:
        text: The text, not escaped.

    Returns:
        A `<div>`.
    """
    return f'<div class="opd-peaks">{escape(text)}</div>'


def draw_legend(channel: Channel, limit: float) -> str:
    """Return the colour scale with its ends and unit; of categories, the mark and name of each.

    Args:
        channel: The channel.
        limit: The size that gets full colour.

    Returns:
        A `<div>`.
    """
    if channel.names:
        return _key(channel, limit)
    has_sides = channel.kind != "amount"
    tints = [
        _tint(channel, i * limit / _STEPS, limit)
        for i in range(-_STEPS if has_sides else 0, _STEPS + 1)
    ]
    cells = "".join(f'<span class="opd-cell" style="{tint}">&nbsp;</span>' for tint in tints)
    ends = [f"−{format_number(limit)}"] if has_sides else []
    ticks = " … ".join([*ends, "0", f"{format_number(limit)} {channel.unit}"])
    meaning = f"{channel.less} ↔ {channel.more}" if channel.less else ""
    return (
        f'<div class="opd-legend"><span>{escape(channel.label)}</span> '
        f'<span class="opd-scale">{cells}</span> '
        f"<span>{escape(ticks)}</span> <span>{escape(meaning)}</span></div>"
    )


def draw_sparkline(channel: Channel, width: int = 64) -> str:
    """Return the sizes of the channel along the text, as one line of bars.

    Where many tokens share a character, it shows the largest. A category is shown by numbers, from
    1 in the order of its names; the commonest where many tokens share a character.

    Args:
        channel: The channel.
        width: Characters at most.

    Returns:
        One character per token or stretch of tokens; "" for no tokens.
    """
    if channel.kind == "category":
        codes = np.nan_to_num(channel.values, nan=-1).astype(int)
        commonest = [
            _commonest(part) for part in np.array_split(codes, min(width, len(codes) or 1))
        ]
        return "".join("·" if code < 0 else str(code + 1) for code in commonest)
    size = np.nan_to_num(np.abs(channel.values), nan=0.0, posinf=np.inf)
    parts = np.array_split(size, min(width, len(size))) if len(size) else []
    strengths = [strength_of(float(part.max()), channel.limit, channel.kind) for part in parts]
    return "".join(draw_bar(strength) for strength in strengths)


def draw_bar(strength: float) -> str:
    """Return one character that is as high as `strength`, from 0 to 1.

    Args:
        strength: The height as a share of a full line; what lies outside 0 to 1 is cut off.

    Returns:
        One of `BARS`.
    """
    return BARS[min(len(BARS) - 1, int(len(BARS) * max(0.0, strength)))]


def draw_sparkline_of(trace: Trace, channel: Channel, row: int) -> list[str]:
    """Return the sparkline of the completion that a row lies in; nothing for no such row.

    Args:
        trace: The trace.
        channel: A channel over all rows of the trace.
        row: A row of the trace.

    Returns:
        One line of text in a list, or an empty list.
    """
    samples = trace.column("sample")
    if not 0 <= row < len(samples):
        return []
    values = channel.values[samples == samples[row]]
    return [
        f"{draw_sparkline(Channel('', '', values, fixed=channel.limit))} {channel.label} along"
        f" completion {samples[row]}"
    ]


def format_number(value: float, sign: bool = False) -> str:
    """Return a number with three significant digits and a real minus.

    Args:
        value: The number.
        sign: Whether a positive number gets a plus.

    Returns:
        The text; "–" for NaN, "∞" or "−∞", and "<0.001" for what is smaller than 0.0005.
    """
    if not math.isfinite(value):
        return "–" if math.isnan(value) else "∞" if value > 0 else "−∞"
    text = np.format_float_positional(value, 3, fractional=False, trim="-")
    if abs(value) < 0.0005 and value:
        return "<0.001" if value > 0 else ">−0.001"
    return ("+" if sign and value > 0 else "") + text.replace("-", "−")


def format_value(value: float, channel: Channel) -> str:
    """Return a value in words: its name, or the number, signed where the channel has two sides.

    Args:
        value: The value.
        channel: The channel that it is from.

    Returns:
        The text, without the unit; "–" for none.
    """
    if channel.names:
        return channel.names[int(value)] if value >= 0 else "–"
    return format_number(value, channel.kind in ("ratio", "signed"))


def escape(text: str) -> str:
    """Return text as HTML that reads back as that text.

    Markup is escaped, CR is kept, NUL, which HTML cannot hold, is dropped.

    Args:
        text: Any string.

    Returns:
        Markup, also for attribute values in quotes.
    """
    return html.escape(clean_text(text)).replace("\r", "&#13;").replace("\0", "")


def draw_title(text: str) -> str:
    """Return the title of a view as HTML; nothing for no title.

    Args:
        text: The title, not escaped.

    Returns:
        A `<div>`, or "".
    """
    return f'<div class="opd-title">{escape(text)}</div>' if text else ""


def count_names(channel: Channel) -> str:
    """Return how common each name of a category is, in words: "route: 1 imitate 40 %, …".

    Args:
        channel: A category with at least one value.

    Returns:
        The label and each name with its number and its share of all tokens, in the order of the
        names.
    """
    parts = [
        f"{i + 1} {name} {100 * (channel.values == i).mean():.0f} %"
        for i, name in enumerate(channel.names)
    ]
    return f"{channel.label}: {', '.join(parts)}"


def _commonest(codes: np.ndarray) -> int:
    known = codes[codes >= 0]
    return int(np.bincount(known).argmax()) if len(known) else -1


def _key(channel: Channel, limit: float) -> str:
    cells = []
    for i, (mark, name) in enumerate(zip(channel.marks, channel.names, strict=True)):
        tint = _tint(channel, i, limit)
        cell = f'<span class="opd-kind" style="{tint}">&nbsp;{escape(mark)}&nbsp;</span>'
        cells.append(cell if mark == name else f"{cell} <span>{escape(name)}</span>")
    return f'<div class="opd-legend"><span>{escape(channel.label)}</span> {" ".join(cells)}</div>'


def _shown(values: Sequence[float]) -> Sequence[int]:
    """Choose the groups that the static strip holds."""
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


def _glyph(group: Group, channel: Channel, value: float, limit: float) -> str:
    look = "opd-ink opd-special" if group.special else "opd-ink"
    parts = "".join(_part(seen, raw) for seen, raw in group.parts)
    tint = _tint(channel, value, limit)
    if not tint and not group.special:
        return group.lead + parts
    return f'{group.lead}<span class="{look}" style="{tint}">{parts}</span>'


def _part(seen: str, raw: str) -> str:
    if seen == raw:
        return escape(raw)
    return f'<span class="opd-mark" data-mark="{escape(seen)}">{escape(raw)}</span>'


def _tint(channel: Channel, value: float, limit: float) -> str:
    """The style of a value: background, and of categories an underline of their own too."""
    if channel.kind == "category":
        if not value >= 0:  # NaN and -1 are no kind
            return ""
        code = int(value)
        hue = channel.hues[code] if channel.hues else ""
        (r, g, b), _ = INK[hue or colour_of("category", code)]
        underline = f"text-decoration:underline {LINES[code % len(LINES)]}"
        return f"background-color:rgba({r},{g},{b},{KIND_ALPHA:.3f});{underline}"
    (r, g, b), strongest = INK[colour_of(channel.kind, value)]
    alpha = strength_of(value, limit, channel.kind) * strongest
    return f"background-color:rgba({r},{g},{b},{alpha:.3f})" if alpha >= 0.02 else ""
