"""The methods of the survey as data, and a method of opdlab for the six choices that make one.

A distillation loss is six choices, called slots: who writes the `prefix`es, which `target`, which
`divergence`, by which `estimator`, with what `weight` per token, and on what `schedule`. This is
the formulation of arXiv 2604.00626 with the estimator added, which it leaves open.
`data/survey.json` has the slots of the methods whose formulas determine them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from opdlab import methods
from opdlab.errors import OpdlabError
from opdlab.losses import DIVERGENCES, TopK
from opdlab.methods.self_distillation import Anchor

SLOTS = ("prefix", "target", "divergence", "estimator", "weight", "schedule")

# The share of prompts that the student answers, by `prefix`.
SHARES = {"student": 1.0, "mixed": 0.5, "teacher": 0.0}

# Targets that are the student itself with a hint, and the weights that it then has.
ANCHORS: dict[str, Anchor] = {"hinted self": "frozen", "hinted self, averaged": "ema"}

# Methods with a choice of their own, by prefix, target, estimator and weight.
SPECIAL: dict[tuple[str, str, str, str], Callable[[], Any]] = {
    ("student", "teacher", "full", "forks"): methods.TOPD,
    ("student", "teacher", "full", "undecided teacher"): methods.EOPD,
    ("student", "beyond the teacher", "sampled", "none"): methods.GOPD,
    ("student", "hinted teacher and hinted self", "top-k", "regimes"): methods.DOPD,
    ("student", "teacher of other tokens", "spans", "none"): methods.SpanOPD,
    ("student", "teacher's words", "scores", "none"): methods.OVD,
    ("student", "teacher's words", "continuations", "entropy peaks"): methods.OmniOPD,
    ("teacher and snapshot", "teacher's words", "pairs", "none"): methods.SODA,
}


def survey() -> pd.DataFrame:
    """Load the survey's methods.

    Returns:
        One row per method, by name. Columns: `arxiv`, `axis` (of the survey's version 4), `access`,
        `granularity`, `loss` (its class), `line` (what it does), the six slots, the source of each
        part (`row_from`, `loss_from`, `slots_from`), and `date` from the arXiv id. Unknown entries
        are None.
    """
    frame = pd.DataFrame([_flatten(row) for row in _load()["methods"]])
    frame = frame.set_index("name").astype(object)
    frame["date"] = pd.to_datetime("20" + frame["arxiv"].str[:4], format="%Y%m")
    return frame.where(frame.notna(), None)


def findings() -> pd.DataFrame:
    """Load what later papers claim about on-policy distillation itself.

    Returns:
        One row per paper, by arXiv id. Columns: `claim`, in our words and not checked by us, and
        `here`, what of opdlab asks the same question.
    """
    return pd.DataFrame(_load()["findings"]).set_index("arxiv")


def _load() -> dict[str, Any]:
    package = Path(__file__).parents[1]
    inside = package / "shipped" / "survey.json"
    path = inside if inside.exists() else package.parent / "data" / "survey.json"
    stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return stored


def _flatten(row: Mapping[str, Any]) -> dict[str, Any]:
    """One method of the file as a row without nesting."""
    plain = {key: value for key, value in row.items() if key not in ("slots", "certainty")}
    slots = {slot: row.get("slots", {}).get(slot) for slot in SLOTS}
    sources = {f"{part}_from": row["certainty"].get(part) for part in ("row", "loss", "slots")}
    return plain | slots | sources


def compose(
    prefix: str = "student",
    target: str = "teacher",
    divergence: str = "reverse_kl",
    estimator: str = "full",
    weight: str = "none",
    schedule: str = "constant",
) -> Any:
    """Make the method of opdlab that six choices describe.

    Args:
        prefix: The writer of the texts: "student", "mixed" or "teacher".
        target: The distribution that the student is to match, such as "teacher".
        divergence: A name of `opd.OPD` or of a generator.
        estimator: "full", "top-k", "sampled", "sampled, baseline" or "return".
        weight: The weight of each token; "none" for equal weights.
        schedule: "constant"; opdlab has no other.

    Returns:
        A method for `distill`.

    Raises:
        OpdlabError: opdlab has no such method. The message names the slot and what it may be.
    """
    if schedule != "constant":
        raise _missing("schedule", schedule, "constant")
    if special := SPECIAL.get((prefix, target, estimator, weight)):
        return special()
    if prefix not in SHARES:
        raise _missing("prefix", prefix, *SHARES)
    if weight != "none":
        raise _missing("weight", weight, "none")
    if target in ANCHORS:
        return _on_hinted_self(prefix, target, divergence, estimator)
    if target != "teacher":
        raise _missing("target", target, "teacher", *ANCHORS)
    if estimator in ("full", "top-k"):
        return _on_distributions(SHARES[prefix], divergence, estimator)
    return _on_sampled_tokens(prefix, divergence, estimator)


def compose_all(frame: pd.DataFrame) -> dict[str, Any]:
    """Compose the methods of a survey whose slots opdlab has.

    Args:
        frame: One row per method, with its name as the index and one column per slot.

    Returns:
        Methods of opdlab by the survey's names; others are left out.
    """
    found = {}
    for name, row in frame[frame["prefix"].notna()].iterrows():
        try:
            found[str(name)] = compose(**{slot: row[slot] for slot in SLOTS})
        except OpdlabError:
            continue
    return found


def _on_hinted_self(prefix: str, target: str, divergence: str, estimator: str) -> Any:
    """Self-distillation: the target is the student with a hint."""
    if (prefix, estimator) != ("student", "full"):
        raise OpdlabError(
            f"opdlab has the target {target!r} on whole distributions. Use prefix='student' and "
            "estimator='full'."
        )
    return methods.SelfDistillation(_known(divergence, DIVERGENCES), anchor=ANCHORS[target])


def _on_distributions(share: float, divergence: str, estimator: str) -> Any:
    """A divergence over the vocabulary, or over the teacher's top tokens."""
    name = _known(divergence, DIVERGENCES)
    if estimator == "top-k":
        return methods.OPD(name, top_k=TopK(16, by="teacher"), on_policy=share)
    return methods.OPD(name, on_policy=share)


def _on_sampled_tokens(prefix: str, divergence: str, estimator: str) -> Any:
    """A divergence estimated from the tokens that the student sampled."""
    sampled = ("sampled", "sampled, baseline", "return")
    if estimator not in sampled:
        raise _missing("estimator", estimator, "full", "top-k", *sampled)
    if prefix != "student":
        raise OpdlabError(
            f"opdlab has the estimator {estimator!r} for the prefix 'student' only, not for "
            f"{prefix!r}. It grades tokens that the student sampled. Use prefix='student', or "
            "estimator='full'."
        )
    if divergence == "reverse_kl" and estimator == "return":
        return methods.OPD(estimator="sampled", discount=1.0)
    if divergence == "reverse_kl":
        return methods.OPD(
            estimator="sampled", baseline="value" if "baseline" in estimator else None
        )
    if estimator != "sampled":
        raise OpdlabError(
            f"opdlab has {estimator!r} for the reverse KL only, not for {divergence!r}. Use "
            "estimator='sampled'."
        )
    return methods.OPDPlus(_known(divergence, DIVERGENCES))


def _known(divergence: str, table: Mapping[str, Any]) -> str:
    if divergence not in table:
        raise _missing("divergence", divergence, *table)
    return divergence


def _missing(slot: str, value: str, *known: str) -> OpdlabError:
    return OpdlabError(f"opdlab has no {slot} {value!r} in this place. Use {', '.join(known)}.")
