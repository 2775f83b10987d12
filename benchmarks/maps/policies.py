"""Map: who writes the texts, and which KL: the two by two of arXiv 2609.35259."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

import torch
from torch import Tensor

from benchmarks.maps.atlas import SAME, MapPlan, head, record
from opdlab.data.map_results import MapRecord, Named, Value
from opdlab.exact.worlds import RoadWorld
from opdlab.exact.worlds.pulls import PULLS

STEPS = 48
ARMS = {
    "forward_teacher": ("forward_kl", "teacher"),
    "forward_student": ("forward_kl", "student"),
    "reverse_teacher": ("reverse_kl", "teacher"),
    "reverse_student": ("reverse_kl", "student"),
}


def train(world: RoadWorld, teacher: Tensor, arm: str, rates: Tensor) -> Tensor:
    """The student's logits after training, `[teachers, rates, horizon, 2, V]`.

    Args:
        world: The road; its noise does not count.
        teacher: Log-probs of teachers of more or less noise, `[teachers, horizon, 2, V]`.
        arm: A name of `ARMS`.
        rates: Learning rates, for one state that every text visits.
    """
    divergence, writer = ARMS[arm]
    logits = world.student().expand(len(teacher), len(rates), -1, -1, -1).clone()
    teacher, kernel = teacher[:, None], world.kernel()
    theirs = world.visits(teacher)
    for _ in range(STEPS):
        visits = theirs if writer == "teacher" else world.visits(logits)
        pull = visits[..., None] * PULLS[divergence](logits.log_softmax(-1), teacher)
        move = kernel @ pull.flatten(-3, -2)
        logits = logits - rates[:, None, None, None] * move.view(logits.shape)
    return logits


def measure(grid: Mapping[str, Sequence[Value]], seeds: Sequence[int]) -> Iterator[MapRecord]:
    """All shares of noise and learning rates side by side."""
    rates = torch.tensor([float(rate) for rate in grid["rate"]], dtype=torch.float64)
    for horizon, capacity, seed in product(grid["horizon"], grid["capacity"], seeds):
        size, features = int(horizon), float(capacity)
        worlds = [RoadWorld(size, float(n), features, seed=seed) for n in grid["noise"]]
        teacher = torch.stack([world.teacher() for world in worlds])
        for arm in ARMS:
            logits = train(worlds[0], teacher, arm, rates)
            score = worlds[0].on_road(logits)
            for (i, noise), (j, rate) in product(enumerate(grid["noise"]), enumerate(grid["rate"])):
                knobs = {"horizon": size, "noise": noise, "capacity": capacity, "rate": rate}
                yield record(knobs, seed, arm, {"on_road": float(score[i, j])})


HEAD = head(
    "policies",
    "Who should write the texts, and which KL?",
    "A student that errs comes to places that the teacher's texts never show.",
    knobs=(
        Named("horizon", "horizon", "Steps of a text."),
        Named("noise", "noise", "The teacher's share of noise off the road."),
        Named("capacity", "capacity", "Features of the student per state; 1 can be right in all."),
        Named("rate", "learning rate", "For one state that every text visits."),
    ),
    arms=(
        Named("forward_teacher", "forward KL, teacher's texts", "Sequence-level distillation."),
        Named("forward_student", "forward KL, student's texts"),
        Named("reverse_teacher", "reverse KL, teacher's texts"),
        Named("reverse_student", "reverse KL, student's texts", "On-policy distillation."),
    ),
    metrics=(Named("on_road", "on the road", "Share of the steps of the student's own texts."),),
    against=("forward_teacher", "forward_student", "reverse_teacher"),
    budgets=SAME,
)
PLAN = MapPlan(
    HEAD,
    grid={
        "horizon": (4, 12, 32),
        "noise": (0.0, 0.5, 1.0),
        "capacity": (0.25, 0.5, 1.0),
        "rate": (0.1, 0.3, 1.0),
    },
    quick={"horizon": (4, 12), "noise": (0.0, 1.0), "capacity": (0.5,), "rate": (0.3,)},
    measure=measure,
    together=("noise", "rate"),
    shown={"arm": "reverse_student", "against": "forward_teacher", "at": [1, 1]},
)
