"""Evaluation: greedy accuracy, avg@k, pass@k and length on the same prompts, and paired differences with intervals.

Every policy answers the same prompts with the same random numbers, so `after - before` is a paired comparison.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from opdlab.errors import MissingPolicy, OpdlabError
from opdlab.policy import Policy
from opdlab.progress import Progress
from opdlab.rollout import sample
from opdlab.tasks import Task


@dataclass(frozen=True, eq=False)
class Difference:
    """A paired difference of means with a 95 % bootstrap interval over prompts."""

    mean: float
    low: float
    high: float
    prompts: int

    @property
    def clear(self) -> bool:
        """Whether zero lies outside the interval."""
        return self.low > 0 or self.high < 0

    def __repr__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}] (95 % paired bootstrap, {self.prompts} prompts)"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """`greedy [P]`: the verifier's scores of greedy completions; `sampled [P, k]`: of samples at temperature 1 (k may be 0).

    `length [P]` counts tokens of the greedy completions, `cut [P]` those that hit the limit. `key` names the prompts.
    """

    name: str
    greedy: np.ndarray
    sampled: np.ndarray
    length: np.ndarray
    cut: np.ndarray
    key: tuple[Any, ...]

    @property
    def accuracy(self) -> float:
        """Mean score of the greedy completions."""
        return float(self.greedy.mean())

    @property
    def avg_at_k(self) -> float:
        """Mean score of the samples."""
        self._sampled("avg@k")
        return float(self.sampled.mean())

    def pass_at(self, k: int) -> float:
        """The chance that the best of `k` samples is right: 1 - C(n-c, k) / C(n, k), unbiased for k <= n (arXiv 2107.03374)."""
        self._sampled("pass@k")
        n = self.sampled.shape[1]
        if not 1 <= k <= n:
            raise OpdlabError(f"pass@{k} needs at least {k} samples a prompt; there are {n}. Evaluate with k={k} or more.")
        wrong = n - (self.sampled > 0.5).sum(1)
        miss = [np.prod([(w - i) / (n - i) for i in range(k)]) if w >= k else 0.0 for w in wrong]
        return float(1 - np.mean(miss))

    def __sub__(self, before: Evaluation) -> Difference:
        """Paired difference of greedy accuracy; raises OpdlabError where the prompts differ."""
        if self.key != before.key:
            raise OpdlabError(
                f"These evaluations are on different prompts ({self.key} and {before.key}), so they do not pair. "
                "Use the same task, n and seed."
            )
        return paired(self.greedy, before.greedy)

    def table(self) -> dict[str, float]:
        """The numbers by name."""
        out = {"accuracy": self.accuracy, "length": float(self.length.mean()), "cut": float(self.cut.mean())}
        if self.sampled.shape[1]:
            k = self.sampled.shape[1]
            out |= {f"avg@{k}": self.avg_at_k, f"pass@{k}": self.pass_at(k)}
        return out

    def __repr__(self) -> str:
        facts = ", ".join(f"{k} {v:.3g}" for k, v in self.table().items())
        return f"{self.name}: {facts} ({len(self.greedy)} prompts)"

    def _sampled(self, what: str) -> None:
        if not self.sampled.shape[1]:
            raise OpdlabError(f"{what} needs samples. Evaluate with k=4 or more.")


def paired(after: np.ndarray, before: np.ndarray, resamples: int = 10_000, seed: int = 0) -> Difference:
    """Mean of `after - before` over prompts, with a percentile bootstrap interval (95 %)."""
    gap = np.asarray(after, float) - np.asarray(before, float)
    rng = np.random.default_rng(seed)
    means = np.concatenate([gap[rng.integers(len(gap), size=(500, len(gap)))].mean(1) for _ in range(resamples // 500)])
    low, high = np.quantile(means, [0.025, 0.975])
    return Difference(float(gap.mean()), float(low), float(high), len(gap))


def evaluate(policy: Policy, task: Task, n: int = 200, k: int = 0, seed: int = 0, *, name: str = "", batch_size: int = 64,
             max_new_tokens: int | None = None, quiet: bool = True) -> Evaluation:  # fmt: skip
    """Score `n` held-out prompts greedily and, with `k` > 0, with `k` samples each at temperature 1.

    Raises MissingPolicy where the task has no verifier.
    """
    if task.verify is None:
        raise MissingPolicy(f"{task.name} has no verifier, so nothing can be scored. Make the task with verify=….")
    prompts = task.prompts(n, seed, "test")
    width = max_new_tokens or task.max_new_tokens
    rows: dict[str, list[Any]] = {"greedy": [], "sampled": [], "length": [], "cut": []}
    bar = Progress(len(prompts), f"evaluate {name or policy}", "prompt", quiet)
    for i in range(0, len(prompts), batch_size):
        part = prompts[i : i + batch_size]
        best = sample(policy, part, temperature=0, max_new_tokens=width)
        rows["greedy"] += [task.verify(p, t) for p, t in zip(part, best.texts, strict=True)]
        rows["length"] += best.lengths.tolist()
        rows["cut"] += [f == "length" for f in best.finish]
        if k:
            many = sample(policy, part, k, max_new_tokens=width, seed=seed + 7919 * (i + 1))
            scores = [task.verify(p, t) for p, t in zip(many.prompts, many.texts, strict=True)]
            rows["sampled"] += torch.tensor(scores).view(-1, k).tolist()
        bar.update(i + len(part), accuracy=float(np.mean(rows["greedy"])))
    bar.close()
    arrays = {key: np.asarray(value, float) for key, value in rows.items()}
    arrays["sampled"] = arrays["sampled"].reshape(len(prompts), k)
    settings = tuple(sorted((key, str(value)) for key, value in task.settings.items()))
    asked = hashlib.sha256(repr([(p.text, p.messages) for p in prompts]).encode()).hexdigest()[:8]
    return Evaluation(name or repr(policy), key=(task.name, settings, len(prompts), seed, asked), **arrays)
