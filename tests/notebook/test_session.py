"""The set-up line of the notebooks."""

from __future__ import annotations

import pytest

import opdlab as opd
from opdlab import notebook


def test_setup_prints_profile_device_and_time(monkeypatch, capsys):
    monkeypatch.setenv("OPDLAB_PROFILE", "ci")
    context = notebook.setup({"ci": 0.5})
    assert "profile ci · cpu · about 0.5 min" in capsys.readouterr().out
    assert context.pick(ci=1, cpu=2) == 1


def test_pick_takes_the_next_smaller_profile():
    assert notebook.Context("cpu", "cpu").pick(ci=1, cpu=2) == 2
    assert notebook.Context("gpu", "cuda").pick(ci=1) == 1
    with pytest.raises(opd.OpdlabError, match=r"no size for profile 'ci'\. Name at least ci=…"):
        notebook.Context("ci", "cpu").pick(gpu=1)


def test_an_unknown_profile_is_refused(monkeypatch):
    monkeypatch.setenv("OPDLAB_PROFILE", "huge")
    with pytest.raises(opd.OpdlabError, match=r"'huge'\. Use ci, cpu or gpu"):
        notebook.setup()
