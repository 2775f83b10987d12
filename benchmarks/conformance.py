"""The losses of installed peers, opdlab's own, and the zoo of mistakes, through `opd.conform`.

`python -m benchmarks.conformance [--only peers|own|zoo] [--tables]`

Writes `results/conformance.json`, and the tables in `docs/conformance.md` between their marks. TRL
and Liger are looked at if they are installed: `make .venv/trl.done`, and
`.venv/bin/pip install --no-deps liger-kernel==0.8.5`. `--tables` writes the tables anew from the
results, and measures nothing.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import tyro

from opdlab import OPD, OPDPlus, TopK
from opdlab.audit import as_loss, in_reward
from opdlab.conformance import Case, Spec, conform
from opdlab.conformance.zoo import CASES
from opdlab.losses import DIVERGENCES

RESULTS = Path(__file__).parent / "results" / "conformance.json"
PAGE = Path(__file__).parents[1] / "docs" / "conformance.md"
Group = Literal["peers", "own", "zoo"]


def peers() -> Iterator[Case]:
    """Yield the cases of the peers that are installed."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    for name in ("trl_losses", "liger_losses"):
        try:
            module = __import__(f"opdlab.bridges.{name}", fromlist=["cases"])
        except ImportError as error:
            print(error, file=sys.stderr)
            continue
        yield from module.cases()


def own() -> Iterator[Any]:
    """Yield every divergence of opdlab as a function and as a method, and its estimators."""
    for name, entry in DIVERGENCES.items():
        yield Case(f"losses.{name}", without_mask(entry), Spec("log_probs", trains=name))
    yield from (OPDPlus(name) for name in ("reverse_kl", "forward_kl", "jensen_shannon"))
    yield OPD(estimator="sampled")
    yield OPD(estimator="sampled", baseline="value")
    for by in ("student", "teacher"):
        yield OPD(top_k=TopK(3, by=by))
        yield OPD(top_k=TopK(3, by=by, tail="renormalize"))
    yield from (in_reward("k1"), as_loss("k2"))


def without_mask(divergence: Any) -> Any:
    """Make a loss `[B, T]` of a divergence, which needs no mask."""

    def loss(student: Any, teacher: Any, mask: Any) -> Any:
        return divergence(student, teacher)

    return loss


def examine(group: Group) -> list[dict[str, Any]]:
    """Run `conform` on the losses of a group."""
    found = []
    for case in {"peers": peers, "own": own, "zoo": lambda: iter(CASES)}[group]():
        report = conform(case, seconds=3600)
        plain = report.to_dict()
        del plain["gradients"]
        for one in plain["findings"]:
            if one["status"] in ("pass", "skip"):  # the report has the sentences
                del one["said"], one["mistake"]
        if isinstance(case, Case):
            plain |= {"known mistake": case.mistake, "about": case.about}
        print(f"{plain['seconds']:6.1f} s  {report.name}: {report.summary}", file=sys.stderr)
        found.append(plain | {"named": report.named})
    return found


def peer_table(rows: list[Mapping[str, Any]]) -> list[str]:
    """Make a table of peers: what each trains, and what there is to know."""
    lines = [
        "| loss | trains | passed | failed | mistakes | to know |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        failed = [one for one in row["findings"] if one["status"] == "fail"]
        passed = sum(one["status"] == "pass" for one in row["findings"])
        cautions = [name for name in row["named"] if name not in row["mistakes"]]
        claim = row["claim"] or "no divergence"
        cells = [
            row["name"],
            claim if not any(one["check"] == "claim" for one in failed) else f"not the {claim}",
            str(passed),
            str(len(failed)),
            _words(row["mistakes"]),
            _words(cautions),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def zoo_table(rows: list[Mapping[str, Any]]) -> list[str]:
    """Make a table of the zoo: each mistake, its source, and how it was answered."""
    lines = ["| mistake | described in | named as | answer |", "|---|---|---|---|"]
    for row in rows:
        named = row["known mistake"]
        if named not in row["named"]:
            named = row["named"][0]
        said = next(one["said"] for one in row["findings"] if one.get("mistake") == named)
        lines.append(f"| {row['name']} | {row['about']} | {_words([named])} | {said} |")
    return lines


def _words(names: list[str]) -> str:
    return ", ".join(names).replace("_", " ")


def write_tables(found: Mapping[str, Any]) -> None:
    """Write the tables of the page between their marks."""
    text = PAGE.read_text(encoding="utf-8")
    tables = {"peers": peer_table, "own": peer_table, "zoo": zoo_table}
    for group, make in tables.items():
        if group not in found:
            continue
        begin, end = f"<!-- {group}: begin -->", f"<!-- {group}: end -->"
        before, _, rest = text.partition(begin)
        after = rest.partition(end)[2]
        text = "\n".join([before + begin, "", *make(found[group]), "", end]) + after
    PAGE.write_text(text, encoding="utf-8")


def versions() -> dict[str, str]:
    """Return the versions of what was looked at."""
    found = {"python": sys.version.split()[0]}
    for name in ("opdlab", "torch", "trl", "liger-kernel"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main(only: tuple[Group, ...] = ("peers", "own", "zoo"), *, tables: bool = False) -> None:
    """Examine, write `results/conformance.json` and the tables of the page.

    Args:
        only: The groups to examine; others stay as they are in the results.
        tables: Write the tables anew, and measure nothing.
    """
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if not tables:
        for group in only:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found[group] = examine(group)
            found |= {"date": f"{date.today()}", "versions": versions()}
            RESULTS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")
    write_tables(found)


if __name__ == "__main__":
    tyro.cli(main)
