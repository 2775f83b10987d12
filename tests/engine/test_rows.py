"""The engine against plain autograd on full logits in float64."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from opdlab import TopK
from opdlab.engine import chunking
from opdlab.engine.passes import compute, gradient
from opdlab.engine.rows import Rows
from opdlab.errors import BadLoss, MissingPolicy, NonFinite, UnknownColumn
from opdlab.losses.divergences import entropy, forward_kl, jensen_shannon, reverse_kl
from opdlab.models.graded import States
from opdlab.models.head import Head

N, V, H = 23, 13, 8


def focal(rows: Rows) -> torch.Tensor:
    """A loss that no paper has, as a user writes it in a notebook: uses all that rows offer."""
    certainty = 1 - entropy(rows.teacher) / 3
    return (
        certainty * (rows.student.exp() * rows.keys).sum(-1)
        - (1 - rows.logp.exp()) ** 2 * rows.logp
    )


LOSSES = {
    "forward_kl": lambda rows: forward_kl(rows.student, rows.teacher),
    "reverse_kl": lambda rows: reverse_kl(rows.student, rows.teacher),
    "jensen_shannon": lambda rows: jensen_shannon(rows.student, rows.teacher),
    "top-k by teacher": lambda rows: reverse_kl(*rows.on("teacher", TopK(4, by="teacher"))),
    "policy gradient": lambda rows: -(rows.logp - rows.sampler_logp).exp() * rows.advantage,
    "user-written": focal,
    "uniform": lambda rows: (
        -rows.student.sum(-1)
    ),  # its slope is one number, expanded: not to be written to
}
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scaled": {"scale": 0.25, "bias": True},
    "capped": {"cap": 2.0, "scale": 3.0},
    "padded": {"spare": 5, "bias": True},
}


def make_head(
    seed: int = 0,
    *,
    bias: bool = False,
    spare: int = 0,
    scale: float = 1.0,
    cap: float | None = None,
) -> Head:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(V + spare, H, generator=g, dtype=torch.float64)
    return Head(
        weight,
        torch.randn(V + spare, generator=g, dtype=torch.float64) if bias else None,
        V,
        scale,
        cap,
    )


def make_case(n: int = N, **head: object):
    """States of a student and a teacher, tokens, weights and plan columns, all in float64."""
    g = torch.Generator().manual_seed(7)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    states = {
        "student": States(draw(n, H), make_head(1, **head)),
        "teacher": States(draw(n, H), make_head(2)),
    }
    columns = {"advantage": draw(n), "sampler_logp": draw(n) - 2, "keys": draw(n, V)}
    return (
        states,
        torch.randint(V, (n,), generator=g),
        torch.rand(n, generator=g, dtype=torch.float64) / max(n, 1),
        columns,
    )


def full_logits(state: States) -> torch.Tensor:
    """The head's formula, once more and plainly."""
    head, rows = state.head, state.head.vocab_size
    logits = state.hidden @ head.weight[:rows].T + (0 if head.bias is None else head.bias[:rows])
    logits = logits * head.scale
    return logits if head.cap is None else head.cap * torch.tanh(logits / head.cap)


def oracle(loss, states, token, weight, columns):
    """Loss, gradient wrt hidden (weighted, and a token alone), gradients of weight and bias: one
    graph over `[n, V]`.
    """
    hidden = states["student"].hidden.clone().requires_grad_()
    head = states["student"].head
    leaves = [hidden, head.weight.detach().clone().requires_grad_()]
    if head.bias is not None:
        leaves.append(head.bias.detach().clone().requires_grad_())
    copy = Head(
        *(leaves[1:] if head.bias is not None else [leaves[1], None]),
        head.vocab_size,
        head.scale,
        head.cap,
    )
    logp = {"student": full_logits(States(hidden, copy)).log_softmax(-1)}
    logp |= {k: full_logits(s).log_softmax(-1) for k, s in states.items() if k != "student"}
    value = loss(Rows(logp, token, columns))
    alone = torch.autograd.grad(value.sum(), hidden, retain_graph=True)[0]
    return value.detach(), alone, torch.autograd.grad((value * weight).sum(), leaves)


@pytest.mark.parametrize("chunk", [1, 7, None])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("loss", LOSSES)
def test_equals_autograd_on_full_logits(loss, head, chunk):
    states, token, weight, columns = make_case(**HEADS[head])
    value, alone, want = oracle(LOSSES[loss], states, token, weight, columns)
    own = states["student"].head
    for p in (own.weight, own.bias):
        if p is not None:
            p.requires_grad_()
    got = gradient(LOSSES[loss], states, token, weight, columns, chunk=chunk)
    torch.testing.assert_close(got.loss, value)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    close(got.gradient, want[0])
    close(got.columns["grad_norm"], alone.norm(dim=-1))
    close(own.weight.grad, want[1])
    if own.bias is not None:
        close(own.bias.grad, want[2])


