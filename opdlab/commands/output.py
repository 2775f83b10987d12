"""Print results on stdout and progress on stderr; --json leaves stdout to JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from opdlab.errors import printable

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class Output:
    """Print for people, or for programs.

    Attributes:
        is_json: Whether programs read stdout.
        result: What `--json` prints at the end.
    """

    is_json: bool
    result: Any = field(default=None, repr=False)

    @property
    def console(self) -> Console:
        """The console for people."""
        from opdlab.support.consoles import make_console

        return make_console(stderr=self.is_json)

    def say(self, text: str) -> None:
        """Print a line for people, as plain text.

        Args:
            text: The line.
        """
        print(printable(text), file=sys.stderr if self.is_json else sys.stdout, flush=True)

    @contextmanager
    def printing(self) -> Iterator[Output]:
        """Keep stdout for `result`: with --json, all else that is printed goes to stderr.

        This holds for libraries and their processes too, since the file itself is exchanged.

        Yields:
            The output.
        """
        if not self.is_json:
            yield self
            return
        sys.stdout.flush()
        with os.fdopen(os.dup(1), "w", encoding="utf-8") as stdout:
            # For good: some trackers print once more when the process ends.
            os.dup2(2, 1)
            yield self
            if self.result is not None:
                json.dump(self.result, stdout, indent=1, ensure_ascii=False, allow_nan=False)
                stdout.write("\n")
