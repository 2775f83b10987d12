"""Map: TOPD against OPD, by the depth of a fork, the reach of its windows and wordings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product

import torch
from torch import Tensor

from benchmarks.maps.atlas import MapPlan, head, record
from opdlab.data.map_results import MapRecord, Named, Value
from opdlab.exact.worlds import ForkWorld
from opdlab.exact.worlds.forks import A, B
from opdlab.exact.worlds.pulls import pull_forward_kl, pull_reverse_kl

STEPS = 24
WEIGHT = 0.3  # λ
BATCH = 32  # texts of an update: with none at a fork, there is no trajectory term
RATES = (1.0, 3.0, 10.0, 30.0)
# What the trajectory term of each arm teaches, and the teacher's tokens that it costs beside the
# grades of the text: those of one window, the whole text (half of the texts), or one token.
WINDOWED = ("topd", "topd_diagonal", "teacher_context")


def window_of(world: ForkWorld, start: int) -> list[int]:
    """The teacher's greedy window from a state on; 0 where the procedure has ended."""
    on_a, on_b = world.steps
    begin = start + 1 if start == world.fork else start
    branch = on_b if start >= on_b.start else on_a
    first = on_a.start if start == world.fork else begin
    rest = [
        int(world.right[s]) if s < branch.stop else 0 for s in range(first, first + world.window)
    ]
    return [A, *rest][: world.window] if start == world.fork else rest


def targets_of(world: ForkWorld, start: int, arm: str) -> dict[int, Tensor]:
    """The targets `[V]` of a window from `start` on, by state; their mass is 1 in all.

    Rows of states in which nothing can be learned are left out: behind a wrong token, and behind
    the end.
    """
    size, (on_a, on_b) = world.window, world.steps
    text = torch.nn.functional.one_hot(torch.tensor(window_of(world, start)), world.vocab).double()
    if arm == "first_token":
        return {start: text[0]}
    if start == world.fork:
        behind = on_a if arm == "teacher_context" else on_b
        states = [start, *range(behind.start, min(behind.stop, behind.start + size - 1))]
    elif arm == "teacher_context":
        stop = on_a.stop if start < on_b.start else on_b.stop
        states = list(range(start, min(stop, start + size)))
    else:
        states = [start]
    if arm == "topd":  # no token of one window is in the other, so the plan is uniform
        return {state: text.mean(0) / size for state in states}
    return {state: text[i] / size for i, state in enumerate(states)}


def trajectory(world: ForkWorld, arm: str) -> Callable[[Tensor], Tensor]:
    """A function from logits `[..., S, V]` to the gradient of λ times the trajectory term."""
    mass = torch.zeros(len(world.right), len(world.right), world.vocab, dtype=torch.float64)
    for start in range(world.fork, len(world.right)):
        for state, target in targets_of(world, start, arm).items():
            mass[start, state] = target

    def pull(logits: Tensor) -> Tensor:
        points = world.points(logits)
        total = points.sum(-1, keepdim=True)
        share = points / total.clamp(min=1e-300) * (1 - (1 - total).clamp(0, 1) ** BATCH)
        wanted = torch.einsum("...s,srv->...rv", share, mass)
        # The student's steps of B are met while it stays on B, as its own text does.
        kept = torch.ones_like(points)
        fork, on_b = world.fork, world.steps[B]
        stay = world.visits(logits)[..., on_b] / logits.softmax(-1)[..., fork, B, None]
        if arm in ("topd", "topd_diagonal"):
            kept[..., on_b] = stay
        wanted = wanted * kept[..., None]
        return WEIGHT * (wanted.sum(-1, keepdim=True) * logits.softmax(-1) - wanted)

    return pull


def gradient(world: ForkWorld, arm: str) -> Callable[[Tensor], Tensor]:
    """A function from logits to the expected gradient of the loss of an arm, a mean per token."""
    teacher = world.teacher()
    more = trajectory(world, arm) if arm in (*WINDOWED, "first_token") else None

    def pull(logits: Tensor) -> Tensor:
        logp = logits.log_softmax(-1)
        own = world.visits(logits)[..., None] * pull_reverse_kl(logp, teacher) / world.length
        if arm == "teacher_texts":
            theirs = world.visits(teacher)[:, None] * pull_forward_kl(logp, teacher)
            return (own + theirs / world.length) / 2
        return own if more is None else own + more(logits)

    return pull


