"""A view that is given something else than it draws says what that is and how to get the right
thing.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from viz.traces import made

import opdlab
from opdlab import viz
from opdlab.errors import OpdlabError
from opdlab.viz.overview import overview

VIEWS = (
    viz.TokenLens,
    viz.Timeline,
    viz.Regimes,
    viz.PrivilegeLens,
    viz.Forks,
    viz.Audits,
    viz.TailAudit,
    viz.Rollouts,
    overview,
    viz.Alignment.of_trace,
    lambda trace: viz.Playground("reverse_kl", trace=trace),
)


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: getattr(view, "__qualname__", str(view)))
def test_a_view_of_a_trace_takes_nothing_else(view, student, prompts):
    rollout = student.sample(prompts[:1], max_new_tokens=2)
    wrong = {
        3: "Use a Trace, as",
        "a.parquet": r"Read it: Trace\.load\('a\.parquet'\)",
        Path("b"): r"Trace\.load\('b'\)",
        rollout: r"Grade it first: opdlab\.score",
        (): "Use a Trace",
        student: "Use a Trace",
    }
    for value, words in wrong.items():
        with pytest.raises(OpdlabError, match=rf"got trace=.*{words}"):
            view(value)
    with pytest.raises(OpdlabError, match=r"got trace=\[\]\..* Use a Trace"):
        view([])
    with pytest.raises(OpdlabError, match=r"got trace=None"):
        viz.TokenLens(None)


def test_views_of_several_traces_say_how_to_name_them():
    trace, history = made([b"a", b"b"]), pd.DataFrame({"loss": [1.0, 0.5]})
    for value in (None, 3, "a", trace, [trace, trace], {"a": trace, "b": None}, {"a": 1, "b": 2}):
        with pytest.raises(
            OpdlabError, match=r"Compare got .*(\{'old': a, 'new': b\}|Use a Trace)"
        ):
            viz.Compare(value)
    for value in (trace, [trace], 3, {0: trace, 1: None}):
        with pytest.raises(OpdlabError, match=r"Scrubber got .*(Use traces by step|Use a Trace)"):
            viz.Scrubber(value)
    with pytest.raises(OpdlabError, match=r"RunCard got .*samples="):
        viz.RunCard(history, samples=[trace])
    with pytest.raises(OpdlabError, match=r"RunCard got before=0\.5\. Use what opdlab\.evaluate"):
        viz.RunCard(history, before=0.5, after=0.6)
    for value in (None, 3, [1], "runs/a"):
        with pytest.raises(OpdlabError, match=r"RunBoard got"):
            viz.RunBoard(value)
    assert opdlab.viz.RunBoard(history).plots
