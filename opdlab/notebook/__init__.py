"""What the notebooks share: the one-line set-up, exercises that check themselves, and freezing for
committing.

A profile (`OPDLAB_PROFILE=ci|cpu|gpu`) sets models and sizes; the cells stay the same. Nothing here
is needed to use opdlab.
"""

from opdlab.notebook.checking import Exercise, author, exercise
from opdlab.notebook.freezing import LIMIT, execute, freeze, source_hash
from opdlab.notebook.session import Context, setup
from opdlab.notebook.survey import compose, composed, survey

__all__ = [
    "LIMIT",
    "Context",
    "Exercise",
    "author",
    "compose",
    "composed",
    "execute",
    "exercise",
    "freeze",
    "setup",
    "source_hash",
    "survey",
]
