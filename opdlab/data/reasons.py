"""Reasons of a policy at one token: the weight of everything that it read, and its way in depth.

`opdlab.diagnose.attribute` and `opdlab.diagnose.depth` compute them, `viz.Why` and `viz.Depth` draw
them; files keep both, so that they are drawn again without a model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opdlab.errors import DamagedFile, InvalidValue
from opdlab.support.expect import shortened
from opdlab.support.files import write_file
from opdlab.support.validation import CountOrZero, FilePath, Number, Text, validate, validate_fields

FORMAT = 1
PARTS = ("hint", "prompt", "prefix", "last")
LARGEST_FILE = 256 << 20  # bytes


@dataclass(frozen=True)
class Reading:
    """Hold what a policy read before it gave a token its probability.

    Attributes:
        logp: The token's log-prob, in nats.
        pieces: The bytes of each token read, as Latin-1 text.
        parts: The part of each: "hint" (only this policy sees it), "prompt", "prefix" (of the
            completion), and "last", the token just before, where the prediction is made.
        weights: Gradient times input of each, in nats.
    """

    logp: Number
    pieces: list[str]
    parts: list[str]
    weights: list[float]

    def __post_init__(self) -> None:
        validate_fields(self)
        sizes = {len(self.pieces), len(self.parts), len(self.weights)}
        if len(sizes) > 1 or not set(self.parts) <= set(PARTS):
            raise InvalidValue(
                f"A reading has {len(self.pieces)} pieces, {len(self.parts)} parts and"
                f" {len(self.weights)} weights. Give one of each per token, the parts from"
                f" {', '.join(PARTS)}."
            )

    def shares(self) -> dict[str, float]:
        """Sum the sizes of the weights by part.

        Returns:
            Shares of the hint, the prompt and the prefix; those of the last token, which says where
            the text is and carries no other information, are left out. They sum to 1, or to 0.
        """
        sums = dict.fromkeys(PARTS, 0.0)
        for part, weight in zip(self.parts, self.weights, strict=True):
            sums[part] += abs(weight)
        del sums["last"]
        total = sum(sums.values()) or 1.0
        return {part: value / total for part, value in sums.items()}


@dataclass(frozen=True)
class Reason:
    """Why teacher and student gave a token the probabilities that they gave.

    Attributes:
        sample: Number of the completion.
        position: The token's place in it.
        token_id: The token.
        token: Its bytes, as Latin-1 text.
        teacher: What the teacher read.
        student: What the student read.
    """

    sample: CountOrZero
    position: CountOrZero
    token_id: CountOrZero
    token: Text
    teacher: Reading
    student: Reading

    def __post_init__(self) -> None:
        validate_fields(self)


@dataclass(frozen=True)
class Depth:
    """Hold where in depth two models of one architecture part, at one token (the logit lens).

    Attributes:
        sample: Number of the completion.
        position: The token's place in it.
        kl: KL(student || teacher) after the embeddings and after every layer, in nats.
        student: The student's log-prob of the sampled token there.
        teacher: The teacher's.
    """

    sample: CountOrZero
    position: CountOrZero
    kl: list[float]
    student: list[float]
    teacher: list[float]

    def __post_init__(self) -> None:
        validate_fields(self)
        if not len(self.kl) == len(self.student) == len(self.teacher) > 0:
            raise InvalidValue(
                f"A depth has {len(self.kl)}, {len(self.student)} and {len(self.teacher)} numbers."
                " Give one of each per layer."
            )


def save_reasons(reasons: Sequence[Reason | Depth], path: str | os.PathLike[str]) -> Path:
    """Write reasons and depths to a file, atomically.

    Args:
        reasons: What to write.
        path: The file.

    Returns:
        The path.

    Raises:
        InvalidValue: There is something else among them, or `path` is no path.
    """
    path = Path(validate("save_reasons", {"path": path}, {"path": FilePath})["path"])
    for one in reasons:
        if not isinstance(one, (Reason, Depth)):
            raise InvalidValue(
                f"save_reasons got {shortened(one)}. Give what opdlab.diagnose.attribute and depth"
                " make."
            )
    content = {
        "format": FORMAT,
        "reasons": [asdict(one) for one in reasons if isinstance(one, Reason)],
        "depths": [asdict(one) for one in reasons if isinstance(one, Depth)],
    }
    return write_file(path, json.dumps(content, ensure_ascii=False).encode("utf-8", "replace"))


def load_reasons(path: str | os.PathLike[str]) -> list[Reason | Depth]:
    """Read what `save_reasons` wrote.

    Args:
        path: The file.

    Returns:
        The reasons, then the depths.

    Raises:
        DamagedFile: It is something else, or is not whole.
    """
    path = Path(validate("load_reasons", {"path": path}, {"path": FilePath})["path"])
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ValueError("it is too large")
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError("it has another format")
        return [
            *(_read_reason(one) for one in content["reasons"]),
            *(Depth(**one) for one in content["depths"]),
        ]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise DamagedFile(
            f"{path} is no file of reasons ({error}). Write it again with save_reasons()."
        ) from error


def _read_reason(stored: dict[str, Any]) -> Reason:
    readings = {name: Reading(**stored[name]) for name in ("teacher", "student")}
    return Reason(**{**stored, **readings})
