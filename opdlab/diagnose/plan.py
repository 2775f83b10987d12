"""Plan a run on paper: memory, traffic and time of a step of OPD on several devices.

Only the shapes of student and teacher are needed (`opdlab.diagnose.shapes`). Three placements are
compared:

    copies     each device has a copy of student and teacher (DDP)
    sharded    the weights of both are spread over all devices (FSDP)
    servers    some devices serve the teacher, the others train copies of the student
    servers, sharded   likewise, with the student's weights spread over the devices that train

A step does this work. `A` are the numbers of a model that a token is multiplied with, `VH` those of
its head, `c` the mean length of what a token looks back on, `w` the width of its attention:

    one token through a model          2 A + 4 L w c operations; a head 2 VH
    write     B n C / N tokens, one after the other: the weights and the cache are read each time
    grade     B n (P + C) / N tokens of the teacher, and its head on the C new ones
    learn     B n (P + C) / N tokens of the student, twice for a LoRA (forward, and back to the
              inputs), three times for all weights, and once more where layers run again; and three
              products with the head for each new token (four where it trains)
    update    AdamW reads and writes all that trains
    traffic   2 (N - 1) / N of the gradients (sum over processes); with shards, (N - 1) / N of the
              weights for each pass that gathers them

A device does `Device.compute` and `Device.bandwidth` times the shares of `Efficiency`.
`benchmarks/scaling.py` measures these on a CPU and compares plans with runs in one to three
processes. For GPUs they are the makers' numbers and usual shares, which no run here has checked.
Nothing overlaps in a plan, and text is written in one batch without waiting for the longest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pandas as pd
from pydantic import Field

from opdlab.diagnose.cost import ADAM
from opdlab.diagnose.shapes import Shape
from opdlab.diagnose.tables import to_html
from opdlab.engine.chunking import bytes_of_pass
from opdlab.errors import InvalidValue
from opdlab.support.validation import Count, Positive, Text, validate_arguments, validate_fields

GIB = 2**30
PLACEMENTS = ("copies", "sharded", "servers", "servers, sharded")
K = 20  # log-probs per token that a server gives
BYTES_OF_A_GRADE = 64  # bytes of one of them in a server's reply, as JSON
BESIDE = 1.5 * GIB  # bytes on a GPU beside tensors: its context, libraries, and the allocator's
Share = Annotated[float, Field(gt=0, le=1, description="a number above 0, at most 1")]


@dataclass(frozen=True)
class Efficiency:
    """The shares of a device's numbers that passes of a model reach.

    Attributes:
        passes: Of the compute, while reading and learning.
        writing: Of the memory's bandwidth, while writing token by token.
        overhead: Seconds per layer and written token that no kernel uses: Python and launches. The
            student's own loop has about 0.4 ms on a GPU, vLLM with CUDA graphs about 0.02 ms.
        links: Of the link's bandwidth, while processes exchange tensors.
    """

    passes: Share = 0.4
    writing: Share = 0.6
    overhead: Annotated[float, Field(ge=0, description="seconds, at least 0")] = 4e-4
    links: Share = 0.7

    def __post_init__(self) -> None:
        validate_fields(self)


@dataclass(frozen=True)
class Device:
    """A device as its maker describes it.

    Attributes:
        name: Its name.
        memory: Bytes.
        compute: Operations per second in the precision of the weights.
        bandwidth: Bytes per second of its memory.
        link: Bytes per second to another device, each way.
        beside: Bytes in use beside tensors.
        kind: What PyTorch calls it, "cuda" or "cpu": it decides how many tokens the engine takes at
            once.
        per_node: Devices of one machine; links between machines are `between`.
        between: Bytes per second to a device of another machine.
    """

    name: Text
    memory: Positive
    compute: Positive
    bandwidth: Positive
    link: Positive
    beside: float = BESIDE
    kind: Text = "cuda"
    per_node: Count = 8
    between: Positive = 50e9

    def __post_init__(self) -> None:
        validate_fields(self)

    def link_for(self, devices: int) -> float:
        """Bytes per second of the slowest link among so many devices."""
        return self.link if devices <= self.per_node else min(self.link, self.between)


# Dense bf16 operations per second, and bytes.
DEVICES = {
    "h200": Device("H200", 141e9, 989e12, 4.8e12, 450e9),
    "h100": Device("H100 SXM", 80e9, 989e12, 3.35e12, 450e9),
    "a100": Device("A100 80 GB", 80e9, 312e12, 2.0e12, 300e9),
    "l40s": Device("L40S", 48e9, 362e12, 0.864e12, 32e9),
    "4090": Device("RTX 4090", 24e9, 165e12, 1.0e12, 16e9),
}


@dataclass(frozen=True)
class Work:
    """The work of a step.

    Attributes:
        batch: Prompts, over all devices.
        n: Completions of each prompt.
        prompt: Tokens of a prompt.
        new: Tokens of a completion.
        lora: Rank of the adapter; None trains all weights.
        micro_batch: Completions in one backward pass of a device.
        checkpointing: Whether layers run again in the backward pass.
        itemsize: Bytes of a weight that does not train: 2 for bfloat16.
    """

    batch: Count = 64
    n: Count = 1
    prompt: Count = 512
    new: Count = 1024
    lora: Count | None = 16
    micro_batch: Count = 4
    checkpointing: bool = True
    itemsize: Count = 2

    def __post_init__(self) -> None:
        validate_fields(self)


@dataclass(frozen=True)
class Plan:
    """State the cost of a step in one placement, for the busiest device that trains.

    Attributes:
        placement: One of `PLACEMENTS`.
        training: Devices that train.
        serving: Devices that serve the teacher.
        memory: Bytes by part.
        seconds: Seconds by part.
        traffic: Bytes that the device sends, by part.
        new_tokens: Tokens that all devices write together.
        available: Bytes of the device.
        available_for_serving: Bytes that the serving devices need and have, together.
    """

    placement: str
    training: int
    serving: int
    memory: dict[str, float]
    seconds: dict[str, float]
    traffic: dict[str, float]
    new_tokens: int
    available: float
    available_for_serving: tuple[float, float] = (0.0, 0.0)

    @property
    def peak(self) -> float:
        """Most bytes at once: writing and learning do not overlap."""
        memory = self.memory
        learning = memory["activations"] + memory["states"] + memory["head"]
        stays = memory["student"] + memory["teacher"] + memory["training"] + memory["beside"]
        return stays + memory["gathered"] + max(memory["cache"], learning)

    @property
    def fits(self) -> bool:
        """True if the devices have the memory."""
        need, have = self.available_for_serving
        return self.peak <= self.available and need <= have

    @property
    def step(self) -> float:
        """Seconds of a step; nothing overlaps."""
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second, of all devices together."""
        return self.new_tokens / self.step


