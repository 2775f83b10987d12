"""Worlds in which the premise of a method is a knob, and all that matters is known exactly.

Each world is a dataclass of knobs. It gives the logits of a student and a teacher, the places that
texts visit, and exact scores. They have `policies()`: the same distributions as tables, on which
the package's own methods run, and which the tests hold against the world. `benchmarks/maps` maps
where which method wins.
"""

from opdlab.exact.worlds.pairs import PairWorld
from opdlab.exact.worlds.support import SupportWorld

__all__ = ["PairWorld", "SupportWorld"]
