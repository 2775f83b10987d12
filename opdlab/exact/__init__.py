"""Enumerable toy models: every law, expectation and gradient of a method exactly, in float64.

    student, teacher = exact.Table.random(4, 3, seed=0), exact.Table.random(4, 3, seed=1)
    exact.gradient(OPD(), {"student": student, "teacher": teacher})      # [prompts, prefixes, V]

The methods that run here are those that train models, with the same plan and loss, batch and
engine.
"""

from opdlab.exact import privilege, worlds
from opdlab.exact.chain import Chain
from opdlab.exact.gradients import differences, gradient, gradient_on, loss_pass
from opdlab.exact.laws import expectation, law, visits
from opdlab.exact.letters import Letters
from opdlab.exact.table import Table, everything

__all__ = [
    "Chain",
    "Letters",
    "Table",
    "differences",
    "everything",
    "expectation",
    "gradient",
    "gradient_on",
    "law",
    "loss_pass",
    "privilege",
    "visits",
    "worlds",
]
