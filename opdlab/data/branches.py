"""Trees of texts: a token is forced, and student and teacher write on from there.

`opdlab.diagnose.branch` grows them, `viz.Branches` draws them, and files keep them, so that a tree
that was grown once is drawn again without a model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from opdlab.errors import DamagedFile, InvalidValue
from opdlab.support.expect import shortened
from opdlab.support.files import write_file
from opdlab.support.validation import CountOrZero, FilePath, Number, Text, validate, validate_fields

FORMAT = 1
LARGEST_FILE = 256 << 20  # bytes


@dataclass(frozen=True)
class WrittenOn:
    """A text that a policy wrote on from a branch.

    Attributes:
        text: What was written behind the forced token.
        tokens: Its number of tokens.
        kl: The mean KL(student || teacher) along it, in nats per token; None for no token.
        score: The verifier's score of the whole completion; None without a verifier.
        finish: Why it ends: "stop" or "length".
    """

    text: Text
    tokens: CountOrZero
    kl: Number | None = None
    score: Number | None = None
    finish: Text = "stop"

    def __post_init__(self) -> None:
        validate_fields(self)


@dataclass(frozen=True)
class Branch:
    """A token at the place, and the texts that go on from it.

    Attributes:
        token_id: The token.
        token: Its bytes, as Latin-1 text.
        by: Who wants it: "student" (it was sampled), "teacher" (its likeliest), or "asked".
        p: The probability that each policy gives it, by name.
        texts: By name of the policy that wrote on.
    """

    token_id: CountOrZero
    token: Text
    by: Text
    p: dict[str, float]
    texts: dict[str, list[WrittenOn]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        validate_fields(self)

    def mean(self, writer: str, name: str) -> float | None:
        """Average a number of the texts of a writer.

        Args:
            writer: The policy that wrote on.
            name: "score" or "kl".

        Returns:
            The mean over its texts; None where none has the number.
        """
        values = [getattr(text, name) for text in self.texts.get(writer, [])]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None


@dataclass(frozen=True)
class Tree:
    """The branches at one token of a completion.

    Attributes:
        sample: Number of the completion.
        position: The token's place in it.
        token_ids: The tokens before it, which the tree belongs to.
        branches: The branches, the sampled token's first.
    """

    sample: CountOrZero
    position: CountOrZero
    token_ids: list[int]
    branches: list[Branch]

    def __post_init__(self) -> None:
        validate_fields(self)


def save_trees(trees: Sequence[Tree], path: str | os.PathLike[str]) -> Path:
    """Write trees to a file, atomically: a reader sees the old file or the new one.

    Args:
        trees: The trees.
        path: The file.

    Returns:
        The path.

    Raises:
        InvalidValue: There is something else among them, or `path` is no path.
    """
    path = Path(validate("save_trees", {"path": path}, {"path": FilePath})["path"])
    for tree in trees:
        if not isinstance(tree, Tree):
            raise InvalidValue(
                f"save_trees got {shortened(tree)}. Give trees, as opdlab.diagnose.branch makes"
                " them."
            )
    content = {"format": FORMAT, "trees": [asdict(tree) for tree in trees]}
    return write_file(path, json.dumps(content, ensure_ascii=False).encode("utf-8", "replace"))


def load_trees(path: str | os.PathLike[str]) -> list[Tree]:
    """Read what `save_trees` wrote.

    Args:
        path: The file.

    Returns:
        The trees.

    Raises:
        DamagedFile: It is something else, or is not whole.
    """
    path = Path(validate("load_trees", {"path": path}, {"path": FilePath})["path"])
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ValueError("it is too large")
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError("it has another format")
        return [_read_tree(tree) for tree in content["trees"]]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise DamagedFile(
            f"{path} is no file of trees ({error}). Write it again with save_trees()."
        ) from error


def _read_tree(stored: dict[str, Any]) -> Tree:
    branches = [
        Branch(
            int(one["token_id"]),
            one["token"],
            one["by"],
            {str(name): float(p) for name, p in one["p"].items()},
            {
                str(name): [WrittenOn(**text) for text in texts]
                for name, texts in one["texts"].items()
            },
        )
        for one in stored["branches"]
    ]
    token_ids = [int(i) for i in stored["token_ids"]]
    return Tree(stored["sample"], stored["position"], token_ids, branches)
