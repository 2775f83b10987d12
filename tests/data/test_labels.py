"""Labels stay: they are saved at every change, whole or not at all, and belong to one trace."""

from __future__ import annotations

import json
import os

import pytest
from viz.traces import NASTY, made, several

from opdlab.commands.output import Output
from opdlab.commands.trace import ask_trace
from opdlab.data.labels import LONGEST_COMMENT, LONGEST_LABEL, MOST, Labels, load_labelled
from opdlab.data.trace import Trace
from opdlab.errors import DamagedFile, InvalidValue, OpdlabError
from opdlab.viz import Marks, Regimes, questions
from opdlab.viz.channels import find_channels

WORDS = [b" a", b" b", b" c", b" d"]


@pytest.fixture
def trace():
    return several(made(WORDS, seed=1), made(WORDS, seed=2))


@pytest.fixture
def path(trace, tmp_path):
    return trace.save(tmp_path / "t.parquet")


def test_labels_stay_beside_the_trace(trace, path, tmp_path):
    labels = Labels.beside(path)
    labels.add(0, 1, "slip", comment=NASTY[0], length=2)
    labels.add(sample=1, position=3, label="../../evil")
    assert sorted(os.listdir(tmp_path)) == ["t.labels.json", "t.parquet"]
    again = Labels.beside(path)
    assert again.as_json() == labels.as_json()
    assert again.frame().loc[0, "comment"] == NASTY[0]
    again.add(0, 2, "fine")  # replaces what it overlaps
    assert [mark.label for mark in Labels.beside(path)] == ["fine", "../../evil"]
    again.remove(1, 3)
    assert len(Labels.beside(path)) == 1
    with pytest.raises(InvalidValue, match="has no label"):
        again.remove(1, 3)


def test_labels_are_a_column_that_views_and_questions_read(trace):
    labels = Labels(trace)
    labels.add(0, 1, "slip", length=2)
    labels.add(1, 0, "fine")
    named = labels.add_to(trace)
    assert named.column("label").tolist() == [-1, 1, 1, -1, 0, -1, -1, -1]
    assert find_channels(named)["label"].names == ("fine", "slip")
    assert Regimes(named, by="label").df["kind"].tolist().count("slip") == 2
    assert questions.where(named, ["label = slip"])["count"] == 2
    assert Marks.of_trace(named).labels.as_json() == labels.as_json()
    assert Labels(trace).add_to(trace).column("label").tolist() == [-1] * 8


def test_the_command_line_reads_labels_beside_a_trace(trace, path):
    assert load_labelled(path).table.equals(trace.table)
    Labels.beside(path).add(0, 1, "slip")
    output = Output(is_json=True)
    ask_trace(path, "where", ["label = slip"], output)
    assert output.result["count"] == 1


def test_a_save_that_fails_changes_nothing(trace, path, monkeypatch):
    labels = Labels.beside(path)
    labels.add(0, 0, "first")
    before = labels.path.read_bytes()

    def broken(*_):
        raise OSError("no space")

    monkeypatch.setattr("pathlib.Path.replace", broken)
    with pytest.raises(OSError, match="no space"):
        labels.add(0, 1, "second")
    monkeypatch.undo()
    assert labels.path.read_bytes() == before
    assert [mark.label for mark in labels] == ["first"]
    assert len(os.listdir(path.parent)) == 2


def test_labels_of_another_trace_are_refused(trace, path):
    Labels.beside(path).add(0, 0, "here")
    other = made([b" x", *WORDS])
    with pytest.raises(InvalidValue, match="other tokens"):
        Labels(other, path.with_name("t.labels.json"))
    with pytest.raises(InvalidValue, match="other tokens"):
        Labels(trace).add_to(other)
    with pytest.raises(InvalidValue, match="other tokens"):
        Marks(other, Labels(trace))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"format": 9}',
        '{"format": 1, "marks": 3}',
        '{"format": 1, "marks": [{"sample": 0}]}',
        '{"format": 1, "marks": [{"sample": 0, "position": -1, "label": "a"}]}',
        "[" * 100_000,
        "\udcff",
    ],
)
def test_a_damaged_file_is_said(trace, path, text):
    path.with_name("t.labels.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DamagedFile, match="no file of labels"):
        Labels.beside(path)


@pytest.mark.parametrize(
    "mark",
    [
        {"sample": 0, "position": 4, "label": "a"},
        {"sample": 2, "position": 0, "label": "a"},
        {"sample": 0, "position": 3, "label": "a", "length": 2},
        {"sample": 0, "position": 0, "label": ""},
        {"sample": 0, "position": 0, "label": "a\nb"},
        {"sample": 0, "position": 0, "label": "a" * (LONGEST_LABEL + 1)},
        {"sample": 0, "position": 0, "label": "a", "comment": "x" * (LONGEST_COMMENT + 1)},
        {"sample": 0, "position": 0, "label": 3},
        {"sample": 0.5, "position": 0, "label": "a"},
        {"position": 0, "label": "a"},
        3,
    ],
)
def test_what_is_no_label_is_refused(trace, mark):
    labels = Labels(trace)
    with pytest.raises(InvalidValue):
        labels.replace([mark])
    assert len(labels) == 0


def test_two_labels_on_a_token_and_too_many_are_refused(trace):
    labels = Labels(trace)
    one = {"sample": 0, "position": 0, "label": "a"}
    with pytest.raises(InvalidValue, match="each token one"):
        labels.replace([one, one])
    with pytest.raises(InvalidValue, match="at most"):
        labels.replace([one] * (MOST + 1))
    with pytest.raises(InvalidValue, match="no file"):
        labels.save()
    with pytest.raises(OpdlabError):
        Labels("t.parquet")


def test_what_the_page_offers_is_a_file_of_labels(trace, tmp_path):
    view = Marks(trace)
    view.marks = [{"sample": 0, "position": 1, "length": 1, "label": "a", "comment": ""}]
    content = view.data()["file"] | {"marks": view.marks}
    (tmp_path / "from-page.json").write_text(json.dumps(content), encoding="utf-8")
    assert Labels(trace, tmp_path / "from-page.json").as_json() == view.marks


def test_a_live_page_saves_through_python(trace, path):
    view = Marks(Trace.load(path), Labels.beside(path))
    widget = view.live()
    widget.marks = [{"sample": 1, "position": 2, "length": 2, "label": "slip", "comment": "why"}]
    assert [mark.comment for mark in Labels.beside(path)] == ["why"]
    view.marks = []
    assert widget.marks == []
    assert len(Labels.beside(path)) == 0
