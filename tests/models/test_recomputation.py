"""Gradient checkpointing changes memory and no number, whatever dropout a family asks for."""

from __future__ import annotations

import pytest
import torch

import opdlab as opd
from opdlab import Policy
from opdlab.errors import InvalidValue
from opdlab.models.recomputation import recompute_layers

TASK = opd.tasks.from_records(
    [
        {"prompt": p, "answer": "1"}
        for p in ("ana has 4 7 apples", "ben has 2", "cleo has 2 pears buys 3")
    ],
    test=0,
    max_new_tokens=5,
)
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "llama": {"attention_dropout": 0.5},
    "granite": {"attention_dropout": 0.1},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.5},
    "gpt_bigcode": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "attn_pdrop": 0.5,
        "resid_pdrop": 0.5,
    },
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "attn_pdrop": 0.5,
        "embd_pdrop": 0.5,
    },
    "xglm": {
        "d_model": 32,
        "ffn_dim": 64,
        "num_layers": 2,
        "attention_heads": 4,
        "dropout": 0.5,
        "attention_dropout": 0.5,
    },
    "biogpt": {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5, "layerdrop": 0.5},
    "seed_oss": {"attention_dropout": 0.5, "residual_dropout": 0.5},
    "mixtral": {"attention_dropout": 0.5, "router_jitter_noise": 0.5, **EXPERTS},
    "phimoe": {
        "attention_dropout": 0.5,
        "router_jitter_noise": 0.5,
        "input_jitter_noise": 0.5,
        **EXPERTS,
    },
    "gpt_neox": {"attention_dropout": 0.5, "hidden_dropout": 0.5},
    "gemma3_text": {
        "attention_dropout": 0.5,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


def one_step(
    student: Policy, checkpointing: bool, lora: int | None, micro_batch: int | None = None
):
    run = opd.distill(
        student,
        student.copied().seeing("say sum 4"),
        TASK,
        steps=1,
        batch=3,
        lora=lora,
        lr=0.0,
        clip=0,
        micro_batch=micro_batch,
        checkpointing=checkpointing,
        quiet=True,
    )
    metrics = next(run).metrics
    return metrics["loss"], {name: p.grad for name, p in run.parameters.items()}


@pytest.mark.parametrize("lora", [4, None], ids=["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_number_moves(family, lora, make_policy):
    found = [
        one_step(make_policy(0, family=family, **FAMILIES[family]), flag, lora)
        for flag in (False, True)
    ]
    assert found[0][0] == found[1][0]
    assert found[0][0] != 0
    assert found[0][1].keys() == found[1][1].keys()
    for name, grad in found[0][1].items():
        assert torch.equal(grad, found[1][1][name]), name
    assert any(grad.norm() > 0 for grad in found[0][1].values())


def test_layers_run_again_and_keep_less(make_policy):
    kept, calls = {}, {}
    for flag in (False, True):
        student = make_policy(0, num_hidden_layers=4).adapt(4)
        calls[flag], kept[flag] = [], 0
        student.weights.model.model.layers[1].mlp.register_forward_pre_hook(
            lambda *_, seen=calls[flag]: seen.append(1)
        )
        rollout = student.sample(TASK.prompts(3), max_new_tokens=5)
        calls[flag].clear()
        sizes: list[int] = []
        keep = torch.autograd.graph.saved_tensors_hooks(
            lambda t, seen=sizes: seen.append(t.numel()) or t, lambda t: t
        )
        with torch.enable_grad(), recompute_layers(student.weights.model, flag), keep:
            hidden = student.hidden(rollout)
        kept[flag] = sum(sizes)
        with student.weights.using(student.adapter):
            hidden.sum().backward()
    assert (len(calls[False]), len(calls[True])) == (1, 2)
    assert kept[True] < 0.3 * kept[False]


def test_the_layers_are_as_before_afterwards(make_policy):  # also after an error
    model = make_policy(0).weights.model
    inside: list[str] = []
    with pytest.raises(IndexError), recompute_layers(model):  # noqa: PT012
        inside += [name for name, module in model.named_modules() if "forward" in vars(module)]
        model(torch.tensor([[10**6]]))  # no such token
    assert inside == ["model.layers.0", "model.layers.1"]
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(module.training for module in model.modules())


def test_the_adapter_and_the_precision_of_the_first_pass_hold_in_the_second(make_policy):
    grads = []
    for flag in (False, True):
        student = make_policy(0).adapt(4, modules_to_save=["norm"])
        run = opd.distill(
            student,
            make_policy(1),
            TASK,
            steps=2,
            batch=3,
            lr=0.01,
            checkpointing=flag,
            precision="bf16",
            quiet=True,
        )
        losses = [step.metrics["loss"] for step in run]
        grads.append((losses, [p.grad.clone() for p in run.parameters.values()]))
    assert grads[0][0] == grads[1][0]
    assert all(torch.equal(a, b) for a, b in zip(grads[0][1], grads[1][1], strict=True))


def test_a_model_without_known_layers_is_refused(make_policy, monkeypatch):
    student = make_policy(0, family="gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64)
    monkeypatch.setattr("opdlab.models.recomputation.GradientCheckpointingLayer", torch.nn.Bilinear)
    monkeypatch.setattr(type(student.weights.model), "_no_split_modules", None)
    student.weights.model._no_split_modules = None
    with pytest.raises(
        InvalidValue, match="checkpointing=True, but GPT2LMHeadModel names no layers"
    ):
        opd.distill(student, student.frozen(), TASK, checkpointing=True)
