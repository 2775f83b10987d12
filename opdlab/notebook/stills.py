"""Put a still picture of a view into its HTML, for front ends that run no script.

A notebook from elsewhere is not trusted: JupyterLab and Notebook 7 then strip scripts, styles and
SVG from its outputs, and keep images, also those whose data is in the page.
"""

from __future__ import annotations

import base64
import io
import re
import tempfile
from pathlib import Path

from opdlab.errors import OpdlabError
from opdlab.viz import camera, embed
from opdlab.viz.markup import BARE_NOTE, escape

# JupyterLab shows a picture unscaled until the mouse is over it, and cuts off a wider one.
WIDTH = 760  # CSS pixels
_COLOURS = 64  # of the picture; a third of the bytes of the full range, and no visible loss
_LOOK = (
    "<style>body{margin:0;background:Canvas}.opd{max-width:none!important}"
    ".opd-block{content-visibility:visible!important}</style>"
)
# What `View.html` has where scripts draw the view, up to the data that the script reads; and where
# no script does.
_BOX = r'(?<=<div class="opd-view"><div class="opd-box">)(.*?)'
_DRAWN = re.compile(
    _BOX + r'(?=</div></div><script type="application/json" class="opd-data">)', re.DOTALL
)
_STATIC = re.compile(_BOX + r"(?=</div></div></div>$)", re.DOTALL)
# Styles are stripped where a notebook is not trusted, and so is `hidden` without a value: the
# picture shows there. Elsewhere the view does.
_SWAP = "<style>.opd-when-bare{display:none}.opd-when-styled[hidden]{display:block}</style>"
_MARK = '<picture class="opd-still">'


def add_still(html: str, words: str) -> str:
    """Replace the static half of a view's HTML by a picture of the view, and its words.

    Where scripts and styles are kept, the view itself is seen instead.

    Args:
        html: An HTML output. One that is no view, or has its picture already, is left alone.
        words: What the view says as text; the picture's description.

    Returns:
        The HTML.

    Raises:
        OpdlabError: There is no Chromium to draw with, or no Pillow.
    """
    is_drawn = bool(_DRAWN.search(html))
    if _MARK in html or not (is_drawn or _STATIC.search(html)):
        return html
    still = _make_still(html, words.strip(), note=BARE_NOTE if is_drawn else "")
    if is_drawn:  # the script replaces the picture
        return _DRAWN.sub(lambda _: still, html, count=1)

    def swap(found: re.Match[str]) -> str:
        bare = f'<div class="opd-when-bare">{still}</div>'
        return f'{_SWAP}{bare}<div class="opd-when-styled" hidden="hidden">{found[1]}</div>'

    return _STATIC.sub(swap, html, count=1)


def _make_still(html: str, words: str, note: str) -> str:
    """Return a view's picture in light and dark, a note, and the view's words to unfold."""
    light, dark = _draw(html, dark=False), _draw(html, dark=True)
    # Front ends that drop <picture> and <source> keep the light picture, which is on its own paper.
    return (
        f'{_MARK}<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(words.partition(chr(10))[0])}"></picture>'
        f"{note}<details><summary>In words</summary><pre>{escape(words)}</pre></details>"
    )


def _draw(html: str, dark: bool) -> str:
    """Draw a fragment with Chromium; return the PNG as an address that holds its data."""
    document = embed.document("still", _LOOK, html)
    with tempfile.TemporaryDirectory(prefix="opdlab-") as folder:
        target = Path(folder) / "still.png"
        shot = camera.shoot(document, target, dark=dark, width=WIDTH, density=1, least=1)
        small = _with_fewer_colours(shot.read_bytes())
    return f"data:image/png;base64,{base64.b64encode(small).decode()}"


def _with_fewer_colours(png: bytes) -> bytes:
    try:
        from PIL import Image
    except ImportError as error:
        raise OpdlabError(
            "Freezing a notebook with views needs Pillow. Install it: pip install pillow."
        ) from error
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    small = io.BytesIO()
    # Median cut, the default, would give two kinds of few pixels the same colour.
    octree = Image.Quantize.FASTOCTREE
    picture.quantize(_COLOURS, octree, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return small.getvalue()
