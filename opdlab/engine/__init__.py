"""Any loss on next-token distributions in constant memory: rows, batches, signals, scoring."""

from opdlab.engine import passes, rows, signals

__all__ = ["passes", "rows", "signals"]
