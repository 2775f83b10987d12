"""Diagnoses, which explain the numbers of a distillation.

Each result has a `table` and a plain `sentence`.
"""

from opdlab.diagnose.attribution import attribute, depth
from opdlab.diagnose.branching import branch
from opdlab.diagnose.cost import Cost, cost
from opdlab.diagnose.diagnosis import Diagnosis
from opdlab.diagnose.doctor import doctor
from opdlab.diagnose.exposure import Exposure, exposure
from opdlab.diagnose.health import Alarm, Health, Limits, health
from opdlab.diagnose.illusion import Illusion, illusion
from opdlab.diagnose.overlap import Overlap, overlap
from opdlab.diagnose.plan import DEVICES, Device, Efficiency, Plan, Plans, Work, plan
from opdlab.diagnose.privilege import Privilege, information_floor, privilege
from opdlab.diagnose.profile import PhaseCost, Profile, Rates, profile
from opdlab.diagnose.shapes import Shape, shape_of

__all__ = [
    "DEVICES",
    "Alarm",
    "Cost",
    "Device",
    "Diagnosis",
    "Efficiency",
    "Exposure",
    "Health",
    "Illusion",
    "Limits",
    "Overlap",
    "PhaseCost",
    "Plan",
    "Plans",
    "Privilege",
    "Profile",
    "Rates",
    "Shape",
    "Work",
    "attribute",
    "branch",
    "cost",
    "depth",
    "doctor",
    "exposure",
    "health",
    "illusion",
    "information_floor",
    "overlap",
    "plan",
    "privilege",
    "profile",
    "shape_of",
]
