"""Labels that people give to tokens of a trace, kept in a file beside it.

    labels = Labels.beside("step-20.parquet")        # step-20.labels.json, if there is one
    labels.add(sample=3, position=17, label="slip", comment="the sum is right, the word is not")
    trace = labels.add_to(trace)                     # a column `label` for Regimes, reports, …

Labels belong to the tokens of one trace: a file with those of another is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from opdlab.data.column import Column
from opdlab.data.trace import Trace
from opdlab.errors import DamagedFile, InvalidValue, OpdlabError
from opdlab.support.expect import expect, shortened
from opdlab.support.files import write_file
from opdlab.support.validation import (
    Count,
    CountOrZero,
    FilePath,
    Text,
    Unchecked,
    validate_arguments,
    validate_fields,
)

FORMAT = 1
SUFFIX = ".labels.json"
LONGEST_LABEL, LONGEST_COMMENT, MOST = 80, 10_000, 100_000
LARGEST_FILE = 64 << 20  # bytes; a larger one was not written here


@dataclass(frozen=True)
class Mark:
    """A label on some tokens in a row.

    Attributes:
        sample: Number of the completion.
        position: The first token's place in it, from 0.
        label: A short name, such as "slip".
        comment: Any text; "" for none.
        length: The number of tokens.

    Raises:
        InvalidValue: A field is not of its type, or a text is empty or too long.
    """

    sample: CountOrZero
    position: CountOrZero
    label: Text
    comment: Text = ""
    length: Count = 1

    def __post_init__(self) -> None:
        validate_fields(self)
        label = self.label.strip()
        object.__setattr__(self, "label", label)  # the dataclass is frozen for everybody else
        if not label or len(label) > LONGEST_LABEL or not label.isprintable():
            raise InvalidValue(
                f"A label is {shortened(self.label)}. Use one line of 1 to {LONGEST_LABEL}"
                " characters."
            )
        if len(self.comment) > LONGEST_COMMENT:
            raise InvalidValue(
                f"A comment has {len(self.comment):,} characters. Use {LONGEST_COMMENT:,} at most."
            )


class Labels:
    """The labels of a trace's tokens. A token has one label at most: a new one replaces the old.

    Args:
        trace: The trace whose tokens are labelled.
        path: The file that keeps them, written at every change; None for none. `Labels.beside`
            names it after the trace's file. No name of a file is ever made of a label.

    Attributes:
        path: The file, or None.

    Raises:
        OpdlabError: `trace` is no trace.
        DamagedFile: The file is something else, or is not whole.
        InvalidValue: The file has labels of another trace.
    """

    @validate_arguments
    def __init__(self, trace: Unchecked[Trace], path: FilePath | None = None) -> None:
        expect(trace, Trace, "Labels", "trace")
        self.path = None if path is None else Path(path)
        self._tokens = _fingerprint(trace)
        self._sizes = np.bincount(
            trace.column("sample"), minlength=len(trace.meta["texts"])
        ).tolist()
        self._marks: list[Mark] = []
        if self.path is not None and self.path.exists():
            self._marks = self._read(self.path)

    @classmethod
    def beside(cls, trace_path: str | os.PathLike[str]) -> Labels:
        """Open the labels of a saved trace, in a file beside it.

        Args:
            trace_path: The trace's file; that of the labels ends in `.labels.json` instead.

        Returns:
            The labels; none, where there is no file yet.

        Raises:
            OpdlabError: As for `Trace.load` and `Labels`.
        """
        trace = Trace.load(trace_path)
        return cls(trace, path_beside(trace_path))

    def __len__(self) -> int:
        return len(self._marks)

    def __iter__(self) -> Iterator[Mark]:
        return iter(self._marks)

    @validate_arguments
    def add(
        self,
        sample: CountOrZero,
        position: CountOrZero,
        label: Text,
        comment: Text = "",
        length: Count = 1,
    ) -> Mark:
        """Label some tokens, in place of labels that overlap with it, and save.

        Args:
            sample: Number of the completion.
            position: The first token's place in it, from 0.
            label: A short name.
            comment: Any text.
            length: The number of tokens.

        Returns:
            The label as it is kept.

        Raises:
            InvalidValue: There are no such tokens, or a text is empty or too long.
        """
        mark = Mark(sample, position, label, comment, length)
        self._keep([*(one for one in self._marks if not _overlap(one, mark)), mark])
        return mark

    @validate_arguments
    def remove(self, sample: CountOrZero, position: CountOrZero) -> None:
        """Take the label of a token away, and save.

        Args:
            sample: Number of the completion.
            position: The place of any of its tokens.

        Raises:
            InvalidValue: The token has no label.
        """
        here = Mark(sample, position, "here")
        kept = [one for one in self._marks if not _overlap(one, here)]
        if len(kept) == len(self._marks):
            raise InvalidValue(
                f"Token {position} of completion {sample} has no label. Give one of those that"
                " labels.frame() lists."
            )
        self._keep(kept)

    def replace(self, marks: Iterable[Mark | Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Put other labels in the place of all, and save.

        Args:
            marks: The new labels, also as dicts of their fields.

        Returns:
            Them as dicts, in the order of the text.

        Raises:
            InvalidValue: One of them is no label of this trace, or two overlap.
        """
        self._keep([_read_mark(one) for one in marks])
        return self.as_json()

    def as_json(self) -> list[dict[str, Any]]:
        """Give the labels as dicts, in the order of the text.

        Returns:
            One dict per label, with the fields of `Mark`.
        """
        return [asdict(mark) for mark in self._marks]

    def frame(self) -> pd.DataFrame:
        """Make a table of the labels.

        Returns:
            The fields of `Mark` as columns, one row per label, in the order of the text.
        """
        columns = ["sample", "position", "label", "comment", "length"]
        return pd.DataFrame(self.as_json(), columns=columns)

    def add_to(self, trace: Trace) -> Trace:
        """Make a trace with the labels as its column `label`.

        Args:
            trace: The trace that was labelled, also with other columns than then.

        Returns:
            The trace with whole numbers in `label` (-1 for none) that its description names, so
            that views sort by it.

        Raises:
            InvalidValue: The trace has other tokens.
        """
        expect(trace, Trace, "Labels.add_to", "trace")
        self._check_tokens(_fingerprint(trace), "The trace")
        names = sorted({mark.label for mark in self._marks})
        codes = np.full(len(trace), -1)
        if names:
            rows = {
                place: row
                for row, place in enumerate(
                    zip(
                        trace.column("sample").tolist(),
                        trace.column("position").tolist(),
                        strict=True,
                    )
                )
            }
            for mark in self._marks:
                for position in range(mark.position, mark.position + mark.length):
                    codes[rows[mark.sample, position]] = names.index(mark.label)
        return trace.with_columns(
            label=Column(codes, "label given by hand", labels=tuple(names or ["none"]))
        )

    @validate_arguments
    def save(self, path: FilePath | None = None) -> Path:
        """Write the labels, atomically: a reader sees the old file or the new one.

        Args:
            path: The file; that of the labels by default, which follows this one from now on.

        Returns:
            The path.

        Raises:
            InvalidValue: There is no path.
        """
        if path is not None:
            self.path = Path(path)
        if self.path is None:
            raise InvalidValue("These labels have no file. Give labels.save('trace.labels.json').")
        content = {"format": FORMAT, "tokens": self._tokens, "marks": self.as_json()}
        text = json.dumps(content, indent=1, ensure_ascii=False)
        return write_file(self.path, text.encode("utf-8", "replace"))

    @property
    def fingerprint(self) -> str:
        """The tokens that these labels belong to, as 64 hexadecimal digits."""
        return self._tokens

    def _keep(self, marks: list[Mark]) -> None:
        """Take over labels that fit the trace, in order, and save them where there is a file."""
        ordered = sorted(marks, key=lambda mark: (mark.sample, mark.position))
        self._check(ordered)
        before, self._marks = self._marks, ordered
        if self.path is None:
            return
        try:
            self.save()
        except BaseException:
            self._marks = before
            raise

    def _check(self, marks: list[Mark]) -> None:
        if len(marks) > MOST:
            raise InvalidValue(f"There are {len(marks):,} labels. Use {MOST:,} at most.")
        for mark in marks:
            size = self._sizes[mark.sample] if mark.sample < len(self._sizes) else 0
            if mark.position + mark.length > size:
                raise InvalidValue(
                    f"Completion {mark.sample} has {size} tokens, and a label is on tokens"
                    f" {mark.position} to {mark.position + mark.length - 1}. Label tokens that are"
                    " there."
                )
        for one, other in pairwise(marks):
            if _overlap(one, other):
                raise InvalidValue(
                    f"Two labels are on token {other.position} of completion {other.sample}. Give"
                    " each token one."
                )

    def _check_tokens(self, tokens: str, owner: str) -> None:
        if tokens != self._tokens:
            raise InvalidValue(
                f"{owner} has other tokens than the trace of these labels. Open them with the trace"
                " that they were made for."
            )

    def _read(self, path: Path) -> list[Mark]:
        try:
            if path.stat().st_size > LARGEST_FILE:
                raise ValueError("it is too large")
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict) or content.get("format") != FORMAT:
                raise ValueError("it has another format")
            if not isinstance(content.get("marks"), list):
                raise ValueError("it has no list of marks")
            marks = [_read_mark(one) for one in content["marks"]]
            marks.sort(key=lambda mark: (mark.sample, mark.position))
        except (ValueError, RecursionError, OpdlabError) as error:
            raise DamagedFile(
                f"{path} is no file of labels ({error}). Move it away, or write it again with"
                " labels.save()."
            ) from error
        self._check_tokens(str(content.get("tokens")), str(path))
        self._check(marks)
        return marks


