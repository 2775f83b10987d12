"""Consoles on which foreign text cannot steer the terminal.

Rich writes the text in a table or a line as it is, with the escape sequences in it. Here they are
shown as text. Rich's own colours and moves are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.segment import Segment

from opdlab.errors import printable


def make_console(**options: Any) -> Console:
    """Make a console of Rich.

    Args:
        options: Arguments of `rich.console.Console`.

    Returns:
        A console that shows the characters a terminal would obey as Python's escapes.
    """
    console = Console(**options)
    console.push_render_hook(_Printable())
    return console


class _Printable(RenderHook):
    """Rich's hook for all that is printed."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Wrap what is about to be printed.

        Args:
            renderables: The objects, as Rich has made them.

        Returns:
            The objects that are printed in their place.
        """
        return [_Shown(one) for one in renderables]


@dataclass(frozen=True)
class _Shown:
    """An object whose text is made printable after its layout.

    Attributes:
        inside: The object.
    """

    inside: ConsoleRenderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Lay the object out, and change the text of its parts."""
        for part in console.render(self.inside, options):
            yield part if part.control else Segment(printable(part.text), part.style)
