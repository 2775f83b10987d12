"""The names that a notebook uses, and where they are: `__init__.py` imports each when it is first used."""

from . import diagnose, divergence, errors, estimator, exact, methods, notebook, rollout, rows, signals, snapshots, tasks, teachers, viz
from .diagnose import doctor
from .distill import Run, Settings, Step, distill
from .divergence import TopK
from .errors import OpdlabError
from .estimator import audit
from .evaluate import evaluate
from .methods import (
    DOPD,
    EOPD,
    GOPD,
    GRPO,
    OPD,
    OVD,
    SFT,
    SODA,
    TOPD,
    OmniOPD,
    OPDPlus,
    SelfDistillation,
    SequenceKD,
    SpanOPD,
    dopd,
    method,
    omniopd,
    topd,
)
from .policy import Policy, Prompt
from .profiles import load
from .resuming import resume
from .rollout import Rollout, sample
from .tasks import Task
from .trace import Trace, score

__version__: str
__all__ = [
    "DOPD", "EOPD", "GOPD", "GRPO", "OPD", "OVD", "SFT", "SODA", "TOPD", "OPDPlus", "OmniOPD", "OpdlabError", "Policy", "Prompt",
    "Rollout", "Run", "SelfDistillation", "SequenceKD", "Settings", "SpanOPD", "Step", "Task", "TopK", "Trace", "audit", "diagnose",
    "distill", "divergence", "doctor", "dopd", "errors", "estimator", "evaluate", "exact", "load", "method", "methods", "notebook",
    "omniopd", "resume", "rollout", "rows", "sample", "score", "signals", "snapshots", "tasks", "teachers", "topd", "viz",
]  # fmt: skip
