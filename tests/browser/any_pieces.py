"""Every view, made from any tokens and words: what the safety test draws.

The examples of all registered views, and further forms that some of them have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from viz.traces import made, several

from opdlab import viz
from opdlab.data.trace import Trace

Make = Callable[[Sequence[bytes], str], viz.View]


def trace(pieces: Sequence[bytes], text: str, *policies: str, seed: int = 0) -> Trace:
    """One completion of these tokens after the prompt `text`, each token of the kind `text`."""
    return made(
        pieces, policies or ("student", "teacher"), prompt=text, finish=text, seed=seed
    ).with_columns(type=[text] * len(pieces))


def lens_of_any_policy(pieces: Sequence[bytes], text: str) -> viz.View:
    scored = trace(pieces, text, "student", text or "teacher")
    return viz.TokenLens(scored, title=text, channel="type", tracks=["jsd"])


def timeline_of_many(pieces: Sequence[bytes], text: str) -> viz.View:
    return viz.Timeline(several(*[trace(pieces, text)] * 7), title=text)


def scrubber_of_texts(pieces: Sequence[bytes], text: str) -> viz.View:
    return viz.Scrubber({0: trace([b"first", *pieces], text), 10: trace(pieces, text)}, title=text)


def playground_of_an_own_loss(pieces: Sequence[bytes], text: str) -> viz.View:
    return viz.Playground({text or "mine": "forward_kl"}, trace=trace(pieces, text), title=text)


EXAMPLES: dict[str, Make] = {view.__name__: view.example for view in viz.VIEWS}
FORMS: dict[str, Make] = {
    "TokenLens of any policy": lens_of_any_policy,
    "Timeline of many": timeline_of_many,
    "Scrubber of texts": scrubber_of_texts,
    "Playground of an own loss": playground_of_an_own_loss,
}
ALL = EXAMPLES | FORMS

# How many strips of the tokens a view shows at least, where it shows any.
STRIPS = {
    "TokenLens": 1,
    "Equation": 1,
    "Compare": 3,
    "Rollouts": 1,
    "Timeline": 1,
    "PrivilegeLens": 1,
    "Forks": 1,
    "Audits": 1,
    "Branches": 1,
    "Marks": 1,
    "Scrubber": 1,
    "RunCard": 1,
    "TailAudit": 1,
    "TwoRules": 1,
    "Why": 1,
}
