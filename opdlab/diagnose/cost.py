"""Predict memory and time of a step of OPD before training.

Memory is counted in tensors; the interpreter and the libraries come on top. The parts are weights,
the adapter or full gradients with AdamW's two moments, the key-value cache while writing, and the
activations that the backward pass keeps. The activations are not guessed from a formula for one
architecture: one completion is run with gradients on, the bytes that autograd saves are counted,
and they are scaled to the tokens of a micro-batch.

Time is measured: one sampled batch of the run's own size for a few tokens, one pass of both models
over the rollout at hand and one pass of the engine, each scaled by tokens. A backward pass counts
as two forward passes (with LoRA it is less, but there the forward pass is slower).

Measured on a CPU (market and SmolLM2-135M, LoRA and full): memory from 0 to 12 % too high, time
within 25 %. Left out: several devices, data loading, the optimizer's own time, methods other than
OPD.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import psutil
import torch
from torch import Tensor

from opdlab.data.rollout import Rollout
from opdlab.data.sampling_config import SamplingConfig
from opdlab.diagnose.tables import to_html
from opdlab.engine import signals
from opdlab.engine.passes import CHUNK_BYTES, gradient
from opdlab.engine.rows import Rows
from opdlab.losses.divergences import reverse_kl
from opdlab.models.graded import States
from opdlab.models.policy import Policy, sample
from opdlab.training.settings import Settings

ADAM = 3  # gradient and two moments, each as large as what trains
# [chunk, V] float32 tensors alive at once in the engine with two policies, counted in a profile
BUFFERS = 10


@dataclass(frozen=True, eq=False)
class Cost:
    """The predicted cost of a step.

    Attributes:
        memory: Bytes by part.
        seconds: Seconds by part.
        available: Bytes that are free on the device.
    """

    memory: dict[str, float]
    seconds: dict[str, float]
    available: float

    @property
    def peak(self) -> float:
        """Most bytes at once: the part that stays, and the larger of writing and learning."""
        memory = self.memory
        learning = memory["activations"] + memory["states"] + memory["head"]
        return memory["weights"] + memory["training"] + max(memory["writing"], learning)

    @property
    def step(self) -> float:
        """Seconds per step."""
        return sum(self.seconds.values())

    @property
    def table(self) -> pd.DataFrame:
        """One row per part, with its `value` and `unit`."""
        rows = [
            (name, value / 2**20, "MiB")
            for name, value in [*self.memory.items(), ("peak", self.peak)]
        ]
        rows += [(name, value, "s") for name, value in [*self.seconds.items(), ("step", self.step)]]
        return pd.DataFrame(rows, columns=["part", "value", "unit"]).set_index("part")

    @property
    def sentence(self) -> str:
        """Peak and seconds in words."""
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
        return to_html(self.sentence, self.table)


def cost(student: Policy, teacher: Policy, rollout: Rollout, settings: Settings) -> Cost:
    """Predict the cost of a step of OPD.

    Nothing is trained.

    Args:
        student: The policy that would train.
        teacher: The policy that would grade.
        rollout: Texts of the student on typical prompts.
        settings: The settings of the planned run.

    Returns:
        Bytes of memory and seconds of a step, by part, and the bytes that are free.
    """
    rows = settings.batch * settings.n
    lengths = rollout.lengths.float()
    sizes = _Sizes(
        rows=rows,
        micro=min(settings.micro_batch or rows, rows),
        prompt=max(len(student.encode(prompt)) for prompt in rollout.prompts),
        mean=float(lengths.mean()),
        long=float(lengths.quantile(0.95)),
    )
    return Cost(
        _memory(student, teacher, rollout, settings, sizes),
        _seconds(student, teacher, rollout, settings, sizes),
        available(student),
    )


def available(policy: Policy) -> float:
    """Return the bytes that are free on the policy's device.

    The policy's own weights count as free, since they are there already.

    Args:
        policy: A policy that is loaded.

    Returns:
        Bytes.
    """
    own = _count_bytes(policy.weights.model.parameters())
    if policy.weights.device.type == "cuda":
        return float(torch.cuda.mem_get_info(policy.weights.device)[0]) + own
    return float(psutil.virtual_memory().available) + own


@dataclass(frozen=True)
class _Sizes:
    """The sizes of a step.

    Attributes:
        rows: Completions per step.
        micro: Completions in one backward pass.
        prompt: Tokens of the student's longest prompt.
        mean: New tokens per completion.
        long: The 95th percentile of new tokens.
    """

    rows: int
    micro: int
    prompt: int
    mean: float
    long: float


def _memory(
    student: Policy, teacher: Policy, rollout: Rollout, settings: Settings, sizes: _Sizes
) -> dict[str, float]:
    """Bytes by part."""
    model, config = student.weights.model, student.weights.model.config.get_text_config()
    linear = _linear_layers(student)
    theirs = teacher.weights.model
    parameters = {id(p): p for p in (*model.parameters(), *theirs.parameters())}
    if settings.lora is None:
        # A teacher with the student's own weights stays as it is, so `distill` copies the model.
        copies = ADAM + (teacher.weights is student.weights)
        training = copies * _count_bytes(model.parameters())
    else:
        sides = sum(layer.inputs + layer.outputs for layer in linear)
        training = (1 + ADAM) * 4 * settings.lora * sides
    layers, vocab = config.num_hidden_layers, student.weights.vocab_size
    width = config.hidden_size * model.dtype.itemsize
    kept = _saved_per_token(student, rollout) + _saved_by_lora(linear, settings)
    padded = sizes.prompt + sizes.long
    if settings.checkpointing:
        kept = layers * width + 2 * kept / layers
    chunk = max(CHUNK_BYTES.get(student.weights.device.type, CHUNK_BYTES["cuda"]), 32 * 4 * vocab)
    new = sizes.rows * sizes.mean
    return {
        "weights": _count_bytes(parameters.values()),
        "training": training,
        "writing": sizes.rows * (padded * _cache_per_token(student) + 4 * 4 * vocab),
        "activations": sizes.micro * padded * kept,
        "states": new * (2 * width + 4 * config.hidden_size),
        "head": BUFFERS * min(chunk, 4 * vocab * new),
    }


def _saved_per_token(policy: Policy, rollout: Rollout) -> float:
    """Bytes that autograd keeps per token, counted on the longest completion at hand."""
    row = rollout.select([int(rollout.lengths.argmax())])
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
            # The result keeps all saved tensors alive, so no address is counted for two of them.
            states = policy.hidden(row)
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
    del states
    return sum(seen.values()) / (len(policy.encode(row.prompts[0])) + int(row.lengths[0]))


@dataclass(frozen=True)
class _Linear:
    """The shape of a linear layer, and the bytes of one of its weights."""

    inputs: int
    outputs: int
    itemsize: int


def _saved_by_lora(linear: list[_Linear], settings: Settings) -> float:
    """Bytes per token that adapters add: `rank` numbers per layer, and a float32 copy of the input.

    The copy is made only if the weights are narrower than float32.
    """
    if settings.lora is None:
        return 0.0
    copies = sum(4 * layer.inputs for layer in linear if layer.itemsize < 4)
    return 4 * settings.lora * len(linear) + copies


def _linear_layers(policy: Policy) -> list[_Linear]:
    """Every linear layer but the head: those that get an adapter."""
    model: Any = policy.weights.model  # transformers gives this method no types
    head = model.get_output_embeddings()
    return [
        _Linear(layer.in_features, layer.out_features, layer.weight.dtype.itemsize)
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and layer is not head and ".lora_" not in name
    ]


def _cache_per_token(policy: Policy) -> float:
    """Bytes of the key-value cache per token."""
    config = policy.weights.model.config.get_text_config()
    # Configurations of transformers leave these two fields out if they follow from the others.
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = policy.weights.model.dtype.itemsize
    return float(2 * config.num_hidden_layers * heads * size * width)


def _seconds(
    student: Policy, teacher: Policy, rollout: Rollout, settings: Settings, sizes: _Sizes
) -> dict[str, float]:
    """Seconds of writing, of grading (the teacher's pass), and of learning.

    Learning is the student's passes and the engine's.
    """
    piece = rollout.select(range(min(len(rollout), sizes.rows)))
    scale = sizes.rows / len(piece)
    states, took = {}, {}
    with torch.no_grad():
        for name, policy in (("student", student), ("teacher", teacher)):
            work = partial(policy.hidden, piece)
            states[name] = States(work(), policy.head)  # the first pass also pays for setting up
            took[name] = _time(work, policy)
    weight = torch.full((piece.tokens,), 1 / piece.tokens, device=piece.ids.device)
    engine = partial(
        gradient,
        _reverse_kl,
        states,
        piece.ids[piece.mask],
        weight,
        watch=signals.cheap,
        check=False,
    )
    passes = 3 + settings.checkpointing
    return {
        "write": _seconds_of_writing(student, rollout, settings, sizes.long),
        "grade": took["teacher"] * scale,
        "learn": (passes * took["student"] + _time(engine, student)) * scale,
    }


def _seconds_of_writing(
    student: Policy, rollout: Rollout, settings: Settings, length: float
) -> float:
    """Seconds to write a step's rollout: those of the first token, and of each further one."""
    asked = (list(rollout.prompts[:: rollout.n]) * settings.batch)[: settings.batch]

    def time_writing(tokens: int) -> float:
        config = SamplingConfig(max_new_tokens=tokens, top_p=settings.top_p)
        work = partial(sample, student, asked, settings.n, **config.options())
        return _time(work, student)

    some = max(2, min(9, int(length)))
    time_writing(1)  # the first call also pays for setting up
    first, several = time_writing(1), time_writing(some)
    return first + (length - 1) * max(0.0, several - first) / (some - 1)


def _reverse_kl(rows: Rows) -> Tensor:
    return reverse_kl(rows["student"], rows["teacher"])


def _time(work: Callable[[], object], policy: Policy) -> float:
    """Seconds of some work: the best of a few tries if it is short, since noise only ever adds."""
    took: list[float] = []
    while len(took) < 3 and sum(took) < 0.3:
        _wait_for(policy)
        began = time.perf_counter()
        work()
        _wait_for(policy)
        took.append(time.perf_counter() - began)
    return min(took)


def _wait_for(policy: Policy) -> None:
    """Wait until the policy's device has done its work."""
    if policy.weights.device.type == "cuda":
        torch.cuda.synchronize(policy.weights.device)


def _count_bytes(tensors: Iterable[Tensor]) -> float:
    return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
