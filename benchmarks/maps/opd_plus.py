"""Map: OPD+ against the stop-gradient weight, by divergence, distance of the pair and batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product

import torch
from torch import Tensor

from benchmarks.maps.atlas import SAME, MapPlan, head, record
from opdlab.data.map_results import MapRecord, Named, Value
from opdlab.exact.worlds import PairWorld
from opdlab.methods.opd_plus import OPDPlus

STEPS = 200
# Times 1 / f''(1), so that all divergences pull alike near the teacher; each arm at its best.
RATES = (0.1, 0.3, 1.0, 3.0)
ARMS = {
    "stop_gradient": {"stop_gradient": True},
    "opd_plus": {},
    "opd_plus_centred": {"centred": True},
}
EXACT = "exact"  # the expectation in place of a batch


def step(method: OPDPlus, logits: Tensor, teacher: Tensor, batch: Value, seed: int) -> Tensor:
    """The ascent direction `[..., states, V]` of one update on `batch` tokens of each state."""
    logp = logits.log_softmax(-1)
    p, weight = logp.exp(), method.weight(teacher.log_softmax(-1) - logp)
    if batch == EXACT:
        share = p
    else:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.multinomial(p.flatten(0, -2), int(batch), True, generator=generator)
        counts = (
            torch.zeros_like(p)
            .flatten(0, -2)
            .scatter_add_(1, tokens, torch.ones(tokens.shape, dtype=p.dtype))
        )
        share = counts.view_as(p) / int(batch)
    pushed = share * weight
    return pushed - p * pushed.sum(-1, keepdim=True)


def train(method: OPDPlus, worlds: Sequence[PairWorld], batch: Value, seed: int) -> Tensor:
    """The mass that student and teacher have in common after training, `[worlds, rates]`."""
    start = torch.stack([world.student() for world in worlds])[:, None]
    teacher = torch.stack([world.teacher() for world in worlds])[:, None]
    curvature = method.generator.curvature
    if not 0 < curvature < math.inf:
        curvature = 1.0  # the total variation has a corner at u = 1
    rates = torch.tensor(RATES, dtype=torch.float64).view(-1, 1, 1) / curvature
    logits = start.repeat(1, len(RATES), 1, 1)
    for i in range(STEPS):
        logits = logits + rates * step(method, logits, teacher, batch, 1000 * seed + i)
        logits = logits.clamp(-1e4, 1e4)  # a step that runs away stays a number
    return 1 - PairWorld.gap(logits, teacher)


def measure(grid: Mapping[str, Sequence[Value]], seeds: Sequence[int]) -> Iterator[MapRecord]:
    """All distances side by side, for one divergence."""
    name = str(grid["divergence"][0])
    for batch, seed, (arm, options) in product(grid["batch"], seeds, ARMS.items()):
        worlds = [PairWorld(float(d), seed=seed) for d in grid["distance"]]
        common = train(OPDPlus(name, **options), worlds, batch, seed).amax(-1)
        for distance, score in zip(grid["distance"], common.tolist(), strict=True):
            knobs = {"distance": distance, "batch": batch, "divergence": name}
            yield record(knobs, seed, arm, {"common": score})


HEAD = head(
    "opd_plus",
    "Where does the missing half of the gradient matter?",
    "The weight -f(u) of a sampled token leaves out that u moves with the student.",
    knobs=(
        Named("distance", "distance", "Standard deviation of the logits of both sides."),
        Named("batch", "batch", "Sampled tokens of each state in an update, or the expectation."),
        Named("divergence", "divergence", "The f-divergence that is named."),
    ),
    arms=(
        Named("stop_gradient", "stop-gradient", "The weight -f(u)."),
        Named("opd_plus", "OPD+", "The weight -f(u) + u f'(u)."),
        Named("opd_plus_centred", "OPD+, centred", "That less f'(1), which is opdlab's option."),
    ),
    metrics=(Named("common", "mass in common", "1 less the total variation, mean over states."),),
    against=("stop_gradient",),
    budgets=SAME,
)
PLAN = MapPlan(
    HEAD,
    grid={
        "distance": (0.1, 0.3, 1.0, 2.0, 3.0),
        "batch": (1, 4, 16, 64, EXACT),
        "divergence": (
            "reverse_kl",
            "forward_kl",
            "jensen_shannon",
            "squared_hellinger",
            "total_variation",
            "skew_reverse_kl",
        ),
    },
    quick={"distance": (0.3, 1.0, 3.0), "batch": (1, 16), "divergence": ("reverse_kl",)},
    measure=measure,
    together=("distance", "batch"),
    shown={"arm": "opd_plus", "at": [1]},
)
