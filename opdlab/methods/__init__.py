"""Methods: what each token is told (`plan`) and how (`loss`).

One file a technique, each readable beside its paper.
"""

from opdlab.methods.combined import Combined
from opdlab.methods.contract import Method, method
from opdlab.methods.dopd import DOPD
from opdlab.methods.eopd import EOPD
from opdlab.methods.feedback import RLSD, SDAR, SDPO
from opdlab.methods.gopd import GOPD
from opdlab.methods.grpo import GRPO
from opdlab.methods.omniopd import OmniOPD
from opdlab.methods.opd import OPD
from opdlab.methods.opd_plus import OPDPlus
from opdlab.methods.opsa import OPSA
from opdlab.methods.ovd import OVD
from opdlab.methods.self_distillation import SelfDistillation
from opdlab.methods.soda import SODA
from opdlab.methods.spans import SpanOPD
from opdlab.methods.supervised import SFT, SequenceKD
from opdlab.methods.topd import TOPD
from opdlab.methods.turn_opd import TurnOPD

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
    "Method",
    "OPDPlus",
    "OmniOPD",
    "SelfDistillation",
    "SequenceKD",
    "SpanOPD",
    "TurnOPD",
    "method",
]
