"""The home page: one sentence, a TokenLens that moves, and the ways into the site."""

from __future__ import annotations

from pathlib import Path

from opdlab import viz
from opdlab.data.trace import Trace
from website.fragments import Fragments
from website.links import ROOT, Links

_TRACE = ROOT / "notebooks" / "data" / "pair" / "paragraphs.parquet"
# The paragraph of the README's picture, and the token at which it goes wrong.
_SAMPLE, _TOKEN = 2, 5
_LENS = "{{lens}}"


def render_home(links: Links) -> tuple[str, Fragments]:
    """Write the home page as Markdown.

    Args:
        links: Where files are in the site. Links to pages that are not written are left out.

    Returns:
        The Markdown, and the picture that it has a mark for.
    """
    text = (Path(__file__).parent / "home.md").read_text(encoding="utf-8")
    fragments = Fragments("index")
    text = text.replace(_LENS, fragments.add(draw_lens().html()))
    return links.rewrite(text, "website/home.md", "index.md"), fragments


def draw_lens() -> viz.TokenLens:
    """Draw the paragraph of the README's picture, as recorded for a pair of real models."""
    lens = viz.TokenLens.of_trace(Trace.load(_TRACE), _SAMPLE)
    lens.selected = _TOKEN
    return lens
