"""What a loss must keep: one number per token from that token's row alone, nothing changed, nothing
else trained.
"""

from __future__ import annotations

import pytest
import torch

from opdlab import Task, audit, distill, method
from opdlab.engine.passes import gradient
from opdlab.engine.rows import Rows
from opdlab.errors import BadLoss
from opdlab.exact import Table
from opdlab.exact import gradient as exact_gradient
from opdlab.losses.divergences import reverse_kl
from opdlab.models.graded import States
from opdlab.models.head import Head

V, H = 13, 8


def kl(rows: Rows) -> torch.Tensor:
    return reverse_kl(rows.student, rows.teacher)


def make_case(n: int, dtype: torch.dtype = torch.float32):
    """States, tokens, weights and a column."""
    g = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=g).to(dtype)
    states = {
        name: States(draw(n, H), Head(draw(V, H), None, V)) for name in ("student", "teacher")
    }
    return (
        states,
        torch.randint(V, (n,), generator=g),
        torch.full((n,), 1 / n),
        {"advantage": draw(n)},
    )


def softmax_over_tokens(rows: Rows) -> torch.Tensor:
    return kl(rows) * kl(rows).detach().softmax(0)


def top_tokens_only(rows: Rows) -> torch.Tensor:
    values = kl(rows)
    return values * (values >= values.detach().topk(max(1, len(rows) // 10)).values[-1])


def mean_of_value_held_back(rows: Rows) -> torch.Tensor:
    values = kl(rows)
    return values - values.mean() + values.mean().detach()


READS_OTHER_ROWS = {
    "softmax over tokens": softmax_over_tokens,
    "shift": lambda rows: kl(rows) + rows.logp.roll(1),
    "shift in the weight only": lambda rows: kl(rows) * rows.advantage.roll(-1),
    "quantile": lambda rows: kl(rows).clamp(max=kl(rows).detach().quantile(0.9)),
    "median gate": lambda rows: torch.where(kl(rows) > kl(rows).median(), kl(rows), 0 * kl(rows)),
    "batch mean": lambda rows: kl(rows) - kl(rows).mean(),
    "normalised advantage": lambda rows: (
        -rows.logp * (rows.advantage - rows.advantage.mean()) / (rows.advantage.std() + 1e-6)
    ),
    "largest": lambda rows: kl(rows) / kl(rows).detach().max(),
    "cumulative sum": lambda rows: kl(rows).cumsum(0),
    "number of tokens": lambda rows: kl(rows) / len(rows),
    "top tenth": top_tokens_only,
    "a little of the mean": lambda rows: kl(rows) + 1e-3 * kl(rows).mean(),
    "gradient alone": mean_of_value_held_back,
    "as many as the chunk": lambda rows: kl(rows) * torch.linspace(0.1, 1, len(rows)),
}
READS_ONE_ROW = {
    "reverse KL": kl,
    "in bf16": lambda rows: kl(rows).bfloat16(),
    "on float16 log-probs": lambda rows: reverse_kl(rows.student.half(), rows.teacher.half()),
    "by way of bf16": (
        lambda rows: (rows.student.exp().bfloat16() @ torch.linspace(0, 1, V).bfloat16()).float()
    ),
    "in float64": lambda rows: kl(rows).double(),
    "gated by a column": lambda rows: kl(rows) * (rows.advantage > 0),
    "some rows only": (
        lambda rows: kl(rows).index_add(
            0, (rows.advantage > 0).nonzero()[:, 0], rows.logp[rows.advantage > 0]
        )
    ),
    "softmax over the vocabulary": lambda rows: -(rows.teacher.softmax(-1) * rows.student).sum(-1),
    "a product over the vocabulary": lambda rows: (
        rows.student.exp() @ torch.linspace(0, 1, V, dtype=rows.student.dtype)
    ),
    "policy gradient": lambda rows: -(rows.logp - rows.logp.detach()).exp() * rows.advantage,
}


@pytest.mark.parametrize("n", [2, 40, 500])
@pytest.mark.parametrize("name", READS_OTHER_ROWS)
def test_a_loss_that_reads_other_rows_is_refused_whatever_the_chunk(name, n):
    states, token, weight, columns = make_case(n)
    with pytest.raises(BadLoss, match=r"in plan\(batch\)|in plan\."):
        gradient(READS_OTHER_ROWS[name], states, token, weight, columns)


@pytest.mark.parametrize("n", [1, 2, 40, 500])
@pytest.mark.parametrize("name", READS_ONE_ROW)
def test_a_loss_of_single_rows_is_not_refused(name, n):
    states, token, weight, columns = make_case(n)
    result = gradient(READS_ONE_ROW[name], states, token, weight, columns)
    assert result.is_checked == (n >= 16)
    assert result.loss.dtype in (torch.float32, torch.float64)


def test_a_single_token_shows_a_softmax_over_tokens():
    states, token, weight, columns = make_case(1)
    with pytest.raises(BadLoss, match="depends on the other rows"):
        gradient(softmax_over_tokens, states, token, weight, columns)


def test_the_rows_that_are_compared_come_from_all_completions():
    """An advantage is the same for all tokens of a completion, so the first rows alone would not
    show its mean.
    """
    states, token, weight, _ = make_case(300)
    columns = {"advantage": torch.tensor([1.0, -1.0, 0.5]).repeat_interleave(100)}
    with pytest.raises(BadLoss, match="depends on the other rows"):
        gradient(READS_OTHER_ROWS["normalised advantage"], states, token, weight, columns)


def test_where_nothing_differs_the_check_is_made_again():
    states, token, weight, _ = make_case(40)
    nothing, something = {"advantage": torch.zeros(40)}, {"advantage": torch.arange(40.0)}

    def centred(rows: Rows) -> torch.Tensor:
        return -rows.logp * (rows.advantage - rows.advantage.mean())

    assert not gradient(centred, states, token, weight, nothing).is_checked
    with pytest.raises(BadLoss, match="depends on the other rows"):
        gradient(centred, states, token, weight, something)


def test_a_random_loss_is_refused_with_the_way_out():
    states, token, weight, columns = make_case(40)
    for loss in (
        lambda rows: kl(rows) * torch.rand(len(rows)),
        lambda rows: torch.nn.functional.dropout(kl(rows), 0.5),
    ):
        with pytest.raises(
            BadLoss, match=r"not the same when it is called again.*manual_seed\(batch\.step\)"
        ):
            gradient(loss, states, token, weight, columns)


def test_a_loss_with_a_running_mean_is_refused_and_one_that_counts_is_not():
    state, calls = {"mean": 0.0}, []

    def running(rows: Rows) -> torch.Tensor:
        state["mean"] = 0.9 * state["mean"] + 0.1 * float(kl(rows).detach().mean())
        return kl(rows) - state["mean"]

    def counting(rows: Rows) -> torch.Tensor:
        calls.append(len(rows))
        return kl(rows)

    states, token, weight, columns = make_case(40)
    with pytest.raises(BadLoss, match="not the same when it is called again"):
        gradient(running, states, token, weight, columns)
    gradient(counting, states, token, weight, columns)
    assert calls == [40, 20, 20, 40]  # whole, two parts, then the pass itself


def test_a_checked_loss_is_called_once_per_chunk():
    calls = []
    states, token, weight, columns = make_case(40)
    gradient(
        lambda rows: calls.append(len(rows)) or kl(rows),
        states,
        token,
        weight,
        columns,
        chunk=16,
        check=False,
    )
    assert calls == [16, 16, 8]


def clamp_teacher(rows: Rows) -> torch.Tensor:
    rows.teacher.clamp_(min=-3)
    return kl(rows)


def zero_token(rows: Rows) -> torch.Tensor:
    rows.token.zero_()
    return -rows.logp


def double_column(rows: Rows) -> torch.Tensor:
    rows.advantage.mul_(2)
    return -rows.logp * rows.advantage


def clamp_student(rows: Rows) -> torch.Tensor:
    rows.student.clamp_(min=-3)
    return kl(rows)


def clamp_student_without_gradient(rows: Rows) -> torch.Tensor:
    rows.student.detach().clamp_(min=-3)
    return kl(rows)


def change_what_backward_needs(rows: Rows) -> torch.Tensor:
    p = rows.student.exp()
    value = (p * rows.student).sum(-1)
    p.mul_(2)
    return value


@pytest.mark.parametrize(
    ("loss", "named"),
    [
        (clamp_teacher, r"rows\.teacher"),
        (zero_token, r"rows\.token"),
        (double_column, r"rows\.advantage"),
        (clamp_student, r"rows\.student"),
        (clamp_student_without_gradient, r"rows\.student"),
        (change_what_backward_needs, "a tensor"),
    ],
)
@pytest.mark.parametrize("check", [True, False])
def test_a_loss_that_writes_to_what_it_reads_is_refused(loss, named, check):
    states, token, weight, columns = make_case(40)
    with pytest.raises(BadLoss, match=f"chang.*{named}.* in place"):
        gradient(loss, states, token, weight, columns, check=check)


@pytest.mark.parametrize("keep", [True, False])
def test_a_loss_that_calls_backward_itself_is_refused(keep):
    def loss(rows: Rows) -> torch.Tensor:
        value = kl(rows)
        value.sum().backward(retain_graph=keep)
        return value

    states, token, weight, columns = make_case(5)
    with pytest.raises(BadLoss, match="called backward itself"):
        gradient(loss, states, token, weight, columns)


def test_a_parameter_of_the_loss_is_refused_since_nothing_trains_it():
    scale = torch.nn.Parameter(torch.ones(3))
    states, token, weight, columns = make_case(5)
    for loss in (
        lambda rows: kl(rows) * scale.sum(),
        lambda rows: kl(rows) + 0.1 * (scale**2).sum(),
    ):
        with pytest.raises(
            BadLoss, match=r"tensor of shape \[3\] that requires a gradient.*Detach it"
        ):
            gradient(loss, states, token, weight, columns)
    gradient(lambda rows: kl(rows) * scale.detach().sum(), states, token, weight, columns)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda v: v + 0j, "complex numbers"),
        (lambda v: v.to_sparse(), "a sparse tensor"),
        (lambda v: v.long(), "constant"),
        (lambda v: v.tolist(), "list"),
        (lambda v: None, "NoneType"),
        (lambda v: v.detach().numpy(), "ndarray"),
    ],
)
def test_what_is_no_real_number_per_token_is_refused(change, named):
    states, token, weight, columns = make_case(5)
    with pytest.raises(BadLoss, match=named):
        gradient(lambda rows: change(kl(rows)), states, token, weight, columns)


