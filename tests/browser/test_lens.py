"""TokenLens beyond one strip: tracks, kinds, search, pins, brush, help, the map of long texts."""

from __future__ import annotations

import re

import numpy as np
import pytest
from playwright.sync_api import expect
from viz.traces import byte_pieces, made

from opdlab.viz import TokenLens, page

pytestmark = pytest.mark.browser
WORDS = [b"The", b" cat", b" sat", *byte_pieces(" 🤗", 2), b" on", b"\n", b" the", b" Cat", b"."]
TYPES = ["word", "noun", "verb", "face", "face", "face", "word", "break", "word", "noun", "end"]
PAST_1900 = re.compile(r"^(19|2\d)\d\d$")
HEIGHTS = "nodes => nodes.map((n) => parseFloat(n.style.getPropertyValue('--h0')) || 0)"


@pytest.fixture
def lens() -> TokenLens:
    assert len(WORDS) == len(TYPES)
    return TokenLens(made(WORDS).with_columns(type=TYPES), title="A lens")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_tracks_kinds_search_brush_and_pins(open_page, tmp_path, lens, axe, scheme):
    view = open_page(lens.to_html(tmp_path / "lens.html"), color_scheme=scheme)
    strip = view.locator(".opd-strip")
    tracks(view, strip, lens)
    kinds(view, strip, lens)
    axe(view)
    search(view, strip)
    brush(view, strip, lens)
    pins(view, strip)
    axe(view)
    strip.press("Escape")
    assert (strip.locator(".opd-brushed").count(), view.locator(".opd-pin:visible").count()) == (
        0,
        2,
    )
    strip.press("Escape")
    assert view.locator(".opd-pin:visible").count() == 0


def tracks(view, strip, lens):
    """As high as the square root of the value; at most four."""
    inks = strip.locator(".opd-ink")
    view.get_by_role("button", name="reverse KL as a track").click()
    high, kl = inks.evaluate_all(HEIGHTS), lens.channels["reverse_kl"]
    singles = [i for i in range(len(WORDS)) if i not in (3, 4, 5)]
    wanted = np.maximum(1, 8 * np.minimum(1, np.sqrt(kl.values[singles] / kl.limit)))
    np.testing.assert_allclose([h for k, h in enumerate(high) if k != 3], wanted, atol=0.06)
    view.get_by_role("button", name="student entropy", exact=True).click(modifiers=["Shift"])
    assert view.locator(".opd-track-name b").all_text_contents() == [
        "reverse KL",
        "student entropy",
    ]
    view.get_by_role("button", name="more").click()
    for name in ("JSD", "ΔH", "teacher rank"):
        view.get_by_role("button", name=f"{name} as a track").click()
    assert view.locator(".opd-track-name b").all_text_contents() == [
        "student entropy",
        "JSD",
        "ΔH",
        "teacher rank",
    ]
    assert view.locator(".opd-fact", has_text="ΔH").is_visible()
    for name in ("student entropy", "JSD", "ΔH", "teacher rank"):
        view.get_by_role("button", name=f"Take away the track {name}").click()
    assert strip.get_attribute("data-tracks") is None
    assert set(inks.evaluate_all(HEIGHTS)) == {0}


def kinds(view, strip, lens):
    """A letter where a run begins, a name in the key and in the facts."""
    view.get_by_role("button", name="type", exact=True).click()
    runs = strip.locator("[data-run]").evaluate_all("nodes => nodes.map((n) => n.dataset.run)")
    assert runs == [
        lens.channels["type"].marks[lens.channels["type"].names.index(t)]
        for t in ("word", "noun", "verb", "face", "word", "break", "word", "noun", "end")
    ]
    assert view.locator(".opd-legend").text_content().count("noun") == 1
    strip.locator("[data-i='9']").hover()
    assert view.locator(".opd-fact[data-on] .opd-value").text_content() == "noun"
    assert view.locator(".opd-item[data-on]").text_content().endswith("noun")
    assert strip.evaluate("node => node.textContent") == lens.text


