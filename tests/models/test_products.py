"""Products with a head's matrix: float32 sums whatever the matrix is in, against float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from opdlab.models import products
from opdlab.models.head import Head
from opdlab.models.products import gives_float32, project, project_back

VOCAB, WIDTH, ROWS = 700, 96, 5


def make_matrices(dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator).to(dtype)
    weight = (2 * torch.randn(VOCAB, WIDTH, generator=generator)).to(dtype)  # logits up to 70
    return hidden, weight, torch.randn(ROWS, VOCAB, generator=generator)


@pytest.fixture(params=[1, 100, VOCAB])
def block(request, monkeypatch):
    """Cast the matrix in blocks of so many rows."""
    monkeypatch.setattr(products, "CAST_BYTES", 4 * WIDTH * request.param)


@pytest.mark.usefixtures("block")
def test_logits_of_a_bf16_head_are_exact_to_float32():
    hidden, weight, _ = make_matrices()
    exact = hidden.double() @ weight.double().T
    rounded = functional.linear(hidden, weight).double()
    got = project(hidden, weight)
    assert got.dtype == torch.float32
    assert (rounded - exact).abs().max() > 0.1  # what is left out here
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-4)


@pytest.mark.usefixtures("block")
def test_log_probs_of_a_bf16_head_are_exact_to_float32():
    hidden, weight, _ = make_matrices()
    exact = (hidden.double() @ weight.double().T).log_softmax(-1)
    rounded = functional.linear(hidden, weight).float().log_softmax(-1).double()
    got = Head(weight, None, VOCAB)(hidden).log_softmax(-1).double()
    assert (rounded - exact).abs().max() > 0.1  # nats
    assert (got - exact).abs().max() < 1e-4


@pytest.mark.usefixtures("block")
def test_gradients_through_a_bf16_head_are_exact_to_float32():
    _, weight, slope = make_matrices()
    exact = slope.double() @ weight.double()
    got = project_back(slope, weight)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("with_bias", [False, True])
def test_autograd_gets_the_same_logits_and_the_right_gradients(with_bias):
    hidden, weight, slope = make_matrices()
    bias = torch.randn(VOCAB).bfloat16() if with_bias else None
    with torch.no_grad():
        want = project(hidden, weight, bias)
    leaves = [one.clone().requires_grad_() for one in (hidden, weight, bias) if one is not None]
    got = project(*leaves)
    assert torch.equal(got, want)
    found = torch.autograd.grad(got, leaves, slope)
    exact = [slope.double() @ weight.double(), slope.double().T @ hidden.double(), slope.sum(0)]
    for one, leaf, right in zip(found, leaves, exact, strict=False):
        assert one.dtype == leaf.dtype
        torch.testing.assert_close(one.double(), right.double(), rtol=2e-2, atol=0.1)


def test_a_float32_or_float64_matrix_is_multiplied_as_it_is():
    for dtype in (torch.float32, torch.float64):
        hidden, weight, slope = make_matrices(dtype)
        slope = slope.to(dtype)
        assert torch.equal(project(hidden, weight), functional.linear(hidden, weight))
        assert torch.equal(project_back(slope, weight), slope @ weight)


class Largest(TorchDispatchMode):
    """Notes the largest float32 tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
            self.numel = max(self.numel, out.numel())
        return out


def test_no_float32_copy_of_the_matrix_exists(monkeypatch):
    monkeypatch.setattr(products, "CAST_BYTES", 4 * WIDTH * 100)
    hidden, weight, slope = make_matrices()
    with Largest() as seen:
        project(hidden, weight)
        project_back(slope, weight)
    assert ROWS * VOCAB <= seen.numel <= 100 * WIDTH < weight.numel()


# A device that gives float32 sums by itself. Without a card only "meta" does, which computes shapes
# and no numbers, so what is tested is which product is asked for.


class Operations(TorchDispatchMode):
    """Notes the names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_device_is_asked_whether_it_gives_float32_sums():
    assert not gives_float32(torch.device("cpu"), torch.bfloat16)
    supported = "aten::mm.dtype" in torch._C._dispatch_get_all_op_names()
    assert gives_float32(torch.device("meta"), torch.bfloat16) == supported


@pytest.mark.parametrize("gives", [True, False])
def test_the_float32_sums_are_taken_where_there_are_some(gives, monkeypatch):
    if gives and not gives_float32(torch.device("meta"), torch.bfloat16):
        pytest.skip("this version of PyTorch has no torch.mm(out_dtype=)")
    monkeypatch.setattr(products, "gives_float32", lambda device, dtype: gives)
    hidden, weight, slope = (one.to("meta") for one in make_matrices())
    with Operations() as seen:
        forward, backward = project(hidden, weight), project_back(slope, weight)
    assert {forward.dtype, backward.dtype} == {torch.float32}
    assert forward.shape == (ROWS, VOCAB)
    assert backward.shape == (ROWS, WIDTH)
    kind = "aten.mm.dtype" if gives else "aten.mm.default"
    assert [name for name in seen.names if ".mm." in name] == [kind] * 2
    # The slope is cast down to be multiplied; the products are cast up only where they must be.
    assert seen.names.count("aten._to_copy.default") == (1 if gives else 3)
