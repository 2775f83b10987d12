"""All maps, in the order of docs/maps.md."""

from __future__ import annotations

from benchmarks.maps import opd_plus, support
from benchmarks.maps.atlas import MapPlan

PLANS: dict[str, MapPlan] = {module.PLAN.name: module.PLAN for module in (opd_plus, support)}