@pytest.fixture
def blocks_of_two(monkeypatch):
    """Blocks of two tokens, on a vocabulary that would fit into one block."""
    monkeypatch.setattr(chunking, "FEWEST_OF_BLOCK", 2)
    monkeypatch.setattr(chunking, "CPU", chunking.Budget(chunking.CPU.chunk, 1))
    assert len(chunking.blocks(7, V, chunking.budget_of(torch.device("cpu")))) == 4


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.usefixtures("blocks_of_two")
def test_blocks_of_a_chunk_change_nothing(loss, head):
    test_equals_autograd_on_full_logits(loss, head, 7)


@pytest.mark.usefixtures("blocks_of_two")
def test_numbers_may_be_views_of_the_log_probs():
    """The engine uses the memory of the log-probs again once a block is done."""
    states, token, weight, columns = make_case()
    logp = full_logits(states["student"]).log_softmax(-1)
    got = gradient(
        lambda rows: rows.student[:, 0],
        states,
        token,
        weight,
        columns,
        watch=lambda rows: {"first": rows.student[:, 1], "teacher": rows.teacher[:, 2]},
    )
    torch.testing.assert_close(got.loss, logp[:, 0])
    torch.testing.assert_close(got.columns["first"], logp[:, 1])
    teacher = full_logits(states["teacher"]).log_softmax(-1)
    torch.testing.assert_close(got.columns["teacher"], teacher[:, 2])


@pytest.mark.usefixtures("blocks_of_two")
def test_a_function_of_rows_is_computed_in_blocks():
    states, token, _, columns = make_case()
    sizes = []

    def measure(rows):
        sizes.append(len(rows))
        return {"entropy": entropy(rows.student), "advantage": rows.advantage}

    got = compute(measure, states, token, columns)
    assert max(sizes) == 2
    logp = full_logits(states["student"]).log_softmax(-1)
    torch.testing.assert_close(got["entropy"], entropy(logp))
    torch.testing.assert_close(got["advantage"], columns["advantage"])


def test_the_memory_of_a_chunk_is_used_again():
    """New pages cost a tenth of a product, so a chunk's logits take the place of the last ones."""
    states, _, _, _ = make_case(40)
    head, hidden = states["student"].head, states["student"].hidden
    with torch.no_grad():
        first = head(hidden)
        want = head(hidden[:20])
        again = head(hidden[:20], first)
        assert again.data_ptr() == first.data_ptr()
        assert torch.equal(again, want)
        assert head(hidden, first[:20]).data_ptr() != first.data_ptr()  # too small
        torch.testing.assert_close(head(hidden, first.float()), head(hidden))  # of another type
        biased = make_case(40, bias=True)[0]["student"]
        want = full_logits(biased)
        torch.testing.assert_close(biased.head(biased.hidden, torch.empty_like(first)), want)


def test_gradients_of_a_trainable_head_add_up():
    states, token, weight, columns = make_case(bias=True)
    own = states["student"].head
    own.weight.requires_grad_()
    gradient(LOSSES["reverse_kl"], states, token, weight, columns)
    once = own.weight.grad.clone()
    gradient(LOSSES["reverse_kl"], states, token, weight, columns, chunk=5)
    torch.testing.assert_close(own.weight.grad, 2 * once)
    assert own.bias.grad is None
    assert own.parameters == [own.weight]


def test_a_frozen_head_gets_no_gradient():
    states, token, weight, columns = make_case(bias=True)
    gradient(LOSSES["reverse_kl"], states, token, weight, columns)
    for state in states.values():
        assert state.head.weight.grad is None
        assert state.head.bias is None or state.head.bias.grad is None


def test_watched_numbers_are_those_of_a_pass_without_gradient():
    states, token, weight, columns = make_case()
    watch = lambda rows: {"entropy": entropy(rows.student), "rank": rows.columns["advantage"]}
    got = gradient(LOSSES["forward_kl"], states, token, weight, columns, watch=watch, chunk=4)
    want = compute(watch, states, token, columns)
    torch.testing.assert_close({k: got.columns[k] for k in want}, want)
    assert not got.columns["entropy"].requires_grad


@pytest.mark.parametrize("chunk", [1, 7, None])
def test_compute_equals_full_logits(chunk):
    states, token, _, columns = make_case(scale=0.5, cap=3.0)
    rows = Rows({k: full_logits(s).log_softmax(-1) for k, s in states.items()}, token, columns)
    want = reverse_kl(*rows.distributions.values())
    torch.testing.assert_close(
        compute(lambda r: reverse_kl(r.student, r.teacher), states, token, columns, chunk), want
    )
    torch.testing.assert_close(
        compute(lambda r: {"own": r.logp, "all": r.student}, states, token, columns, chunk),
        {"own": rows.student[torch.arange(N), token], "all": rows.student},
    )