def search(view, strip):
    """Plain text, any case, across tokens; Enter goes on and around, Shift back."""
    strip.press("1")
    assert strip.locator("[data-run]").count() == 0
    strip.press("/")
    field = view.get_by_role("searchbox")
    assert field.evaluate("node => node === document.activeElement")
    field.fill("CAT")
    assert strip.locator(".opd-found").evaluate_all("nodes => nodes.map((n) => n.dataset.i)") == [
        "1",
        "9",
    ]
    at = lambda: strip.locator("[aria-selected='true']").get_attribute("data-i")
    strip.locator("[data-i='2']").click()
    walk = []
    for key in ("Enter", "Enter", "Shift+Enter"):
        field.press(key)
        walk.append(at())
    assert walk == ["9", "1", "9"]
    assert view.locator(".opd-search").text_content() == "2 of 2"
    field.fill("t 🤗 o")
    assert strip.locator(".opd-found").evaluate_all("nodes => nodes.map((n) => n.dataset.i)") == [
        "2",
        "3",
        "4",
        "5",
        "6",
    ]
    field.fill(".*")
    assert view.locator(".opd-search").text_content() == "0 found"
    field.press("Escape")
    assert strip.evaluate("node => node === document.activeElement")


def brush(view, strip, lens):
    """By dragging, with what it sums up to."""
    strip.locator("[data-i='1']").hover()
    view.mouse.down()
    strip.locator("[data-i='2']").hover()
    strip.locator("[data-i='9']").hover()
    view.mouse.up()
    assert strip.locator(".opd-brushed").count() == 9
    total = lens.channels["log_ratio"].values[1:10].sum()
    assert (
        f"9 tokens: log ratio sum {total:+.3g}".replace("-", "−")
        in view.locator(".opd-status").text_content()
    )


def pins(view, strip):
    """Up to three side by side; the oldest gives way."""
    for key in ("Home", "ArrowRight", "ArrowRight", "End"):
        strip.press(key)
        strip.press("Enter")
    cards = view.locator(".opd-pin:visible")
    assert cards.locator(".opd-now .opd-word").all_text_contents() == ["·cat", "·sat", "."]
    assert strip.locator("[data-pin]").evaluate_all("nodes => nodes.map((n) => n.dataset.i)") == [
        "1",
        "2",
        str(len(WORDS) - 1),
    ]
    view.get_by_role("button", name="Take away pin 2").click()
    assert cards.locator(".opd-now .opd-word").all_text_contents() == ["·cat", "."]
    strip.focus()
    strip.press("?")
    assert view.locator(".opd-help").is_visible()


def test_a_map_of_a_long_text_keeps_peaks_and_scrolls(open_page, tmp_path, axe):
    n = 3000
    gap = np.full(n, 0.01)
    gap[2222] = -9.0
    trace = made([f" w{i % 50}".encode() for i in range(n)], ("student", "teacher", "other"), top=2)
    trace = trace.with_columns(
        student_logp=np.zeros(n),
        teacher_logp=gap,
        other_logp=np.where(np.arange(n) == 2222, -5.0, -0.01),
    )
    view = open_page(TokenLens(trace).to_html(tmp_path / "long.html"))
    strip, rows = view.locator(".opd-strip"), view.get_by_role("slider")
    assert view.locator(".opd-map-name").all_text_contents() == [
        "log ratio",
        "log ratio · other",
        "all agree",
    ]
    # The one peak, a third of a pixel wide, is drawn in full height in the student's colour, in
    # each row.
    column = """(canvas, part) => {
      const { width, height } = canvas, x = Math.floor(part * width), pen = canvas.getContext("2d");
      const orange = (dx) => {
        const pixels = pen.getImageData(x + dx, 0, 1, height).data;
        const isOrange = (y) => pixels[4 * y] > 200 && pixels[4 * y + 2] < 30;
        return [...Array(height).keys()].filter(isOrange).length / height;
      };
      return Math.max(...[-1, 0, 1].map(orange));
    }"""
    for k in range(3):
        canvas = view.locator(".opd-map-row").nth(k)
        assert canvas.evaluate(column, 2222 / n) > 0.3
        assert canvas.evaluate(column, 0.2) < 0.15
    seen = lambda: [int(w) for w in rows.get_attribute("aria-valuetext").split() if w.isdigit()][:2]
    expect(rows).to_have_attribute("aria-valuenow", PAST_1900)
    assert seen()[0] < 2222 < seen()[1]  # at first the largest is in sight
    strip.evaluate("node => (node.scrollTop = 0)")
    expect(rows).to_have_attribute("aria-valuenow", "0")
    box = rows.bounding_box()
    view.mouse.click(box["x"] + box["width"] * 2222 / n, box["y"] + 6)
    expect(rows).to_have_attribute("aria-valuenow", PAST_1900)
    first, last = seen()
    assert first < 2222 < last < 2700
    assert strip.locator("[data-i='2222']").is_visible()
    rows.focus()
    rows.press("Home")
    expect(rows).to_have_attribute("aria-valuenow", "0")
    strip.focus()
    strip.press("p")
    strip.press("n")
    assert strip.locator("[aria-selected='true']").get_attribute("data-i") == "2222"
    axe(
        view,
        only=[
            "aria-required-attr",
            "aria-input-field-name",
            "label",
            "nested-interactive",
            "scrollable-region-focusable",
        ],
    )


