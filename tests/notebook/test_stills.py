"""Still pictures of views in frozen notebooks."""

from __future__ import annotations

import base64
import io
import re
import shutil

import numpy as np
import pytest

from opdlab import viz
from opdlab.notebook.stills import _with_fewer_colours, add_still

needs_chromium = pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")


@pytest.mark.parametrize("html", ["", "<b>no view</b>", '<div class="opd"><p>no box</p></div>'])
def test_what_is_no_view_is_left_alone(html):
    assert add_still(html, "words") == html


@pytest.mark.browser
@needs_chromium
def test_a_view_gets_its_picture_and_keeps_script_and_data():
    from PIL import Image

    view = viz.TokenLens.example()
    html, words = view.html(), repr(view)
    stilled = add_still(html, words)
    assert add_still(stilled, words) == stilled
    addresses = re.findall(r'"data:image/png;base64,([^"]+)"', stilled)
    dark, light = (Image.open(io.BytesIO(base64.b64decode(one))) for one in addresses)
    assert light.size == dark.size
    assert light.width == 760
    papers = [picture.convert("RGB").getpixel((380, 8)) for picture in (light, dark)]
    assert min(papers[0]) > 240
    assert max(papers[1]) < 60
    for part in ("<style>", '<script type="application/json" class="opd-data">', "<script type="):
        assert html[html.index(part) :][:200] in stilled


@pytest.mark.browser
@needs_chromium
def test_a_view_without_a_script_is_seen_where_styles_are_kept():
    view = viz.RunCard.example()
    html = view.html()
    stilled = add_still(html, repr(view))
    box = html.partition('<div class="opd-box">')[2].removesuffix("</div></div></div>")
    assert f'<div class="opd-when-styled" hidden="hidden">{box}</div>' in stilled
    assert ".opd-when-bare{display:none}" in stilled


def test_rare_colours_stay_apart():
    """Few pixels of one kind of token must not get the colour of another kind."""
    from PIL import Image

    rng = np.random.default_rng(0)
    pixels = np.full((200, 200, 3), 255, np.uint8)
    pixels[:100] = rng.integers(90, 256, (100, 200, 1))  # text and its soft edges, in greys
    kinds = [(0, 158, 115), (60, 190, 200), (176, 160, 0), (120, 180, 60)]
    for i, kind in enumerate(kinds):
        pixels[150, 4 * i : 4 * i + 2] = kind
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    small = Image.open(io.BytesIO(_with_fewer_colours(png.getvalue()))).convert("RGB")
    found = np.array([small.getpixel((4 * i, 150)) for i in range(len(kinds))])
    assert np.abs(found - kinds).max() < 20
