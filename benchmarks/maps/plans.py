"""All maps, in the order of docs/maps.md."""

from __future__ import annotations

from benchmarks.maps import (
    dopd,
    omniopd,
    opd_plus,
    policies,
    self_distillation,
    support,
    topd,
)
from benchmarks.maps.atlas import MapPlan

PLANS: dict[str, MapPlan] = {
    module.PLAN.name: module.PLAN
    for module in (topd, dopd, omniopd, opd_plus, policies, support, self_distillation)
}
