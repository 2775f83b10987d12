"""Plans read as tensors, which the tests of the methods share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from opdlab.data.column import Column
from opdlab.engine.batch import Batch


def plan_values(method: Any, batch: Batch) -> dict[str, Tensor]:
    """Run a method's plan and return the values of its columns, described or not."""
    return {
        name: column.values if isinstance(column, Column) else column
        for name, column in method.plan(batch).items()
    }
