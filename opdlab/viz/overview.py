"""Every view that a trace has something for, in the order in which one looks:

`opdlab show trace.parquet` draws these.
"""

from __future__ import annotations

from opdlab.data.trace import Trace
from opdlab.support.expect import expect
from opdlab.viz.audits import Audits
from opdlab.viz.forks import Forks
from opdlab.viz.kept import has_top
from opdlab.viz.privilege_lens import PrivilegeLens
from opdlab.viz.provenance import notes_of
from opdlab.viz.regimes import Regimes
from opdlab.viz.rollouts import Rollouts
from opdlab.viz.tail_audit import TailAudit
from opdlab.viz.timeline import Timeline
from opdlab.viz.token_lens import TokenLens
from opdlab.viz.view import View

CAPTIONS = {
    TokenLens: "What each token was told",
    Rollouts: "All completions",
    Timeline: "Where the text leaves the teacher's road",
    Regimes: "Which tokens a rule touches",
    PrivilegeLens: "What the hint adds",
    Forks: "Real forks and false alarms",
    Audits: "What the teacher wrote instead",
    TailAudit: "What the kept tokens miss",
}


def overview(trace: Trace, sample: int = 0) -> list[tuple[str, View]]:
    """Captions and views, as `page(lenses=…)` takes them; `sample` is the completion that the close
    views show.

    A trace of a student alone has a lens and nothing to compare. Raises OpdlabError for a
    completion that is not there.
    """
    expect(trace, Trace, "overview", "trace")
    rivals = [name for name in trace.policies if name != "student"]
    views: list[View] = [TokenLens(trace, sample)]
    views += [Rollouts(trace)] if len(trace.meta["texts"]) > 1 and len(trace) else []
    views += [Timeline(trace, samples=[sample]), Regimes(trace)] if rivals and len(trace) else []
    views += (
        [PrivilegeLens(trace, sample=sample)] if {"teacher", "teacher+hint"} <= set(rivals) else []
    )
    views += [Forks(trace)] if notes_of(trace, "TOPD").get("windows") else []
    views += [Audits(trace)] if notes_of(trace, "OmniOPD").get("audits") else []
    views += (
        [TailAudit(trace, sample)]
        if rivals and len(trace) and has_top(trace, "student", rivals[0])
        else []
    )
    return [(CAPTIONS[type(view)], view) for view in views]
