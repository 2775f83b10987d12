"""Known mistakes of distillation losses, each rebuilt from its public description.

`CASES` has one case per mistake: the loss, the spec that its users believe, the name of the
mistake, and where it was described. `conform` must name every one of them. The code is ours; it
shows the mistake and nothing else of the code base that made it.
"""

from opdlab.conformance.case import Case
from opdlab.conformance.zoo.gradients import GRADIENTS
from opdlab.conformance.zoo.masks import MASKS
from opdlab.conformance.zoo.scales import SCALES

CASES: tuple[Case, ...] = (*GRADIENTS, *MASKS, *SCALES)

__all__ = ["CASES", "GRADIENTS", "MASKS", "SCALES"]
