"""The illusion index by hand, and on a student that memorises hints."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from opdlab.diagnose import Privilege, illusion
from opdlab.errors import OpdlabError


def measured(**kl: float) -> Privilege:
    """A measurement with one token of each type; all other numbers are zero."""
    zero = (
        "gap",
        "capability",
        "information",
        "interaction",
        "reverse_kl",
        "floor",
        "entropy",
        "teacher_weight",
        "route",
    )
    return Privilege(
        pd.DataFrame(
            {"type": list(kl), "forward_kl": list(kl.values()), **dict.fromkeys(zero, 0.0)}
        ),
        pd.DataFrame(),
        0.0,
    )


def test_the_index_by_type_and_measurement():
    train = [
        measured(skill=2.0, secret=2.0, copy=0.1),
        measured(skill=1.0, secret=1.5, copy=0.1),
        measured(skill=0.0, secret=1.0, copy=0.1),
    ]
    held = [
        measured(skill=2.0, secret=2.0, copy=0.1),
        measured(skill=1.1, secret=2.0, copy=0.1),
        measured(skill=0.5, secret=2.5, copy=0.1),
    ]
    result = illusion(train, held)
    index = result.table["index"]
    assert index[1, "skill"] == pytest.approx(0.1)
    assert index[1, "secret"] == pytest.approx(1)  # nothing transfers
    assert index[2, "skill"] == pytest.approx(0.25)
    assert index[2, "secret"] == pytest.approx(1.5)  # held-out prompts got worse
    assert math.isnan(index[2, "copy"])  # there was nothing to learn
    assert result.index == pytest.approx(1 - (4.1 - 3.1) / (4.1 - 1.1))
    assert (
        "illusion index 0.67 (0: all of it transfers, 1: none; worst on secret tokens, 1.50)"
        in str(result)
    )


def test_it_is_undefined_where_training_did_not_lower_the_kl():
    worse = illusion(
        [measured(skill=1.0), measured(skill=1.2)], [measured(skill=1.0), measured(skill=1.0)]
    )
    assert math.isnan(worse.index)
    assert "undefined" in str(worse)


def test_measurements_must_pair():
    one = measured(skill=1.0)
    with pytest.raises(
        OpdlabError, match="got 1 measurements on training prompts and 1 on held-out"
    ):
        illusion([one], [one])
    with pytest.raises(
        OpdlabError, match="got 2 measurements on training prompts and 3 on held-out"
    ):
        illusion([one] * 2, [one] * 3)
