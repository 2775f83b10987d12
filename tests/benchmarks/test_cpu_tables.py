"""The tables of speed and memory in benchmarks/README.md are those of the recorded results."""

from __future__ import annotations

from benchmarks import cpu_tables
from benchmarks.growth import SERIES, exponent
from benchmarks.page_tables import PAGE, fill


def test_the_page_has_the_recorded_numbers():
    page = PAGE.read_text(encoding="utf-8")
    for name in cpu_tables.TABLES:
        assert f"<!-- cpu: {name} -->" in page
    assert fill(page, "cpu", cpu_tables.TABLES, cpu_tables.read_all()) == page


def test_every_series_was_measured():
    assert set(cpu_tables.read_all()["growth"]) == set(SERIES)


def test_an_exponent_is_the_slope_of_the_logarithms():
    found = [{"size": size, "seconds": 3 * size**1.5} for size in (1.0, 2.0, 8.0, 32.0)]
    assert abs(exponent(found, "seconds") - 1.5) < 1e-12
