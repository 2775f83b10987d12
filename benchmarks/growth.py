"""Measure how time and memory grow with one size at a time, and fit the exponents.

`OMP_NUM_THREADS=1 python -m benchmarks.growth [--only SERIES] [--draw-only]`

Beside the CPU seconds of opdlab stand those of the bare matrix products of the same work
(`benchmarks.products`), measured in the same process. An exponent is the slope of the logarithms by
least squares: with 1, twice the size takes twice as long. Writes `results/growth.json`
and draws `docs/growth.png`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from plotly.subplots import make_subplots
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from benchmarks.products import Products
from benchmarks.run import RESULTS, about_machine
from benchmarks.workload import (
    STUDENT,
    TEACHER,
    build_model,
    build_tokenizer,
    measured,
    source_text,
)
from opdlab import Policy, Prompt, distill
from opdlab.engine.passes import gradient
from opdlab.engine.rows import Rows
from opdlab.models.graded import States
from opdlab.models.head import Head
from opdlab.models.sampled_texts import SampledTexts
from opdlab.tasks import Task
from opdlab.viz import camera

FILE, PICTURE = RESULTS / "growth.json", Path(__file__).parents[1] / "docs" / "growth.png"
REPEATS = 3
VOCAB = 32_000
# Models of Llama's shape, from narrow and shallow to wide and deep.
SIZES: dict[int, dict[str, Any]] = {
    number: {
        "hidden_size": 64 * heads,
        "intermediate_size": 176 * heads,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    for number, (heads, layers) in enumerate([(2, 3), (4, 5), (6, 8), (9, 12)])
}


@dataclass(frozen=True)
class Work:
    """Hold what is run at one size, and the least of it.

    Attributes:
        size: The size, as it stands on the axis.
        run: What opdlab does.
        products: The matrix products of it.
    """

    size: float
    run: Callable[[], object]
    products: Callable[[], object]


class Workbench:
    """Makes the work of every series, on random models of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.words = tokenizer(source_text())["input_ids"]

    def policy(self, shape: dict[str, Any]) -> Policy:
        return Policy.of(build_model(shape, self.tokenizer, 0).eval(), self.tokenizer, eos=())

    def prompts(self, count: int, tokens: int) -> list[Prompt]:
        return [
            Prompt(str(self.tokenizer.decode(self.words[i * tokens : (i + 1) * tokens])))
            for i in range(count)
        ]

    def loss(self, tokens: int = 1024, vocab: int = VOCAB, teachers: int = 1) -> Work:
        """A reverse KL to each teacher and its gradient, through heads that do not train."""
        generator = torch.Generator().manual_seed(0)

        def states(width: int) -> States:
            head = 0.02 * torch.randn(vocab, width, generator=generator)
            return States(torch.randn(tokens, width, generator=generator), Head(head, None, vocab))

        student = states(STUDENT["hidden_size"])
        others = {f"teacher {i}": states(TEACHER["hidden_size"]) for i in range(teachers)}
        token, weight = torch.zeros(tokens, dtype=torch.long), torch.full((tokens,), 1 / tokens)

        def loss(rows: Rows) -> Tensor:
            mine = rows["student"]
            parts = [(mine.exp() * (mine - rows[name])).sum(-1) for name in others]
            return torch.stack(parts).sum(0)

        @torch.no_grad()
        def products() -> None:
            for i in range(0, tokens, 128):
                for graded in [*others.values(), student]:
                    logits = graded.hidden[i : i + 128] @ graded.head.weight.T
                logits @ student.head.weight

        policies = {"student": student, **others}
        return Work(0, lambda: gradient(loss, policies, token, weight), products)

    def score(self, tokens: int) -> Work:
        """The teacher's states of one long text."""
        policy, prompts = self.policy(TEACHER), self.prompts(1, 64)
        texts = SampledTexts.empty(1, tokens, torch.device("cpu"))
        texts.ids[0] = torch.tensor(self.words[:tokens])
        rollout = policy.make_rollout(prompts, 1, texts, "student")
        bare = Products.of(policy.weights.model)
        return Work(tokens, lambda: policy.grade(rollout), lambda: bare.forward(64 + tokens))

    def write(self, texts: int = 8, prompt: int = 64, tokens: int = 64) -> Work:
        """Texts of the student, each after a prompt of its own."""
        policy, prompts = self.policy(STUDENT), self.prompts(texts, prompt)
        bare = Products.of(policy.weights.model)
        return Work(
            0,
            lambda: policy.sample(prompts, max_new_tokens=tokens),
            lambda: bare.generate(texts, texts, prompt, tokens),
        )

    def step(self, number: int) -> Work:
        """A whole step of a student that teaches itself with a hint, with a LoRA."""
        student = self.policy(SIZES[number])
        bare = Products.of(student.weights.model)
        prompts = self.prompts(64, 64)
        task = Task("growth", lambda n, seed, split: prompts[:n], max_new_tokens=32)
        run = distill(student, student.seeing("a hint"), task, steps=100, batch=8, quiet=True)

        def products() -> None:
            bare.generate(8, 8, 64, 32)
            for _ in range(2):  # teacher and student
                bare.forward(8 * 96)
                bare.head_forward(8 * 32)
            bare.head_backward(8 * 32, trains=False)
            bare.backward(8 * 96, trains=False)

        millions = sum(p.numel() for p in student.weights.model.parameters()) / 1e6
        return Work(millions, lambda: next(run), products)