@validate_arguments
def plan(
    student: Shape,
    teacher: Shape,
    gpus: Count = 1,
    device: Device = DEVICES["h100"],
    work: Work | None = None,
    efficiency: Efficiency | None = None,
) -> Plans:
    """Plan a step of OPD in every placement.

    Args:
        student: The shape of the model that trains.
        teacher: The shape of the model that grades.
        gpus: Devices in all.
        device: What they are.
        work: The work of a step.
        efficiency: The shares of the device's numbers that are reached.

    Returns:
        One plan for each placement that needs no more devices than there are.

    Raises:
        InvalidValue: An argument is not what it must be, or there are fewer prompts than devices.
    """
    work, efficiency = work or Work(), efficiency or Efficiency()
    if work.batch < gpus:
        raise InvalidValue(
            f"plan got gpus={gpus} for a batch of {work.batch} prompts. Use a prompt for each"
            " device at least."
        )
    least = _devices_to_serve(teacher, device, work)
    found = []
    for placement in PLACEMENTS:
        is_sharded = placement.endswith("sharded")
        counts = [0]
        if placement.startswith("servers"):  # as many servers as make the step shortest
            counts = [*range(least, gpus, least)] or [gpus - 1]
        if max(counts) == gpus or (counts == [0] and placement.startswith("servers")):
            continue
        if is_sharded and gpus - min(counts) == 1:  # one device has nothing to share
            continue
        made = [
            _Sum(
                student, teacher, gpus - servers, servers, is_sharded, device, work, efficiency
            ).plan(placement)
            for servers in counts
        ]
        found.append(min(made, key=lambda one: (not one.fits, one.step)))
    return Plans(tuple(found), student, teacher, gpus, device, work)


def _devices_to_serve(teacher: Shape, device: Device, work: Work) -> int:
    """Devices that hold the teacher's weights and a fifth for its cache, a power of two."""
    need = 1.2 * teacher.parameters * work.itemsize
    devices = 1
    while devices * (device.memory - device.beside) < need:
        devices *= 2
    return devices


