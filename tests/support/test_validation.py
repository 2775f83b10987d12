"""Values are taken as they are or refused in words; numpy's numbers count, booleans do not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest
import torch

from opdlab.errors import InvalidValue, OpdlabError
from opdlab.models.policy import Policy
from opdlab.support.validation import (
    Amount,
    Count,
    CountOrZero,
    Finite,
    Flag,
    Positive,
    PositiveShare,
    Seed,
    Share,
    validate_arguments,
    validate_fields,
)
from opdlab.support.validation import validate as check


@dataclass(frozen=True)
class Recipe:
    steps: Count = 1
    micro_batch: Count | None = None
    rate: Amount = 0.1
    share: PositiveShare = 1.0
    schedule: Literal["constant", "cosine"] = "constant"
    quiet: Flag = False

    def __post_init__(self) -> None:
        validate_fields(self)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"steps": 0}, "Recipe got steps=0. Use a whole number of at least 1."),
        ({"steps": 2.0}, "Recipe got steps=2.0. Use a whole number of at least 1."),
        ({"steps": "3"}, "Recipe got steps='3'. Use a whole number of at least 1."),
        ({"steps": True}, "Recipe got steps=True. Use a whole number of at least 1."),
        ({"steps": None}, "Recipe got steps=None. Use a whole number of at least 1."),
        (
            {"micro_batch": -1},
            "Recipe got micro_batch=-1. Use a whole number of at least 1, or None.",
        ),
        ({"rate": float("nan")}, "Recipe got rate=nan. Use a finite number of at least 0."),
        ({"rate": float("inf")}, "Recipe got rate=inf. Use a finite number of at least 0."),
        ({"rate": "1e-4"}, "Recipe got rate='1e-4'. Use a finite number of at least 0."),
        (
            {"rate": torch.tensor(0.1)},
            "Recipe got rate=tensor(0.1000). Use a finite number of at least 0.",
        ),
        ({"share": 0}, "Recipe got share=0. Use a number above 0, at most 1."),
        ({"schedule": "cosin"}, "Recipe got schedule='cosin'. Use 'constant' or 'cosine'."),
        ({"quiet": "no"}, "Recipe got quiet='no'. Use True or False."),
    ],
)
def test_a_field_is_refused_in_words(given, said):
    with pytest.raises(InvalidValue) as caught:
        Recipe(**given)
    assert str(caught.value) == said
    assert isinstance(caught.value, OpdlabError)
    assert isinstance(caught.value, ValueError)


def test_numbers_of_numpy_are_taken_as_python_s_own():
    recipe = Recipe(steps=np.int64(3), rate=np.float32(0.5), share=1, quiet=np.bool_(True))
    assert (recipe.steps, recipe.rate, recipe.share, recipe.quiet) == (3, 0.5, 1.0, True)
    assert type(recipe.steps) is int
    assert type(recipe.rate) is float
    assert type(recipe.quiet) is bool


@validate_arguments
def sample(policy: Policy, n: Count = 1, *, seed: Seed = 0, temperature: Positive = 1.0) -> int:
    return n + seed


def test_arguments_are_refused_in_words(student):
    assert sample(student, np.int64(2), seed=3) == 5
    with pytest.raises(
        InvalidValue, match=r"^sample got n=0\. Use a whole number of at least 1\.$"
    ):
        sample(student, 0)
    with pytest.raises(
        InvalidValue,
        match=(
            r"^sample: got an unexpected keyword argument 'top_k'\. It takes policy, n, seed,"
            r" temperature\.$"
        ),
    ):
        sample(student, top_k=3)
    with pytest.raises(
        InvalidValue, match=r"^sample got policy=None\. Use a Policy: Policy\.load\("
    ):
        sample(None)
    with pytest.raises(InvalidValue, match=r"seed=-1\. Use a whole number from 0"):
        sample(student, seed=-1)


def test_values_by_name():
    assert check("draw", {"n": 2, "share": 0.5}, {"n": CountOrZero, "share": Share}) == {
        "n": 2,
        "share": 0.5,
    }
    with pytest.raises(InvalidValue, match=r"^draw got shift=inf\. Use a finite number\.$"):
        check("draw", {"shift": float("inf")}, {"shift": Finite})


def test_a_long_or_broken_value_stays_short_in_the_message():
    class Broken:
        def __repr__(self) -> str:
            raise RuntimeError("no repr")

    with pytest.raises(InvalidValue) as caught:
        check("f", {"n": Broken()}, {"n": Count})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200
    with pytest.raises(InvalidValue) as caught:
        check("f", {"n": "x" * 10_000}, {"n": Count})
    assert len(str(caught.value)) < 200
