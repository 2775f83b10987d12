"""Every field of a SamplingConfig is checked, and named as the user's call names it."""

from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import pytest

from opdlab import SamplingConfig
from opdlab.errors import InvalidValue, UnknownOption

WRONG = [
    *(
        ("max_new_tokens", value, "a whole number of at least 1")
        for value in (0, -1, 2.0, "8", True)
    ),
    *(("temperature", value, "0 for the likeliest token") for value in (-1, 1e-9, math.inf, "1")),
    *(("top_p", value, "a number above 0, at most 1") for value in (0, 1.1, math.nan, None)),
    *(("top_k", value, "a whole number of at least 0") for value in (-1, 1.5, True, None)),
    *(("min_new_tokens", value, "a whole number of at least 0") for value in (-1, 0.5, "2", True)),
    *(("min_p", value, "a number from 0 to below 1") for value in (-0.1, 1, math.nan, "0.1")),
    *(("seed", value, "a whole number from 0 to 2**64 - 1") for value in (-1, 1 << 64, 0.5, None)),
    *(("stop", value, "a text, or a tuple of texts") for value in (None, 3, (1,), ["a", None])),
]


@pytest.mark.parametrize(("name", "value", "wanted"), WRONG)
def test_a_wrong_value_is_refused_in_words(name, value, wanted):
    with pytest.raises(InvalidValue) as caught:
        SamplingConfig(**{name: value})
    assert f"SamplingConfig got {name}=" in str(caught.value)
    assert f"Use {wanted}" in str(caught.value)
    with pytest.raises(InvalidValue, match=f"^sample got {name}="):
        SamplingConfig.of("sample", {name: value})


@pytest.mark.parametrize("stop", ["", ("a", "")])
def test_an_empty_stop_is_refused(stop):
    with pytest.raises(InvalidValue, match="sample got an empty text in stop="):
        SamplingConfig.of("sample", {"stop": stop})


def test_every_field_is_tested():
    assert {name for name, _, _ in WRONG} == {field.name for field in fields(SamplingConfig)}


def test_values_are_taken_as_python_s_own():
    config = SamplingConfig(
        np.int64(8), np.float32(0.5), 1, np.int32(3), min_p=0, stop=["a", "b"], seed=np.int64(7)
    )
    assert config == SamplingConfig(8, 0.5, 1.0, 3, 0.0, ("a", "b"), 7)
    assert type(config.max_new_tokens) is int
    assert SamplingConfig(stop="a").stop == ("a",)


def test_only_the_distribution_itself_is_on_policy():
    assert SamplingConfig(max_new_tokens=3, stop="a", seed=5).is_on_policy
    for change in ({"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}):
        assert not SamplingConfig(**change).is_on_policy


def test_options_make_the_same_config_again():
    config = SamplingConfig(8, 0.5, 0.9, 3, 0.1, ("a",), 7)
    assert SamplingConfig(**config.options()) == config
    assert SamplingConfig.of("sample", config.options()) == config


def test_an_unknown_option_lists_those_that_there_are():
    with pytest.raises(
        UnknownOption,
        match=r"^sample has no option 'top_q'\. It takes max_new_tokens, temperature, top_p, top_k",
    ):
        SamplingConfig.of("sample", {"top_q": 1})
    with pytest.raises(UnknownOption, match=r"It takes n, writer, max_new_tokens"):
        SamplingConfig.of("sample", {"top_q": 1}, beside=("n", "writer"))