@dataclass(frozen=True)
class Series:
    """One size that is changed.

    Attributes:
        what: What is done.
        size: What is changed, as the axis says it.
        values: Arguments of `make`; the sizes themselves where the work says no other.
        make: Makes the work of a value.
    """

    what: str
    size: str
    values: Sequence[int]
    make: Callable[[Workbench, int], Work]


SERIES = {
    "loss-tokens": Series(
        "loss", "tokens", (256, 512, 1024, 2048, 4096), lambda bench, n: bench.loss(tokens=n)
    ),
    "loss-vocabulary": Series(
        "loss",
        "vocabulary",
        (8_000, 16_000, 32_000, 64_000, 152_000),
        lambda bench, n: bench.loss(tokens=512, vocab=n),
    ),
    "loss-teachers": Series(
        "loss", "teachers", (1, 2, 4, 8), lambda bench, n: bench.loss(tokens=512, teachers=n)
    ),
    "score-tokens": Series(
        "scoring one text", "tokens", (256, 512, 1024, 1984), lambda bench, n: bench.score(n)
    ),
    "write-texts": Series(
        "writing", "texts side by side", (4, 8, 16, 32, 64), lambda bench, n: bench.write(texts=n)
    ),
    "write-prompt": Series(
        "writing", "tokens of a prompt", (64, 128, 256, 512), lambda bench, n: bench.write(prompt=n)
    ),
    "write-tokens": Series(
        "writing", "tokens of a text", (32, 64, 128, 256), lambda bench, n: bench.write(tokens=n)
    ),
    "step-model": Series(
        "a step", "millions of weights", tuple(SIZES), lambda bench, n: bench.step(n)
    ),
}


def measure(series: Series, bench: Workbench) -> list[dict[str, float]]:
    """Measure all sizes of a series.

    Returns:
        For each size the best CPU seconds of opdlab and of the products, and opdlab's largest peak
        above its start, in MiB.
    """
    found = []
    for value in series.values:
        work = series.make(bench, value)
        ours, bare, peaks = [], [], []
        for repeat in range(REPEATS + 1):  # the first is a warm-up
            with measured() as cost:
                work.run()
            with measured() as limit:
                work.products()
            peaks.append(cost.peak_mib)
            if repeat:
                ours.append(cost.seconds)
                bare.append(limit.seconds)
        found.append(
            {
                "size": work.size or value,
                "seconds": min(ours),
                "products": min(bare),
                "mib": max(peaks),
            }
        )
    return found