def test_tokens_of_zero_weight_teach_nothing():
    states, token, weight, columns = make_case()
    weight[::3] = 0
    got = gradient(LOSSES["forward_kl"], states, token, weight, columns)
    assert (got.gradient[::3] == 0).all()
    assert (got.columns["grad_norm"][::3] == 0).all()
    assert (got.gradient[1::3].norm(dim=-1) > 0).all()
    assert (got.loss[::3] > 0).all()


def test_no_tokens_give_empty_results_of_the_same_kind():
    states, token, weight, columns = make_case(0)
    got = gradient(
        LOSSES["user-written"],
        states,
        token,
        weight,
        columns,
        watch=lambda rows: {"entropy": entropy(rows.student)},
    )
    assert got.loss.shape == (0,)
    assert got.gradient.shape == (0, H)
    assert {k: v.shape for k, v in got.columns.items()} == {"grad_norm": (0,), "entropy": (0,)}
    assert compute(lambda rows: {"all": rows.student}, states, token)["all"].shape == (0, V)


class Sizes(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize(
    "loss", ["reverse_kl", "jensen_shannon", "top-k by teacher", "policy gradient"]
)
def test_tokens_times_vocabulary_never_exists(loss):
    tokens, chunk = 400, 10
    states, token, weight, columns = make_case(tokens)
    del columns["keys"]
    states["student"].head.weight.requires_grad_()
    with Sizes() as seen:
        gradient(LOSSES[loss], states, token, weight, columns, chunk=chunk)
    assert (
        tokens * H <= seen.largest < tokens * V
    )  # the gradient for the hidden states is the largest thing
    with Sizes() as seen:
        compute(lambda rows: reverse_kl(rows.student, rows.teacher), states, token, chunk=chunk)
    assert seen.largest <= max(tokens, chunk * V)


# Bad input.


@pytest.mark.parametrize(
    "loss",
    [
        lambda rows: forward_kl(rows.student, rows.teacher).mean(),
        lambda rows: rows.student - rows.teacher,
        lambda rows: forward_kl(rows.student, rows.teacher)[:, None],
        lambda rows: 1.0,
    ],
)
def test_a_wrong_shape_is_a_bad_loss(loss):
    with pytest.raises(
        BadLoss,
        match=r"returned (shape|float).* for 23 tokens.*shape \[23\]: sum over the vocabulary",
    ):
        gradient(loss, *make_case())


def test_a_constant_loss_is_a_bad_loss():
    with pytest.raises(BadLoss, match=r"constant.*without detach"):
        gradient(lambda rows: entropy(rows.student.detach()), *make_case())


def test_a_loss_that_ignores_the_student_is_a_bad_loss():
    scale = torch.ones((), requires_grad=True)
    with pytest.raises(BadLoss, match=r"does not depend on rows\.student"):
        gradient(lambda rows: scale * entropy(rows.teacher), *make_case())


@pytest.mark.parametrize("chunk", [1, 7, None])
def test_a_number_that_is_none_names_its_row(chunk):
    states, token, weight, columns = make_case()
    columns["advantage"][17] = torch.nan
    with pytest.raises(NonFinite, match="is nan at token row 17") as caught:
        gradient(LOSSES["policy gradient"], states, token, weight, columns, chunk=chunk)
    assert caught.value.row == 17


def test_an_infinite_gradient_is_found_too():
    loss = lambda rows: (
        (rows.logp - rows.logp.detach()).abs().sqrt()
    )  # value 0, slope infinite or nan
    with pytest.raises(NonFinite, match="at token row 0"):
        gradient(loss, *make_case())


def test_an_unknown_name_lists_what_exists():
    states, token, weight, columns = make_case()
    with pytest.raises(
        UnknownColumn,
        match=(
            r"no 'advantge'; there are student, teacher, token, logp, advantage, sampler_logp,"
            r" keys\."
        ),
    ):
        gradient(lambda rows: rows.logp * rows.advantge, states, token, weight, columns)


def test_rows_know_their_names():
    states, token, _, columns = make_case()
    rows = Rows({k: full_logits(s) for k, s in states.items()}, token, columns)
    assert set(rows) == {"student", "teacher", "advantage", "sampler_logp", "keys"}
    assert "teacher" in rows
    assert "teacher+hint" not in rows
    assert not hasattr(rows, "nothing")
    torch.testing.assert_close(rows["advantage"], rows.advantage)
    torch.testing.assert_close(rows.logp_of("teacher"), rows.teacher[torch.arange(N), token])


def test_a_pass_without_a_student_is_refused():
    states, token, weight, columns = make_case()
    with pytest.raises(MissingPolicy, match="needs the student's states"):
        gradient(LOSSES["forward_kl"], {"teacher": states["teacher"]}, token, weight, columns)
