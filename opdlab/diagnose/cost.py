"""Predict memory and time of a step of OPD before training.

Memory is counted in tensors: weights, the adapter or full gradients with AdamW's two moments, the
key-value cache while writing, and the activations that the backward pass keeps. The activations
are not guessed from a formula for one architecture: one completion is run with gradients on, the
bytes that autograd saves are counted, and they are scaled to the tokens of a micro-batch. On a CPU
a share is added for what the process keeps beside its tensors; the interpreter and the libraries
themselves come on top.

Time is measured on small pieces, which suffice on a slow machine, and scaled by tokens: a pass of
both models over a few completions, one pass of the student forward and back, one of the engine, a
few tokens of as many texts as a step has, and the optimizer on a few million numbers.

`python -m benchmarks.cost` compares predictions with real steps. Left out: several devices, data
loading, the optimizer's own time, methods other than OPD.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
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
from opdlab.engine.chunking import bytes_of_pass
from opdlab.engine.passes import gradient
from opdlab.engine.rows import Rows
from opdlab.losses.divergences import reverse_kl
from opdlab.models.graded import States
from opdlab.models.policy import Policy, sample
from opdlab.training.settings import Settings

ADAM = 3  # gradient and two moments, each as large as what trains
LONG_ENOUGH = 0.5  # seconds of a measurement that need not be repeated on more
# What the process keeps beside its tensors on a CPU: buffers of libraries, and freed memory
# that was not given back. Measured on three sizes and on a real pair (`benchmarks/README.md`).
BESIDE_TENSORS = (0.12, 60 * 2**20)  # share of the tensors, and bytes


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
        """Most bytes at once: what stays, the larger of writing and learning, the allocator's."""
        return _tensors_at_peak(self.memory) + self.memory["allocator"]

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
    prompt, long = _longest(student, rollout), float(lengths.quantile(0.95))
    micro = settings.per_backward(rows, math.ceil(prompt + long), student.weights.device)
    sizes = _Sizes(
        rows=rows,
        micro=min(micro, rows),
        prompt=prompt,
        teacher_prompt=_longest(teacher, rollout),
        mean=float(lengths.mean()),
        long=long,
    )
    return Cost(
        _memory(student, teacher, rollout, settings, sizes),
        _seconds(student, teacher, rollout, settings, sizes),
        available(student),
    )


def _longest(policy: Policy, rollout: Rollout) -> int:
    return max(len(policy.encode(prompt)) for prompt in rollout.prompts)


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
        teacher_prompt: Tokens of the same prompt as the teacher reads it.
        mean: New tokens per completion.
        long: The 95th percentile of new tokens.
    """

    rows: int
    micro: int
    prompt: int
    teacher_prompt: int
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
    new = sizes.rows * sizes.mean
    tensors = {
        "weights": _count_bytes(parameters.values()),
        "training": training,
        "writing": sizes.rows * (padded * _cache_per_token(student) + 4 * 4 * vocab),
        "activations": _tokens_of_pass(student, settings, sizes) * kept,
        "states": new * (2 * width + 4 * config.hidden_size),
    }
    # What is free when the loss runs; both models are there already.
    free = available(student) - _count_bytes(model.parameters())
    free -= sum(tensors[name] for name in ("training", "activations", "states"))
    tensors["head"] = bytes_of_pass(new, vocab, student.weights.device.type, free=free)
    share, least = BESIDE_TENSORS if student.weights.device.type == "cpu" else (0.0, 0)
    return {**tensors, "allocator": share * _tensors_at_peak(tensors) + least}


def _tokens_of_pass(student: Policy, settings: Settings, sizes: _Sizes) -> float:
    """Tokens of a backward pass, whose samples of a prompt may share it."""
    tokens = sizes.micro * (sizes.prompt + sizes.long)
    limit = settings.tokens_per_backward(student.weights.device)
    if limit is None or settings.n == 1:
        return tokens
    return max(tokens, min(sizes.prompt + limit, sizes.prompt + sizes.rows * sizes.long))


def _tensors_at_peak(memory: Mapping[str, float]) -> float:
    """Bytes of the tensors that are alive at once."""
    learning = memory["activations"] + memory["states"] + memory["head"]
    return memory["weights"] + memory["training"] + max(memory["writing"], learning)


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

    Learning is the student's pass forward and back, the engine's, and the optimizer's.
    """
    ours, theirs = (_measure_reading(one, rollout, sizes.rows) for one in (student, teacher))
    tokens = min(ours.states.hidden.shape[0], theirs.states.hidden.shape[0])
    piece = slice(0, tokens)
    weight = torch.full((tokens,), 1 / tokens, device=rollout.ids.device)
    engine = partial(
        gradient,
        _reverse_kl,
        {"student": ours.states.part(piece), "teacher": theirs.states.part(piece)},
        rollout.ids[rollout.mask][piece],
        weight,
        watch=signals.watched,
        check=False,
    )
    trains_all = settings.lora is None
    compared = _time(engine, student) / tokens * sizes.rows * sizes.mean
    # A head that trains gets a gradient of its own: a fourth product beside three.
    compared *= 4 / 3 if trains_all else 1
    there_and_back = _measure_learning(student, rollout, sizes.micro)
    if trains_all:  # gradients of the weights take as long as a pass forward
        there_and_back += ours.per_token
    else:
        there_and_back *= 1 + _share_of_lora(student, settings)
    there_and_back += ours.per_token * settings.checkpointing
    read = sizes.rows * (sizes.prompt + sizes.long)
    return {
        "write": _seconds_of_writing(student, rollout, settings, sizes, ours.per_token),
        "grade": theirs.per_token * sizes.rows * (sizes.teacher_prompt + sizes.long),
        "learn": there_and_back * read + compared + _seconds_of_update(student, settings),
    }