def load_labelled(trace_path: str | os.PathLike[str]) -> Trace:
    """Read a trace with the labels in the file beside it, where there is one.

    Args:
        trace_path: The trace's file.

    Returns:
        The trace; with the column `label` if somebody labelled it.

    Raises:
        OpdlabError: As for `Labels.beside`.
    """
    trace, path = Trace.load(trace_path), path_beside(trace_path)
    return Labels(trace, path).add_to(trace) if path.exists() else trace


def path_beside(trace_path: str | os.PathLike[str]) -> Path:
    """Name the file of the labels of a saved trace.

    Args:
        trace_path: The trace's file.

    Returns:
        The same name with the ending `.labels.json`, in the same folder.
    """
    path = Path(trace_path)
    return path.with_name(path.stem + SUFFIX)


def _read_mark(given: Any) -> Mark:
    if isinstance(given, Mark):
        return given
    if not isinstance(given, Mapping) or not {"sample", "position", "label"} <= set(given):
        raise InvalidValue(
            f"A label is {shortened(given)}. Use a dict with sample, position and label."
        )
    known = ("sample", "position", "label", "comment", "length")
    return Mark(**{name: given[name] for name in known if name in given})


def _overlap(one: Mark, other: Mark) -> bool:
    return (
        one.sample == other.sample
        and one.position < other.position + other.length
        and other.position < one.position + one.length
    )


def _fingerprint(trace: Trace) -> str:
    digest = hashlib.sha256()
    for name in ("sample", "position", "token_id"):
        digest.update(trace.column(name).astype("<i8").tobytes())
    return digest.hexdigest()
