"""Worlds in which the premise of a method is a knob, and all that matters is known exactly.

Each world is a dataclass of knobs. It gives the logits of a student and a teacher, the places that
texts visit, and exact scores. Most have `policies()`: the same distributions as tables, on which
the package's own methods run, and which the tests hold against the world. `benchmarks/maps` maps
where which method wins.
"""

from opdlab.exact.worlds.forks import ForkWorld
from opdlab.exact.worlds.hints import HintWorld
from opdlab.exact.worlds.pairs import PairWorld
from opdlab.exact.worlds.roads import RoadWorld
from opdlab.exact.worlds.rules import RuleWorld
from opdlab.exact.worlds.styles import StyleWorld
from opdlab.exact.worlds.support import SupportWorld

__all__ = [
    "ForkWorld",
    "HintWorld",
    "PairWorld",
    "RoadWorld",
    "RuleWorld",
    "StyleWorld",
    "SupportWorld",
]
