"""Measure OmniOPD with a teacher that only writes.

The teacher is the scribe, which has a tokenizer of characters and another style, through
`TextOnly`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import opdlab as opd
from opdlab.data.notes import Chunks, read_note
from opdlab.errors import OpdlabError
from opdlab.tasks.market import model
from opdlab.teachers import TextOnly

STEPS, BATCH = 60, 16  # in each step the scribe writes up to 16 continuations of 16 texts
SIZES: dict[str, Any] = {
    "length": 1,
    "chunks": 4,
    "continuations": 4,
    "similarity": "rouge1",
    "match_length": True,
}


def omniopd(seed: int, **changes: Any) -> dict[str, float]:
    """Train on the scribe's texts.

    Args:
        seed: Seed of the run and of the method.
        changes: Arguments of `OmniOPD` that differ from `SIZES`.

    Returns:
        Accuracies, mean similarities in the first and the last tenth of the steps, and how many
        characters the teacher wrote.
    """
    student, _, task = opd.load("market")
    teacher = TextOnly(model("scribe"))
    before = opd.evaluate(student, task)
    method = opd.OmniOPD(**{**SIZES, **changes}, seed=seed)
    run = opd.distill(
        student, teacher, task, method=method, steps=STEPS, batch=BATCH, seed=seed, quiet=True
    )
    alike, written = [], 0
    for step in run:
        note = read_note(step.notes["chunks"], Chunks)
        assert note is not None
        alike.append(float(step.plan["similarity"][step.plan["audited"] > 0].mean()))
        written += sum(len(text) for chunk in note.chunks for text in chunk["continuations"])
    after = opd.evaluate(student, task)
    gain, tenth = after - before, STEPS // 10
    return {
        "before": before.accuracy,
        "accuracy": after.accuracy,
        "gain, low": gain.low,
        "gain, high": gain.high,
        "similarity, first": sum(alike[:tenth]) / tenth,
        "similarity, last": sum(alike[-tenth:]) / tenth,
        "teacher characters, k": written / 1000,
        "entropy": run.history["entropy"].tail(tenth).mean(),
    }


def refused(seed: int) -> dict[str, float]:
    """Give OPD this teacher, which has no log-probs: 1 if the error names OmniOPD."""
    student, _, task = opd.load("market")
    try:
        opd.distill(student, TextOnly(model("scribe")), task, method=opd.OPD(), seed=seed)
    except OpdlabError as error:
        return {"refused, naming OmniOPD": float("OmniOPD" in str(error))}
    return {"refused, naming OmniOPD": 0.0}


ARMS = (
    {"OmniOPD (rouge1, C=1, M=4, N=4)": omniopd}
    | {
        name: partial(omniopd, **changes)
        for name, changes in {
            "edit distance": {"similarity": "edit"},
            "no anchor (beta 0)": {"beta": 0.0},
            "no prior (alpha 0)": {"alpha": 0.0},
            "alpha 4": {"alpha": 4.0},
            "random chunks": {"select": "random"},
            "C=2, M=2": {"length": 2, "chunks": 2},
            "N=1": {"continuations": 1},
        }.items()
    }
    | {"OPD": refused}
)
