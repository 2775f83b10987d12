"""Results of maps: what is read is what was written, records are added, and nonsense is refused."""

from __future__ import annotations

import json

import pytest

from opdlab.data.map_results import MapRecord, MapResults
from opdlab.errors import InvalidValue
from opdlab.viz.method_map import example_results

RESULTS = example_results("words")


def test_a_file_reads_as_it_was_written(tmp_path):
    path = RESULTS.save(tmp_path / "map.json")
    assert MapResults.load(path) == RESULTS
    lines = path.read_text().splitlines()
    assert sum('"seed"' in line for line in lines) == len(RESULTS.records), "one record a line"


def test_settings_are_in_order_and_words_stay_as_they_came():
    assert RESULTS.values("x") == [0.001, 0.01, 0.1, 1.0]
    assert RESULTS.values("z") == ["a", "b"]


def test_records_are_added_and_those_of_the_same_place_give_way():
    first = RESULTS.records[0]
    better = MapRecord(first.knobs, first.seed, first.arm, {"updates": {"score": 9.0}})
    other = MapRecord(first.knobs, 77, first.arm, {"updates": {"score": 4.0}})
    more = RESULTS.add([better, other])
    assert len(more.records) == len(RESULTS.records) + 1
    scores = more.scores(first.knobs, first.arm, "score", "updates")
    assert (scores[first.seed], scores[77]) == (9.0, 4.0)
    assert RESULTS.scores(first.knobs, first.arm, "score", "updates")[first.seed] == 0.5


def test_a_record_written_by_hand_is_read(tmp_path):
    """As docs/maps.md shows it: one more line in `records`."""
    path = RESULTS.save(tmp_path / "map.json")
    data = json.loads(path.read_text())
    data["records"].append(
        {"knobs": {"x": 1, "y": 0, "z": "a"}, "seed": 9, "arm": "first", "updates": {"score": 1}}
    )
    path.write_text(json.dumps(data))
    found = MapResults.load(path).scores(
        {"x": 1.0, "y": 0.0, "z": "a"}, "first", "score", "updates"
    )
    assert found[9] == 1.0
    assert set(found) == {0, 1, 2, 9}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 2}, "format 1"),
        ({"knobs": []}, "at least two knobs"),
        ({"knobs": 3}, "lack a part"),
        ({"against": ["nobody"]}, "'nobody', which is no arm"),
        ({"records": [{"seed": 1}]}, "lack a part"),
        ({"records": [{"knobs": {"x": 1}, "seed": 0, "arm": "first", "updates": {}}]}, "has knobs"),
        (
            {
                "records": [
                    {"knobs": {"x": 1, "y": 1, "z": 1}, "seed": 0, "arm": "first", "money": {}}
                ]
            },
            "compares at",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_words(change, words):
    with pytest.raises(InvalidValue, match=words):
        MapResults.from_json(RESULTS.as_json() | change)


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "map.json"
    path.write_text("{")
    with pytest.raises(InvalidValue, match=r"map\.json holds no results"):
        MapResults.load(path)


def test_what_is_no_file_is_refused(tmp_path):
    for given in (tmp_path / "nowhere.json", tmp_path, 3, None):
        with pytest.raises(InvalidValue):
            MapResults.load(given)
