"""Measure how fast the views are in a browser, beside CircuitsVis.

    python -m benchmarks.viz [--repeats 5] [--sizes 300 1000 10000 30000]

Pages are opened from files in the Chromium of this machine. `paint` is the time from the start of
the navigation until every token is in the page and two frames have passed. The sides alternate; the
tables give the best and the median. CircuitsVis is measured if it is installed (`pip install
--no-deps circuitsvis "importlib-metadata<9" zipp`), with its bundle in the page, as it is without a
network. Every repetition is written to `results/viz.json`.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tyro
from playwright.sync_api import Browser, Page, sync_playwright
from rich.console import Console
from rich.table import Table

from opdlab import viz
from opdlab.data.trace import Trace
from opdlab.viz import camera, page, payload

RESULTS = Path(__file__).parent / "results" / "viz.json"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
]
WORDS = [
    f" {a}{b}"
    for a in ("so", "the", "carry", "ten", "un", "re", "over", "add")
    for b in ("", "s", "ing", "er", "\n", ".", "ed", "42")
]
TOP = 8

# Runs before the page, and notes the time when `count` nodes match and two frames have passed.
WATCH = """([selector, count]) => {
  const look = () => {
    if (document.querySelectorAll(selector).length < count) return requestAnimationFrame(look);
    const note = () => { window.painted = performance.now(); };
    requestAnimationFrame(() => requestAnimationFrame(note));
  };
  requestAnimationFrame(look);
}"""
SWITCH = """() => new Promise((done) => {
  const from = performance.now();
  document.querySelectorAll(".opd-button[data-channel]")[1].click();
  requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - from)));
})"""
HOVER = """() => {
  const nodes = [...document.querySelectorAll(".opd-strip [data-i]")], costs = [];
  for (let k = 0; k < 50; k++) {
    const node = nodes[(k * 7919) % Math.min(nodes.length, 1000)], from = performance.now();
    node.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
    document.querySelector(".opd-panel").getBoundingClientRect();
    costs.push(performance.now() - from);
  }
  return costs.sort((a, b) => a - b);
}"""
LINK = """() => {
  const [one, two] = document.querySelectorAll(".opd-strip"), costs = [];
  const nodes = [...one.querySelectorAll("[data-i]")];
  for (let k = 0; k < 50; k++) {
    const from = performance.now();
    nodes[(k * 7919) % nodes.length].click();
    two.getBoundingClientRect();
    costs.push(performance.now() - from);
  }
  return costs.sort((a, b) => a - b);
}"""


def trace_of(n: int) -> Trace:
    """Make a trace of one completion of `n` tokens: noise in the shape of a scored text, seeded.

    Two policies grade it, each with its own top tokens.
    """
    rng, rows = np.random.default_rng(0), np.arange(n)
    support = np.argsort(rng.random((n, len(WORDS))), 1)[:, : 2 * TOP]
    data: dict[str, Any] = {
        "sample": 0 * rows,
        "position": rows,
        "token_id": support[:, 0],
        "support": list(support),
    }
    for name in ("student", "teacher"):
        logits = rng.normal(scale=2.0, size=(n, 2 * TOP + 1))  # the last is the tail
        logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        data |= {
            f"{name}_logp": logp[:, 0],
            f"{name}_entropy": -(np.exp(logp) * logp).sum(1),
            f"{name}_top": list(logp[:, :-1]),
            f"{name}_tail": np.exp(logp[:, -1]),
            f"{name}_rank": (logp[:, :-1] > logp[:, :1]).sum(1) + 1,
        }
    data["teacher_reverse_kl"] = np.abs(rng.normal(size=n)) ** 3
    text = "".join(WORDS[i] for i in support[:, 0])
    meta = {
        "policies": ["student", "teacher"],
        "plan": [],
        "texts": [text],
        "finish": ["stop"],
        "prompts": ["Go on."],
        "vocab": {str(i): w for i, w in enumerate(WORDS)},
    }
    return Trace(pa.table(data), meta)


def write_lens(trace: Trace, path: Path) -> dict[str, float]:
    """Write a `TokenLens`, and measure its size."""
    lens = viz.TokenLens(trace)
    lens.to_html(path)
    return {
        "payload KB": len(payload.to_base64(payload.pack(lens.data()))) / 1000,
        "page KB": path.stat().st_size / 1000,
    }


def write_colored_tokens(trace: Trace, path: Path) -> dict[str, float]:
    """Write the same tokens with CircuitsVis, and measure the page's size."""
    from circuitsvis.tokens import colored_tokens

    values = trace.column("teacher_logp") - trace.column("student_logp")
    path.write_text(
        colored_tokens([t.decode() for t in trace.tokens()], values.tolist()).local_src,
        encoding="utf-8",
    )
    return {"page KB": path.stat().st_size / 1000}