def curve(world: ForkWorld, arm: str, kernels: Tensor) -> Tensor:
    """The accuracy after each step, `[steps + 1, reaches, rates]`, as a share of the teacher's."""
    rates = torch.tensor(RATES, dtype=torch.float64)[:, None, None] * world.length
    logits = world.student().expand(len(kernels), len(RATES), -1, -1).clone()
    pull, top = gradient(world, arm), world.accuracy(world.teacher())
    out = [world.accuracy(logits)]
    for _ in range(STEPS):
        logits = logits - rates * (kernels[:, None] @ pull(logits))
        out.append(world.accuracy(logits))
    return (torch.stack(out) / top).clamp(max=1)


def cost(world: ForkWorld, arm: str) -> float:
    """Tokens of the teacher in an update, for each text: grades, and what it writes."""
    extra = {"first_token": 1, **dict.fromkeys(WINDOWED, world.window)}
    return world.length + extra.get(arm, 0)


def measure(grid: Mapping[str, Sequence[Value]], seeds: Sequence[int]) -> Iterator[MapRecord]:
    """All reaches and learning rates side by side."""
    for depth, wordings, seed in product(grid["depth"], grid["wordings"], seeds):
        world = ForkWorld(int(depth), wordings=int(wordings), seed=seed)
        kernels = torch.stack(
            [ForkWorld(int(depth), float(r), int(wordings)).kernel() for r in grid["reach"]]
        )
        for arm in ARMS:
            found = curve(world, arm, kernels)
            fewer = round(STEPS * world.length / cost(world, arm))
            scores = [
                [speed.tolist(), end.tolist()]
                for speed, end in (best(found, STEPS), best(found, fewer))
            ]
            for i, reach in enumerate(grid["reach"]):
                knobs = {"depth": depth, "reach": reach, "wordings": wordings}
                at = [{"area": area[i], "accuracy": end[i]} for area, end in scores]
                yield record(knobs, seed, arm, *at)


def best(found: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The mean accuracy over the steps, and the last, at the rate of the best mean; `[reaches]`."""
    area = found[1 : steps + 1].mean(0)
    top, which = area.max(-1)
    return top, found[steps].gather(-1, which[:, None])[:, 0]


ARMS = (
    "opd",
    "topd",
    "topd_diagonal",
    "teacher_context",
    "first_token",
    "teacher_texts",
)
HEAD = head(
    "topd",
    "When does looking ahead pay?",
    "Behind a fork follows a procedure that the student has never walked.",
    knobs=(
        Named("depth", "depth of the fork", "Tokens of the procedure behind it; windows have 4."),
        Named("reach", "reach", "How far a step in the student's context holds in the teacher's."),
        Named("wordings", "wordings", "Harmless places where both prefer different words."),
    ),
    arms=(
        Named("opd", "OPD"),
        Named("topd", "TOPD", "Targets by the entropic plan, in the student's context."),
        Named("topd_diagonal", "TOPD, diagonal", "Token i for token i, in the student's context."),
        Named("teacher_context", "window in the teacher's context", "Cross-entropy along it."),
        Named("first_token", "first token alone", "The same weight on the window's first token."),
        Named("teacher_texts", "half teacher's texts", "Cross-entropy on half of the texts."),
    ),
    metrics=(
        Named("area", "mean accuracy", f"Over {STEPS} updates, as a share of the teacher's."),
        Named("accuracy", "accuracy", "After the last update, as a share of the teacher's."),
    ),
    against=("opd", "first_token"),
)
PLAN = MapPlan(
    HEAD,
    grid={"depth": (1, 2, 4, 8, 12), "reach": (0.0, 0.25, 0.5, 0.75, 1.0), "wordings": (0, 3)},
    quick={"depth": (1, 4), "reach": (0.0, 1.0), "wordings": (0,)},
    measure=measure,
    together=("reach",),
    shown={"arm": "topd_diagonal"},
)
