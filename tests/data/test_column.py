"""Columns describe themselves, or are refused in words."""

from __future__ import annotations

import numpy as np
import pytest

from opdlab.data.column import Column, Description, Kind
from opdlab.errors import InvalidValue


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kind": "colour"}, r"kind='colour'. Use 'amount', 'signed', 'category', 'flag', or None"),
        ({"kind": 3}, r"Column got kind=3\. Use 'amount'"),
        ({"kind": Kind.CATEGORY}, r"kind='category' and labels=\(\)\. A category needs the label"),
        ({"kind": Kind.AMOUNT, "labels": ("a",)}, r"kind='amount' and labels=\('a',\)"),
        ({"labels": "yes no"}, r"labels='yes no'\. Use a tuple of texts"),
        ({"labels": (1, 2)}, r"labels=\(1, 2\)\. Use a tuple of texts"),
        ({"labels": {"a": 1}}, r"labels=\{'a': 1\}\. Use a tuple of texts"),
        (
            {"labels": ("a", "b"), "hues": ("student",)},
            r"hues=\('student',\)\. Use one of ''.*each",
        ),
        ({"labels": ("a",), "hues": ("red",)}, r"hues=\('red',\)\. Use one of '', 'student'"),
        ({"hues": ("student",)}, r"hues=\('student',\)"),
        ({"compares": ("teacher",)}, r"compares=\('teacher',\)\. Use the names of two policies"),
        ({"compares": "teacher"}, r"compares='teacher'\. Use a tuple of texts"),
        ({"threshold": "high"}, r"threshold='high'\. Use a number, or None"),
        ({"threshold": True}, r"threshold=True\. Use a number, or None"),
        ({"unit": None}, r"unit=None\. Use a text"),
        ({"label": 3}, r"label=3\. Use a text"),
        ({"less": b"low"}, r"less=b'low'\. Use a text"),
        ({"more": ["high"]}, r"more=\['high'\]\. Use a text"),
        ({"colour": "red"}, r"Column got colour\. Its fields are kind, unit, label, labels, hues"),
    ],
)
def test_a_wrong_description_is_refused_when_it_is_made(fields, said):
    with pytest.raises(InvalidValue, match=said):
        Column([1.0], **fields)


def test_labels_make_a_category():
    described = Column([0, 1], labels=["imitate", "steady"], hues=["teacher", ""]).description
    assert described.kind is Kind.CATEGORY
    assert described.labels == ("imitate", "steady")
    assert described.hues == ("teacher", "")


def test_a_description_is_given_as_text_or_whole():
    assert Column([1.0], "log T(y) − log S(y)", unit="nats").description == Description(
        description="log T(y) − log S(y)", unit="nats"
    )
    whole = Description(unit="nats", kind=Kind.SIGNED)
    assert Column([1.0], whole).description is whole
    assert Column([1.0], whole, unit="%").description == Description(unit="%", kind=Kind.SIGNED)
    assert Column([1.0]).description == Description()
    with pytest.raises(InvalidValue, match=r"Column got colour\. Its fields are kind, unit"):
        Column([1.0], whole, colour="red")


def test_only_what_is_said_is_stored_and_read_back():
    full = Description(
        kind="category",
        unit="tokens",
        label="Route",
        labels=("a", "b"),
        hues=("student", "teacher"),
        description="how the token is taught",
        compares=("teacher+hint", "student"),
        threshold=np.float32(0.5),
        less="steady",
        more="imitate",
    )
    assert type(full.threshold) is float
    assert Description.from_json(full.as_json()) == full
    assert Description().as_json() == {}
    assert Description(threshold=0).as_json() == {"threshold": 0.0}
    later = {**full.as_json(), "animation": "slow"}  # a field of a later version
    assert Description.from_json(later) == full


def test_columns_show_their_shape_and_description():
    assert repr(Column(np.zeros((2, 3)), unit="nats")) == "Column([2, 3], {'unit': 'nats'})"
