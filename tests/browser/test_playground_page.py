"""The playground in a real browser: JavaScript agrees with Python, and every control works."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from viz.traces import NASTY, made

from opdlab import losses
from opdlab.losses import DIVERGENCES, Generator
from opdlab.viz import Playground, embed, page, toys
from opdlab.viz.playground_losses import IN_SCRIPT

pytestmark = pytest.mark.browser

PROBE = (
    f"<script type=module>{embed.bundle(['toys.js'])}\nwindow.toys = {{ FORMS, RATIOS, pushOf,"
    " pullsOf, fieldOf, walkOf, fitHills };</script>"
)
READ = """([name, parameter, clip, mass, temperature, steps, teacher, student]) => {
  const T = window.toys, push = T.pushOf(name, parameter, clip);
  const plain = (v) => [...v].map((x) => (Number.isNaN(x) ? null : x));
  const form = T.FORMS[name](parameter);
  return {
    f: plain(T.RATIOS.map((x) => form.f(x))),
    weight: plain(T.RATIOS.map((x) => form.weight(x))),
    push: plain(T.RATIOS.map((x) => push.weight(x))),
    pulls: plain(T.pullsOf(push, mass)),
    field: T.fieldOf(push, teacher, temperature).flat(),
    walk: T.walkOf(push, student, teacher, steps, temperature).flat(),
    fit: T.fitHills(push, steps, temperature),
  };
}"""
DRAWN = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"


@pytest.mark.parametrize("at", [0.5, 0.2])
def test_the_script_computes_what_python_computes(open_page, tmp_path, at):
    path = tmp_path / "probe.html"
    path.write_text(f"<!doctype html><meta charset=utf-8>{PROBE}", encoding="utf-8")
    view = open_page(path)
    view.wait_for_function("!!window.toys")
    teacher, student, clip, mass, temperature, steps = (
        [0.5, 0.3, 0.2],
        [0.1, 0.1, 0.8],
        3 * at,
        at,
        0.5 + at,
        60,
    )
    assert set(view.evaluate("Object.keys(window.toys.FORMS)")) == set(IN_SCRIPT)
    for name in IN_SCRIPT:
        entry = DIVERGENCES[name]
        g = Generator(name, **({entry.parameter.name: at} if entry.parameter else {}))
        got = view.evaluate(READ, [name, at, clip, mass, temperature, steps, teacher, student])
        push = toys.of_generator(g, clip)
        q, p = (torch.tensor(x, dtype=torch.float64) for x in (teacher, student))
        want = {
            "f": g.f(toys.X),
            "weight": g.weight(toys.X),
            "push": toys.weights(push),
            "pulls": toys.pulls(push, mass),
            "field": toys.field(push, q, temperature).ravel(),
            "walk": toys.path(push, p, q, steps, temperature).ravel(),
            "fit": toys.fit(push, steps, temperature),
        }
        for what, numbers in want.items():
            read = np.array([np.nan if v is None else v for v in got[what]], float)
            loose = name == "total_variation" and what in (
                "walk",
                "fit",
                "push",
                "pulls",
            )  # it jumps at 0, where a rounding decides
            np.testing.assert_allclose(
                read,
                np.asarray(numbers),
                rtol=1e-6,
                atol=0.6 if loose else 1e-6,
                err_msg=f"{name} {what}",
            )


def test_everything_moves_what_it_should(open_page, tmp_path, axe):
    view = open_page(
        Playground(
            {NASTY[0]: losses.reverse_kl, "f": "forward_kl"},
            trace=made([b"a", b" b", b" c"]),
            title=NASTY[2],
        ).to_html(tmp_path / "p.html")
    )
    worlds, chips = view.locator(".opd-world"), view.locator(".opd-losses button")
    arrows = lambda: view.locator(".opd-arrows").evaluate_all(
        "nodes => nodes.map((n) => n.getAttribute('d'))"
    )
    heads = lambda: worlds.locator("h4").all_text_contents()
    assert heads() == [f"{NASTY[0]} (yours)", "forward KL"]
    assert [worlds.nth(i).locator(".opd-hills b").text_content() for i in (0, 1)] == [
        "sits on the right hill",
        "covers both hills",
    ]
    assert "trains the reverse KL" in view.locator(".opd-card").text_content()
    view.get_by_role("button", name="reverse KL", exact=True).click()
    assert heads()[-1] == "reverse KL"
    own, forward, reverse = arrows()
    assert (
        own[:40] == reverse[:40] != forward[:40]
    )  # single precision against double: the first arrows read the same

    dot = worlds.nth(2).locator(".opd-dot-teacher")
    dot.scroll_into_view_if_needed()
    box = dot.bounding_box()
    view.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    view.mouse.down()
    view.mouse.move(box["x"] + 60, box["y"] - 40, steps=3)
    view.mouse.up()
    view.locator(".opd-stale", has_text="saved page").first.wait_for()
    moved = arrows()
    assert (moved[0], moved[1] != forward, moved[2] != reverse) == (
        own,
        True,
        True,
    )  # without Python the own loss stays, and says so
    said = dot.get_attribute("aria-label")
    dot.press("ArrowUp")
    view.evaluate(DRAWN)
    share = lambda text: int(text.split(" c ")[1].split(" %")[0])
    assert share(dot.get_attribute("aria-label")) in (share(said) + 2, share(said) + 3)

    view.get_by_label("steps taken").fill("0")
    view.locator(".opd-world >> nth=2 >> .opd-hills >> text=centre 0.6, width 1").wait_for()
    view.get_by_label("clip the push at").fill("1")
    told = view.locator(".opd-knob output").all_text_contents()
    assert (told[1], told[4]) == ("± 1", "0")
    view.locator(".opd-strip [data-i='2']").click()
    assert view.locator(".opd-token-head").text_content().startswith("position 2")
    assert (
        view.locator(".opd-swing").count() == 2 * view.locator(".opd-token-row:has(.opd-p)").count()
    )
    for chip in ("total variation", "pearson"):
        view.get_by_role("button", name=chip).click()
    assert len(heads()) == 4
    assert chips.locator("[aria-pressed=true]").count() == 0
    assert view.locator(".opd-losses button[aria-pressed=true]").count() == 4
    assert view.evaluate("window.broken") is None
    axe(view)


def test_dark_and_narrow_it_fits(open_page, tmp_path, axe):
    lenses = [("", Playground()), ("", Playground([]))]
    view = open_page(
        page(tmp_path / "p.html", title="t", lenses=lenses),
        color_scheme="dark",
        viewport={"width": 480, "height": 900},
    )
    assert view.evaluate("document.documentElement.scrollWidth") <= 480
    axe(view)
