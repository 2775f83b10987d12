"""Traces of the first format load and describe themselves; those of later versions are refused."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opdlab import Trace
from opdlab.data.column import Description, Kind
from opdlab.data.notes import Alignments, Chunks, Windows
from opdlab.data.trace import FORMAT
from opdlab.errors import DamagedFile

META = {
    "policies": ["student", "teacher"],
    "texts": ["a b"],
    "finish": ["stop"],
    "prompts": ["Say a b."],
    "vocab": {"5": "a", "6": " b"},
}
WINDOW = {"sample": 0, "position": 1, "student": [5], "teacher": [6], "distance": 0.5}
CHUNK = {"sample": 0, "start": 0, "length": 2, "text": "a b", "continuations": [], "similarity": 1}
ALIGNED = {"sample": 0, "teacher": ["a b"], "spans": [[0, 2, 0, 1]], "kl": [0.1]}


def write(path, meta, **columns):
    """A file as its version of opdlab wrote it, by hand."""
    table = pa.table({"sample": [0, 0], "position": [0, 1], "token_id": [5, 6], **columns})
    pq.write_table(table.replace_schema_metadata({b"opdlab": json.dumps(meta).encode()}), path)
    return path


def test_columns_of_the_first_format_are_described_by_the_method_that_planned_them(tmp_path):
    mark = {"name": "DOPD", "planner": "opdlab.methods.dopd.DOPD"}
    meta = {**META, "plan": ["route", "gap"], "method": mark}
    trace = Trace.load(write(tmp_path / "t.parquet", meta, route=[0, 3], gap=[0.5, -0.5]))
    assert trace.tokens() == [b"a", b" b"]
    assert trace.meta["format"] == FORMAT
    assert trace.meta["method"] == "DOPD"
    route = trace.describe("route")
    assert route.kind is Kind.CATEGORY
    assert route.labels[3] == "HS student leads"
    assert trace.describe("gap") == Description()
    again = Trace.load(trace.save(tmp_path / "again.parquet"))
    assert again.meta == trace.meta


def test_a_route_of_somebody_elses_method_gets_no_words_of_opdlabs(tmp_path):
    mark = {"name": "Mine", "planner": "mine.Mine"}
    meta = {**META, "plan": ["route"], "method": mark}
    trace = Trace.load(write(tmp_path / "t.parquet", meta, route=[0, 1]))
    assert trace.meta["method"] == "Mine"
    assert trace.describe("route") == Description()


@pytest.mark.parametrize(
    ("planned", "method"),
    [
        (["route", "gap"], "DOPD"),
        (["divergent", "window_distance"], "TOPD"),
        (["audited", "weight", "similarity"], "OmniOPD"),
        (["advantage"], ""),
    ],
)
def test_files_older_than_the_methods_name_are_told_by_their_columns(tmp_path, planned, method):
    columns = {name: [0, 1] for name in planned}
    trace = Trace.load(write(tmp_path / "t.parquet", {**META, "plan": planned}, **columns))
    assert trace.meta["method"] == method


def test_notes_of_the_first_format_get_their_types(tmp_path):
    notes = {
        "windows": [WINDOW],
        "topd": {"threshold": 0.4, "window": 2},
        "audits": [CHUNK],
        "spans": [ALIGNED],
        "alignment": {"share": 0.5},
        "mine": {"x": 1},
    }
    mark = {"name": "TOPD", "planner": "opdlab.methods.topd.TOPD"}
    trace = Trace.load(write(tmp_path / "t.parquet", {**META, "notes": notes, "method": mark}))
    assert trace.note(Windows) == Windows([WINDOW], 0.4, {"threshold": 0.4, "window": 2})
    assert trace.note(Chunks) == Chunks([CHUNK])
    assert trace.note(Alignments) == Alignments([ALIGNED], {"share": 0.5})
    assert trace.meta["notes"]["TOPD"]["mine"] == {"x": 1}


def test_notes_that_only_look_alike_stay_plain(tmp_path):
    notes = {"windows": [{"size": 3}], "audits": "none", "spans": {"a": 1}}
    trace = Trace.load(write(tmp_path / "t.parquet", {**META, "notes": notes}))
    assert trace.note(Windows) is None
    assert trace.note(Chunks) is None
    assert trace.note(Alignments) is None
    assert trace.meta["notes"] == {"": notes}


@pytest.mark.parametrize("number", [4, "2", None])
def test_later_formats_are_refused_in_words(tmp_path, number):
    path = write(tmp_path / "t.parquet", {**META, "format": number})
    with pytest.raises(
        DamagedFile,
        match=rf"its format is {number!r}, which only a later version of opdlab can read",
    ):
        Trace.load(path)


def test_the_second_format_differs_by_its_number_alone(tmp_path):
    meta = {**META, "format": 2, "method": "", "columns": {"gap": {"unit": "nats"}}, "notes": {}}
    trace = Trace.load(write(tmp_path / "t.parquet", meta, gap=[0.5, -0.5]))
    assert trace.meta == {**meta, "format": FORMAT}
    assert trace.describe("gap") == Description(unit="nats")


@pytest.mark.parametrize(
    "change",
    [
        {"columns": []},
        {"columns": {"gap": "nats"}},
        {"columns": {"gap": {"kind": "colour"}}},
        {"notes": []},
        {"notes": {"TOPD": 3}},
    ],
    ids=repr,
)
def test_descriptions_and_notes_that_are_none_are_damage(tmp_path, change):
    meta = {**META, "format": 2, "method": "", "columns": {}, "notes": {}, **change}
    with pytest.raises(DamagedFile, match=r"is not an opdlab trace \(its "):
        Trace.load(write(tmp_path / "t.parquet", meta))
