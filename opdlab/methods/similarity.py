"""How alike two texts are, from 0 (nothing in common) to 1 (equal): what a teacher that only writes
can be asked.

All take `(student's text, teacher's text)`. Two empty texts are equal, an empty and another have
nothing in common.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

from rapidfuzz.distance import Levenshtein

from opdlab.errors import OpdlabError

Similarity = Callable[[str, str], float]


def edit(ours: str, theirs: str) -> float:
    """1 - Levenshtein(a, b) / max(|a|, |b|), on characters (OmniOPD, arXiv 2606.01476; the unit is
    our reading).
    """
    return Levenshtein.normalized_similarity(ours, theirs)


def rouge1(ours: str, theirs: str) -> float:
    """F1 of the words that both have, by whitespace, each counted as often as both have it
    (ROUGE-1; F1 is our reading).
    """
    a, b = Counter(ours.split()), Counter(theirs.split())
    if not a or not b:
        return float(a == b)
    return 2 * (a & b).total() / (a.total() + b.total())


SIMILARITIES: dict[str, Similarity] = {"edit": edit, "rouge1": rouge1}


def checked(similarity: Similarity, ours: str, theirs: str) -> float:
    """The similarity as a number from 0 to 1; raises OpdlabError for anything else."""
    value = float(similarity(ours, theirs))
    if not (math.isfinite(value) and 0 <= value <= 1):
        raise OpdlabError(
            f"The similarity of {ours[:40]!r} and {theirs[:40]!r} came out as {value}. Return a"
            " number from 0 (nothing in common) to 1."
        )
    return value
