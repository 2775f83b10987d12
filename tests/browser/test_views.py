"""The views in a real browser: what is hovered, pressed, shown, and what must never happen."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from viz.traces import NASTY, byte_pieces, made

from opdlab.viz import TokenLens, curves, page
from opdlab.viz.duel import find_duel
from opdlab.viz.glyphs import show_piece

pytestmark = pytest.mark.browser

WORDS = [b"The", b" cat", b" sat", *byte_pieces(" 🤗", 2), b" on", b"\n", b" the", b" mat", b"."]
nasty = (
    st.sampled_from(NASTY).map(str.encode)
    | st.text(max_size=5).map(str.encode)
    | st.binary(max_size=3)
)

# The contrast of the text of every token with what lies behind it: WCAG 2, alpha composited on the
# lens.
CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const over = (...colours) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const c of colours) { canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (rgb) => {
    const linear = (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = rgb.map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (a, b) => {
    const [dark, bright] = [light(a), light(b)].sort((x, y) => x - y);
    return (bright + 0.05) / (dark + 0.05);
  };
  const paper = getComputedStyle(document.querySelector(".opd")).backgroundColor;
  const names = ["ink", "soft", "button", "p", "name", "value", "legend", "prompt"];
  const nodes = document.querySelectorAll(names.map((name) => `.opd-${name}`).join(", "));
  return [...nodes].map((node) => {
    const style = getComputedStyle(node);
    const behind = over(paper, style.backgroundColor);
    const before = over(paper, style.backgroundColor, style.color);
    return [node.className, ratio(before, behind), style.backgroundColor];
  });
}"""


@pytest.fixture
def lens() -> TokenLens:
    rng = np.random.default_rng(0)
    plan = {"advantage": rng.normal(size=len(WORDS))}
    return TokenLens(
        made(
            WORDS,
            ("student", "teacher", "teacher+hint"),
            plan=plan,
            prompt="Where did\n<b>it</b> sit?",
        ),
        title="A lens",
    )


def shown(view) -> dict[str, tuple[str, str]]:
    """The duel as it reads: token -> (student, teacher)."""
    rows = view.locator(".opd-rows .opd-row:not(.opd-empty)").all()
    cells = [row.locator("span").filter(visible=True).all_text_contents() for row in rows]
    texts = [[text for text in cell if text] for cell in cells]
    return {word: (left, right) for left, word, right in texts}


def expected(lens: TokenLens, i: int, rival: str) -> dict[str, list[float]]:
    found = find_duel(lens.trace)
    end = int(found["count"][: i + 1].sum())
    rows = range(end - int(found["count"][i]), end)
    return {
        found["names"][found["row"][r]]: [float(found["p"][name][r]) for name in ("student", rival)]
        for r in rows
    }


def close(text: str, p: float) -> bool:
    return abs(float(text.strip("<> %")) - 100 * p) <= 0.11


@pytest.mark.parametrize("i", [1, 8])
def test_hovering_a_token_shows_both_distributions(open_page, tmp_path, lens, i):
    view = open_page(lens.to_html(tmp_path / "lens.html"))
    view.locator(f"[data-i='{i}']").hover()
    assert view.locator(".opd-now .opd-word").text_content() == show_piece(WORDS[i])
    rows, want = shown(view), expected(lens, i, "teacher")
    assert list(rows) == [*want, "all others"]
    assert all(close(rows[w][0], s) and close(rows[w][1], t) for w, (s, t) in want.items())
    other = find_duel(lens.trace)["other"]
    assert close(rows["all others"][0], other["student"][i])
    assert close(rows["all others"][1], other["teacher"][i])
    assert view.locator(".opd-row[data-sampled] .opd-word").all_text_contents() == [
        show_piece(WORDS[i])
    ]
    assert (
        f"{lens.channels['student_entropy'].values[i]:.3g}"
        in view.locator(".opd-side.opd-of-student").text_content()
    )
    assert view.locator(".opd-side.opd-of-teacher b").text_content() == "teacher"


def test_the_panel_keeps_its_height_and_falls_back_to_the_chosen_token(open_page, tmp_path, lens):
    view = open_page(lens.to_html(tmp_path / "lens.html"))
    view.locator("[data-i='2']").click()
    heights = set()
    for i in range(len(WORDS)):
        view.locator(f"[data-i='{i}']").hover()
        heights.add(view.locator(".opd-panel").bounding_box()["height"])
    view.mouse.move(2, 2)
    assert len(heights) == 1
    assert view.locator(".opd-now .opd-word").text_content() == "·sat"


