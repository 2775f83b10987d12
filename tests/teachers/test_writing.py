"""A run's sampling settings reach a teacher's `write` by name, or the run is refused."""

from __future__ import annotations

import pytest

import opdlab as opd
from opdlab import errors
from opdlab.data.sampling_config import SamplingConfig
from opdlab.methods import SequenceKD
from opdlab.tasks.market import model
from opdlab.teachers.writing import options_for, write_texts

TASK = opd.tasks.market()
RUN = {"method": SequenceKD(), "batch": 2, "steps": 1, "max_new_tokens": 3, "quiet": True}
PLAIN = SamplingConfig(max_new_tokens=5, seed=7)


class Few:
    """A teacher of a user's own that takes few arguments."""

    def __init__(self) -> None:
        self.calls = 0

    def write(self, prompts, n=1, *, max_new_tokens=64, temperature=1.0, seed=0):
        self.calls += 1
        return [["4 7"] * n for _ in prompts]


class Open:
    """One that takes any option."""

    def __init__(self) -> None:
        self.seen = {}

    def write(self, prompts, n=1, **options):
        self.seen = options
        return [["4 7"] * n for _ in prompts]


class Positional:
    """One whose arguments may be given by position, and have other names."""

    def write(self, questions, count, max_new_tokens, temperature, top_p, seed, top_k=0):
        assert (temperature, top_p, top_k) == (1.0, 1.0, 0)
        return [[f"{max_new_tokens} {seed}"] * count for _ in questions]


class PositionalOnly:
    def write(self, prompts, n, top_p, /, max_new_tokens=64, seed=0):
        return [["4 7"] * n for _ in prompts]


class NoSeed:
    def write(self, prompts, n, max_new_tokens=64):
        return [["4 7"] * n for _ in prompts]


def test_options_that_change_nothing_are_left_out():
    assert options_for(Few(), PLAIN) == {"max_new_tokens": 5, "temperature": 1.0, "seed": 7}
    usual = {"max_new_tokens": 5, "temperature": 1.0, "top_p": 1.0, "seed": 7}
    assert options_for(Open(), PLAIN) == usual
    assert options_for(Positional(), PLAIN) == usual
    assert options_for(PositionalOnly(), PLAIN) == {"max_new_tokens": 5, "seed": 7}


def test_options_that_change_something_are_passed_on_or_refused():
    shaped = SamplingConfig(top_k=4, stop="=", top_p=0.9)
    open_one = Open()
    write_texts(open_one, TASK.prompts(2), 1, shaped)
    assert open_one.seen["top_k"] == 4
    assert open_one.seen["stop"] == ("=",)
    assert open_one.seen["top_p"] == 0.9
    assert "min_p" not in open_one.seen
    with pytest.raises(
        errors.InvalidValue,
        match=r"The run has stop=\('=',\), but the teacher's Few\.write takes no stop",
    ):
        options_for(Few(), shaped)
    with pytest.raises(errors.InvalidValue, match=r"top_p=0\.9.*PositionalOnly.*takes no top_p"):
        options_for(PositionalOnly(), SamplingConfig(top_p=0.9))


def test_length_and_seed_are_needed():
    with pytest.raises(
        errors.InvalidValue,
        match=r"NoSeed\.write takes no seed, which a run sets in every step\. Give write a keyword",
    ):
        options_for(NoSeed(), PLAIN)


def test_texts_are_counted():
    assert write_texts(Positional(), TASK.prompts(2), 2, PLAIN) == [["5 7"] * 2] * 2

    class Short(Open):
        def write(self, prompts, n=1, **options):
            return [["4 7"] * (n - 1) for _ in prompts]

    with pytest.raises(
        errors.OpdlabError,
        match=r"Short\.write gave \[1, 1\] texts for 2 prompts\. Let it return one list for each",
    ):
        write_texts(Short(), TASK.prompts(2), 2, PLAIN)


def test_a_writer_that_takes_no_top_p_is_told_so_before_the_first_step():
    own = Few()
    assert opd.distill(model("student"), own, TASK, **RUN).train().done == 1
    with pytest.raises(errors.OpdlabError, match=r"top_p=0\.9.*Few.*write.*no top_p"):
        opd.distill(model("student"), own, TASK, top_p=0.9, **RUN)
    with pytest.raises(errors.OpdlabError, match=r"NoSeed\.write takes no seed"):
        opd.distill(model("student"), NoSeed(), TASK, **RUN)
    assert own.calls == 1
