"""Notebook 13: from choices to a method, and the choices in which two methods differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from opdlab.methods import OPD, OPDPlus
from opdlab.notebook.checking import Exercise
from opdlab.notebook.survey import SLOTS, compose

Row = Mapping[str, Any]


def build(prefix: str, divergence: str, estimator: str) -> Any:
    """Solve 13.1: the method of three choices.

    Args:
        prefix: "student", "mixed" or "teacher".
        divergence: A name of a divergence.
        estimator: "sampled", or another for whole distributions.

    Returns:
        A method for `distill`.
    """
    if estimator == "sampled":
        return OPD(estimator="sampled") if divergence == "reverse_kl" else OPDPlus(divergence)
    share = {"student": 1.0, "mixed": 0.5, "teacher": 0.0}[prefix]
    return OPD(divergence, on_policy=share)


def _reference_build(prefix: str, divergence: str, estimator: str) -> Any:
    return compose(prefix=prefix, divergence=divergence, estimator=estimator)


def _print_method(function: Callable[..., Any], *case: str) -> str:
    """Methods are compared by how they print, which shows how they are made."""
    return repr(function(*case))


def _cases_of_build() -> list[tuple[str, str, str]]:
    full = [
        (prefix, divergence, "full")
        for prefix in ("student", "mixed", "teacher")
        for divergence in ("forward_kl", "reverse_kl")
    ]
    sampled = [
        ("student", divergence, "sampled")
        for divergence in ("reverse_kl", "forward_kl", "total_variation")
    ]
    return full + sampled


def _share_upside_down(prefix: str, divergence: str, estimator: str) -> Any:
    other = {"student": "teacher", "teacher": "student"}.get(prefix, prefix)
    return build(other, divergence, estimator)


def _opd_plus_for_reverse_kl(prefix: str, divergence: str, estimator: str) -> Any:
    return OPDPlus(divergence) if estimator == "sampled" else build(prefix, divergence, estimator)


def _prefix_ignored(prefix: str, divergence: str, estimator: str) -> Any:
    return build("student", divergence, estimator)


def apart(a: Row, b: Row) -> list[str]:
    """Solve 13.2: the slots in which two methods differ.

    Args:
        a: The slots of a method.
        b: The slots of another method.

    Returns:
        Names of slots, in the order of `SLOTS`.
    """
    return [slot for slot in SLOTS if a[slot] != b[slot]]


def _reference_apart(a: Row, b: Row) -> list[str]:
    shared = _shared_slots(a, b)
    return [slot for slot in SLOTS if slot not in shared]


def _cases_of_apart() -> list[tuple[Row, Row]]:
    choices = ("student", "teacher", "reverse_kl", "full", "none", "constant")
    base = dict(zip(SLOTS, choices, strict=True)) | {"arxiv": "0000.00000"}
    return [
        (base, base | {"estimator": "sampled", "arxiv": "1111.11111"}),
        (base, dict(base)),
        (base, base | {"weight": "forks", "prefix": "mixed"}),
    ]


def _shared_slots(a: Row, b: Row) -> list[str]:
    return [slot for slot in SLOTS if a[slot] == b[slot]]


def _all_columns(a: Row, b: Row) -> list[str]:
    return [key for key in a if a[key] != b[key]]


EXERCISES = (
    Exercise(
        "13.1",
        request="return an OPD or an OPDPlus for a prefix law, a divergence and an estimator",
        confirmation="the same methods as the library's",
        reference=_reference_build,
        solution=build,
        cases=_cases_of_build,
        observe=_print_method,
        mistakes={
            (
                "`on_policy` is the share that the student writes: 1 for student, 0 for teacher."
            ): _share_upside_down,
            "the prefix law is not used: OPD has on_policy=….": _prefix_ignored,
            (
                "for the reverse KL use plain OPD(estimator='sampled'); OPDPlus is for the others."
            ): _opd_plus_for_reverse_kl,
        },
    ),
    Exercise(
        "13.2",
        request="return the names of the slots in which two methods differ, in the order of SLOTS",
        confirmation="those are the slots in which they differ",
        reference=_reference_apart,
        solution=apart,
        cases=_cases_of_apart,
        mistakes={
            "those are the slots that they share.": _shared_slots,
            "all columns are compared; only the six slots define the method.": _all_columns,
        },
    ),
)
