"""Pack the data of a view as one deflated block, read back by `static/payload.js`.

The block, before deflating: the length of the JSON (4 bytes, little-endian), the JSON, then each
array from a multiple of 8 on. The JSON is `{"tree": …, "arrays": [[path, kind, start, length, top],
…]}`: the arrays lie outside the tree, so no key of foreign data can pose as one. `describe_text`
and `compact` are the same for every view of a trace.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from opdlab.data.trace import Trace
from opdlab.viz.glyphs import Group, clean_text, group_pieces, show_piece
from opdlab.viz.turns import find_turns

LONG = 2500  # tokens from which numbers travel in 8 bits
WORD = 60  # characters of a token's name in lists; the text itself is never cut
_LEVELS = 126


class Coarse(np.ndarray):
    """Floats that may travel in 8 bits, as `sign · (level / 126)² · top`; `compact` makes them."""


def compact(given: Any) -> np.ndarray:
    """Return numbers for drawing, in few bytes.

    Half precision (three digits); in texts of more than `LONG` tokens 126 levels for each sign. The
    levels are squares, so that colours, which show square roots, have even steps. NaN and
    infinities survive.

    Args:
        given: `[n]` numbers.

    Returns:
        `[n]` in half precision, in single precision where half cannot hold them, or `Coarse`.
    """
    values: np.ndarray = np.asarray(given, np.float64)
    if len(values) > LONG:
        return values.view(Coarse)
    finite = np.abs(values[np.isfinite(values)])
    is_middling = not len(finite) or 1e-4 < finite.max() < 60_000  # the range of half precision
    return values.astype(np.float16 if is_middling else np.float32)


def compact_to_colours(values: np.ndarray, limit: float) -> np.ndarray:
    """Return `compact(values)`, in long texts rounded to the 16 steps of colour up to `limit`.

    Args:
        values: `[n]` numbers.
        limit: The size that gets full colour.

    Returns:
        `[n]`, of the same types as of `compact`.
    """
    values = np.asarray(values, np.float64)
    if len(values) > LONG:
        values = np.sign(values) * (np.rint(16 * np.sqrt(np.abs(values) / limit)) / 16) ** 2 * limit
    return compact(values)


def measure_cost(values: np.ndarray) -> int:
    """Return the bytes that an array takes in the block, about.

    Args:
        values: The array, as `compact` gives it.

    Returns:
        Deflated bytes.
    """
    return len(_deflate([_store(values)[1].tobytes()]))


def describe_text(trace: Trace) -> dict[str, Any]:
    """Return the tokens of a trace, every distinct one once, and its completions.

    Args:
        trace: The trace.

    Returns:
        - `index [n]`: each token's place in the vocabulary, which is `id`, `word` (the token as
          lists show it) and `glyph` (as the strip shows it).
        - `joined`: the groups of several tokens.
        - `turns`: `(first row, rows, turn, whether the student wrote it)` of each stretch of a
          conversation; only where there are several turns.
        - `texts`: for each completion `key` (equal for the same sample, prompt and tokens: it links
          views), `sample`, `first` row, `size`, `prompt` and `finish`.
    """
    ids, where = trace.column("token_id"), list(find_spans(trace))
    seen, first, index = np.unique(ids, return_index=True, return_inverse=True)
    order = np.argsort(first)  # numbered as they come, which deflates better
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    pieces = {int(i): trace.piece(int(i)) for i in seen}
    glyphs = [_describe_glyph(group_pieces([pieces[int(i)]])[0]) for i in seen[order]]
    words = [show_piece(pieces[int(i)]) for i in seen[order]]
    turns = find_turns(trace)
    return {
        **({"turns": turns} if turns else {}),
        "index": back[index].astype(int),
        "id": seen[order],
        "word": [
            None if w == _derive_word(g) else shorten_word(w)
            for w, g in zip(words, glyphs, strict=True)
        ],
        "glyph": glyphs,
        "joined": [
            j
            for _, start, size in where
            for j in _join_glyphs([pieces[int(i)] for i in ids[start : start + size]], start)
        ],
        "texts": [_describe_completion(trace, *span) for span in where],
    }


def find_spans(trace: Trace) -> Iterator[tuple[int, int, int]]:
    """Yield (sample, first row, rows) of each completion that has rows, in row order.

    Args:
        trace: The trace; the rows of a completion follow each other.

    Yields:
        Whole numbers, one triple for each completion.
    """
    samples = trace.column("sample")
    starts = [0, *(np.flatnonzero(np.diff(samples)) + 1).tolist(), len(samples)]
    for start, end in pairwise(starts):
        if end > start:
            yield int(samples[start]), start, end - start


def shorten_word(seen: str) -> str:
    """Return a token's name, cut where it is endless.

    Args:
        seen: The name, as `show_piece` gives it.

    Returns:
        At most `WORD` characters as they are, else the beginning and the length of the name.
    """
    return (
        clean_text(seen)
        if len(seen) <= WORD
        else f"{clean_text(seen[: WORD - 12])}… ({len(seen):,})"
    )


def make_key(ids: np.ndarray, prompt: str, sample: int) -> str:
    """Return the key that links the views of one completion, also of traces that grade it again.

    Args:
        ids: `[n]` token ids of the completion.
        prompt: The prompt's text.
        sample: The completion's number.

    Returns:
        12 hexadecimal digits.
    """
    return hashlib.sha256(
        repr((sample, prompt, ids.tolist())).encode("utf-8", "replace")
    ).hexdigest()[:12]


def pack(tree: Mapping[str, Any]) -> bytes:
    """Return plain data with numpy arrays in it as one deflated block.

    Arrays of two dimensions become flat. Non-finite floats outside arrays become strings.

    Args:
        tree: Mappings, lists, strings, numbers and arrays.

    Returns:
        A raw deflate stream.
    """
    arrays: list[tuple[list[Any], str, np.ndarray, float]] = []
    plain = _split(tree, [], arrays)
    start, listed, parts = 0, [], [b""]
    for path, kind, array, top in arrays:
        listed.append([path, kind, start, array.size, top])
        parts.append(_pad(array.tobytes()))
        start += len(parts[-1])
    head = json.dumps(
        {"tree": plain, "arrays": listed},
        ensure_ascii=False,
        allow_nan=False,
        separators=(",", ":"),
    ).encode()
    parts[0] = _pad(len(head).to_bytes(4, "little") + head)
    return min(_deflate(parts), _deflate([b"".join(parts)]), key=len)


def to_base64(block: bytes) -> str:
    """Return a block as text.

    Args:
        block: The block, as `pack` gives it.

    Returns:
        Base64, in ASCII.
    """
    return base64.b64encode(block).decode("ascii")


def unpack(block: bytes) -> dict[str, Any]:
    """Return the data of a block, arrays as float64 or integers: the reference for `payload.js`.

    Args:
        block: The block, as `pack` gives it.

    Returns:
        The data; arrays that travel in levels or half precision have lost digits.
    """
    raw = zlib.decompress(block, -15)
    size = int.from_bytes(raw[:4], "little")
    head, base = json.loads(raw[4 : 4 + size]), -(-(4 + size) // 8) * 8
    tree: dict[str, Any] = head["tree"]
    for path, kind, start, length, top in head["arrays"]:
        array = np.frombuffer(raw, "i1" if kind == "levels" else f"<{kind}", length, base + start)
        node: Any = tree
        for step in path[:-1]:
            node = node[step]
        node[path[-1]] = (
            _from_levels(array, top)
            if kind == "levels"
            else array.astype(float)
            if kind[0] == "f"
            else array
        )
    return tree


def _pad(raw: bytes) -> bytes:
    return raw + b"\0" * (-len(raw) % 8)


def _deflate(parts: Sequence[bytes]) -> bytes:
    """One stream, each part with codes of its own and in the shorter of two ways.

    Looking for repetitions pays in text; in noise it only costs.
    """
    out = b""
    for i, part in enumerate(parts):
        end = zlib.Z_FINISH if i == len(parts) - 1 else zlib.Z_FULL_FLUSH
        ways = []
        for strategy in (zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY):
            packer = zlib.compressobj(9, zlib.DEFLATED, -15, zlib.DEF_MEM_LEVEL, strategy)
            ways.append(packer.compress(part) + packer.flush(end))
        out += min(ways, key=len)
    return out


def _split(data: Any, path: list[Any], arrays: list[Any]) -> Any:
    if isinstance(data, np.ndarray):
        arrays.append((path, *_store(data)))
        return None
    if isinstance(data, Mapping):
        return {
            clean_text(str(k)): _split(v, [*path, clean_text(str(k))], arrays)
            for k, v in data.items()
        }
    if isinstance(data, (list, tuple)):
        return [_split(v, [*path, i], arrays) for i, v in enumerate(data)]
    if isinstance(data, str):
        return clean_text(data)
    if isinstance(data, np.generic):
        data = data.item()
    if isinstance(data, float) and not math.isfinite(data):
        return "NaN" if math.isnan(data) else "Infinity" if data > 0 else "-Infinity"
    return data


def _store(array: np.ndarray) -> tuple[str, np.ndarray, float]:
    """Kind, little-endian values, and the largest size for levels.

    Integers take the fewest bytes that hold them.
    """
    array = array.ravel()
    if isinstance(array, Coarse):
        levels, top = _to_levels(np.asarray(array))
        return "levels", levels, top
    if array.dtype.kind == "f":
        kind = "f2" if array.dtype == np.float16 else "f4"
    else:
        low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
        fits = [
            k
            for k in ("u1", "i1", "u2", "i2", "u4", "i4")
            if np.iinfo(k).min <= low and high <= np.iinfo(k).max
        ]
        kind = fits[0] if fits else "f8"
    return kind, array.astype(f"<{kind}"), 0.0


def _to_levels(values: np.ndarray) -> tuple[np.ndarray, float]:
    finite = np.abs(values[np.isfinite(values)])
    top = float(finite.max()) if finite.size else 0.0
    level = np.rint(
        _LEVELS
        * np.sqrt(
            np.minimum(np.abs(np.nan_to_num(values, posinf=top, neginf=top)) / (top or 1.0), 1.0)
        )
    )
    level = np.where(np.isinf(values), _LEVELS + 1, level) * np.sign(np.nan_to_num(values))
    return np.where(np.isnan(values), -128, level).astype(np.int8), top


def to_plain_data(data: Any) -> Any:
    """Return data as an `answer` sends it: arrays as lists, NaN and infinities as None.

    Args:
        data: Mappings, lists, strings, numbers and arrays.

    Returns:
        Data that JSON can hold.
    """
    if isinstance(data, Mapping):
        return {k: to_plain_data(v) for k, v in data.items()}
    if isinstance(data, np.ndarray):
        return [to_plain_data(v) for v in data.tolist()]
    if isinstance(data, (list, tuple)):
        return [to_plain_data(v) for v in data]
    value = data.item() if isinstance(data, np.generic) else data
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _from_levels(level: np.ndarray, top: float) -> np.ndarray:
    level = level.astype(float)
    value = np.sign(level) * (level / _LEVELS) ** 2 * top
    value = np.where(np.abs(level) > _LEVELS, np.copysign(np.inf, level), value)
    return np.where(level == -128, np.nan, value)


def _describe_glyph(group: Group) -> Any:
    """The text itself where it is seen as it is, else `[lead, parts, special]`."""
    plain = not group.special and all(seen == raw for seen, raw in group.parts)
    return (
        group.text
        if plain
        else [group.lead, [list(part) for part in group.parts], int(group.special)]
    )


def _derive_word(glyph: Any) -> str | None:
    """The name that the page derives by itself."""
    return glyph.replace(" ", "·") if isinstance(glyph, str) and len(glyph) <= WORD else None


def _join_glyphs(pieces: list[bytes], at: int) -> Iterator[list[Any]]:
    """`[first row, tokens, glyph]` of the groups that several tokens make."""
    for group in group_pieces(pieces):
        if group.tokens > 1:
            yield [at, group.tokens, _describe_glyph(group)]
        at += group.tokens


def _describe_completion(trace: Trace, sample: int, first: int, size: int) -> dict[str, Any]:
    prompt, ids = str(trace.meta["prompts"][sample]), trace.column("token_id")[first : first + size]
    return {
        "key": make_key(ids, prompt, sample),
        "sample": sample,
        "first": first,
        "size": size,
        "prompt": prompt,
        "finish": str(trace.meta["finish"][sample]),
    }
