"""Every view, made from any tokens: what the safety test draws. A new view adds a line."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from viz.traces import made

from opdlab import viz
from opdlab.trace import Trace


def trace(pieces: Sequence[bytes], text: str, *policies: str, seed: int = 0) -> Trace:
    """One completion of these tokens after the prompt `text`, each token of the kind `text`."""
    return made(pieces, policies or ("student", "teacher"), prompt=text, finish=text, seed=seed).with_columns(type=[text] * len(pieces))


def scrubber(pieces: Sequence[bytes], text: str) -> viz.View:
    first = trace(pieces, text)
    return viz.Scrubber({0: first, 10: first.with_columns(student_logp=np.linspace(-2, 0, len(first)))}, title=text)


# A view made of (tokens, any other text), and how many strips of those tokens it shows at least.
Make = Callable[[Sequence[bytes], str], viz.View]
VIEWS: dict[str, tuple[Make, int]] = {
    "TokenLens": (lambda p, t: viz.TokenLens(trace(p, t, "student", t or "teacher"), title=t, channel="type", tracks=["jsd"]), 1),
    "Compare": (lambda p, t: viz.Compare({t: trace(p, t), f"{t}2": trace(p, t, seed=1)}, title=t), 3),
    "Timeline": (lambda p, t: viz.Timeline(trace(p, t), rewards=[1], title=t), 1),
    "Rollouts": (lambda p, t: viz.Rollouts(trace(p, t), title=t), 1),
    "TailAudit": (lambda p, t: viz.TailAudit(trace(p, t), title=t), 1),
    "Regimes": (lambda p, t: viz.Regimes(trace(p, t), title=t), 0),
    "Scrubber": (scrubber, 1),
    "PrivilegeLens": (lambda p, t: viz.PrivilegeLens(trace(p, t, "student", "teacher", "teacher+hint"), title=t), 0),
    "Playground": (lambda p, t: viz.Playground({t or "mine": "forward_kl"}, trace=trace(p, t), title=t), 0),
}
