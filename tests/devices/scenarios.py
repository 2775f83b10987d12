"""What runs on pretended cards; test_devices.py starts it in a process of its own."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from pretended import WAITS, MixedDevices, OnCard, cards, register

import opdlab as opd
from opdlab import losses
from opdlab.engine import signals
from opdlab.engine.kept_tokens import KeptTokens
from opdlab.engine.passes import compute, gradient
from opdlab.models import head
from opdlab.models.graded import States, TopLogprobs
from opdlab.models.policy import Policy
from opdlab.models.routed import Routed
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


# Waiting. Each question to a card (`.item()`, a mask as an index, a copy to the CPU) waits until it
# has done all that it was given, so a pass may ask a few, and no more of them for more chunks.


def test_waits_are_counted():
    here = torch.arange(4.0, device="card:0")
    for ask in (
        lambda: here.max().item(),
        lambda: bool((here > 1).any()),
        here.cpu,
        lambda: here[here > 1],
        here.nonzero,
        lambda: here.masked_fill_(here > 2, 0)[here > 1],
        here.tolist,
    ):
        WAITS.clear()
        ask()
        assert len(WAITS) == 1
    WAITS.clear()
    picked = here[torch.tensor([0, 1, 2])] + here[1:]
    there = picked.to("card:1").masked_fill(here[1:].to("card:1") > 1, 0)
    torch.where(there > 1, 0.0, there).sum()
    torch.zeros(3).to("card:0")
    assert WAITS == []


TOKENS, VOCAB, WIDTH = 48, 30, 8
TOP = opd.TopK(4, by="teacher")


def on_a_card(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to("card:0")


def states() -> States:
    return States(on_a_card(TOKENS, WIDTH), head.Head(on_a_card(VOCAB, WIDTH), None, VOCAB))


def top() -> TopLogprobs:
    logp = on_a_card(TOKENS, VOCAB).log_softmax(-1)
    found, token = logp.topk(5), torch.zeros(TOKENS, dtype=torch.long, device="card:0")
    return TopLogprobs(found.indices, found.values, logp[:, 0], token, VOCAB)


def routed() -> Routed:
    """Two graders that share the tokens, and one token that both have graded."""
    place = torch.full((TOKENS, 2), -1)
    place[:25, 0], place[24:, 1] = torch.arange(25), torch.arange(TOKENS - 24)
    weight = (place >= 0).float() / (place >= 0).sum(1, keepdim=True)
    parts = tuple(states().part(slice(0, n)) for n in (25, TOKENS - 24))
    token = torch.zeros(TOKENS, dtype=torch.long, device="card:0")
    return Routed(parts, place.to("card:0"), weight.to("card:0"), token, VOCAB)


PASSES = {
    "reverse_kl": (states, lambda rows: losses.reverse_kl(rows.student, rows.teacher)),
    "forward_kl": (states, lambda rows: losses.forward_kl(rows.student, rows.teacher)),
    "jensen_shannon": (states, lambda rows: losses.jensen_shannon(rows.student, rows.teacher)),
    "sampled": (states, lambda rows: rows.logp * rows.logp_of("teacher").exp()),
    "top tokens": (top, lambda rows: losses.reverse_kl(*rows.on("teacher", TOP))),
    "several teachers": (routed, lambda rows: losses.reverse_kl(rows.student, rows.teacher)),
}


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_asks_the_card_no_more_for_more_chunks(name):
    teacher, loss = PASSES[name]
    graded = {"student": states(), "teacher": teacher()}
    graded["student"].head.weight.requires_grad_()
    token = torch.zeros(TOKENS, dtype=torch.long, device="card:0")
    kept, counted = KeptTokens(2), {}
    for chunk in (TOKENS, 4):
        WAITS.clear()
        gradient(
            loss,
            graded,
            token,
            torch.ones(TOKENS, device="card:0"),
            watch=lambda rows: signals.watched(rows) | kept.measure(rows),
            slopes=kept.slopes,
            chunk=chunk,
            check=False,
        )
        compute(lambda rows: rows.logp_of("teacher"), graded, token, chunk=chunk)
        counted[chunk] = list(WAITS)
    assert counted[TOKENS] == counted[4]
    assert counted[4] == ["aten._local_scalar_dense.default"]  # is everything finite?
