"""What runs on pretended cards; test_devices.py starts it in a process of its own."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from pretended import MixedDevices, OnCard, cards, register

import opdlab as opd
from opdlab.models import head
from opdlab.models.policy import Policy
from opdlab.tasks.market import model

register()
PLACES = [("card:0", "card:1"), ("card:0", "cpu"), ("cpu", "card:1"), ("card:0", "card:0")]


@pytest.fixture(autouse=True)
def _cards(monkeypatch):
    # A head must be a plain tensor, of which a pretended one is a subclass.
    monkeypatch.setattr(head, "type", type_on_a_real_card, raising=False)
    with cards():
        yield


def type_on_a_real_card(value: object) -> type:
    return torch.Tensor if type(value) is OnCard else type(value)


def load(name: str, device: str) -> Policy:
    """A shipped model on a pretended card."""
    policy = model(name)
    moved = policy.weights.model.to(device)
    moved.tie_weights()  # moving pretended tensors parts what is shared
    assert {str(one.device) for one in moved.parameters()} == {device}
    return Policy.of(moved, policy.tokenizer)


# The imitation itself.


def test_what_a_machine_with_gpus_refuses_is_refused():
    here, there = torch.ones(3, device="card:0"), torch.ones(3, device="card:1")
    beside = torch.ones(3)
    for mix in (
        lambda: here + there,
        lambda: here + beside,
        lambda: torch.cat([here, beside]),
        lambda: here[torch.tensor([0], device="card:1")],
        lambda: torch.where(beside > 0, here, here),
        lambda: torch.rand(3, generator=torch.Generator(), device="card:0"),
        lambda: beside.scatter(0, torch.tensor([0], device="card:0"), 1.0),
    ):
        with pytest.raises(MixedDevices):
            mix()
    with pytest.raises((TypeError, RuntimeError), match="numpy"):
        here.numpy()


def test_what_a_machine_with_gpus_allows_is_allowed():
    here = torch.arange(4.0, device="card:0", requires_grad=True)
    (here[torch.tensor([1, 2])] * torch.tensor(2.0)).sum().backward()
    assert str(here.grad.device) == "card:0"
    assert here.grad.tolist() == [0, 2, 2, 0]
    assert here.detach().cpu().numpy().tolist() == [0, 1, 2, 3]
    assert (here.max().item(), str(here.to("card:1").device)) == (3.0, "card:1")
    copied = torch.zeros(4)
    copied.copy_(here.detach())
    assert (copied.device.type, copied.tolist()) == ("cpu", [0, 1, 2, 3])


# A run.

METHODS = {
    "OPD": opd.OPD(),
    "OPD, top tokens": opd.OPD(top_k=opd.TopK(8)),
    "OPD, sampled": opd.OPD(estimator="sampled", baseline="value", discount=0.5),
    "OPDPlus": opd.OPDPlus(),
    "EOPD": opd.EOPD(),
    "GOPD": opd.GOPD(),
    "TOPD": opd.TOPD(),
    "DOPD": opd.DOPD(),
    "SelfDistillation": opd.SelfDistillation(),
    "SpanOPD": opd.SpanOPD(),
    "OmniOPD": opd.OmniOPD(length=1, chunks=2, continuations=2),
    "SODA": opd.SODA(),
    "SFT": opd.SFT(),
    "SequenceKD": opd.SequenceKD(),
}
COMPARED = ("loss", "reverse_kl", "entropy", "length", "cut", "reward", "tokens", "grad_norm")


def train(places: tuple[str, str], method: object, **settings: object) -> opd.Run:
    """A run, of two steps for plain OPD and one for the others; `run.history` has its numbers."""
    student, teacher = load("student", places[0]), load("teacher", places[1])
    task = opd.load("market")[2]
    steps = 2 if type(method) is opd.OPD else 1
    options = {"steps": steps, "batch": 2, "max_new_tokens": 8, "lr": 1e-3, **settings}
    if isinstance(method, opd.SFT):
        del options["max_new_tokens"]  # nothing is sampled
    run = opd.distill(student, teacher, task, method=method, quiet=True, **options)
    run.train()
    return run


def assert_same(run: opd.Run, on_the_cpu: opd.Run) -> None:
    """Compare the numbers of two runs."""
    compared = [name for name in COMPARED if name in on_the_cpu.history]
    assert {"loss", "length"} <= {*compared}
    got, want = (one.history[compared].to_numpy(float) for one in (run, on_the_cpu))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-7)


@pytest.fixture(scope="module")
def on_the_cpu():
    """Runs without cards, once each."""
    return functools.cache(lambda name: train(("cpu", "cpu"), METHODS[name]))


@pytest.mark.parametrize("places", PLACES, ids=" ← ".join)
def test_a_run_mixes_no_devices_wherever_the_models_are(places, on_the_cpu):
    assert_same(train(places, METHODS["OPD"]), on_the_cpu("OPD"))


@pytest.mark.parametrize("name", METHODS)
def test_no_method_mixes_devices(name, on_the_cpu):
    assert_same(train(("card:0", "card:1"), METHODS[name]), on_the_cpu(name))


@pytest.mark.parametrize("method", [opd.GRPO(), opd.OVD()], ids=["GRPO", "OVD"])
def test_groups_of_samples(method):
    runs = [train(places, method, n=4) for places in (PLACES[0], ("cpu", "cpu"))]
    assert_same(*runs)


def test_micro_batches_and_checkpointing(on_the_cpu):
    run = train(("card:0", "card:1"), METHODS["OPD"], micro_batch=1, checkpointing=True)
    assert_same(run, on_the_cpu("OPD"))


def test_full_training():
    runs = [train(places, METHODS["OPD"], lora=None) for places in (PLACES[0], ("cpu", "cpu"))]
    assert_same(*runs)


# What is around a run.


def test_traces_and_evaluations(tmp_path):
    numbers = []
    for places in (PLACES[0], ("cpu", "cpu")):
        student, teacher = load("student", places[0]), load("teacher", places[1])
        task = opd.load("market")[2]
        rollout = student.sample(task.prompts(3, split="test"), 2, max_new_tokens=8, seed=0)
        trace = opd.score(rollout, student, teacher)
        result = opd.evaluate(student, task, n=4, k=2, max_new_tokens=8, quiet=True)
        numbers.append([*trace.column("teacher_reverse_kl"), result.accuracy])
        trace.save(tmp_path / "trace.parquet")
    np.testing.assert_allclose(*numbers, rtol=1e-4, atol=1e-6)
