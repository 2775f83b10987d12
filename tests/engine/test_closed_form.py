"""A loss with a closed form trains what the same loss without it trains."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from opdlab import EOPD, OPD, SDPO, SelfDistillation
from opdlab.engine import chunking, signals
from opdlab.engine.closed_form import HasClosedForm, closed_form_of
from opdlab.engine.kept_tokens import KeptTokens
from opdlab.engine.passes import gradient
from opdlab.engine.rows import Rows
from opdlab.errors import BadLoss, NonFinite
from opdlab.losses import DIVERGENCES, TopK, reverse_kl
from opdlab.losses.closed_forms import ClosedForm
from opdlab.models.graded import States
from opdlab.models.head import Head

N, V, H = 23, 37, 8
HEADS = {"plain": {}, "capped": {"cap": 3.0}, "scaled": {"scale": 0.5}}
METHODS = {
    **{f"OPD {name}": OPD(name) for name in DIVERGENCES},
    "OPD alpha 2": OPD("alpha_divergence", options={"alpha": 2.0}),
    "SDPO": SDPO(),
    **{f"SelfDistillation {anchor}": SelfDistillation(anchor=anchor) for anchor in ("live", "ema")},
}


def make_case(method, dtype=torch.float64, **head):
    g = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
    states = {"student": States(draw(N, H), Head(draw(V, H), None, V, **head))}
    states |= {name: States(draw(N, H), Head(draw(V, H), None, V)) for name in method.needs}
    weight = torch.rand(N, generator=g).to(dtype)
    weight[[2, 11]] = 0  # no part of the step
    return states, torch.randint(V, (N,), generator=g), weight, {"scale": draw(N)}


@pytest.mark.parametrize("chunk", [5, None])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", METHODS)
def test_it_gives_what_autograd_gives(name, head, chunk, monkeypatch):
    monkeypatch.setattr(chunking, "FEWEST_OF_BLOCK", 2)
    monkeypatch.setattr(chunking, "CPU", chunking.Budget(chunking.CPU.chunk, 1))
    method = METHODS[name]
    states, token, weight, columns = make_case(method, **HEADS[head])
    matrix = states["student"].head.weight.requires_grad_()
    results = []
    for formula in (None, closed_form_of(method)):
        matrix.grad = None
        found = gradient(
            method.loss,
            states,
            token,
            weight,
            columns,
            watch=signals.watched,
            chunk=chunk,
            closed_form=formula,
        )
        results.append([found.loss, found.gradient, matrix.grad, *found.columns.values()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert results[1][1][2].abs().max() == 0


def test_the_engine_takes_it_where_it_is_offered():
    """With the closed form the loss itself runs in the check alone, and autograd never after."""
    method, calls = OPD(), []

    def loss(rows: Rows) -> torch.Tensor:
        calls.append(len(rows))
        return method.loss(rows)

    states, token, weight, columns = make_case(method)
    gradient(loss, states, token, weight, columns, check=False, closed_form=closed_form_of(method))
    assert calls == []
    gradient(loss, states, token, weight, columns, check=False)
    assert calls == [N]


def test_slopes_are_those_of_the_loss_in_log_probs():
    method, top = OPD("forward_kl"), KeptTokens(3)
    states, token, weight, columns = make_case(method)
    found = [
        gradient(
            method.loss,
            states,
            token,
            weight,
            columns,
            watch=top.measure,
            slopes=top.slopes,
            closed_form=formula,
        ).columns
        for formula in (None, closed_form_of(method))
    ]
    for name in ("logp_gradient", "logit_gradient"):
        torch.testing.assert_close(found[0][name], found[1][name])
        assert found[0][name][2].abs().max() == 0


def test_supports_estimators_and_clips_go_through_autograd():
    rows = Rows({"student": torch.zeros(1, 2).log_softmax(-1)}, torch.zeros(1, dtype=torch.long))
    for method in (
        OPD(top_k=TopK(4)),
        OPD(estimator="sampled"),
        SelfDistillation("forward_kl", clip=0.1),
        SelfDistillation(top_k=TopK(4)),
        SDPO(top_k=TopK(4)),
    ):
        assert closed_form_of(method)(rows) is None
    assert closed_form_of(EOPD()) is None
    assert not isinstance(EOPD(), HasClosedForm)


@dataclass(frozen=True)
class TwiceAsMuch(OPD):
    """A subclass with a loss of its own, whose closed form is not that of its base."""

    def loss(self, rows: Rows) -> torch.Tensor:
        return 2 * super().loss(rows)


@dataclass(frozen=True)
class Renamed(OPD):
    """A subclass that keeps the loss."""


@dataclass(frozen=True)
class Wrong(OPD):
    """A closed form that is not that of the loss."""

    def closed_form(self, rows: Rows) -> ClosedForm | None:
        found = super().closed_form(rows)
        assert found is not None
        return ClosedForm(found.value, found.gradient.mul_(1.01))


def test_a_subclass_with_its_own_loss_goes_through_autograd():
    assert closed_form_of(TwiceAsMuch()) is None
    assert closed_form_of(Renamed()) is not None
    assert closed_form_of(reverse_kl) is None


def test_a_wrong_closed_form_is_refused():
    method = Wrong()
    states, token, weight, columns = make_case(method)
    with pytest.raises(BadLoss, match="mend closed_form"):
        gradient(method.loss, states, token, weight, columns, closed_form=closed_form_of(method))


def test_an_infinite_loss_names_its_row():
    method = OPD()
    states, token, weight, columns = make_case(method, torch.float32)
    head = states["teacher"].head
    bias = torch.zeros(V)
    bias[4] = -torch.inf
    states["teacher"] = States(states["teacher"].hidden, Head(head.weight, bias, V))
    for formula in (None, closed_form_of(method)):
        with pytest.raises(NonFinite) as caught:
            gradient(method.loss, states, token, weight, columns, closed_form=formula)
        assert caught.value.row == 0


def test_tokens_that_both_rule_out_teach_nothing():
    method = OPD()
    states, token, weight, columns = make_case(method, torch.float32)
    bias = torch.zeros(V)
    bias[4] = -torch.inf
    for name, one in states.items():
        states[name] = States(one.hidden, Head(one.head.weight, bias, V))
    found = [
        gradient(
            method.loss,
            states,
            token,
            weight,
            columns,
            watch=signals.cheap,
            closed_form=formula,
        )
        for formula in (None, closed_form_of(method))
    ]
    torch.testing.assert_close(found[0].gradient, found[1].gradient, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[0].loss, found[1].columns["teacher_reverse_kl"])
