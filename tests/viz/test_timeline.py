"""Timeline without a browser: sums, forks, which rollouts, rewards."""

from __future__ import annotations

import numpy as np
import pytest
from viz.traces import made, several

from opdlab.errors import OpdlabError, UnknownColumn
from opdlab.viz import Timeline, payload

WORDS = [b"a", b" b", b" c", b" d"]


def path(gap, prompt="What?", policies=("student", "teacher")):
    gap = np.array(gap, float)
    return made(WORDS, policies, prompt=prompt).with_columns(
        student_logp=np.zeros(4), teacher_logp=gap, teacher_reverse_kl=abs(gap) / 2
    )


@pytest.fixture
def view() -> Timeline:
    return Timeline(
        several(
            path([-1, -1.5, -1, 0]),
            path([0.5, 0, 0, -0.25]),
            path([0, 0, -4, 9]),
            path([-9] * 4, prompt="Other?"),
        )
    )


def test_sums_run_along_each_rollout_of_the_prompt(view):
    table = view.df
    assert sorted(set(table["sample"])) == [0, 1, 2]
    np.testing.assert_allclose(
        table["cumulative_log_ratio"], [-1, -2.5, -3.5, -3.5, 0.5, 0.5, 0.5, 0.25, 0, 0, -4, 5]
    )
    np.testing.assert_allclose(table["cumulative_kl"][:5], [0.5, 1.25, 1.75, 1.75, 0.25])


def test_a_fork_is_the_first_token_beyond_the_threshold(view):
    assert view.forks["fork"].tolist() == pytest.approx([2, np.nan, 2], nan_ok=True)
    assert list(view.forks["token"]) == ["·c", "", "·c"]
    assert view.selected == 2
    view.threshold = 3.75
    assert view.forks["fork"].tolist() == pytest.approx([np.nan, np.nan, 2], nan_ok=True)
    view.threshold = 2.5
    assert view.forks.loc[0, "fork"] == 1  # at the threshold itself


def test_a_token_that_the_teacher_rules_out_forks_and_stays_a_number():
    view = Timeline(path([0, -np.inf, np.nan, 1]))
    assert view.forks.loc[0, "fork"] == 1
    assert np.isfinite(view.df["cumulative_log_ratio"]).all()


def test_rewards_come_from_the_trace_a_list_or_a_dict():
    trace = several(path([0] * 4), path([0] * 4))
    assert Timeline(trace).rewards == {}
    assert Timeline(trace.with_columns(reward=[1.0] * 4 + [0.0] * 4)).rewards == {0: 1.0, 1: 0.0}
    view = Timeline(trace, rewards=[0, 1])
    assert view.data()["looks"] == ["grey", "amount"]
    assert Timeline(trace, rewards={1: 5}).rewards == {1: 5.0}
    with pytest.raises(OpdlabError, match="3 rewards for 2 completions"):
        Timeline(trace, rewards=[1, 2, 3])


def test_the_page_gets_what_python_sums(view):
    sent = payload.unpack(payload.pack(view.data()))
    np.testing.assert_array_equal(
        sent["paths"]["cumulative_log_ratio"], view.df["cumulative_log_ratio"]
    )
    assert [t["sample"] for t in sent["text"]["texts"]] == [0, 1, 2]
    assert "position 2 (·c)" in view.static()
    assert view.static().count("opd-l-teacher") == 2  # one line a plot


def test_more_than_six_have_a_plot_each_on_one_scale():
    falls = [path([-i] * 4) for i in range(8)]
    few, many = Timeline(several(*falls[:6])), Timeline(several(*falls), rewards=[0.0] * 7 + [1.0])
    assert (few.data()["own"], len(few.data()["plots"]), few.static().count("<figure")) == (
        [],
        2,
        2,
    )
    sent = many.data()
    assert [plot["label"] for plot in sent["own"]] == [f"rollout {i}" for i in range(8)]
    assert {(*plot["x"], *plot["y"]) for plot in sent["own"]} == {(0.0, 3.0, -28.0, 0.0)}
    assert [len(plot["lines"]) for plot in [*sent["own"], *sent["plots"]]] == [1] * 8 + [8]
    assert many.static().count("<figure") == 9
    for told in (
        "cumulative log ratio",
        "reward 0, no fork",
        "reward 0, fork at 2 ·c",
        "reward 1, fork at 0 a",
    ):
        assert told in many.static()
    assert set(Timeline(several(*falls)).data()["looks"]) == {"amount"}


def test_text_tells_the_same(view):
    assert (
        repr(view)
        == "Timeline: 3 rollouts, nats lost against teacher so far\n▃▆██  rollout 0\n▁▁▁▁  rollout"
        " 1\n▁▁█▁  rollout 2\nForks beyond 3 nats: rollout 0 at position 2 (·c), rollout 2 at"
        " position 2 (·c)"
    )


def test_what_is_not_there_is_named():
    with pytest.raises(OpdlabError, match=r"no row of completion 7, only of 0\. Name these"):
        Timeline(path([0] * 4), samples=[7])
    with pytest.raises(OpdlabError, match="no tokens, so there is no road"):
        Timeline(made([]))
    with pytest.raises(OpdlabError, match="student alone, so nothing to depart from"):
        Timeline(made(WORDS, ("student",)))
    with pytest.raises(UnknownColumn, match="no policy 'other' to compare with, only teacher"):
        Timeline(path([0] * 4), against="other")
    with pytest.raises(OpdlabError, match="17 rollouts are too many for one picture"):
        Timeline(several(*[path([0] * 4)] * 17), samples=range(17))
    other = Timeline(path([0, 0, 0, 1], policies=("student", "teacher", "other")), against="other")
    assert other.against == "other"
