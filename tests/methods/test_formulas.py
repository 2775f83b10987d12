"""The declared formula of every method is the loss that the method trains, number by number."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import opdlab as opd
from opdlab.data.formula import read_formula
from opdlab.engine.rows import Rows
from opdlab.errors import InvalidValue
from opdlab.losses import DIVERGENCES
from opdlab.methods.formulas import divergence_formula, formula_of


@pytest.fixture(scope="module")
def rows() -> Rows:
    torch.manual_seed(0)
    n, size = 50, 12
    logp = {name: torch.randn(n, size).log_softmax(-1) for name in ("student", "teacher")}
    columns = {
        "advantage": torch.randn(n),
        "sampler_logp": logp["student"][:, 0] + 0.3 * torch.randn(n),
        "gated": torch.arange(n) % 2,
        "turn_weight": torch.rand(n),
        "pair_loss": torch.rand(n),
        "slope": torch.randn(n),
    }
    return Rows(logp, torch.zeros(n, dtype=torch.long), columns)


def evaluate(text: str, rows: Rows) -> np.ndarray:
    columns = {name: one.numpy() for name, one in rows.columns.items()}
    columns |= {f"{name}_logp": rows.logp_of(name).numpy() for name in ("student", "teacher")}
    distributions = {name: one.exp().double().numpy() for name, one in rows.distributions.items()}
    return read_formula(text).evaluate(columns, distributions)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_divergence_is_its_formula(name, rows):
    own = DIVERGENCES[name].parameter
    for options in [{}, *([{own.name: 0.3}] if own else [])]:
        want = DIVERGENCES[name](rows.student, rows.teacher, **options)
        found = evaluate(divergence_formula(name, options), rows)
        np.testing.assert_allclose(found, want.numpy(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    "method",
    [
        opd.OPD(),
        opd.OPD("generalized_jsd", {"beta": 0.9}),
        opd.OPD(estimator="sampled"),
        opd.OPDPlus("forward_kl"),
        opd.EOPD(k=12),
        opd.EOPD(k=12, weight=0.4),
        opd.GRPO(clip=0.1),
        opd.OVD(),
        opd.TurnOPD(),
        opd.SFT(),
        opd.SequenceKD(),
        opd.SODA(),
        opd.SpanOPD(),
    ],
    ids=repr,
)
def test_a_method_is_its_formula(method, rows):
    found = evaluate(formula_of(method), rows)
    np.testing.assert_allclose(found, method.loss(rows).numpy(), rtol=2e-5, atol=2e-6)


def test_methods_without_a_formula_and_those_of_a_user():
    assert formula_of(opd.OPD(top_k=8)) == ""
    assert formula_of(lambda rows: rows.student.sum(-1)) == ""

    class Mine:
        needs = ("teacher",)
        formula = "student_logp - teacher_logp"

        def loss(self, rows):
            return rows.logp - rows.logp_of("teacher")

    assert formula_of(Mine()) == "student_logp - teacher_logp"
    Mine.formula = lambda self: 3  # something of the method's own
    assert formula_of(Mine()) == ""
    Mine.formula = "import os"
    with pytest.raises(InvalidValue, match=r"^Mine\.formula"):
        formula_of(Mine())
    student, teacher, task = opd.load("market")
    with pytest.raises(InvalidValue, match=r"^Mine\.formula"):  # before anything is written
        opd.distill(student, teacher, task, method=Mine(), steps=1, quiet=True)


def test_a_function_declares_its_formula_to_the_decorator():
    text = "student_logp - teacher_logp"

    @opd.method(formula=text)
    def gap(rows):
        return rows.logp - rows.logp_of("teacher")

    assert formula_of(gap) == formula_of(opd.method(gap)) == text
    assert formula_of(opd.method(lambda rows: rows.logp)) == ""
    student, teacher, task = opd.load("market")
    rollout = student.sample(task.prompts(2), max_new_tokens=6)
    view = opd.viz.Equation(opd.score(rollout, student, teacher, method=gap))
    assert view.formula.text == text
    np.testing.assert_allclose(view.values, view.trace.column("loss"), atol=1e-5)
    with pytest.raises(InvalidValue, match=r"^opdlab\.method's formula"):
        opd.method(formula="student_logp -")


def test_a_hinted_teacher_stands_in_quotes():
    text = divergence_formula("reverse_kl", {}, "teacher+hint")
    assert read_formula(text).policies == ["student", "teacher+hint"]


class _Mixed:
    """A loss with fields: one that its formula reads, and one that a column of its plan hides."""

    needs = ("teacher",)
    formula = "mix * weight * sum(student * log(student / teacher))"

    def __init__(self) -> None:
        self.mix, self.weight = 0.25, 9.0

    def plan(self, batch):
        return {"weight": batch.signals["teacher_entropy"]}

    def loss(self, rows):
        return self.mix * rows.weight * opd.losses.reverse_kl(rows.student, rows.teacher)


@pytest.mark.parametrize(
    "method", [_Mixed(), opd.Combined(_Mixed(), opd.OPD(), weights=[2.0, 1.0])]
)
def test_fields_of_the_method_are_filled_in(student, teacher, prompts, method):
    rollout = student.sample(prompts, max_new_tokens=4, seed=0)
    trace = opd.score(rollout, student, teacher, method=method, k=student.weights.vocab_size)
    assert "0.25" in trace.meta["formula"]
    assert "9.0" not in trace.meta["formula"]
    values = opd.viz.Equation(trace).values
    np.testing.assert_allclose(values, trace.sample(0).column("loss"), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("formula", "said"),
    [
        ("mixx * student_logp", "reads 'mixx', which is no column of the trace"),
        ("sum(student * nobody)", "reads 'nobody', which is no column"),
        ("2 * student", "reads 'student', which is a policy, outside of sum"),
    ],
)
def test_names_that_stand_for_nothing_are_warned_of(formula, said):
    method = opd.method(formula=formula)(lambda rows: rows.logp)
    with pytest.warns(UserWarning, match=said):
        formula_of(method, ["student_logp", "loss"])
