"""Diagnoses, which explain the numbers of a distillation.

Each result has a `table` and a plain `sentence`.
"""

from opdlab.diagnose.cost import Cost, cost
from opdlab.diagnose.diagnosis import Diagnosis
from opdlab.diagnose.doctor import doctor
from opdlab.diagnose.exposure import Exposure, exposure
from opdlab.diagnose.health import Alarm, Health, Limits, health
from opdlab.diagnose.illusion import Illusion, illusion
from opdlab.diagnose.overlap import Overlap, overlap
from opdlab.diagnose.privilege import Privilege, information_floor, privilege

__all__ = [
    "Alarm",
    "Cost",
    "Diagnosis",
    "Exposure",
    "Health",
    "Illusion",
    "Limits",
    "Overlap",
    "Privilege",
    "cost",
    "doctor",
    "exposure",
    "health",
    "illusion",
    "information_floor",
    "overlap",
    "privilege",
]
