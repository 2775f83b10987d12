"""Typed notes come back from plain data as what they were; other notes are not taken for them."""

from __future__ import annotations

import json

import pytest

from opdlab.data.notes import TYPE, Alignments, Chunks, Windows, read_note

NOTES = [
    Windows([{"sample": 0, "position": 2, "distance": 0.5}], threshold=0.1, facts={"window": 4}),
    Chunks([{"sample": 0, "start": 1, "length": 3, "text": "a"}], facts={"alpha": 2.0}),
    Alignments([{"sample": 0, "teacher": ["a"], "spans": [], "kl": []}]),
]


@pytest.mark.parametrize("note", NOTES, ids=lambda note: note.kind)
def test_a_note_survives_a_file_with_its_type(note):
    stored = json.loads(json.dumps(note.as_json()))
    assert stored[TYPE] == note.kind
    assert read_note(stored, type(note)) == note
    for other in {Windows, Chunks, Alignments} - {type(note)}:
        assert read_note(stored, other) is None


def test_fields_of_later_versions_are_left_out():
    assert read_note({**NOTES[0].as_json(), "colour": "red"}, Windows) == NOTES[0]


@pytest.mark.parametrize(
    "stored",
    [
        None,
        3,
        "windows",
        [],
        {},
        {"windows": []},
        {TYPE: "windows"},
        {TYPE: "chunks", "chunks": []},
    ],
)
def test_what_is_no_such_note_reads_as_none(stored):
    assert read_note(stored, Windows) is None