@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 480)])
def test_the_map_has_bands_of_segments(open_page, tmp_path, axe, scheme, width):
    foreign = "<img src=x onerror=window.broken=1>"
    trace = made([b"a", b"</think>", *[b" b"] * 798])
    named = trace.with_columns(segment=[foreign] * 200 + ["code"] * 400 + [foreign] * 200)
    path = page(
        tmp_path / "p.html", title="t", lenses=[("", TokenLens(named)), ("", TokenLens(trace))]
    )
    view = open_page(path, color_scheme=scheme, viewport={"width": width, "height": 900})
    one, two = view.locator(".opd-lens").all()
    assert one.locator(".opd-band").all_text_contents() == [foreign, "code", foreign]
    assert two.locator(".opd-band").all_text_contents() == ["think", "answer"]
    whole, bands = (
        one.locator(".opd-map-rows").bounding_box(),
        [band.bounding_box() for band in one.locator(".opd-band").all()],
    )
    assert [b["x"] - whole["x"] for b in bands] == pytest.approx(
        [part * whole["width"] for part in (0, 0.25, 0.75)], abs=1
    )
    assert [b["width"] for b in bands] == pytest.approx(
        [part * whole["width"] for part in (0.25, 0.5, 0.25)], abs=1
    )
    shades = one.locator(".opd-band").evaluate_all(
        "bands => bands.map((b) => getComputedStyle(b).backgroundColor)"
    )
    assert shades[0] == shades[2] != shades[1]
    rows = one.get_by_role("slider")
    rows.press("Home")
    expect(rows).to_have_attribute("aria-valuenow", "0")
    in_words(rows.get_attribute("aria-valuetext"), foreign)
    rows.press("End")
    expect(rows).not_to_have_attribute("aria-valuenow", "0")
    in_words(rows.get_attribute("aria-valuetext"), foreign)
    names, drawn = (
        one.locator(".opd-map-name").all(),
        [one.locator(".opd-map-bands"), *one.locator(".opd-map-row").all()],
    )
    tops = [[box.bounding_box()["y"] for box in boxes] for boxes in (names, drawn)]
    assert tops[0] == pytest.approx(tops[1], abs=1)
    assert view.evaluate("window.broken") is None
    axe(view)


def in_words(told: str, foreign: str) -> None:
    """The names of the segments between the tokens told, each once."""
    _, first, _, last, *_ = told.split()
    seen = [
        name
        for name, start, end in ((foreign, 0, 199), ("code", 200, 599), (foreign, 600, 799))
        if start <= int(last) and end >= int(first)
    ]
    assert told.split(", ")[1:] == list(dict.fromkeys(seen))


def test_several_runs_of_tokens_are_marked_at_once(tmp_path, open_page):
    lens = TokenLens(made([b"a", b" b", b" c", b" d", b" e", b" f"]))
    lens.brush = [
        0,
        1,
        4,
        3,
    ]  # runs from end to end, as the regimes map sends them; the second the wrong way round
    tab = open_page(lens.to_html(tmp_path / "runs.html"))
    assert tab.eval_on_selector_all(
        ".opd-strip .opd-brushed", "nodes => nodes.map((n) => Number(n.dataset.i))"
    ) == [0, 1, 3, 4]
