"""Map: what self-distillation amortises, by rule or instance and by how much the hint tells."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product

from torch import Tensor

from benchmarks.maps.atlas import SAME, MapPlan, head, record
from opdlab.data.map_results import MapRecord, Named, Value
from opdlab.exact.worlds import RuleWorld
from opdlab.exact.worlds.pulls import PULLS, peaked, pull_forward_kl, pull_reverse_kl

STEPS = 40
RATE = 2.0  # for a prompt of its own; a class moves with each of its prompts
ARMS = ("before", "self_reverse", "self_forward", "self_jsd", "answers", "teacher")
SELF = {"self_reverse": "reverse_kl", "self_forward": "forward_kl", "self_jsd": "jensen_shannon"}


def pull_of(world: RuleWorld, arm: str, logp: Tensor) -> Tensor:
    """The gradient of an arm's loss for the bare student's logits at training prompts."""
    train = slice(0, world.prompts)
    if arm in SELF:
        return PULLS[SELF[arm]](logp, world.student(hinted=True)[train].log_softmax(-1))
    if arm == "answers":
        return pull_forward_kl(logp, peaked(world.answers[train], 1.0, world.vocab).log())
    return pull_reverse_kl(logp, world.teacher()[train])


def train(world: RuleWorld, arm: str) -> Tensor:
    """The bare student's logits after training, `[2 prompts, V]`."""
    logits, kernel = world.student(), world.kernel()
    # A class counts once, however many training prompts it has.
    rate = RATE * world.classes / (world.classes + world.sharing * world.prompts)
    for _ in range(0 if arm == "before" else STEPS):
        pull = pull_of(world, arm, logits[: world.prompts].log_softmax(-1))
        logits = logits - rate * kernel @ pull
    return logits


def measure(grid: Mapping[str, Sequence[Value]], seeds: Sequence[int]) -> Iterator[MapRecord]:
    """One world at a time."""
    for rule, hint, prompts, seed in product(grid["rule"], grid["hint"], grid["prompts"], seeds):
        world = RuleWorld(float(rule), float(hint), int(prompts), seed=seed)
        for arm in ARMS:
            logits = train(world, arm)
            scores = {
                "held_out": world.hit_rate(logits, held_out=True),
                "log_score": world.log_score(logits, held_out=True) + math.log(world.vocab),
                "training": world.hit_rate(logits, held_out=False),
            }
            if rule > 0:
                scores["rules"] = world.hit_rate(logits, held_out=True, follows=True)
            if rule < 1:
                own = world.log_score(logits, held_out=True, follows=False)
                scores["honesty"] = own + math.log(world.vocab)
            plain = {name: float(score) for name, score in scores.items()}
            yield record({"rule": rule, "hint": hint, "prompts": prompts}, seed, arm, plain)


HEAD = head(
    "self_distillation",
    "What of a hint can a student keep once the hint is gone?",
    "The hint tells what holds for other prompts too.",
    knobs=(
        Named("rule", "shared rule", "Share of prompts whose answer follows the rule of a class."),
        Named("hint", "informativeness", "From a hint that tells nothing to one that tells all."),
        Named("prompts", "prompts", "Training prompts; as many fresh ones are held out."),
    ),
    arms=(
        Named("before", "before training"),
        Named("self_reverse", "self-distillation, reverse KL", "Teacher: the frozen hinted self."),
        Named("self_forward", "self-distillation, forward KL"),
        Named("self_jsd", "self-distillation, Jensen-Shannon"),
        Named("answers", "SFT on the answers"),
        Named("teacher", "OPD, a teacher without hint", "It knows the rules, and no instance."),
    ),
    metrics=(
        Named("held_out", "fresh prompts", "Probability of the answer, without a hint."),
        Named("log_score", "log score", "Of fresh prompts' answers above chance, nats."),
        Named("rules", "rules", "Probability of the answer at fresh prompts that follow the rule."),
        Named("honesty", "honesty", "Log score of instances above chance; below 0 is illusion."),
        Named("training", "training prompts", "Probability of the answer, without a hint."),
    ),
    against=("before", "answers", "teacher"),
    budgets=SAME,
)
PLAN = MapPlan(
    HEAD,
    grid={
        "rule": (0.0, 0.25, 0.5, 0.75, 1.0),
        "hint": (0.1, 0.25, 0.5, 1.0),
        "prompts": (8, 32),
    },
    quick={"rule": (0.0, 1.0), "hint": (0.25, 1.0), "prompts": (32,)},
    measure=measure,
    together=("rule", "hint"),
    shown={"arm": "self_forward", "metric": "log_score", "at": [1]},
)
