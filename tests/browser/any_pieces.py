"""Every view, made from any tokens: what the safety test draws. A new view adds a line."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from viz.traces import byte_pieces, made, several

from opdlab import viz
from opdlab.data.trace import Trace


def trace(pieces: Sequence[bytes], text: str, *policies: str, seed: int = 0) -> Trace:
    """One completion of these tokens after the prompt `text`, each token of the kind `text`."""
    return made(
        pieces, policies or ("student", "teacher"), prompt=text, finish=text, seed=seed
    ).with_columns(type=[text] * len(pieces))


def scrubber(pieces: Sequence[bytes], text: str) -> viz.View:
    first = trace(pieces, text)
    return viz.Scrubber(
        {0: first, 10: first.with_columns(student_logp=np.linspace(-2, 0, len(first)))}, title=text
    )


def noted(pieces: Sequence[bytes], text: str) -> Trace:
    """A trace with one window of TOPD and one audit of OmniOPD, whose texts are foreign too."""
    made_of, said, last = (
        trace(pieces, text),
        b"".join(pieces).decode("utf-8", "replace"),
        len(set(pieces)) - 1,
    )
    window = {
        "sample": 0,
        "position": 0,
        "student": [0, last],
        "teacher": [last, 0],
        "distance": 0.5,
        "plan": [[0.5, 0], [0, 0.5]],
    }
    audit = {
        "sample": 0,
        "start": 0,
        "length": 1,
        "text": said,
        "continuations": [text, said],
        "similarity": [0.5, 1.0],
        "prior": 0.2,
        "weight": 0.5,
    }
    made_of.meta["notes"] = {"windows": [window], "audits": [audit]}
    return made_of


def card(pieces: Sequence[bytes], text: str) -> viz.View:
    return viz.RunCard({text: HISTORY}, samples={text: trace(pieces, text)}, title=text, note=text)


HISTORY = pd.DataFrame(
    {"step": range(1, 31), "loss": 1.0, "entropy": np.linspace(2, 0, 30), "reward": 0.5}
)

# A view made of (tokens, any other text), and how many strips of those tokens it shows at least.
Make = Callable[[Sequence[bytes], str], viz.View]
STILL: dict[str, tuple[Make, int]] = {"RunCard": (card, 1)}  # views without a script
VIEWS: dict[str, tuple[Make, int]] = {
    "TokenLens": (
        lambda p, t: viz.TokenLens(
            trace(p, t, "student", t or "teacher"), title=t, channel="type", tracks=["jsd"]
        ),
        1,
    ),
    "Compare": (
        lambda p, t: viz.Compare({t: trace(p, t), f"{t}2": trace(p, t, seed=1)}, title=t),
        3,
    ),
    "Timeline": (lambda p, t: viz.Timeline(trace(p, t), rewards=[1], title=t), 1),
    "Timeline of many": (lambda p, t: viz.Timeline(several(*[trace(p, t)] * 7), title=t), 1),
    "Rollouts": (lambda p, t: viz.Rollouts(trace(p, t), title=t), 1),
    "TailAudit": (lambda p, t: viz.TailAudit(trace(p, t), title=t), 1),
    "Regimes": (lambda p, t: viz.Regimes(trace(p, t), title=t), 0),
    "Scrubber": (scrubber, 1),
    "Scrubber of texts": (
        lambda p, t: viz.Scrubber({0: trace([b"first", *p], t), 10: trace(p, t)}, title=t),
        1,
    ),
    "RunBoard": (lambda p, t: viz.RunBoard({t: HISTORY, f"{t}2": HISTORY}, title=t), 0),
    "Alignment": (
        lambda p, t: viz.Alignment(
            p, byte_pieces(b"".join(p).decode("utf-8", "replace"), 3), title=t, names=(t, f"{t}2")
        ),
        0,
    ),
    "PrivilegeLens": (
        lambda p, t: viz.PrivilegeLens(trace(p, t, "student", "teacher", "teacher+hint"), title=t),
        1,
    ),
    "Forks": (lambda p, t: viz.Forks(noted(p, t), title=t), 1),
    "Audits": (lambda p, t: viz.Audits(noted(p, t), title=t), 1),
    "Playground": (
        lambda p, t: viz.Playground({t or "mine": "forward_kl"}, trace=trace(p, t), title=t),
        0,
    ),
}
