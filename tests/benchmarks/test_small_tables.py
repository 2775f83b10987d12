"""The tables of the real model in benchmarks/README.md are those of the recorded results."""

from __future__ import annotations

import json

from benchmarks import small, small_tables


def test_the_page_has_the_recorded_numbers():
    page = small_tables.PAGE.read_text(encoding="utf-8")
    data = json.loads(small_tables.RESULT.read_text(encoding="utf-8"))
    for name in small_tables.TABLES:
        assert f"<!-- small: {name} -->" in page
    assert small_tables.fill_page(page, data) == page


def test_every_method_has_three_seeds_and_every_arm():
    data = json.loads(small_tables.RESULT.read_text(encoding="utf-8"))
    assert set(data["methods"]) == set(small.ENTRIES)
    assert data["not_run"] == {}
    assert {len(one["runs"]) for one in data["methods"].values()} == {3}
    assert {len(arm["seeds"]) for arm in data["controls"]["arms"].values()} == {3}
    assert set(data["controls"]["arms"]) == {"teacher", *small.ARMS}
