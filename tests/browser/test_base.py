"""What every view stands on, in a real browser: the data block, the links between views,
accessibility, pictures.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from viz.traces import NASTY, byte_pieces, made

from opdlab.viz import TokenLens, embed, page, payload

pytestmark = pytest.mark.browser
WORDS = [b"The", b" cat", b" sat", *byte_pieces(" 🤗", 2), b" on", b"\n", b" the", b" mat", b"."]

# The shipped decoder, with its two entries in reach of the tests.
PROBE = (
    f"<script type=module>{embed.bundle(['payload.js'])}; "
    "Object.assign(window, { bytesOf, inflate, decode })</script>"
)
HASHED = (
    "(b) => { let h = 0; const r = inflate(bytesOf(b)); for (const x of r) h = (h * 31 + x) >>> 0;"
    " return [r.length, h]; }"
)
PLAIN = """(base64) => {
  const plain = (x) => {
    if (ArrayBuffer.isView(x)) return [...x].map((v) => Number.isFinite(v) ? v : String(v));
    if (Array.isArray(x)) return x.map(plain);
    if (!x || typeof x !== "object") return x;
    return Object.fromEntries(Object.entries(x).map(([k, v]) => [k, plain(v)]));
  };
  return plain(decode(bytesOf(base64)));
}"""


@pytest.fixture
def probe(open_page, tmp_path):
    path = tmp_path / "probe.html"
    path.write_text(f"<!doctype html><meta charset=utf-8>{PROBE}", encoding="utf-8")
    view = open_page(path)
    view.wait_for_function("!!window.decode")
    return view


@pytest.mark.parametrize("strategy", [zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY, zlib.Z_FIXED])
@pytest.mark.parametrize("level", [0, 1, 9])
def test_inflate_is_zlib(probe, level, strategy):
    rng = np.random.default_rng(level)
    for raw in (
        b"",
        b"a",
        b"abc" * 30_000,
        rng.integers(0, 256, 70_000, np.uint8).tobytes(),
        rng.geometric(0.2, 50_000).astype("u1").tobytes(),
    ):
        packer = zlib.compressobj(level, zlib.DEFLATED, -15, 8, strategy)
        block = packer.compress(raw) + packer.flush()
        assert probe.evaluate(HASHED, payload.to_base64(block)) == hashed(raw)


def test_inflate_reads_parts_packed_each_in_its_own_way(probe):
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, high, 9_000, np.uint8).tobytes() for high in (7, 256)]
    parts = [b"abc" * 3_000, noise[0], b"", noise[1], b"tail"]
    assert probe.evaluate(HASHED, payload.to_base64(payload._deflate(parts))) == hashed(
        b"".join(parts)
    )


def test_style_sheets_mean_the_same_without_their_spaces(probe):
    """The rules as the browser reads them, of each style sheet as it is written and as it is sent.

    It keeps spaces in values with var().
    """
    read = """(text) => {
      const sheet = new CSSStyleSheet();
      sheet.replaceSync(text);
      return [...sheet.cssRules].map((rule) => rule.cssText.replace(/([,:])\\s+/g, "$1"));
    }"""
    names = sorted(path.name for path in Path(embed.__file__).with_name("static").glob("*.css"))
    for name in names:
        assert (
            probe.evaluate(read, embed.style_text(name))
            == probe.evaluate(read, embed.asset(name))
            != []
        )


def hashed(raw: bytes) -> list[int]:
    """What `HASHED` makes of it."""
    out = 0
    for x in raw:
        out = (out * 31 + x) & 0xFFFFFFFF
    return [len(raw), out]


def test_the_page_reads_what_python_packs(probe):
    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.text(),
        st.lists(st.floats(width=16), max_size=30),
        st.lists(st.integers(-(2**31), 2**32 - 1), max_size=9),
        st.sampled_from(NASTY),
    )
    def check(text, half, whole, nasty):
        long = np.resize(np.array([*half, 0.5]), payload.LONG + 1)
        tree = {
            "text": [text, {nasty: None}],
            "half": np.array(half, np.float16),
            "whole": np.array(whole, np.int64),
            "long": payload.compact(long),
        }
        block = payload.pack(tree)
        got, want = probe.evaluate(PLAIN, payload.to_base64(block)), payload.unpack(block)
        for key in ("half", "whole", "long"):
            np.testing.assert_allclose(np.array(got[key], float), want[key], rtol=1e-6, err_msg=key)
        assert got["text"] == want["text"]

    check()


def test_views_of_one_text_follow_each_other_and_no_other(open_page, tmp_path):
    trace = made(WORDS)
    again, other = (
        trace.with_columns(student_logp=np.linspace(-1, 0, len(WORDS))),
        made(WORDS, prompt="Something else?"),
    )
    lenses = [("", TokenLens(t)) for t in (trace, again, other)]
    first = [lens.selected for _, lens in lenses]
    view = open_page(page(tmp_path / "p.html", title="t", lenses=lenses))
    chosen = lambda: [
        int(n.get_attribute("data-i")) for n in view.locator("[aria-selected='true']").all()
    ]
    assert chosen() == first
    strips = view.locator(".opd-strip").all()
    strips[0].locator("[data-i='8']").click()
    assert chosen() == [8, 8, first[2]]
    strips[1].locator("[data-i='1']").hover()
    assert view.locator(".opd-now .opd-word").all_text_contents()[:2] == ["·cat", "·cat"]
    strips[2].press("End")
    assert chosen() == [8, 8, len(WORDS) - 1]
    strips[1].focus()
    strips[1].press("Shift+ArrowLeft")
    strips[1].press("Shift+ArrowLeft")
    assert [s.locator(".opd-brushed").count() for s in strips] == [3, 3, 0]
    strips[0].focus()
    strips[0].press("Escape")
    assert view.locator(".opd-brushed").count() == 0


def test_a_view_that_fails_to_draw_leaves_its_static_picture(open_page, tmp_path):
    lens = TokenLens(made(WORDS))
    block = payload.to_base64(payload.pack(lens.data()))
    path = tmp_path / "broken.html"
    path.write_text(
        f"<!doctype html><meta charset=utf-8>{lens.html().replace(block, 'AAAA')}",
        encoding="utf-8",
    )
    view = open_page(path, ["error: The data of this view is cut short. Make the view again."])
    assert view.locator(".opd-strip").text_content() == lens.text


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(open_page, tmp_path, axe, scheme):
    lenses = [("", TokenLens(made(WORDS))), ("", TokenLens(made(list(map(str.encode, NASTY)))))]
    axe(open_page(page(tmp_path / "p.html", title="t", lenses=lenses), color_scheme=scheme))


def test_the_blocks_of_a_long_text_are_no_obstacle(open_page, tmp_path, axe):
    long = made([f" w{i % 50}".encode() if i % 9 else b"\n" for i in range(2500)])
    view = open_page(TokenLens(long).to_html(tmp_path / "long.html"))
    assert view.locator(".opd-block").count() > 4
    assert view.locator(".opd-strip").evaluate("node => node.textContent") == TokenLens(long).text
    axe(view, only=["aria-required-children", "aria-required-parent", "aria-allowed-role"])


@pytest.mark.parametrize(("dark", "width"), [(False, 480), (True, 1200)])
def test_a_picture_is_as_wide_as_asked_and_of_the_theme(tmp_path, dark, width):
    path = TokenLens(made(WORDS)).to_png(tmp_path / "x.png", dark=dark, width=width)
    raw = path.read_bytes()
    wide, high = struct.unpack(">II", raw[16:24])
    assert raw[:4] == b"\x89PNG"
    assert wide == 2 * width
    assert high > 600
    assert _darkness(raw) == dark
    assert list(tmp_path.iterdir()) == [path]


def test_a_picture_holds_what_lies_below_the_window(tmp_path):
    long = made(
        [f" w{i % 50}".encode() for i in range(2500)], top=2, prompt="\n".join(map(str, range(30)))
    )
    raw = (
        TokenLens(long, title="A long title. " * 200)
        .to_png(tmp_path / "x.png", width=480)
        .read_bytes()
    )
    rows = "".join("x" if row.min() < 100 else "-" for row in _grey(raw))
    assert (
        max(map(len, rows.split("x"))) < 200
    )  # pixels, two for each of CSS; the strip alone has 800


def _darkness(raw: bytes) -> bool:
    return float(_grey(raw).mean()) < 128


def _grey(raw: bytes) -> np.ndarray:
    """A picture's pixels by row, 0 black to 255 white."""
    from io import BytesIO

    from PIL import Image

    return np.asarray(Image.open(BytesIO(raw)).convert("L"))
