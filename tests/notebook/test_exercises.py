"""The exercises of all notebooks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from opdlab import notebook
from opdlab.notebook import checking
from opdlab.notebook.checking import find_exercise

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
NUMBERS = checking.list_notebooks()
EVERY = {key: task for number in NUMBERS for key, task in checking.list_exercises(number).items()}


def stub(*_):
    raise NotImplementedError


@pytest.mark.parametrize("number", NUMBERS)
def test_keys_and_modules_say_where_they_belong(number):
    keys = list(checking.list_exercises(number))
    assert keys == [f"{number}.{i}" for i in range(1, len(keys) + 1)]
    (path,) = NOTEBOOKS.glob(f"{number}_*.ipynb")
    module = Path(checking.exercises.__file__).parent / f"notebook_{path.stem}.py"
    assert module.exists()


@pytest.mark.parametrize("key", EVERY)
def test_solutions_agree_with_the_library_and_stubs_go_on(key, capsys):
    task = EVERY[key]
    assert task.judge(task.solution) is None
    assert notebook.exercise(key)(stub) is task.solution
    assert capsys.readouterr().out == (
        f"… {key} is not written yet: {task.request}. "
        "Until then the notebook uses the reference solution.\n"
    )
    assert notebook.exercise(key)(task.solution) is task.solution
    assert capsys.readouterr().out == f"✓ {key}: {task.confirmation}.\n"


@pytest.mark.parametrize(
    ("key", "sentence"),
    [(key, sentence) for key, task in EVERY.items() for sentence in task.mistakes],
)
def test_mistakes_are_named(key, sentence, capsys):
    task = EVERY[key]
    assert sentence.endswith(".")
    assert notebook.exercise(key)(task.mistakes[sentence]) is task.solution
    assert capsys.readouterr().out.startswith(f"✗ {key}: {sentence} Until")


def test_every_exercise_knows_a_mistake():
    assert [key for key, task in EVERY.items() if not task.mistakes] == []


@pytest.mark.parametrize("step", [1e-2, 1e-3, 1e-4, 1e-6])
@pytest.mark.parametrize("side", [1, -1])
def test_a_one_sided_difference_is_named_at_any_step(step, side):
    def slope(loss, logits, teacher):
        here = loss(logits.log_softmax(-1), teacher)
        nudges = side * step * torch.eye(logits.shape[-1], dtype=logits.dtype)
        moved = [loss((logits + nudge).log_softmax(-1), teacher) for nudge in nudges]
        return torch.stack([side * (value - here) / step for value in moved], -1)

    assert "one-sided" in find_exercise("50.3").judge(slope)


def test_autograd_is_told_from_differences():
    def slope(loss, logits, teacher):
        logits = logits.clone().requires_grad_()
        loss(logits.log_softmax(-1), teacher).sum().backward()
        return logits.grad

    assert "autograd" in find_exercise("50.3").judge(slope)
