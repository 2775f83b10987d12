"""Shared parts of the notebooks: set-up in one line, exercises that check themselves, freezing.

A profile (`OPDLAB_PROFILE=ci|cpu|gpu`) sets models and sizes; the cells stay the same. Nothing here
is needed to use opdlab.
"""

from opdlab.notebook.checking import Exercise, author, exercise
from opdlab.notebook.exporting import to_html
from opdlab.notebook.freezing import LIMIT, execute, freeze, hash_source
from opdlab.notebook.session import Context, setup
from opdlab.notebook.survey import compose, compose_all, survey
from opdlab.notebook.trusting import trust

__all__ = [
    "LIMIT",
    "Context",
    "Exercise",
    "author",
    "compose",
    "compose_all",
    "execute",
    "exercise",
    "freeze",
    "hash_source",
    "setup",
    "survey",
    "to_html",
    "trust",
]
