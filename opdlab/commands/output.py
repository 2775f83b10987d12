"""Where a command prints: results on stdout, progress on stderr; --json leaves stdout to JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

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
        from rich.console import Console

        return Console(stderr=self.is_json)

    def say(self, text: str) -> None:
        """Print a line for people, as plain text.

        Args:
            text: The line.
        """
        print(text, file=sys.stderr if self.is_json else sys.stdout, flush=True)

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
        kept = os.dup(1)
        os.dup2(2, 1)
        try:
            yield self
        finally:
            sys.stdout.flush()
            os.dup2(kept, 1)
            os.close(kept)
        if self.result is not None:
            print(json.dumps(self.result, indent=1, ensure_ascii=False, allow_nan=False))
