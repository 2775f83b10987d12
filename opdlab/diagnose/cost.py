"""What will a step of OPD cost?

Memory from a model of the parts, time from small measurements, both before training.

Memory is counted in tensors (the interpreter and the libraries come on top): weights, adapter or
full gradients with AdamW's two moments, the key-value cache while writing, and what the backward
pass keeps. That last part is not guessed from a formula for one
architecture: one completion is run with gradients on, the bytes that autograd saves are counted,
    and scaled to the tokens of a
micro-batch. Time: one sampled batch of the run's own size for a few tokens, one pass of both models
over the rollout at hand and one pass of the engine are timed, and scaled by tokens; a backward pass
is taken as two forward passes (with LoRA it is less, but there the forward pass is slower).
Measured on a CPU (market and SmolLM2-135M, LoRA and full): memory from 0 to 12 % too high, time
within 25 %. Left out: several devices, data loading, the optimizer's own time, methods other than
OPD.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import psutil
import torch
from torch import Tensor

from opdlab.data.rollout import Rollout
from opdlab.diagnose.probe import render
from opdlab.engine import signals
from opdlab.engine.passes import CHUNK_BYTES, gradient
from opdlab.losses.divergences import reverse_kl
from opdlab.models.graded import States
from opdlab.models.policy import Policy, sample
from opdlab.training.settings import Settings

ADAM = 3  # gradient and two moments, each as large as what trains
# [chunk, V] float32 tensors alive at once in the engine with two policies, counted in a profile
BUFFERS = 10


@dataclass(frozen=True, eq=False)
class Cost:
    """`memory`: bytes by part.

    `seconds`: of a step, by part. `available`: bytes that are free on the device.
    """

    memory: dict[str, float]
    seconds: dict[str, float]
    available: float

    @property
    def peak(self) -> float:
        """Bytes: what always stays, and the larger of what writing and learning need."""
        m = self.memory
        return (
            m["weights"]
            + m["training"]
            + max(m["writing"], m["activations"] + m["states"] + m["head"])
        )

    @property
    def step(self) -> float:
        """Seconds a step."""
        return sum(self.seconds.values())

    @property
    def table(self) -> pd.DataFrame:
        rows = [
            (name, value / 2**20, "MiB")
            for name, value in [*self.memory.items(), ("peak", self.peak)]
        ]
        rows += [(name, value, "s") for name, value in [*self.seconds.items(), ("step", self.step)]]
        return pd.DataFrame(rows, columns=["part", "value", "unit"]).set_index("part")

    @property
    def sentence(self) -> str:
        parts = ", ".join(f"{name} {value:.2g}" for name, value in self.seconds.items())
        return (
            f"A step takes about {_size(self.peak)} at its peak ({_size(self.available)} are free;"
            f" counted from the models' parts) and about {self.step:.2g} s ({parts}; scaled from"
            " small measurements)."
        )

    def __str__(self) -> str:
        return self.sentence

    def __repr__(self) -> str:
        return f"Cost(peak {_size(self.peak)}, step {self.step:.2g} s)"

    def _repr_html_(self) -> str:
        return render(self.sentence, self.table)


def cost(student: Policy, teacher: Policy, rollout: Rollout, settings: Settings) -> Cost:
    """Predict a step of OPD with these settings, from a `rollout` of the student's on typical
    prompts. Trains nothing.
    """
    rows = settings.batch * settings.n
    lengths = rollout.lengths.float()
    prompt = (
        max(len(student.encode(p)) for p in rollout.prompts),
        max(len(teacher.encode(p)) for p in rollout.prompts),
    )
    sizes = _Sizes(
        rows,
        min(settings.micro_batch or rows, rows),
        prompt,
        float(lengths.mean()),
        float(lengths.quantile(0.95)),
    )
    return Cost(
        _memory(student, teacher, rollout, settings, sizes),
        _seconds(student, teacher, rollout, settings, sizes),
        available(student),
    )


def available(policy: Policy) -> float:
    """Bytes that are free on the policy's device; its own weights, being there already, count as
    free.
    """
    own = _bytes([*policy.weights.model.parameters()])
    if policy.weights.device.type == "cuda":
        return float(torch.cuda.mem_get_info(policy.weights.device)[0]) + own
    return float(psutil.virtual_memory().available) + own


@dataclass(frozen=True)
class _Sizes:
    """Completions a step and in one backward pass, the longest prompt (student's, teacher's), new
    tokens (mean, 95th percentile).
    """

    rows: int
    micro: int
    prompt: tuple[int, int]
    mean: float
    long: float


def _memory(
    student: Policy, teacher: Policy, rollout: Rollout, settings: Settings, sizes: _Sizes
) -> dict[str, float]:
    model, config = student.weights.model, student.weights.model.config.get_text_config()
    linear = _linear(student)
    weights = _bytes(
        {
            id(p): p for policy in (student, teacher) for p in policy.weights.model.parameters()
        }.values()
    )
    if settings.lora is None:
        training = ADAM * _bytes(model.parameters()) + (
            _bytes(model.parameters()) if teacher.weights is student.weights else 0
        )
    else:
        training = (1 + ADAM) * 4 * settings.lora * sum(a + b for a, b, _ in linear)
    layers, vocab = config.num_hidden_layers, student.weights.vocab_size
    width = config.hidden_size * model.dtype.itemsize
    kept = _saved(student, rollout) + _lora_saves(linear, settings)
    backward = sizes.micro * (sizes.prompt[0] + sizes.long)  # padded tokens
    if settings.checkpointing:
        kept = layers * width + 2 * kept / layers
    chunk = max(CHUNK_BYTES.get(student.weights.device.type, CHUNK_BYTES["cuda"]), 32 * 4 * vocab)
    new = sizes.rows * sizes.mean
    return {
        "weights": weights,
        "training": training,
        "writing": sizes.rows * ((sizes.prompt[0] + sizes.long) * _cache(student) + 4 * 4 * vocab),
        "activations": backward * kept,
        "states": new * (2 * width + 4 * config.hidden_size),
        "head": BUFFERS * min(chunk, 4 * vocab * new),
    }


def _saved(policy: Policy, rollout: Rollout) -> float:
    """Bytes that autograd keeps for one token of a backward pass, counted on the longest completion
    at hand.
    """
    row = rollout.rows([int(rollout.lengths.argmax())])
    model = policy.weights.model
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    flags = [(p, p.requires_grad) for p in model.parameters()]
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    try:
        for p, _ in flags:
            p.requires_grad_(p.is_floating_point())
        with (
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        ):
            states = policy.hidden(
                row
            )  # keeps what was saved alive, so that no address is counted for two tensors
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
    del states
    return sum(seen.values()) / (len(policy.encode(row.prompts[0])) + int(row.lengths[0]))


def _lora_saves(linear: list[tuple[int, int, int]], settings: Settings) -> float:
    """Bytes a token that adapters add: rank numbers a layer, and a float32 copy of the input where
    the weights are narrower.
    """
    if settings.lora is None:
        return 0.0
    return sum(4 * settings.lora + (4 * inputs if size < 4 else 0) for inputs, _, size in linear)


def _linear(policy: Policy) -> list[tuple[int, int, int]]:
    """Inputs, outputs and bytes a weight of every linear layer but the head: those that get an
    adapter.
    """
    model = policy.weights.model
    head = model.get_output_embeddings()
    named = [
        (name, m)
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and m is not head
    ]
    return [
        (m.in_features, m.out_features, m.weight.dtype.itemsize)
        for name, m in named
        if ".lora_" not in name
    ]


def _cache(policy: Policy) -> float:
    """Bytes of the key-value cache, a token."""
    config = policy.weights.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2.0 * config.num_hidden_layers * heads * size * policy.weights.model.dtype.itemsize


def _seconds(
    student: Policy, teacher: Policy, rollout: Rollout, settings: Settings, sizes: _Sizes
) -> dict[str, float]:
    """Seconds of writing, grading (the teacher's pass) and learning (the student's passes and the
    engine).
    """
    asked = (list(rollout.prompts[:: rollout.n]) * settings.batch)[: settings.batch]
    write = lambda tokens: _timed(
        lambda: sample(student, asked, settings.n, max_new_tokens=tokens, top_p=settings.top_p),
        student,
    )
    some = max(2, min(9, int(sizes.long)))
    write(1)  # the first call also pays for setting up
    first, several = write(1), write(some)
    piece = rollout.rows(range(min(len(rollout), sizes.rows)))
    scale = sizes.rows / len(piece)
    with torch.no_grad():
        took, head = {}, {}
        for name, policy in (("student", student), ("teacher", teacher)):
            work = partial(policy.hidden, piece)
            head[name] = States(work(), policy.head)  # the first pass also pays for setting up
            took[name] = _timed(work, policy)
    token, weight = (
        piece.ids[piece.mask],
        torch.full((piece.tokens,), 1 / piece.tokens, device=piece.ids.device),
    )
    loss: Callable[[Any], Tensor] = lambda rows: reverse_kl(rows.student, rows.teacher)
    engine = _timed(
        lambda: gradient(loss, head, token, weight, watch=signals.cheap, check=False), student
    )
    passes = 3 + settings.checkpointing
    return {
        "write": first + (sizes.long - 1) * max(0.0, several - first) / (some - 1),
        "grade": took["teacher"] * scale,
        "learn": (passes * took["student"] + engine) * scale,
    }


def _timed(work: Callable[[], Any], policy: Policy) -> float:
    """Seconds; of work that takes no time, the best of a few, since a busy machine only ever adds."""
    wait = torch.cuda.synchronize if policy.weights.device.type == "cuda" else lambda: None
    took: list[float] = []
    while len(took) < 3 and sum(took) < 0.3:
        wait()
        began = time.perf_counter()
        work()
        wait()
        took.append(time.perf_counter() - began)
    return min(took)


def _bytes(tensors: Any) -> float:
    return float(sum(t.numel() * t.element_size() for t in tensors))


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
