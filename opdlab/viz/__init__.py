"""Pictures of traces and runs. They draw what is recorded; importing them loads no model.

`VIEWS` has every view, in the order in which one looks. A new view adds its import and its name
here; the gallery, the overview, the table in the README and the tests of all views follow.
"""

from opdlab.viz.alignment import Alignment
from opdlab.viz.arms import Arms
from opdlab.viz.audits import Audits
from opdlab.viz.branches import Branches
from opdlab.viz.compare import Compare
from opdlab.viz.curves import curves
from opdlab.viz.disagreements import Disagreements
from opdlab.viz.equation import Equation
from opdlab.viz.forks import Forks
from opdlab.viz.marks import Marks
from opdlab.viz.method_map import MethodMap
from opdlab.viz.page import page
from opdlab.viz.playground import Playground
from opdlab.viz.privilege_lens import PrivilegeLens
from opdlab.viz.regimes import Regimes
from opdlab.viz.rollouts import Rollouts
from opdlab.viz.run_board import RunBoard
from opdlab.viz.run_card import RunCard
from opdlab.viz.scrubber import Scrubber
from opdlab.viz.tail_audit import TailAudit
from opdlab.viz.timeline import Timeline
from opdlab.viz.token_lens import TokenLens
from opdlab.viz.two_rules import TwoRules
from opdlab.viz.view import View, set_renderer
from opdlab.viz.why import Why

VIEWS: tuple[type[View], ...] = (
    TokenLens,
    Equation,
    Compare,
    Rollouts,
    Timeline,
    Regimes,
    TwoRules,
    Disagreements,
    PrivilegeLens,
    Forks,
    Branches,
    Why,
    Audits,
    Marks,
    Scrubber,
    RunBoard,
    RunCard,
    Arms,
    Playground,
    TailAudit,
    Alignment,
    MethodMap,
)

__all__ = [
    "VIEWS",
    "Alignment",
    "Arms",
    "Audits",
    "Branches",
    "Compare",
    "Disagreements",
    "Equation",
    "Forks",
    "Marks",
    "MethodMap",
    "Playground",
    "PrivilegeLens",
    "Regimes",
    "Rollouts",
    "RunBoard",
    "RunCard",
    "Scrubber",
    "TailAudit",
    "Timeline",
    "TokenLens",
    "TwoRules",
    "View",
    "Why",
    "curves",
    "page",
    "set_renderer",
]
