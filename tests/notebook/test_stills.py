"""Still pictures of views in frozen notebooks."""

from __future__ import annotations

import base64
import io
import re
import shutil

import pytest

from opdlab import viz
from opdlab.notebook.stills import add_still

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
