"""Branches: what would have come of another token, as a tree of texts with their results."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from opdlab.data.branches import Branch, Tree, WrittenOn, load_trees, save_trees
from opdlab.data.trace import Trace
from opdlab.errors import InvalidValue, OpdlabError
from opdlab.support.expect import expect, shortened
from opdlab.support.validation import ByName, Count, Text, Unchecked, Whole, validate_arguments
from opdlab.viz import markup, payload
from opdlab.viz.channel import Channel, describe_channel
from opdlab.viz.channels import find_channels
from opdlab.viz.given import select_completion
from opdlab.viz.glyphs import clean_text, show_piece
from opdlab.viz.made_up import make_trace
from opdlab.viz.view import EXAMPLE_TOKENS, EXAMPLE_WORDS, View

if TYPE_CHECKING:
    from typing_extensions import Self

    from opdlab.data.rollout import Rollout

NAMES = {"student": "the student's token", "teacher": "the teacher's token", "asked": "asked for"}
LONGEST = 4000  # characters of a text that a page carries


class Branches(View):
    """Force a token and go on: the texts of student and teacher from there, scored.

    Trees that are there already are drawn without a model. To grow more on a live page, hand in
    `policies` and the `rollout`: choosing a token in any view of the page (`TokenLens`, `Forks`)
    chooses it here, and a button grows its tree.

    Args:
        trace: The trace of the rollout.
        trees: Trees that are there already: from `opdlab.diagnose.branch`, or the path of a file
            that `save` wrote.
        policies: `student` and `teacher`, to grow trees.
        rollout: The rollout that was graded, whose prompts the policies read.
        task: The task whose verifier scores the texts.
        sample: The completion.
        n: Texts of each writer from each branch.
        title: The title above.

    Attributes:
        trees: The trees of this completion, by position.
        trace: The rows of the completion.

    Raises:
        OpdlabError: The trace has no such completion, or there are no trees and nobody to ask.
        InvalidValue: A tree belongs to another text.
    """

    caption = "What would have come of the teacher's token?"
    takes = "a trace, with trees or with policies"
    name, scripts, styles = "branches", ("branches.js",), ("branches.css",)

    @validate_arguments
    def __init__(
        self,
        trace: Unchecked[Trace],
        trees: Unchecked[Sequence[Tree] | str | os.PathLike[str]] = (),
        policies: ByName | None = None,
        rollout: Unchecked[Rollout | None] = None,
        task: Unchecked[Any] = None,
        sample: Whole = 0,
        n: Count = 4,
        title: Text = "",
    ) -> None:
        super().__init__()
        expect(trace, Trace, type(self).__name__, "trace")
        if rollout is not None:
            _expect_rollout(rollout, type(self).__name__)
        self.trace = select_completion(trace, sample)
        self.sample, self.n, self.title = sample, n, title
        self.policies, self.rollout, self.task = dict(policies or {}), rollout, task
        given = load_trees(trees) if isinstance(trees, (str, os.PathLike)) else trees
        self.trees: dict[int, Tree] = {}
        for tree in given:
            self._add(tree)
        if not self.trees and not self._can_ask:
            raise OpdlabError(
                "There is no tree to draw. Grow one with opdlab.diagnose.branch(rollout, student,"
                " teacher, sample, position), or hand in policies={'student': …, 'teacher': …} and"
                " rollout=… to grow them here."
            )
        self.selected = next(iter(self.trees), 0)

    @classmethod
    def fits(cls, given: object, sample: int = 0) -> bool:
        """Return False: a trace alone has no trees.

        Args:
            given: Anything.
            sample: Not used.

        Returns:
            False.
        """
        return False

    @classmethod
    def example(cls, tokens: Sequence[bytes] = EXAMPLE_TOKENS, words: str = EXAMPLE_WORDS) -> Self:
        """Make the view of a made-up tree at the second token.

        Args:
            tokens: The bytes of the completion's tokens.
            words: All other texts: title, prompt, texts of the tree.

        Returns:
            The view.
        """
        trace = make_trace(tokens, prompt=words, finish=words)
        at = min(1, len(tokens) - 1)
        ids = trace.column("token_id").tolist()
        texts = [
            WrittenOn(words, 5, kl=0.1, score=1.0),
            WrittenOn(words, 5, kl=0.4, score=0.0, finish="length"),
        ]
        branches = [
            Branch(
                int(token),
                trace.meta["vocab"][str(token)],
                by,
                {"student": p, "teacher": 0.7 - p},
                {"student": texts, "teacher": texts[:1]},
            )
            for token, by, p in ((ids[at], "student", 0.6), (max(ids), "teacher", 0.2))
        ]
        tree = Tree(0, at, ids[:at], branches)
        return cls(trace, [tree], title=words)

    def grow(self, row: int, tokens: Sequence[int] = ()) -> Tree:
        """Grow the tree of a token, and keep it.

        Args:
            row: A row of `df`.
            tokens: Further token ids to force.

        Returns:
            The tree.

        Raises:
            OpdlabError: No policies were handed in, or there is no such row.
        """
        if not self._can_ask or self.rollout is None:
            raise OpdlabError(
                "Nobody can be asked. Make it with Branches(trace, policies={'student': …,"
                " 'teacher': …}, rollout=rollout)."
            )
        if not 0 <= row < len(self.trace):
            raise OpdlabError(
                f"The completion has tokens 0 to {len(self.trace) - 1}, not {shortened(row)}. Give"
                " one of these."
            )
        from opdlab.diagnose.branching import branch

        student, teacher = self.policies["student"], self.policies["teacher"]
        tree = branch(
            self.rollout,
            student,
            teacher,
            self.sample,
            int(row),
            tokens=tokens,
            n=self.n,
            task=self.task,
            quiet=True,
        )
        self._add(tree)
        return tree

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the trees to a file, atomically, for `Branches(trace, path)`.

        Args:
            path: The file.

        Returns:
            The path.
        """
        return save_trees(list(self.trees.values()), path)

    def answer(self, question: Mapping[str, Any]) -> Any:
        """Grow the tree of a row.

        Args:
            question: `row`.

        Returns:
            The tree as the page reads it.

        Raises:
            OpdlabError: There is no such row, or no policies were handed in.
        """
        return self._describe(self.grow(int(question["row"])))

    @property
    def df(self) -> pd.DataFrame:
        """The trace's rows of this completion with each token's name and whether it has a tree."""
        return self.trace.to_pandas().assign(
            token=[show_piece(piece) for piece in self.trace.tokens()],
            has_tree=[i in self.trees for i in range(len(self.trace))],
        )

    @property
    def table(self) -> pd.DataFrame:
        """A row per branch and writer: probabilities, mean score, mean KL, number of texts."""
        rows = [
            {
                "position": position,
                "token": show_piece(branch.token.encode("latin-1")),
                "by": branch.by,
                **{f"p_{name}": p for name, p in branch.p.items()},
                "writer": writer,
                "score": branch.mean(writer, "score"),
                "kl": branch.mean(writer, "kl"),
                "texts": len(texts),
            }
            for position, tree in self.trees.items()
            for branch in tree.branches
            for writer, texts in branch.texts.items()
        ]
        return pd.DataFrame(rows)

    def data(self) -> dict[str, Any]:
        """Return all that the script draws.

        Returns:
            Plain data and numpy arrays, as `static/branches.js` reads them.
        """
        channel = self._channel
        return {
            "title": self.title,
            "prompt": str(self.trace.meta["prompts"][self.sample]),
            "finish": str(self.trace.meta["finish"][self.sample]),
            "text": payload.describe_text(self.trace),
            "channel": describe_channel(channel, channel.limit) | {"peaks": sorted(self.trees)},
            "asks": self._can_ask and self.rollout is not None,
            "trees": [self._describe(tree) for tree in self.trees.values()],
        }

    def static(self) -> str:
        """Return the picture as HTML without a script.

        Returns:
            Markup with a line per branch and writer; every foreign string in it is escaped.
        """
        lines = "".join(f"<div>{markup.escape(line)}</div>" for line in self._lines())
        return (
            f"{markup.draw_title(self.title)}"
            f"{markup.draw_prompt(str(self.trace.meta['prompts'][self.sample]))}"
            f'<div class="opd-still">{lines}</div>'
        )

    def __repr__(self) -> str:
        head = f"Branches: {self.title or f'completion {self.sample}'}, {len(self.trees)} trees"
        return "\n".join([head, markup.draw_sparkline(self._channel), *self._lines()])

    def _add(self, tree: Tree) -> None:
        """Keep a tree of this completion; refuse one of another text."""
        if not isinstance(tree, Tree):
            raise InvalidValue(
                f"Branches got {shortened(tree)} for a tree. Give those that"
                " opdlab.diagnose.branch(…) makes, or the path of their file."
            )
        if tree.sample != self.sample:
            return
        ids = self.trace.column("token_id").tolist()
        if tree.position >= len(ids) or tree.token_ids != ids[: tree.position]:
            raise InvalidValue(
                f"A tree at position {tree.position} of completion {tree.sample} belongs to another"
                " text. Draw it with the trace of the rollout that it was grown from."
            )
        self.trees = dict(sorted({**self.trees, tree.position: tree}.items()))

    @property
    def _can_ask(self) -> bool:
        return {"student", "teacher"} <= set(self.policies)

    @cached_property
    def _channel(self) -> Channel:
        """The log ratio, or another channel where the trace has none."""
        found = find_channels(self.trace)
        plain = Channel("none", "no numbers", np.zeros(len(self.trace)))
        return found.get("log_ratio") or next(
            (one for one in found.values() if one.kind in ("ratio", "amount")), plain
        )

    def _describe(self, tree: Tree) -> dict[str, Any]:
        """A tree as the page reads it."""
        return {
            "row": tree.position,
            "branches": [
                {
                    "token": payload.shorten_word(show_piece(one.token.encode("latin-1"))),
                    "by": one.by,
                    "p": one.p,
                    "writers": [
                        {
                            "name": writer,
                            "score": one.mean(writer, "score"),
                            "kl": one.mean(writer, "kl"),
                            "texts": [_short(text) for text in texts],
                        }
                        for writer, texts in one.texts.items()
                    ],
                }
                for one in tree.branches
            ],
        }

    def _lines(self) -> list[str]:
        lines = []
        for row in self.table.to_dict("records"):
            score = "" if row["score"] is None else f", score {markup.format_number(row['score'])}"
            kl = "" if row["kl"] is None else f", KL {markup.format_number(row['kl'])} nats a token"
            lines.append(
                f"position {row['position']}, {row['token']} ({NAMES.get(row['by'], row['by'])}),"
                f" the {row['writer']} goes on: {row['texts']} texts{score}{kl}"
            )
        return lines


def _expect_rollout(value: Any, where: str) -> None:
    """Refuse what is no rollout; only a view that may ask a model imports the class."""
    from opdlab.data.rollout import Rollout

    expect(value, Rollout, where, "rollout")


def _short(text: WrittenOn) -> dict[str, Any]:
    """A text as the page reads it, without its end where it is very long."""
    shown = text.text if len(text.text) <= LONGEST else f"{text.text[:LONGEST]} …"
    kept = replace(text, text=clean_text(shown))
    return {"text": kept.text, "kl": kept.kl, "score": kept.score, "finish": kept.finish}