@pytest.fixture
def apples(prompts) -> Task:
    return Task("apples", lambda n, seed, split: [prompts[i % len(prompts)] for i in range(n)])


def test_what_a_loss_raises_comes_through_with_the_step(make_policy, teacher, apples):
    @method()
    def broken(rows: Rows) -> torch.Tensor:
        return {"a": rows.logp}["b"]

    with pytest.raises(KeyError, match="b") as caught:
        next(
            distill(
                make_policy(0),
                teacher,
                apples,
                method=broken,
                steps=1,
                batch=1,
                max_new_tokens=4,
                quiet=True,
            )
        )
    assert getattr(
        caught.value, "__notes__", ["Raised by the loss of FunctionMethod in step 1."]
    ) == ["Raised by the loss of FunctionMethod in step 1."]
    assert any(frame.name == "broken" for frame in caught.traceback)


def test_audit_and_exact_refuse_what_the_engine_refuses():
    student, teacher = Table.random(4, 3, seed=1), Table.random(4, 3, seed=2)
    for loss in (softmax_over_tokens, READS_OTHER_ROWS["batch mean"]):
        with pytest.raises(BadLoss, match="depends on the other rows"):
            audit(method()(loss))
        with pytest.raises(BadLoss, match="depends on the other rows"):
            exact_gradient(method()(loss), {"student": student, "teacher": teacher})


def test_a_run_refuses_it_in_the_first_step_and_leaves_the_weights(make_policy, teacher, apples):
    loss = method()(READS_OTHER_ROWS["batch mean"])
    run = distill(
        make_policy(0), teacher, apples, method=loss, steps=2, batch=2, max_new_tokens=8, quiet=True
    )
    before = [p.clone() for p in run.parameters.values()]
    with pytest.raises(BadLoss, match="depends on the other rows"):
        next(run)
    assert run.done == 0
    assert all(torch.equal(a, b) for a, b in zip(before, run.parameters.values(), strict=True))
