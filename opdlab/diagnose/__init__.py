"""Diagnoses: what a number alone does not say about a distillation. Each result has a `table` and a plain `sentence`."""

from opdlab.diagnose.exposure import Exposure, exposure
from opdlab.diagnose.health import Alarm, Health, Limits, health
from opdlab.diagnose.illusion import Illusion, illusion
from opdlab.diagnose.overlap import Overlap, overlap
from opdlab.diagnose.privilege import Privilege, information_floor, privilege

__all__ = [
    "Alarm", "Exposure", "Health", "Illusion", "Limits", "Overlap", "Privilege", "exposure", "health", "illusion", "information_floor",
    "overlap", "privilege",
]  # fmt: skip
