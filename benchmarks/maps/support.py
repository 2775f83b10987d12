"""Map: reverse KL against forward KL, JSD and a share of the teacher's texts, by support."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

import torch
from torch import Tensor

from benchmarks.maps.atlas import SAME, MapPlan, head, record
from opdlab.data.map_results import MapRecord, Named, Value
from opdlab.exact.worlds import SupportWorld
from opdlab.losses import DIVERGENCES

# Each arm: its divergence on the student's own texts, the share of texts that the teacher writes,
# and the divergence on those (cross-entropy on samples has the gradient of the forward KL).
ARMS: dict[str, tuple[str, float, str]] = {
    "reverse_kl": ("reverse_kl", 0.0, ""),
    "forward_kl": ("forward_kl", 0.0, ""),
    "jensen_shannon": ("jensen_shannon", 0.0, ""),
    "reverse_kl_mixed": ("reverse_kl", 0.5, "reverse_kl"),
    "forward_kl_mixed": ("forward_kl", 0.5, "forward_kl"),
    "reverse_kl_and_texts": ("reverse_kl", 0.5, "forward_kl"),
}
# Rates of plain descent, and of Adam; every arm is shown at its best one.
RATES = {"sgd": (1.0, 3.0, 10.0, 30.0), "adam": (0.01, 0.03, 0.1, 0.3)}


def loss_of(arm: str, logits: Tensor, teacher: Tensor) -> Tensor:
    """The mean loss per token `[...]` of an arm: exact, over all texts."""
    divergence, share, on_texts = ARMS[arm]
    own = SupportWorld.visits(logits.detach())
    logp, logq = logits.log_softmax(-1), teacher.log_softmax(-1)
    loss = (1 - share) * own * DIVERGENCES[divergence](logp, logq)
    if share:
        loss = loss + share * SupportWorld.visits(teacher) * DIVERGENCES[on_texts](logp, logq)
    return loss.mean(-1)


def train(
    arm: str, student: Tensor, teacher: Tensor, rates: Tensor, adam: bool, stops: Sequence[int]
) -> dict[int, Tensor]:
    """Descend with exact gradients. Returns the accuracy `[..., rates]` after each of `stops`."""
    logits = student.unsqueeze(-3).repeat_interleave(len(rates), -3).requires_grad_()
    teacher = teacher.unsqueeze(-3)
    by_rate = rates.view(-1, 1, 1)
    first, second = torch.zeros_like(logits), torch.zeros_like(logits)
    out = {}
    for step in range(1, max(stops) + 1):
        (slope,) = torch.autograd.grad(loss_of(arm, logits, teacher).sum(), logits)
        move = slope * slope.shape[-2]  # a place's own gradient, however many places there are
        if adam:
            first = 0.9 * first + 0.1 * slope
            second = 0.999 * second + 0.001 * slope**2
            root = (second / (1 - 0.999**step)).sqrt() + 1e-8
            move = first / (1 - 0.9**step) / root
        with torch.no_grad():
            logits -= by_rate * move
        if step in stops:
            out[step] = SupportWorld.accuracy(logits.detach())
    return out


def measure(grid: Mapping[str, Sequence[Value]], seeds: Sequence[int]) -> Iterator[MapRecord]:
    """All supports, seeds and learning rates side by side."""
    places, optimizer = int(grid["places"][0]), str(grid["optimizer"][0])
    stops = [int(step) for step in grid["updates"]]
    worlds = list(product(grid["support"], seeds))
    made = [SupportWorld(float(support), places, seed=seed) for support, seed in worlds]
    student = torch.stack([world.student() for world in made])
    teacher = torch.stack([world.teacher() for world in made])
    top = SupportWorld.accuracy(teacher)[:, None]
    rates = torch.tensor(RATES[optimizer], dtype=torch.float64)
    for arm in ARMS:
        found = train(arm, student, teacher, rates, optimizer == "adam", stops)
        for step in stops:
            best = (found[step] / top).amax(-1).clamp(max=1)
            for (support, seed), score in zip(worlds, best.tolist(), strict=True):
                knobs = {"support": support, "updates": step, "places": places}
                yield record(knobs | {"optimizer": optimizer}, seed, arm, {"accuracy": score})


HEAD = head(
    "support",
    "Where does the reverse KL stall for want of support?",
    "The student gives next to no probability to the tokens that the teacher wants.",
    knobs=(
        Named("support", "support", "The student's probability of the teacher's token at first."),
        Named("updates", "updates", "Steps of training."),
        Named("places", "places", "Tokens of the form that must all be right."),
        Named("optimizer", "optimizer", "Plain descent, or Adam without noise."),
    ),
    arms=(
        Named("reverse_kl", "reverse KL"),
        Named("forward_kl", "forward KL"),
        Named("jensen_shannon", "Jensen-Shannon"),
        Named("reverse_kl_mixed", "reverse KL, half of the texts by the teacher"),
        Named("forward_kl_mixed", "forward KL, half of the texts by the teacher"),
        Named("reverse_kl_and_texts", "reverse KL, and cross-entropy on as many teacher's texts"),
    ),
    metrics=(
        Named(
            "accuracy",
            "texts in the form",
            "Of the student's texts, as a share of the teacher's; 1 at most.",
        ),
    ),
    against=("reverse_kl",),
    budgets=SAME,
)
PLAN = MapPlan(
    HEAD,
    grid={
        "support": (1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
        "updates": (8, 32, 128, 512),
        "places": (1, 2, 4),
        "optimizer": ("sgd", "adam"),
    },
    quick={
        "support": (1e-6, 1e-4, 1e-2, 1e-1),
        "updates": (8, 64),
        "places": (1, 4),
        "optimizer": ("sgd",),
    },
    measure=measure,
    together=("support", "updates"),
)
