"""Divergences between next-token distributions, with their generators and supports.

Pure PyTorch.
"""

from opdlab.losses.divergences import (
    TopK,
    alpha_divergence,
    entropy,
    forward_kl,
    generalized_jsd,
    jensen_shannon,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    total_variation,
)
from opdlab.losses.generators import FORMS, Generator

__all__ = [
    "FORMS",
    "Generator",
    "TopK",
    "alpha_divergence",
    "entropy",
    "forward_kl",
    "generalized_jsd",
    "jensen_shannon",
    "reverse_kl",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
]
