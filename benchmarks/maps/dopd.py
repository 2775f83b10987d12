"""Map: DOPD against OPD and privileged OPD, by help of the hint, wrong certainty and secrets."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product

import torch
from torch import Tensor

from benchmarks.maps.atlas import SAME, MapPlan, head, record
from opdlab.data.map_results import MapRecord, Named, Value
from opdlab.exact.worlds import HintWorld
from opdlab.exact.worlds.pulls import pull_jensen_shannon, pull_reverse_kl
from opdlab.methods.dopd import Route

STEPS = 40
RATES = (1.0, 3.0)
LIGHT, WEAK, TRIM = 0.6, 0.3, 0.05  # β_l, β_w and the trimmed share: DOPD's own
ARMS = ("opd", "privileged", "dopd", "dopd_frozen", "dopd_hs_teacher", "dopd_hs_none")


def routes(logp: Tensor, logp_hinted: Tensor, logq: Tensor, shares: Tensor) -> Tensor:
    """The chance that a token of each state takes each route, `[..., prompts, tokens, 4]`.

    As `opdlab.methods.dopd.route`, with every token weighted as often as the student writes it in
    place of a batch of samples. All arguments are `[..., prompts, tokens, V]`, but for `shares
    [tokens]`.
    """
    weight = logp.exp() * (shares / logp.shape[-3])[:, None]
    gap = (logq - logp_hinted).abs()
    sure = logq.exp() + logp_hinted.exp()
    flat = (-3, -2, -1)
    order = gap.flatten(-3).argsort(-1)
    total = weight.flatten(-3).gather(-1, order).cumsum(-1)
    place = (total < 1 - TRIM - 1e-9).sum(-1, keepdim=True).clamp(max=order.shape[-1] - 1)
    largest = gap.flatten(-3).gather(-1, order.gather(-1, place))[..., None, None]
    kept = weight * (gap <= largest)
    mean_gap, mean_sure = (
        ((kept * x).sum(flat) / kept.sum(flat))[..., None, None, None] for x in (gap, sure)
    )
    low, is_sure = gap < mean_gap - 1e-12, sure >= mean_sure - 1e-12
    taken = {
        Route.LH: low & is_sure,
        Route.LL: low & ~is_sure,
        Route.HT: ~low & (logq >= logp_hinted),
        Route.HS: ~low & (logq < logp_hinted),
    }
    return torch.stack([(logp.exp() * taken[route]).sum(-1) for route in Route], -1)


def pull_of(world: HintWorld, arm: str, logp: Tensor, hinted: Tensor) -> Tensor:
    """The gradient of an arm's loss for the bare student's logits at training prompts."""
    if arm == "opd":
        return pull_reverse_kl(logp, world.teacher(hinted=False)[: world.prompts])
    teacher = world.teacher()[: world.prompts]
    to_teacher = pull_reverse_kl(logp, teacher)
    if arm == "privileged":
        return to_teacher
    share = routes(logp, hinted, teacher, world.shares)[..., None]
    to_self, strong = pull_reverse_kl(logp, hinted), pull_jensen_shannon(logp, teacher)
    out = LIGHT * share[..., Route.LH, :] * to_teacher + WEAK * share[..., Route.LL, :] * to_self
    out = out + share[..., Route.HT, :] * strong
    if arm == "dopd_hs_none":
        return out
    is_teacher = arm == "dopd_hs_teacher"
    last = strong if is_teacher else LIGHT * to_self
    return out + share[..., Route.HS, :] * last


def train(world: HintWorld, arm: str) -> Tensor:
    """The bare student's logits after training, `[rates, 2 prompts, tokens, V]`."""
    rates = torch.tensor(RATES, dtype=torch.float64)[:, None, None, None]
    start, hinted = world.student(), world.student(hinted=True)[: world.prompts]
    logits, kernel = start.expand(len(RATES), -1, -1, -1).clone(), world.kernel()
    by_share = (world.shares * len(world.shares))[:, None]
    coupling = 0.0 if arm == "dopd_frozen" else world.coupling
    for _ in range(STEPS):
        bare = logits[:, : world.prompts]
        moved = hinted + coupling * (bare - start[: world.prompts])
        pull = pull_of(world, arm, bare.log_softmax(-1), moved.log_softmax(-1))
        logits = logits - rates * torch.einsum("ixy,ryiv->rxiv", kernel, by_share * pull)
    return logits


def scores(world: HintWorld, logits: Tensor) -> dict[str, float]:
    """All scores at the rate of the best log score over all tokens."""
    parts = {kind: world.log_score(logits, kind) for kind in world.kinds}
    weighted = [world.shares[part].sum() * parts[kind] for kind, part in world.kinds.items()]
    overall = torch.stack(weighted).sum(0)
    at = int(overall.argmax())
    hits = {kind: world.hit_rate(logits, kind)[at] for kind in ("stuck", "unsure")}
    return {
        "overall": float(overall[at]),
        "skill": float(hits["unsure"]),
        "stuck": float(hits["stuck"]),
        "honesty": float(parts["secret"][at]) + math.log(world.vocab),
    }


def measure(grid: Mapping[str, Sequence[Value]], seeds: Sequence[int]) -> Iterator[MapRecord]:
    """One world at a time."""
    names = ("help", "certainty", "secrets")
    for place in product(*(grid[name] for name in names), seeds):
        *settings, seed = place
        knobs = dict(zip(names, settings, strict=True))
        world = HintWorld(**{name: float(value) for name, value in knobs.items()}, seed=int(seed))
        for arm in ARMS:
            yield record(knobs, int(seed), arm, scores(world, train(world, arm)))


HEAD = head(
    "dopd",
    "When does routing attenuate the illusion, and when does it freeze mistakes?",
    "The hint helps the student as it helps the teacher, and the student samples what is right.",
    knobs=(
        Named("help", "help of the hint", "What the hinted student knows of a secret: 0 to 1."),
        Named(
            "certainty", "wrong certainty", "The student's share of a wrong token, half of skills."
        ),
        Named("secrets", "secrets", "Share of tokens that only the hint decides."),
    ),
    arms=(
        Named("opd", "OPD, no hint"),
        Named("privileged", "privileged OPD", "Reverse KL to the hinted teacher everywhere."),
        Named("dopd", "DOPD", "As in the paper: a live privileged student."),
        Named("dopd_frozen", "DOPD, frozen", "The privileged student stays as it was."),
        Named("dopd_hs_teacher", "DOPD, HS to the teacher", "opdlab's option."),
        Named("dopd_hs_none", "DOPD, no HS", "opdlab's option."),
    ),
    metrics=(
        Named("overall", "log score", "Of the right tokens of fresh prompts, nats per token."),
        Named("skill", "skill", "Probability of the right token where the student was unsure."),
        Named("honesty", "honesty", "Log score of secrets above chance; below 0 is illusion."),
        Named("stuck", "mended", "Probability of the right token where the student was wrong."),
    ),
    against=("opd", "privileged"),
    budgets=SAME,
)
PLAN = MapPlan(
    HEAD,
    grid={
        "help": (0.0, 0.5, 0.8, 1.0),
        "certainty": (0.15, 0.25, 0.4, 0.6, 0.8, 0.9, 0.95),
        "secrets": (0.15, 0.5),
    },
    quick={"help": (0.0, 1.0), "certainty": (0.5, 0.9), "secrets": (0.5,)},
    measure=measure,
    together=("help", "certainty"),
    shown={"arm": "dopd", "against": "privileged", "metric": "honesty", "at": [1]},
)
