"""The methods of the survey as data, and the six choices that make one: from choices to a method
that runs.

A distillation loss is six slots: whose `prefix`es, which `target`, which `divergence`, by which
`estimator`, with what `weight` a token, on what `schedule` (the formulation of arXiv 2604.00626,
with the estimator that it leaves open). `data/survey.json` has the slots of the methods whose
formulas tell them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from opdlab import methods as m
from opdlab.errors import OpdlabError
from opdlab.losses.divergences import Generator, TopK
from opdlab.losses.generators import FORMS
from opdlab.methods.opd import DIVERGENCES

SLOTS = ("prefix", "target", "divergence", "estimator", "weight", "schedule")
SHARES = {"student": 1.0, "mixed": 0.5, "teacher": 0.0}


def survey() -> pd.DataFrame:
    """One row a method, by name: `arxiv`, `axis` (of version 4), `access`, `granularity`, `loss`
    class, `line`, the six slots and where each comes from (`row_from`, `loss_from`,
    `slots_from`); None where unknown, `date` from the arXiv id.
    """
    package = Path(__file__).parents[1]
    inside = package / "shipped" / "survey.json"
    path = inside if inside.exists() else package.parent / "data" / "survey.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["methods"]
    flat = [
        {key: value for key, value in row.items() if key not in ("slots", "certainty")}
        | {slot: row.get("slots", {}).get(slot) for slot in SLOTS}
        | {f"{part}_from": row["certainty"].get(part) for part in ("row", "loss", "slots")}
        for row in rows
    ]
    frame = pd.DataFrame(flat).set_index("name").astype(object)
    frame["date"] = pd.to_datetime("20" + frame["arxiv"].str[:4], format="%Y%m")
    return frame.where(frame.notna(), None)


def compose(
    prefix: str = "student",
    target: str = "teacher",
    divergence: str = "reverse_kl",
    estimator: str = "full",
    weight: str = "none",
    schedule: str = "constant",
) -> Any:
    """The method of opdlab that six choices make.

    Raises OpdlabError for what it does not have, and says which slot.
    """
    if schedule != "constant":
        raise _lacks("schedule", schedule, "constant")
    if made := SPECIAL.get((prefix, target, estimator, weight)):
        return made()
    if prefix not in SHARES:
        raise _lacks("prefix", prefix, *SHARES)
    if weight != "none":
        raise _lacks("weight", weight, "none")
    if target in ANCHORS and (prefix, estimator) != ("student", "full"):
        raise OpdlabError(
            f"opdlab has the target {target!r} on whole distributions. Use prefix='student' and"
            " estimator='full'."
        )
    if target in ANCHORS:
        return m.SelfDistillation(_known(divergence, DIVERGENCES), anchor=ANCHORS[target])  # type: ignore[arg-type]
    if target != "teacher":
        raise _lacks("target", target, "teacher", *ANCHORS)
    return _on_logits(SHARES[prefix], divergence, estimator)


def _on_logits(share: float, divergence: str, estimator: str) -> Any:
    if estimator == "full":
        return m.OPD(_known(divergence, DIVERGENCES), on_policy=share)
    if estimator == "top-k":
        return m.OPD(_known(divergence, DIVERGENCES), top_k=TopK(16, by="teacher"), on_policy=share)
    if estimator not in ("sampled", "sampled, baseline", "return"):
        raise _lacks(
            "estimator", estimator, "full", "top-k", "sampled", "sampled, baseline", "return"
        )
    if share < 1:
        raise OpdlabError(
            f"The estimator {estimator!r} grades tokens that the student sampled. Use"
            " prefix='student', or estimator='full'."
        )
    if divergence != "reverse_kl":
        if estimator != "sampled":
            raise OpdlabError(
                f"opdlab has {estimator!r} for the reverse KL only, not for {divergence!r}. Use"
                " estimator='sampled'."
            )
        return m.OPDPlus(Generator(_known(divergence, FORMS)).name)
    if estimator == "return":
        return m.OPD(estimator="sampled", discount=1.0)
    return m.OPD(estimator="sampled", baseline="value" if "baseline" in estimator else None)


ANCHORS = {"told self": "frozen", "told self, averaged": "ema"}
SPECIAL: dict[
    tuple[str, str, str, str], Callable[[], Any]
] = {  # by prefix, target, estimator and weight
    ("student", "teacher", "full", "forks"): m.TOPD,
    ("student", "teacher", "full", "undecided teacher"): m.EOPD,
    ("student", "beyond the teacher", "sampled", "none"): m.GOPD,
    ("student", "told teacher and told self", "top-k", "regimes"): m.DOPD,
    ("student", "teacher of other tokens", "spans", "none"): m.SpanOPD,
    ("student", "teacher's words", "scores", "none"): m.OVD,
    ("student", "teacher's words", "continuations", "entropy peaks"): m.OmniOPD,
    ("teacher and snapshot", "teacher's words", "pairs", "none"): m.SODA,
}


def composed(frame: pd.DataFrame) -> dict[str, Any]:
    """The methods of a survey whose slots make one of opdlab's, by name."""
    out = {}
    for name, row in frame[frame["prefix"].notna()].iterrows():
        try:
            out[str(name)] = compose(**{slot: row[slot] for slot in SLOTS})
        except OpdlabError:
            continue
    return out


def _known(divergence: str, table: Mapping[str, Any]) -> str:
    if divergence not in table:
        raise _lacks("divergence", divergence, *table)
    return divergence


def _lacks(slot: str, value: str, *known: str) -> OpdlabError:
    return OpdlabError(f"opdlab has no {slot} {value!r} in this place. Use {', '.join(known)}.")
