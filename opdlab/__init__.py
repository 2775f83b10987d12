"""opdlab: on-policy distillation of language models, one token at a time. The names that a notebook uses."""

from opdlab import diagnose, divergence, errors, estimator, exact, methods, notebook, snapshots, tasks, viz
from opdlab.checkpoint import resume
from opdlab.diagnose import doctor
from opdlab.distill import Run, Settings, Step, distill
from opdlab.divergence import TopK
from opdlab.errors import OpdlabError
from opdlab.estimator import audit
from opdlab.evaluate import evaluate
from opdlab.methods import (
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
from opdlab.policy import Policy, Prompt
from opdlab.profiles import load
from opdlab.rollout import Rollout, sample
from opdlab.tasks import Task
from opdlab.trace import Trace, score

__version__ = "0.1.0"
__all__ = [
    "DOPD", "EOPD", "GOPD", "GRPO", "OPD", "OVD", "SFT", "SODA", "TOPD", "OPDPlus", "OmniOPD", "OpdlabError", "Policy", "Prompt",
    "Rollout", "Run", "SelfDistillation", "SequenceKD", "Settings", "SpanOPD", "Step", "Task", "TopK", "Trace", "audit", "diagnose",
    "distill", "divergence", "doctor", "dopd", "errors", "estimator", "evaluate", "exact", "load", "method", "methods", "notebook",
    "omniopd", "resume", "sample", "score", "snapshots", "tasks", "topd", "viz",
]  # fmt: skip
