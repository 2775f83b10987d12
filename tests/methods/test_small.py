"""Every method trains a real model for a step, and plain OPD for two:

SmolLM2-135M, its 49k vocabulary, its chat template.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import opdlab as opd
from opdlab.teachers import TextOnly

pytestmark = pytest.mark.small


def repeat(prompt: opd.Prompt, text: str) -> opd.Prompt:
    """A question whose answer a small model manages, and which differs between texts."""
    return opd.Prompt(
        messages=({"role": "user", "content": f"Repeat this number: {len(text) % 10}"},)
    )


METHODS = {
    "OPD": opd.OPD(),
    "OPD, sampled token": opd.OPD(estimator="sampled"),
    "SequenceKD": opd.SequenceKD(),
    "GRPO": opd.GRPO(),
    "OPD+": opd.OPDPlus("forward_kl"),
    "TOPD": opd.TOPD(window=2, share=0.2),
    "DOPD": opd.DOPD(),
    "DOPD, average": opd.DOPD(anchor="ema"),
    "OPSD": opd.SelfDistillation.opsd(),
    "SDFT": opd.SelfDistillation.sdft(),
    "context distillation": opd.SelfDistillation.context_distillation(256),
    "GOPD": opd.GOPD(),
    "EOPD": opd.EOPD(),
    "OPSA": opd.OPSA(),
    "OmniOPD": opd.OmniOPD(length=2, chunks=1, continuations=1),
    "SODA": opd.SODA(),
    "OVD": opd.OVD(ask=repeat, ballots=4, temperature=1.0),
    "SpanOPD": opd.SpanOPD(),
}


@pytest.fixture(scope="module")
def small():
    loaded = opd.load("small")
    torch.set_num_threads(1)  # two threads spin where other work runs
    return loaded


def teacher_for(name: str, student: opd.Policy, teacher: opd.Policy) -> object:
    """What the method asks for: nobody, the plain self (the hint makes it a teacher), a writer, or
    one with log-probs.
    """
    if name in ("GRPO", "OPSD", "SDFT", "context distillation"):
        return None
    if name.startswith("DOPD"):
        return student.frozen()
    return TextOnly(teacher) if name in ("OmniOPD", "SODA", "OVD") else teacher


@pytest.mark.parametrize("name", METHODS)
def test_it_trains(small, name):
    student, teacher, task = small
    learner, n = student.frozen(), 2 if name in ("GRPO", "OVD") else 1
    steps = 2 if name == "OPD" else 1
    if name == "GRPO":
        task = replace(
            task, verify=lambda prompt, text: min(1.0, len(text) / 200)
        )  # whoever follows no rule yet gets no reward by it
    told = teacher_for(name, student, teacher)
    run = opd.distill(
        learner,
        told,
        task,
        method=METHODS[name],
        steps=steps,
        lora=4,
        batch=1,
        n=n,
        max_new_tokens=6,
        quiet=True,
    ).train()
    assert run.history["loss"].notna().all()
    assert len(run.history) == steps
    learnt = [
        w for name, w in learner.weights.adapter_state(learner.adapter).items() if "lora_B" in name
    ]
    assert all(w.isfinite().all() for w in learnt)
    assert (
        any(w.any() for w in learnt) or name == "OVD"
    )  # lora_B starts at zero, and stays there where scores are equal
