"""Show progress in one live line: a bar in a terminal, a line of HTML in a notebook.

The line is no widget, so it survives saving.
"""

from __future__ import annotations

import html
import sys
from typing import Any

from tqdm import tqdm

PLAIN = "{desc} |{bar:10}| {n_fmt} of {total_fmt} UNITs{postfix}"  # without tqdm's own clock


def in_notebook() -> bool:
    """Tell whether this process is a Jupyter kernel.

    Returns:
        True in a Jupyter kernel; False in a script and in a terminal IPython.
    """
    if "IPython" not in sys.modules:
        return False
    from IPython import get_ipython

    return type(get_ipython()).__name__ == "ZMQInteractiveShell"


class Progress:
    """Draw one line of progress.

    Args:
        total: The number of units in all.
        name: The name of the task.
        unit: The name of a unit.
        quiet: Whether to draw nothing.
        leave: Whether the last state stays after `close` (in a terminal; in a notebook it does).
        clock: Whether a terminal shows the time gone and left, reckoned from the units done. Work
            that knows better how long it takes says so itself in `update`.

    Attributes:
        total: The number of units in all; it may change from one update to the next.
        name: The name of the task.
        unit: The name of a unit.
        quiet: Whether nothing is drawn.
        leave: Whether the last state stays after `close`.
        clock: Whether a terminal shows the time gone and left.
    """

    def __init__(
        self,
        total: int,
        name: str,
        unit: str = "step",
        quiet: bool = False,
        leave: bool = True,
        clock: bool = True,
    ) -> None:
        self.total, self.name, self.unit, self.quiet, self.leave = total, name, unit, quiet, leave
        self.clock = clock
        self._bar: Any = None

    def update(self, done: int, **numbers: float | str) -> None:
        """Redraw the line.

        Args:
            done: The number of units done.
            numbers: Figures to show beside it, by name, such as `loss=0.3`.
        """
        if self.quiet:
            return
        shown = {k: v if isinstance(v, str) else f"{v:.3g}" for k, v in numbers.items()}
        if in_notebook():
            self._draw(done, shown)
            return
        if self._bar is None:
            self._bar = tqdm(
                total=self.total,
                desc=self.name,
                unit=self.unit,
                leave=self.leave,
                dynamic_ncols=True,
                bar_format=None if self.clock else PLAIN.replace("UNIT", self.unit),
            )
        self._bar.total = self.total
        if self.clock:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(done - self._bar.n)
            return
        facts = " · ".join(f"{name} {value}" for name, value in shown.items())
        self._bar.set_postfix_str(facts, refresh=False)
        self._bar.n = done
        self._bar.refresh()

    def _draw(self, done: int, shown: dict[str, str]) -> None:
        from IPython.display import HTML, display

        facts = " · ".join(f"{html.escape(k)} {html.escape(v)}" for k, v in shown.items())
        line = HTML(
            f"<code>{html.escape(self.name)} {done}/{self.total}</code> <progress max={self.total}"
            f" value={done}></progress> {facts}"
        )
        if self._bar is None:
            self._bar = display(line, display_id=True)
        else:
            self._bar.update(line)

    def close(self) -> None:
        """End the line; a later update starts a new one."""
        if isinstance(self._bar, tqdm):
            self._bar.close()
        self._bar = None
