"""Every known mistake is caught and named, by its first name."""

import pytest

from opdlab.conformance import MISTAKES, conform
from opdlab.conformance.zoo import CASES

# A generalised JSD is what its paper says, so what happens at its ends is only to know.
TO_KNOW = {"vanishes_at_ends"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_mistake_is_caught_and_named(case):
    report = conform(case)
    if case.mistake in TO_KNOW:
        assert report.passes
        assert case.mistake in report.named
    else:
        assert report.mistakes[0] == case.mistake
        # What follows from a mistake is not counted as others.
        assert len(report.mistakes) == 1 or case.mistake == "negative_losses_clamped"
    assert any(one.mistake == case.mistake and one.said for one in report.findings)


def test_there_are_enough_and_each_says_where_it_was_described():
    assert len(CASES) >= 12
    assert len({case.name for case in CASES}) == len(CASES)
    assert all(case.about and case.mistake in MISTAKES for case in CASES)
