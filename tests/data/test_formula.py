"""Formulas: read, named, evaluated; whatever is no formula is refused in words."""

from __future__ import annotations

import json

import numpy as np
import pytest

from opdlab.data.formula import fill_names, read_formula
from opdlab.errors import InvalidValue, UnknownColumn


def test_a_formula_is_python_arithmetic_over_columns():
    a, b = np.array([0.5, -2.0, 3.0]), np.array([1.0, 2.0, -1.0])
    cases = {
        "-a * exp(b - a)": -a * np.exp(b - a),
        "where(a > 0, max(a, b), min(a, b)) / 2": np.where(
            a > 0, np.maximum(a, b), np.minimum(a, b)
        )
        / 2,
        "sqrt(abs(a)) - (b - 1)": np.sqrt(np.abs(a)) - (b - 1),
    }
    for text, want in cases.items():
        formula = read_formula(text)
        assert json.loads(json.dumps(formula.tree)) == formula.tree
        np.testing.assert_allclose(formula.evaluate({"a": a, "b": b}, {}), want)
    assert read_formula("-a * exp(b - a)").names == ["a", "b"]


def test_a_sum_runs_over_the_vocabulary():
    p = np.array([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
    q = np.array([[0.25, 0.5, 0.25], [0.5, 0.0, 0.5]])
    weight = np.array([2.0, 1.0])
    formula = read_formula('w * sum(student * log(student / "teacher+hint"))')
    assert (formula.names, formula.policies) == (["w"], ["student", "teacher+hint"])
    found = formula.evaluate({"w": weight}, {"student": p, "teacher+hint": q})
    assert found[0] == pytest.approx(2 * 0.5 * np.log(2))  # 0 log 0 adds nothing
    assert found[1] == np.inf
    inside = read_formula("sum(w * student)").evaluate({"w": weight}, {"student": p})
    np.testing.assert_allclose(inside, weight)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a +",
        "a ** 2",
        "__import__('os')",
        "a.real",
        "a[0]",
        "f(a)",
        "exp(a, b)",
        "sum(sum(a))",
        "a < b < c",
        "lambda: 0",
        "True",
        "a; b",
        "(" * 500 + "a" + ")" * 500,
        "a + " * 900 + "a",
        None,
        3,
    ],
)
def test_anything_else_is_refused(text):
    with pytest.raises(InvalidValue) as caught:
        read_formula(text, "Mine.formula")
    assert str(caught.value).startswith("Mine.formula")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "(a - b) ^ 2",
            "the sign ^ in `a - b ^ 2`, which no formula has. For a power write a prod",
        ),
        ("a ** 2", "the sign ** in `a ** 2`, which no formula has. For a power write a product"),
        ("f(a)", "the function f in `f(a)`, which no formula has."),
        ("exp(a, b)", "`exp(a, b)`, but exp takes 1 and not 2 values."),
        ("sum(sum(a))", "`sum(a)` inside of another sum."),
        ("a + not_a_name.field", "`not_a_name.field`, which no formula has."),
    ],
)
def test_a_part_that_is_refused_is_quoted_with_what_to_write(text, said):
    with pytest.raises(InvalidValue) as caught:
        read_formula(text, "Mine.formula")
    assert said in str(caught.value)
    assert ".." not in str(caught.value)
    assert str(caught.value).endswith("where(condition, then, otherwise).")


def test_numbers_take_the_place_of_names():
    filled = fill_names("mix * exp(-a) + where(a > mix, exp, 1)", {"mix": -0.25, "exp": 2.0})
    want = -0.25 * np.exp(-3.0) + 2.0
    assert read_formula(filled).evaluate({"a": np.array([3.0])}, {})[0] == pytest.approx(want)
    assert fill_names("a  +  b", {"c": 1.0}) == "a  +  b"


def test_a_name_that_is_not_there_is_said():
    with pytest.raises(UnknownColumn, match="'b'; there is a"):
        read_formula("a + b").evaluate({"a": np.zeros(1)}, {})