def test_keys_move_and_choose(open_page, tmp_path, lens):
    view = open_page(lens.to_html(tmp_path / "lens.html"))
    strip = view.locator(".opd-strip")
    at = lambda: int(view.locator("[aria-selected='true']").get_attribute("data-i"))
    peaks = lens.channels["log_ratio"].peaks()
    assert at() == peaks[0]
    strip.focus()
    for key, want in [
        ("Home", 0),
        ("ArrowLeft", 0),
        ("ArrowRight", 1),
        ("End", len(WORDS) - 1),
        ("ArrowRight", len(WORDS) - 1),
        ("Home", 0),
    ]:
        strip.press(key)
        assert at() == want, key
    strip.press("ArrowDown")
    assert at() == WORDS.index(b" the")  # the first token of the next line
    strip.press("ArrowUp")
    assert at() == 0
    strip.press("n")
    assert at() == min(p for p in peaks if p > 0)
    assert strip.get_attribute("aria-activedescendant") == view.locator(
        "[aria-selected='true']"
    ).get_attribute("id")
    strip.press("2")
    assert view.locator("[aria-pressed='true']").text_content() == "reverse KL"
    assert f"position {at()}" in view.locator("[aria-live]").text_content()
    assert (
        view.locator(".opd-strip").evaluate("node => getComputedStyle(node).outlineStyle")
        == "solid"
    )


def test_buttons_recolour_and_set_the_rival(open_page, tmp_path, lens):
    view = open_page(lens.to_html(tmp_path / "lens.html"))
    colours = lambda: view.locator(".opd-token .opd-ink").evaluate_all(
        "nodes => nodes.map((n) => getComputedStyle(n).backgroundColor)"
    )
    before = colours()
    view.get_by_role("button", name="log ratio · teacher+hint", exact=True).click()
    assert colours() != before
    assert view.locator(".opd-side.opd-of-teacher b").text_content() == "teacher+hint"
    view.locator("[data-i='1']").hover()
    want = expected(lens, 1, "teacher+hint")
    assert all(close(shown(view)[w][1], t) for w, (_, t) in want.items())
    view.get_by_role("button", name="advantage", exact=True).click()
    legend = view.locator(".opd-legend").text_content()
    assert "negative" in legend
    assert "positive" in legend


def test_the_legend_is_the_scale(open_page, tmp_path, lens):
    view = open_page(lens.to_html(tmp_path / "lens.html"))
    ticks = view.locator(".opd-ticks span").all_text_contents()
    limit = f"{lens.limits['log_ratio']:.3g}"
    assert [t.strip("≤≥") for t in ticks] == [f"−{limit}", "0", limit]
    assert "nats" in view.locator(".opd-legend").text_content()
    i = int(np.argmin(np.abs(lens.channels["log_ratio"].values)))
    view.locator(f"[data-i='{i}']").hover()
    at = float(view.locator(".opd-cursor").evaluate("node => node.style.left").strip("%"))
    share = lens.channels["log_ratio"].values[i] / lens.limits["log_ratio"]
    assert at == pytest.approx(
        50 * (1 + np.sign(share) * np.sqrt(abs(share))), abs=0.1
    )  # as the colours lie


