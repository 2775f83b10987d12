"""The head against the models' own logits, family by family."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from opdlab.models.head import Head
from opdlab.models.products import LARGE_MATRIX, MOST_TO_TURN, PADDED_ROWS

FAMILIES = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8, "sliding_window": 8},
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.25},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "phi": {},  # a head with a bias
}


@pytest.mark.parametrize("family", FAMILIES)
def test_reproduces_the_models_logits(family, make_model):
    vocab, rows = 40, 33
    model = make_model(vocab, family=family, **FAMILIES[family]).eval()
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    head = Head.of(model, rows)
    ids = torch.randint(rows, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(ids).logits[..., :rows]
        got = head(model.base_model(ids).last_hidden_state.flatten(0, 1))
    assert want.std() > 0.05
    torch.testing.assert_close(got, want.flatten(0, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_are_float32(dtype, make_model):
    model = make_model(20, dtype=dtype)
    assert Head.of(model, 20)(torch.randn(3, 32, dtype=dtype)).dtype == torch.float32


class Doubled(LlamaForCausalLM):
    """A family that does to its logits what no config field says."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 2
        return out


def test_an_unknown_kind_of_head_is_refused():
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.4,
    )
    with pytest.raises(
        ValueError,
        match=(
            r"Doubled computes its logits in a way that opdlab does not know \(largest"
            r" difference \d"
        ),
    ):
        Head.of(Doubled(config).eval(), 20)


@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"cap": 1.5}, {"scale": 2.0, "cap": 3.0}])
def test_backward_is_that_of_autograd(options):
    g = torch.Generator().manual_seed(0)
    weight, bias, hidden, slope = (
        torch.randn(*s, generator=g, dtype=torch.float64) for s in ((9, 4), (9,), (5, 4), (5, 6))
    )
    for x in (weight, bias, hidden):
        x.requires_grad_()
    head = Head(weight, bias, vocab_size=6, **options)
    logits = head(hidden)
    want = torch.autograd.grad((logits * slope).sum(), (hidden, weight, bias))
    before_cap = head.through_cap(slope.clone(), logits.detach())
    got = head.backward(before_cap, hidden.detach())
    torch.testing.assert_close(got, want[0])
    torch.testing.assert_close((weight.grad, bias.grad), want[1:])


@pytest.mark.parametrize(
    "kinds",
    [
        (torch.bfloat16,) * 2,
        (torch.float32,) * 2,
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
    ],
)
def test_gradients_are_float32_unless_all_is_float64(kinds):
    hidden, weight = torch.ones(2, 3, dtype=kinds[0]), torch.ones(5, 3, dtype=kinds[1])
    head = Head(weight, None, vocab_size=5)
    assert head.backward(torch.ones(2, 5, dtype=kinds[1]), hidden).dtype == torch.float32


@pytest.mark.parametrize("capability", ["AVX512", "AVX2"])
@pytest.mark.parametrize("rows", [0, 1, 6, MOST_TO_TURN, PADDED_ROWS - 1, PADDED_ROWS])
def test_few_rows_of_a_large_head_are_those_of_many(rows, capability, monkeypatch):
    """The way that is fast on a processor changes nothing, forwards and backwards."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    generator = torch.Generator().manual_seed(0)
    vocab, width = LARGE_MATRIX // 512, 512
    weight = torch.randn(vocab, width, generator=generator)
    bias = torch.randn(vocab, generator=generator)
    hidden = torch.randn(PADDED_ROWS, width, generator=generator)
    head, few = Head(weight, bias, vocab), hidden[:rows].clone().requires_grad_()
    got = head(few)
    assert got.shape == (rows, vocab)
    want = few.double() @ weight.double().T + bias
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)
    assert got.is_contiguous()
    assert torch.equal(got, head(few))  # a run repeats bit for bit
    got.sum().backward()
    torch.testing.assert_close(few.grad, weight.sum(0).expand(rows, width), rtol=1e-3, atol=1e-2)
