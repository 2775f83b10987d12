"""Certify losses of other code bases on toy models whose gradients are known exactly.

    conform(loss, Spec(kind="logits", trains="reverse_kl", keywords={"count": "num_items"}))

A report says which divergence's gradient a loss trains, what it does with masks, padding, EOS, cut
texts, top-k tails, temperatures, micro-batches, processes and extreme logits, and which known
mistake it makes. `zoo` has such mistakes, `for_trl` and `for_verl` make plain functions of opdlab's
methods.
"""

from opdlab.conformance.case import Case
from opdlab.conformance.conforming import conform
from opdlab.conformance.contract import Kind, Quantity, Reduction, Sequences
from opdlab.conformance.export import for_trl, for_verl
from opdlab.conformance.finding import MISTAKES, Finding, Status
from opdlab.conformance.report import Conformance, save_all
from opdlab.conformance.spec import Spec

__all__ = [
    "MISTAKES",
    "Case",
    "Conformance",
    "Finding",
    "Kind",
    "Quantity",
    "Reduction",
    "Sequences",
    "Spec",
    "Status",
    "conform",
    "for_trl",
    "for_verl",
    "save_all",
]