SIDES: dict[str, tuple[Callable[[Trace, Path], dict[str, float]], str]] = {
    "opdlab TokenLens": (write_lens, ".opd-strip [data-i]"),
    "CircuitsVis ColoredTokens": (write_colored_tokens, "[id^=circuits-vis] span"),
}


def open_page(browser: Browser, path: Path, selector: str, n: int) -> tuple[Page, float]:
    """Open a page, and measure the milliseconds until all of it is painted."""
    # The clock is a script of its own, which the page's policy would refuse.
    tab = browser.new_page(viewport={"width": 900, "height": 800}, bypass_csp=True)
    tab.add_init_script(f"({WATCH})({json.dumps([selector, n])})")
    tab.goto(path.as_uri())
    tab.wait_for_function("window.painted", timeout=60_000)
    return tab, float(tab.evaluate("window.painted"))


def measure(browser: Browser, side: str, trace: Trace, folder: Path) -> dict[str, float]:
    write, selector = SIDES[side]
    path = folder / "page.html"
    sizes = write(trace, path)
    tab, ms = open_page(browser, path, selector, len(trace))
    out = {"paint ms": ms, **sizes}
    if side.startswith("opdlab"):
        hover = tab.evaluate(HOVER)
        out |= {
            "switch ms": tab.evaluate(SWITCH),
            "hover ms, median": hover[len(hover) // 2],
            "hover ms, 95 %": hover[-3],
        }
    tab.close()
    return out


def measure_link(browser: Browser, trace: Trace, folder: Path) -> dict[str, float]:
    """Measure the time from a click in one of two lenses of one text until the other moves."""
    path = page(
        folder / "two.html",
        title="two",
        lenses=[("one", viz.TokenLens(trace)), ("two", viz.TokenLens(trace))],
    )
    tab, ms = open_page(browser, path, ".opd-strip [data-i]", 2 * len(trace))
    costs = tab.evaluate(LINK)
    tab.close()
    return {
        "paint ms": ms,
        "link ms, median": costs[len(costs) // 2],
        "link ms, 95 %": costs[int(0.95 * len(costs))],
    }


def main(repeats: int = 5, sizes: tuple[int, ...] = (300, 1000, 10_000, 30_000)) -> None:
    """Measure, print, and write `results/viz.json`."""
    sides = [side for side in SIDES if side.startswith("opdlab") or find_spec("circuitsvis")]
    results: dict[str, list[dict[str, float]]] = {}
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=camera.browser(), args=FLAGS)
        for _ in range(repeats):
            for n in sizes:
                trace = trace_of(n)
                for side in sides:
                    if side.startswith("opdlab") or n <= 10_000:
                        results.setdefault(f"{side}, {n:,}", []).append(
                            measure(browser, side, trace, Path(folder))
                        )
            results.setdefault("two linked lenses, 1,000", []).append(
                measure_link(browser, trace_of(1000), Path(folder))
            )
        version = browser.version
        browser.close()
    RESULTS.write_text(
        json.dumps({"date": str(date.today()), "chromium": version, "results": results}, indent=1)
        + "\n"
    )
    Console(width=160).print(table(results))


def table(results: dict[str, list[dict[str, float]]]) -> Table:
    """Make a table of the best and the median over the repetitions."""
    columns = list(dict.fromkeys(key for rows in results.values() for row in rows for key in row))
    out = Table("case, tokens", *columns)
    for case, rows in results.items():
        cells = [[row[c] for row in rows if c in row] for c in columns]
        out.add_row(
            case, *(f"{min(v):.0f} / {statistics.median(v):.0f}" if v else "" for v in cells)
        )
    return out


if __name__ == "__main__":
    tyro.cli(main)
