"""Notebook 13: from six slots to a method, and which two methods are one choice apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from opdlab.methods import OPD, OPDPlus
from opdlab.notebook.checking import Exercise
from opdlab.notebook.survey import SLOTS, compose

Row = Mapping[str, Any]


def build(prefix: str, divergence: str, estimator: str) -> Any:
    if estimator == "sampled":
        return OPD(estimator="sampled") if divergence == "reverse_kl" else OPDPlus(divergence)
    share = {"student": 1.0, "mixed": 0.5, "teacher": 0.0}[prefix]
    return OPD(divergence, on_policy=share)


def library(prefix: str, divergence: str, estimator: str) -> Any:
    return compose(prefix=prefix, divergence=divergence, estimator=estimator)


def said(function: Callable[..., Any], *case: str) -> str:
    """Methods are compared by how they print, which is how they are made."""
    return repr(function(*case))


def choices() -> list[tuple[str, str, str]]:
    full = [
        (prefix, divergence, "full")
        for prefix in ("student", "mixed", "teacher")
        for divergence in ("forward_kl", "reverse_kl")
    ]
    return full + [
        ("student", divergence, "sampled")
        for divergence in ("reverse_kl", "forward_kl", "total_variation")
    ]


def upside_down(prefix: str, divergence: str, estimator: str) -> Any:
    return build(
        {"student": "teacher", "teacher": "student"}.get(prefix, prefix), divergence, estimator
    )


def always_plus(prefix: str, divergence: str, estimator: str) -> Any:
    return OPDPlus(divergence) if estimator == "sampled" else build(prefix, divergence, estimator)


def always_student(prefix: str, divergence: str, estimator: str) -> Any:
    return build("student", divergence, estimator)


def apart(a: Row, b: Row) -> list[str]:
    return [slot for slot in SLOTS if a[slot] != b[slot]]


def shared(a: Row, b: Row) -> list[str]:
    return [slot for slot in SLOTS if a[slot] == b[slot]]


def all_keys(a: Row, b: Row) -> list[str]:
    return [key for key in a if a[key] != b[key]]


def pairs() -> list[tuple[Row, Row]]:
    base = dict(
        zip(SLOTS, ("student", "teacher", "reverse_kl", "full", "none", "constant"), strict=True)
    ) | {"arxiv": "0000.00000"}
    return [
        (base, base | {"estimator": "sampled", "arxiv": "1111.11111"}),
        (base, dict(base)),
        (base, base | {"weight": "forks", "prefix": "mixed"}),
    ]


EXERCISES = (
    Exercise(
        "13.1",
        asks="return an OPD or an OPDPlus for a prefix law, a divergence and an estimator",
        says="the same methods as the library's",
        truth=library,
        solution=build,
        cases=choices,
        look=said,
        mistakes={
            "`on_policy` is the share that the student writes: 1 for student, 0 for teacher.": (
                upside_down
            ),
            "the prefix law is not used: OPD has on_policy=….": always_student,
            "for the reverse KL plain OPD(estimator='sampled') will do; OPDPlus is for the others.": (
                always_plus
            ),
        },
    ),
    Exercise(
        "13.2",
        asks="return the names of the slots in which two methods differ, in the order of SLOTS",
        says="that is how far apart they are",
        truth=lambda a, b: [slot for slot in SLOTS if (a[slot] == b[slot]) is False],
        solution=apart,
        cases=pairs,
        mistakes={
            "those are the slots that they share.": shared,
            "all columns are compared; only the six slots make the method.": all_keys,
        },
    ),
)
