"""The names that a notebook uses; `__init__.py` imports each when it is first used."""

from . import (
    conformance,
    diagnose,
    engine,
    errors,
    exact,
    losses,
    methods,
    notebook,
    samplers,
    tasks,
    teachers,
    viz,
)
from .audit import audit
from .audit.what_if import what_if
from .conformance import conform
from .data.prompt import Prompt
from .data.rollout import Rollout, concat_rollouts
from .data.sampling_config import SamplingConfig
from .data.trace import Trace
from .diagnose import doctor, profile
from .engine import signals
from .engine.recording import rollout_from_trace
from .errors import OpdlabError
from .evidence.controls import Controls
from .evidence.credit import Credit, credit
from .evidence.running import controls
from .losses import TopK
from .methods import (
    DOPD,
    EOPD,
    GOPD,
    GRPO,
    OPD,
    OPSA,
    OVD,
    RLSD,
    SDAR,
    SDPO,
    SFT,
    SODA,
    TOPD,
    Combined,
    OmniOPD,
    OPDPlus,
    SelfDistillation,
    SequenceKD,
    SpanOPD,
    TurnOPD,
    dopd,
    method,
    omniopd,
    topd,
)
from .models.policy import Policy, sample
from .models.text_rollouts import rollout_from_texts
from .tasks import Task
from .tasks.profiles import load
from .teachers import MultiTeacher
from .training import snapshots
from .training.configured import from_config
from .training.evaluation import evaluate
from .training.resuming import resume
from .training.run import Run, distill
from .training.scoring import score
from .training.settings import Settings
from .training.step import Step

__version__: str
__all__ = [
    "DOPD",
    "EOPD",
    "GOPD",
    "GRPO",
    "OPD",
    "OPSA",
    "OVD",
    "RLSD",
    "SDAR",
    "SDPO",
    "SFT",
    "SODA",
    "TOPD",
    "Combined",
    "Controls",
    "Credit",
    "MultiTeacher",
    "OPDPlus",
    "OmniOPD",
    "OpdlabError",
    "Policy",
    "Prompt",
    "Rollout",
    "Run",
    "SamplingConfig",
    "SelfDistillation",
    "SequenceKD",
    "Settings",
    "SpanOPD",
    "Step",
    "Task",
    "TopK",
    "Trace",
    "TurnOPD",
    "audit",
    "concat_rollouts",
    "conform",
    "conformance",
    "controls",
    "credit",
    "diagnose",
    "distill",
    "doctor",
    "dopd",
    "engine",
    "errors",
    "evaluate",
    "exact",
    "from_config",
    "load",
    "losses",
    "method",
    "methods",
    "notebook",
    "omniopd",
    "profile",
    "resume",
    "rollout_from_texts",
    "rollout_from_trace",
    "sample",
    "samplers",
    "score",
    "signals",
    "snapshots",
    "tasks",
    "teachers",
    "topd",
    "viz",
    "what_if",
]