@dataclass(frozen=True)
class _Sum:
    """One placement, and the sums that make its plan."""

    student: Shape
    teacher: Shape
    training: int
    serving: int
    is_sharded: bool
    device: Device
    work: Work
    efficiency: Efficiency

    @property
    def rows(self) -> float:
        """Completions of the busiest device that trains."""
        return -(-self.work.batch // self.training) * self.work.n

    @property
    def trained(self) -> int:
        """Numbers that train."""
        rank = self.work.lora
        return self.student.parameters if rank is None else rank * self.student.lora

    @property
    def parts(self) -> int:
        """Into how many parts weights are split."""
        return self.training if self.is_sharded else 1

    def plan(self, placement: str) -> Plan:
        """Make the plan."""
        need = 1.2 * self.teacher.parameters * self.work.itemsize if self.serving else 0.0
        have = self.serving * (self.device.memory - self.device.beside)
        return Plan(
            placement,
            self.training,
            self.serving,
            self.memory(),
            self.seconds(),
            self.traffic(),
            self.work.batch * self.work.n * self.work.new,
            self.device.memory,
            (need, have),
        )

    def memory(self) -> dict[str, float]:
        """Bytes by part."""
        work, student = self.work, self.student
        width = work.itemsize
        trains_all = work.lora is None
        own = 4 if trains_all else width  # weights that train are float32
        length = work.prompt + work.new
        kept = saved_per_token(student, work)
        new = self.rows * work.new
        largest = student.inside / student.layers
        memory = {
            "student": own * student.parameters / self.parts,
            "teacher": 0.0 if self.serving else width * self.teacher.parameters / self.parts,
            "training": (ADAM + (not trains_all)) * 4 * self.trained / self.parts,
            # of shards, a layer and the head are gathered at a time
            "gathered": (self.parts > 1) * width * (2 * largest + student.head),
            "cache": self.rows * length * student.cache * width,
            "activations": min(work.micro_batch, self.rows) * length * kept,
            "states": new * (width * (student.hidden + self.teacher.hidden) + 4 * student.hidden),
            "head": 0.0,
            "beside": self.device.beside,
        }
        free = self.device.memory - sum(memory.values()) + memory["cache"]  # freed after writing
        memory["head"] = bytes_of_pass(new, student.vocab, self.device.kind, free=free)
        return memory

    def seconds(self) -> dict[str, float]:
        """Seconds by part."""
        device, efficiency = self.device, self.efficiency
        compute = device.compute * efficiency.passes
        link = device.link_for(self.training) * efficiency.links
        operations = self.operations()
        graders = self.serving or self.training
        moved = sum(bytes_ for name, bytes_ in self.traffic().items() if name != "grades")
        return {
            "write": self.seconds_of_writing(),
            "grade": operations["grade"] / (compute * graders),
            "learn": operations["learn"] / compute,
            # AdamW reads weight, gradient and moments and writes all but the gradient
            "update": 7 * 4 * self.trained / self.parts / device.bandwidth,
            "exchange": moved / link,
        }

    def operations(self) -> dict[str, float]:
        """Operations: of learning on the busiest device, of grading on all devices together."""
        work = self.work
        length = work.prompt + work.new
        new = self.rows * work.new
        trains_all = work.lora is None
        times = 2 + trains_all + work.checkpointing
        heads = 3 + trains_all
        everyone = work.batch * work.n
        return {
            "learn": self.rows * length * times * operations_of_token(self.student, length / 2)
            + heads * 2 * self.student.head * new,
            "grade": everyone * length * operations_of_token(self.teacher, length / 2)
            + 2 * self.teacher.head * everyone * work.new,
        }

    def seconds_of_writing(self) -> float:
        """Seconds to write: the prompts in one pass, then one token of all rows after the other."""
        work, student, device = self.work, self.student, self.device
        compute = device.compute * self.efficiency.passes
        prompts = -(-work.batch // self.training)
        read = prompts * work.prompt * operations_of_token(student, work.prompt / 2) / compute
        context = work.prompt + work.new / 2
        operations = self.rows * (operations_of_token(student, context) + 2 * student.head)
        # Rows go to different experts, whose weights are all read.
        read_inside = min(student.inside, self.rows * student.active)
        weights = (read_inside + student.head) * work.itemsize
        cache = self.rows * context * student.cache * work.itemsize
        reached = device.bandwidth * self.efficiency.writing
        each = max(operations / compute, (weights + cache) / reached)
        return read + work.new * (each + student.layers * self.efficiency.overhead)

    def traffic(self) -> dict[str, float]:
        """Bytes that a device which trains sends in a step, by part."""
        work, n = self.work, self.training
        passes = max(1, -(-int(self.rows) // work.micro_batch))
        shared = (n - 1) / n
        gradients = 2 * shared * 4 * self.trained
        found = {"gradients": gradients / (2 if self.is_sharded else 1), "weights": 0.0}
        if self.is_sharded and n > 1:
            width = 4 if work.lora is None else work.itemsize
            # Once to write (gathered for all of its tokens), and forward and back for each pass.
            gathers = 1 + passes * 2
            found["weights"] = gathers * shared * width * self.student.parameters
            if not self.serving:
                found["weights"] += shared * work.itemsize * self.teacher.parameters
        asked = self.rows * work.new * (K + 1) * BYTES_OF_A_GRADE
        found["grades"] = asked if self.serving else 0.0
        return found


def operations_of_token(shape: Shape, context: float) -> float:
    """Count the operations of one token through the layers of a model.

    Args:
        shape: The model.
        context: Tokens that it looks back on.

    Returns:
        Multiplications and additions: two for each number that it is multiplied with, and four for
        each number of the keys' width that it looks at.
    """
    return 2 * shape.active + 4 * shape.layers * shape.attention * context


def saved_per_token(shape: Shape, work: Work) -> float:
    """Estimate the bytes per token that the backward pass keeps.

    Per layer: two normalised and two residual states, queries, keys, values and the attention's
    output, and three of the feed-forward layer's width; a LoRA adds float32 copies of the inputs
    where the weights are narrower. Where layers run again, only their inputs are kept, and one
    layer.

    Args:
        shape: The model.
        work: The work of a step.

    Returns:
        Bytes.
    """
    width = 4 if work.lora is None else work.itemsize
    pairs = shape.cache / shape.layers
    layer = width * (6 * shape.hidden + 3 * shape.attention + pairs + 4 * shape.inner)
    if work.lora is not None and work.itemsize < 4:
        layer += 4 * (2 * shape.hidden + shape.attention + shape.inner)
    if work.checkpointing:
        return shape.layers * shape.hidden * width + layer
    return shape.layers * layer


@dataclass(frozen=True)
class Plans:
    """Plans of the same work in several placements.

    Attributes:
        plans: The plans.
        student: The shape of the student.
        teacher: The shape of the teacher.
        gpus: Devices in all.
        device: What they are.
        work: The work of a step.
    """

    plans: tuple[Plan, ...]
    student: Shape
    teacher: Shape
    gpus: int
    device: Device
    work: Work

    @property
    def best(self) -> Plan | None:
        """The quickest plan that fits; None if none does."""
        fitting = [one for one in self.plans if one.fits]
        return min(fitting, key=lambda one: one.step) if fitting else None

    @property
    def table(self) -> pd.DataFrame:
        """One row for each placement."""
        rows = [
            {
                "placement": one.placement,
                "train on": one.training,
                "serve on": one.serving,
                "fits": one.fits,
                "peak GiB": one.peak / GIB,
                "step s": one.step,
                "new tokens/s": one.tokens_per_second,
                "sent GiB": sum(one.traffic.values()) / GIB,
                **{f"{name} s": value for name, value in one.seconds.items()},
            }
            for one in self.plans
        ]
        return pd.DataFrame(rows).set_index("placement")

    @property
    def sentence(self) -> str:
        """The quickest plan in words."""
        work = self.work
        what = f"all weights of {self.student.name}" if work.lora is None else self.student.name
        asked = (
            f"{what} ({self.student.parameters / 1e9:.3g}B) learns from {self.teacher.name}"
            f" ({self.teacher.parameters / 1e9:.3g}B) on {self.gpus} x {self.device.name}:"
            f" {work.batch} x {work.n} completions of {work.new} tokens"
        )
        best = self.best
        if best is None:
            least = min(self.plans, key=lambda one: one.peak)
            return (
                f"{asked} do not fit. The least memory is that of {least.placement!r}:"
                f" {least.peak / GIB:.1f} GiB on each of {least.training} devices that train. Use"
                " more devices, a smaller micro_batch, checkpointing, or a LoRA."
            )
        return (
            f"{asked} take about {best.step:.2g} s a step ({best.tokens_per_second:,.0f} new tokens"
            f" per second) in the placement {best.placement!r}, with {best.peak / GIB:.1f} GiB at"
            f" the peak of each of {best.training} devices that train"
            + (f" and {best.serving} that serve the teacher." if best.serving else ".")
        )

    def __str__(self) -> str:
        shown = self.table.copy()
        for name in shown.select_dtypes("float"):
            shown[name] = shown[name].map("{:,.3g}".format)
        return f"{self.sentence}\n\n{shown.to_string()}"

    def _repr_html_(self) -> str:
        return to_html(self.sentence, self.table)
