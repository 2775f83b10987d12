"""Methods: what each token is told (`plan`) and how (`loss`). One file a technique, each readable beside its paper."""

from opdlab.methods.contract import Method, method
from opdlab.methods.grpo import GRPO
from opdlab.methods.opd import OPD
from opdlab.methods.supervised import SFT, SequenceKD

__all__ = ["GRPO", "OPD", "SFT", "Method", "SequenceKD", "method"]
