"""How answers to exercises are compared, and the sentences that say what is wrong."""

from __future__ import annotations

import runpy

import pytest
import torch

import opdlab as opd
from opdlab import notebook
from opdlab.notebook import cases, checking
from opdlab.notebook.checking import describe_difference, find_exercise


def stub(*_):
    raise NotImplementedError


def reverse_kl(rows):
    return (rows.student.exp() * (rows.student - rows.teacher)).sum(-1)


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (lambda rows: -reverse_kl(rows), "value: the sign is wrong."),
        (lambda rows: 2 * reverse_kl(rows), "value: it is 2 times what is wanted."),
        (
            lambda rows: reverse_kl(rows).detach(),
            "it carries no gradient, so it trains nothing.",
        ),
        (lambda rows: 0 * reverse_kl(rows), "value: it is zero everywhere."),
        (
            lambda rows: rows.student.exp() * (rows.student - rows.teacher),
            "value: shape [5] is wanted; you returned shape [5, 7].",
        ),
        (lambda rows: rows.student.sum(-1), "value: the values differ: "),
        (lambda rows: None, "value: it returned None. Is there a return?"),
        (lambda rows: "kl", "value: shape [5] is wanted; you returned a str."),
        (
            lambda rows: rows.pupil,
            "it stopped with UnknownColumn: rows has no 'pupil'; there are student, teacher",
        ),
    ],
)
def test_the_sentence_says_what_is_wrong(answer, sentence):
    assert sentence in find_exercise("00.1").judge(answer)


def test_the_line_that_stopped_is_shown(tmp_path):
    source = tmp_path / "cell.py"
    source.write_text(
        "def loss(rows):\n    gap = rows.student - 1\n    return gap / rows.token.foo\n"
    )
    loss = runpy.run_path(str(source))["loss"]
    said = find_exercise("00.1").judge(loss)
    assert "AttributeError: 'Tensor' object has no attribute 'foo'" in said
    assert "(in the line `return gap / rows.token.foo`)" in said


def test_methods_are_judged_as_functions():
    task = find_exercise("00.1")
    assert task.judge(opd.method(needs=("teacher",))(task.solution)) is None


@pytest.mark.parametrize(
    ("got", "wanted", "sentence"),
    [
        (0.1 + 0.2, 0.3, None),
        (1.0, 2.0, "the values differ: 1, wanted 2."),
        (torch.tensor([1.0, torch.nan]), [1.0, torch.nan], None),
        ((1.0, "a"), (1.0, "a"), None),
        ((1.0, "b"), (1.0, "a"), "result 2: it returned 'b', wanted 'a'."),
        (1.0, (1.0, "a"), "2 results are wanted; you returned a float."),
        ({"x": 1.0}, {"x": 1.0, "y": 2.0}, "results by name are wanted: x, y; you returned x."),
        (1, True, "it returned 1, wanted True."),
        (
            torch.zeros(2, 3),
            torch.zeros(3, 2),
            "shape [3, 2] is wanted; you returned shape [2, 3].",
        ),
        ([0.0, 1.0, 5.0], [0.0, 1.0, 2.0], "the values differ: 5 at [2], wanted 2."),
    ],
)
def test_results_are_compared(got, wanted, sentence):
    assert describe_difference(got, wanted, 1e-6) == sentence


def test_a_gradient_that_cancels_up_to_rounding_is_zero():
    rounding, wanted = torch.tensor([1e-17, -2e-17]), torch.tensor([0.3, -0.3])
    assert describe_difference(rounding, wanted, 1e-5) == "it is zero everywhere."


def test_differing_values_are_shown_with_the_digits_in_which_they_differ():
    said = describe_difference(0.563612, 0.563614, 1e-9)
    assert said == "the values differ: 0.563612, wanted 0.563614."


def test_the_author_of_the_function_in_use_is_known(capsys):
    task = find_exercise("20.1")
    checking._authors.pop("31.3", None)
    with pytest.raises(opd.OpdlabError, match=r"Exercise 31\.3 has not run yet"):
        notebook.author("31.3")
    notebook.exercise("20.1")(stub)
    assert notebook.author("20.1") == "the reference solution's"
    notebook.exercise("20.1")(task.solution)
    assert notebook.author("20.1") == "yours"
    notebook.exercise("20.1")(next(iter(task.mistakes.values())))
    assert notebook.author("20.1") == "the reference solution's"


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("99.1", r"There is no exercise '99\.1'\. There are exercises for the notebooks 00"),
        ("00.9", r"There is no exercise '00\.9'\. Notebook 00 has 00\.1, 00\.2\."),
        ("../x", "There is no exercise"),
    ],
)
def test_unknown_keys_are_answered_with_the_known_ones(key, sentence):
    with pytest.raises(opd.OpdlabError, match=sentence):
        notebook.exercise(key)


def test_the_gradient_of_a_loss_is_that_in_the_logits():
    rows = cases.random_rows(4, 6)
    p, q = rows.student.detach(), rows.teacher
    found = cases.evaluate_loss(reverse_kl, rows)
    wanted = p.exp() * (p - q - found["value"][:, None])
    assert torch.allclose(found["gradient"], wanted)
