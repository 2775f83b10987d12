"""`same_answer`: what counts as the same value, exactly, and what does not."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opdlab import Prompt
from opdlab.errors import OpdlabError
from opdlab.tasks.answers import read_values, same_answer

LONG = "1" + "0" * 400
HUGE = "9" * 6000  # beyond Python's limit for int(text)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("47", 1),
        ("so 5 + 42 = 47.", 1),
        ("$1,047", 0),
        ("47.0", 1),
        ("48", 0),
        ("47 or 48", 0),
        ("", 0),
        ("-47", 0),
    ],
)
def test_numbers_are_compared_as_numbers(text, score):
    assert same_answer(Prompt("q", answer="the total is 47"), text) == score


def test_words_are_compared_whole():
    assert same_answer(Prompt("q", answer="New York"), " new\n york ") == 1
    assert same_answer(Prompt("q", answer="New York"), "in New York") == 0
    assert same_answer(Prompt("q", answer="1,234"), "1234") == 1


SAME = [
    (LONG, f"so it is {LONG}"),
    (LONG, "1e400"),
    (HUGE, f"it is {HUGE}"),
    (f"{HUGE}/7", f"{HUGE}/7"),
    ("-5", "it is \u22125"),
    ("5", "10-5"),
    ("5", "5."),
    ("5", "**5**"),
    ("5", "_5_"),
    ("12", "$12$"),
    ("3", "\u0663"),
    ("72", "The total is 72, altogether."),
    ("29", "It costs $29.00."),
    ("-29", "-$29.00"),
    ("-29", "$-29"),
    ("3.0", "3"),
    ("1/2", "0.5"),
    ("2/4", "1/2"),
    ("-1/2", "\u22121/2"),
    ("1.5", "1 1/2"),
    ("-1.5", "-1 1/2"),
    ("1.5", "1\u00bd"),
    ("\u00bd", "1/2"),
    ("1e3", "1000"),
    ("1.5 × 10^3", "1500"),
    ("10^5", "100000"),
    ("2^10", "2^10"),
    ("1E+22", "10000000000000000000000"),
    (r"\frac{1}{2}", "0.5"),
    (r"\boxed{\frac{3}{2}}", "so 3/2"),
    ("x+1", r"thus \boxed{x+1}, by 2"),
    (r"1{,}000", "1000"),
    ("10:30", "at 10:30 am"),
    ("9:30", "09:30"),
    ("1000000", "1\u202f000\u202f000"),
    ("March 4, 2021", "on 2021-03-04."),
    ("March 4, 2021", "the 4th of March 2021"),
    ("March 2021", "March 4, 2021"),
    ("48/2 = 24\nso 24 clips\n#### 72", "72 clips"),
    ("72", "the work\n#### 72"),
    ("72", "#### Step 1: 3\nso 72"),
    ("x = 5", "5"),
    ("5 km", "5km"),
    ("5 km", "5"),
    ("5", "5 km"),
    ("50%", "50 %"),
    ("3, 5", "x = 3 or x = 5"),
    ("H2O", "h2o"),
    ("5th", "5"),
    ("caf\u00e9", "cafe\u0301"),
    ("1/0", "1/0"),
    ("24/7", "24/7"),
]
DIFFERENT = [
    ("9007199254740993", "so it is 9007199254740992"),
    (LONG, "so it is " + "9" * 401),
    (HUGE, "9" * 5999 + "8"),
    ("1/2", "the chance is 3/2"),
    ("1/3", "0.333333333"),
    ("5", "the temperature is \u22125"),
    ("0.1", "0.10000000000000001"),
    ("10:30", "at 9:30"),
    ("10:30 pm", "10:30 am"),
    ("March 4, 2021", "June 9, 2021"),
    ("March 4, 2021", "March 5, 2021"),
    ("March 4, 2021", "2021"),
    ("2021-03-04", "2021-03-05"),
    ("1.2.3", "1.2.4"),
    ("3x4", "3x5"),
    ("10", "2^10"),
    ("2^10", "10"),
    ("5 km", "5 m"),
    ("2x", "2y"),
    ("H2O", "CO2"),
    ("5", "x5"),
    ("3, 5", "x = 4 or x = 5"),
    ("5-10", "10"),
    ("123", "1,2,3"),
    ("1", "1e999999999999999999999999"),
    ("1/0", "2/0"),
    ("0.5", "50%"),
    ("yes", "no"),
    ("5", ""),
    ("yes", ""),
]


@pytest.mark.parametrize(("answer", "text"), SAME)
def test_equal_values_are_the_same(answer, text):
    assert same_answer(Prompt("q", answer=answer), text) == 1


@pytest.mark.parametrize(("answer", "text"), DIFFERENT)
def test_other_values_are_not(answer, text):
    assert same_answer(Prompt("q", answer=answer), text) == 0


@given(
    st.decimals(allow_nan=False, allow_infinity=False), st.text(alphabet="ab c.,\n", max_size=30)
)
def test_every_number_is_the_same_as_itself_behind_any_words(number, words):
    answer = Prompt("q", answer=str(number))
    assert same_answer(answer, f"{words} {number}") == same_answer(answer, f"{number:f}") == 1
    assert same_answer(answer, f"{words} {number + 1:f}") == (number + 1 == number)


@given(st.text(alphabet="0123456789 .,:/-+eE^x$%={}\\u00bd\u2212\nMarch", max_size=60))
def test_any_text_can_be_read(text):
    assert same_answer(Prompt("q", answer=text), text) in (0, 1)
    assert len(read_values(text)) <= len(text)


def test_only_the_end_of_a_long_text_is_read(monkeypatch):
    text = "9 and 8 " * 20_000 + "so 47"
    read = []
    monkeypatch.setattr(
        "opdlab.tasks.answers.read_values", lambda part: read.append(len(part)) or read_values(part)
    )
    assert same_answer(Prompt("q", answer="47"), text) == 1
    assert sum(read) < 1000


def test_values_are_exact():
    (value,) = read_values(f"-{HUGE}.5")
    assert value.above == Decimal(f"-{HUGE}.5")


def test_a_prompt_without_answer_is_refused():
    with pytest.raises(
        OpdlabError, match="Prompt 'p7' has no answer that a text could be compared with"
    ):
        same_answer(Prompt("q", id="p7"), "47")
