"""Every view that a trace has something for, as `opdlab show trace.parquet` draws them."""

from __future__ import annotations

from opdlab.data.trace import Trace
from opdlab.support.expect import expect
from opdlab.viz import VIEWS
from opdlab.viz.view import View


def overview(trace: Trace, sample: int = 0) -> list[tuple[str, View]]:
    """Return the views that fit a trace with their captions, as `page(lenses=…)` takes them.

    Args:
        trace: The trace. One of a student alone has a lens and nothing to compare.
        sample: The completion that views of a single completion show.

    Returns:
        (caption, view) in the order of `VIEWS`.

    Raises:
        OpdlabError: The trace has no such completion.
    """
    expect(trace, Trace, "overview", "trace")
    fitting = [view for view in VIEWS if view.fits(trace, sample)]
    return [(view.caption, view.of_trace(trace, sample)) for view in fitting]