def test_any_tokens_rejoin_and_none_runs(open_page, tmp_path):
    view = open_page(
        TokenLens(made(list(map(str.encode, NASTY)), prompt=NASTY[0]), title=NASTY[2]).to_html(
            tmp_path / "nasty.html"
        )
    )
    whole = set(
        view.evaluate("[...document.querySelectorAll('.opd-lens *')].map((n) => n.localName)")
    )
    assert whole <= {"div", "span", "button", "b", "script", "input"}

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(nasty, max_size=10), st.sampled_from(NASTY))
    def check(pieces, prompt):
        lens = TokenLens(made(pieces, prompt=prompt))
        view.set_content(lens.html())
        view.wait_for_selector("[data-mounted]")
        strip = view.locator(".opd-strip")
        if pieces:
            assert (
                strip.evaluate("node => [...node.children].map((n) => n.textContent).join('')")
                == lens.text
            )
            assert strip.locator("[role=option]").count() == len(pieces)
        assert view.locator(".opd-prompt").text_content() == prompt
        assert view.evaluate("window.broken") is None
        assert view.locator(".opd-lens :is(img, b[onerror], iframe)").count() == 0

    check()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_on_every_colour(open_page, tmp_path, scheme):
    n = 60
    gap = np.linspace(-3, 3, n)
    trace = made([f" t{i}".encode() for i in range(n)], plan={"signed": gap})
    trace = trace.with_columns(
        student_logp=np.zeros(n),
        teacher_logp=gap,
        teacher_reverse_kl=abs(gap),
        kind=[f"kind {i % 8}" for i in range(n)],
    )
    view = open_page(TokenLens(trace).to_html(tmp_path / "lens.html"), color_scheme=scheme)
    for name, colours in (("log ratio", 14), ("signed", 14), ("reverse KL", 14), ("kind", 8)):
        view.get_by_role("button", name=name, exact=True).click()
        found = view.evaluate(CONTRAST)
        assert len({colour for _, _, colour in found}) >= colours
        assert min(ratio for _, ratio, _ in found) >= 4.5, (name, min(found, key=lambda f: f[1]))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_without_scripts_the_colours_and_the_message_stay(open_page, tmp_path, lens, scheme):
    view = open_page(
        lens.to_html(tmp_path / "lens.html"), java_script_enabled=False, color_scheme=scheme
    )
    html = view.locator(".opd-strip").inner_html()
    assert "rgba(0,114,178" in html
    assert "rgba(213,94,0" in html
    assert view.locator(".opd-strip").text_content() == lens.text
    assert "Largest log ratio" in view.locator(".opd-peaks").text_content()
    assert "nats" in view.locator(".opd-legend").text_content()


def test_two_lenses_of_one_notebook_live_side_by_side(open_page, tmp_path, lens):
    path = tmp_path / "two.html"
    path.write_text(
        f"<!doctype html><meta charset=utf-8>{lens.html()}{lens.html()}", encoding="utf-8"
    )
    view = open_page(path)
    assert view.locator(".opd-lens[data-mounted]").count() == 2
    ids = view.evaluate("[...document.querySelectorAll('[id]')].map((n) => n.id)")
    assert len(ids) == len(set(ids)) == 2  # the active token of each


def test_a_student_alone_and_a_training_trace_show_what_they_have(open_page, tmp_path):
    alone, training = TokenLens(made(WORDS, ("student",))), TokenLens(made(WORDS, top=0))
    view = open_page(
        page(
            tmp_path / "p.html",
            title="t",
            lenses=[("alone", alone), ("training", training), ("empty", TokenLens(made([])))],
        )
    )
    first, second, third = view.locator(".opd-lens").all()
    first.locator("[data-i='1']").hover()
    assert first.locator(".opd-row[data-sampled] .opd-word").text_content() == "·cat"
    second.locator("[data-i='1']").hover()
    assert second.locator(".opd-rows .opd-row").count() == 0
    assert second.locator(".opd-fact").count() == len(training.channels)
    assert third.locator(".opd-strip").text_content() == "(no tokens)"


@pytest.mark.parametrize("width", [1200, 480])
def test_a_page_draws_its_curves_and_fits(open_page, tmp_path, lens, width):
    step = np.arange(1, 41)
    history = pd.DataFrame(
        {"step": step, "loss": 1 / step, "entropy": 1 / step, "reward": step / 40}
    )
    path = page(
        tmp_path / "p.html",
        title="A run",
        summary=[("accuracy", 0.3, 0.8, 0.98)],
        figures=[curves(history)],
        lenses=[("after", lens)],
    )
    view = open_page(path, viewport={"width": width, "height": 900})
    view.wait_for_selector(".opd-chart .main-svg")
    assert view.locator(".opd-chart .scatterlayer .trace").count() == 6
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    assert view.locator(".opd-lens[data-mounted]").count() == 1


def test_ten_thousand_tokens_mount_quickly(open_page, tmp_path):
    trace = made([f" w{i % 50}".encode() for i in range(10_000)])
    view = open_page(TokenLens(trace).to_html(tmp_path / "long.html"))
    ms = view.evaluate("""() => {
      const button = document.querySelectorAll(".opd-button")[1], begin = performance.now();
      button.click();
      document.querySelector(".opd-strip").getBoundingClientRect();
      return performance.now() - begin;
    }""")
    assert view.locator("[role=option]").count() == 10_000
    assert ms < 1500
