"""Similarities of two texts, from 0 (nothing in common) to 1 (equal).

All take the student's text and the teacher's text. Two empty texts are equal; an empty text has
nothing in common with another one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

from rapidfuzz.distance import Levenshtein

from opdlab.errors import OpdlabError

Similarity = Callable[[str, str], float]


def edit(ours: str, theirs: str) -> float:
    """Compute 1 - Levenshtein(a, b) / max(|a|, |b|) on characters (OmniOPD, arXiv 2606.01476).

    The paper does not name the unit; characters are our reading.

    Args:
        ours: The student's chunk.
        theirs: A text of the teacher.

    Returns:
        From 0 to 1; 1 for equal texts.
    """
    return Levenshtein.normalized_similarity(ours, theirs)


def rouge1(ours: str, theirs: str) -> float:
    """Compute ROUGE-1: the F1 score of the words that both have, split at whitespace.

    A word counts as often as both have it. The paper does not name the variant; F1 is our reading.

    Args:
        ours: The student's chunk.
        theirs: A text of the teacher.

    Returns:
        From 0 to 1; two texts without words are equal.
    """
    a, b = Counter(ours.split()), Counter(theirs.split())
    if not a or not b:
        return float(a == b)
    return 2 * (a & b).total() / (a.total() + b.total())


SIMILARITIES: dict[str, Similarity] = {"edit": edit, "rouge1": rouge1}


def measure(similarity: Similarity, ours: str, theirs: str) -> float:
    """Call a similarity and check its value.

    Args:
        similarity: The function of two texts.
        ours: The student's chunk.
        theirs: A text of the teacher.

    Returns:
        The similarity, from 0 to 1.

    Raises:
        OpdlabError: The value is not a number from 0 to 1.
    """
    value = float(similarity(ours, theirs))
    if not (math.isfinite(value) and 0 <= value <= 1):
        raise OpdlabError(
            f"The similarity of {ours[:40]!r} and {theirs[:40]!r} came out as {value}. Return a"
            " number from 0 (nothing in common) to 1."
        )
    return value
