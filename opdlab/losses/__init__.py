"""Divergences between next-token distributions, their generators and supports, in pure PyTorch.

`DIVERGENCES` is the table of all of them; `OPD`, `OPDPlus` and `audit` take every name in it.
"""

from opdlab.losses.divergence_table import DIVERGENCES, Divergence, Form, Parameter
from opdlab.losses.divergences import (
    TopK,
    alpha_divergence,
    entropy,
    forward_kl,
    generalized_jsd,
    jeffreys,
    jensen_shannon,
    le_cam,
    neyman,
    pearson,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    squared_hellinger,
    total_variation,
)
from opdlab.losses.generators import Generator

__all__ = [
    "DIVERGENCES",
    "Divergence",
    "Form",
    "Generator",
    "Parameter",
    "TopK",
    "alpha_divergence",
    "entropy",
    "forward_kl",
    "generalized_jsd",
    "jeffreys",
    "jensen_shannon",
    "le_cam",
    "neyman",
    "pearson",
    "reverse_kl",
    "skew_forward_kl",
    "skew_reverse_kl",
    "squared_hellinger",
    "total_variation",
]