def exponent(found: list[dict[str, float]], column: str) -> float:
    """Fit the slope of the logarithm of a column over that of the size."""
    x, y = (np.log([row[name] for row in found]) for name in ("size", column))
    return float(np.polyfit(x, y, 1)[0])


def show(results: dict[str, list[dict[str, float]]]) -> Table:
    """Tabulate the exponents, and the largest size's ratio to its products."""
    table = Table("what", "over", title="growth: exponents", title_justify="left")
    for column in ("from", "to", "seconds", "products", "memory", "times the products, at most"):
        table.add_column(column, justify="right")
    for name, found in results.items():
        series = SERIES[name]
        worst = max(row["seconds"] / row["products"] for row in found)
        numbers = [exponent(found, column) for column in ("seconds", "products", "mib")]
        ends = [f"{found[i]['size']:,.0f}" for i in (0, -1)]
        table.add_row(
            series.what, series.size, *ends, *(f"{x:.2f}" for x in numbers), f"{worst:.2f}"
        )
    return table


def draw(results: dict[str, list[dict[str, float]]]) -> None:
    """Draw seconds and products of all series over their sizes, light and dark."""
    titles = [f"{SERIES[name].what}, by {SERIES[name].size}" for name in results]
    for suffix, dark in (("", False), ("_dark", True)):
        figure = make_subplots(rows=2, cols=4, subplot_titles=titles, horizontal_spacing=0.055)
        for i, found in enumerate(results.values()):
            sizes, place = [row["size"] for row in found], {"row": i // 4 + 1, "col": i % 4 + 1}
            words = [f"{size / 1000:.0f}k" if size >= 8000 else f"{size:,.0f}" for size in sizes]
            figure.update_xaxes(type="log", tickvals=sizes, ticktext=words, **place)
            for column, label, colour, dash in (
                ("seconds", "opdlab", "#D55E00", "solid"),
                ("products", "bare matrix products", "#0072B2", "dot"),
            ):
                figure.add_scatter(
                    x=sizes,
                    y=[row[column] for row in found],
                    name=label,
                    mode="lines+markers",
                    line={"color": colour, "dash": dash},
                    showlegend=i == 0,
                    **place,
                )
        figure.update_yaxes(type="log", tickvals=[0.1, 0.2, 0.5, 1, 2, 5])
        figure.update_yaxes(title="CPU seconds", col=1)
        figure.update_layout(
            template="plotly_dark" if dark else "plotly_white",
            width=1200,
            height=600,
            legend={"orientation": "h", "y": 1.14},
            margin={"l": 60, "r": 10, "t": 80, "b": 30},
        )
        html = figure.to_html(include_plotlyjs=True, config={"staticPlot": True})
        path = PICTURE.with_name(f"{PICTURE.stem}{suffix}.png")
        camera.shoot(f"<style>body{{margin:0}}</style>{html}", path, dark=dark, width=1200)


def main(only: str = "", draw_only: bool = False) -> None:
    """Measure the series, print the exponents, and write results and picture.

    Args:
        only: The name of one series; all by default.
        draw_only: Draw the picture from the results and measure nothing.
    """
    torch.set_num_threads(1)
    results = json.loads(FILE.read_text())["series"] if FILE.exists() else {}
    if not draw_only:
        bench = Workbench(build_tokenizer())
        for name in [only] if only else SERIES:
            results[name] = measure(SERIES[name], bench)
            print(name, results[name], flush=True)
            ordered = {known: results[known] for known in SERIES if known in results}
            FILE.write_text(json.dumps(about_machine() | {"series": ordered}, indent=1) + "\n")
    Console(width=120).print(show(results))
    draw(results)


if __name__ == "__main__":
    tyro.cli(main)