@dataclass(frozen=True)
class _Reading:
    """A measured pass of a policy.

    Attributes:
        states: Its states on the first completions.
        per_token: Seconds per token, prompts and padding included.
    """

    states: States
    per_token: float


def _measure_reading(policy: Policy, rollout: Rollout, most: int) -> _Reading:
    """Time a pass over as many completions as it takes to be sure, at most `most`."""
    count, most = 1, min(most, len(rollout))
    while True:
        piece = rollout.select(range(count))
        with torch.no_grad():
            took = _time(partial(policy.hidden, piece), policy)
            if took > LONG_ENOUGH or count == most:
                states = policy.grade(piece)
                return _Reading(states, took / _padded(policy, piece))
        count = min(2 * count, most)


def _padded(policy: Policy, rollout: Rollout) -> int:
    """Tokens of a pass over a rollout, with prompts and padding."""
    starts = [len(policy.encode(prompt)) for prompt in rollout.prompts]
    longest: int = max(a + b for a, b in zip(starts, rollout.lengths.tolist(), strict=True))
    return len(rollout) * longest


def _measure_learning(policy: Policy, rollout: Rollout, most: int) -> float:
    """Seconds per token of a pass forward and of one back to the embeddings, no weight moving.

    A short pass is repeated on more completions, at most `most`, since a larger one is quicker per
    token.
    """
    embeddings = policy.weights.model.get_input_embeddings()
    seed = torch.zeros((), device=rollout.ids.device, requires_grad=True)
    hook = embeddings.register_forward_hook(lambda _, __, states: states + seed.to(states.dtype))
    count, most = 1, min(most, len(rollout))
    try:
        while True:
            piece = rollout.select(range(count))
            took = _time(partial(_go_there_and_back, policy, piece, seed), policy)
            if took > LONG_ENOUGH or count == most:
                return took / _padded(policy, piece)
            count = min(2 * count, most)
    finally:
        hook.remove()


def _go_there_and_back(policy: Policy, rollout: Rollout, seed: Tensor) -> None:
    with torch.enable_grad():
        states = policy.hidden(rollout)
    torch.autograd.grad(states, seed, torch.ones_like(states))


def _share_of_lora(policy: Policy, settings: Settings) -> float:
    """Work of the adapters as a share of that of the layers they sit on.

    Their products are thin and read the inputs once more, which takes about three times as long as
    their operations alone would.
    """
    linear = _linear_layers(policy)
    own = sum(layer.inputs * layer.outputs for layer in linear)
    rank = settings.lora or 0
    return 3 * rank * sum(layer.inputs + layer.outputs for layer in linear) / max(own, 1)


def _seconds_of_update(policy: Policy, settings: Settings) -> float:
    """Seconds of AdamW on all that trains, measured on a piece."""
    if settings.lora is None:
        count = sum(p.numel() for p in policy.weights.model.parameters())
    else:
        sides = sum(layer.inputs + layer.outputs for layer in _linear_layers(policy))
        count = settings.lora * sides
    piece = torch.zeros(min(count, 1 << 22), device=policy.weights.device, requires_grad=True)
    piece.grad = torch.zeros_like(piece)
    optimizer = torch.optim.AdamW([piece], fused=True)
    optimizer.step()  # makes the moments
    return _time(optimizer.step, policy) / piece.numel() * count


def _seconds_of_writing(
    student: Policy, rollout: Rollout, settings: Settings, sizes: _Sizes, per_token: float
) -> float:
    """Seconds to write a step's rollout: those of reading the prompts, and of each further token.

    The texts of one prompt share its reading, so that is measured with as many texts of one.
    """
    one = [rollout.prompts[0]]

    def time_writing(tokens: int) -> float:
        config = SamplingConfig(max_new_tokens=tokens, top_p=settings.top_p)
        return _time(partial(sample, student, one, sizes.rows, **config.options()), student)

    some = max(2, min(9, int(sizes.long)))
    first, several = time_writing(1), time_writing(some)
    each = max(0.0, several - first) / (some - 1)
    # Rows that are done are dropped, so the later tokens are cheaper.
    shrinking = (1 + sizes.mean / max(sizes.long, 1)) / 2
    read = per_token * settings.batch * sizes.prompt
    return read + (sizes.long - 1) * each * shrinking


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
