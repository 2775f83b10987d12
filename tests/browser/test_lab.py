"""Views in a real JupyterLab: values go to Python and back, outputs survive, keys are safe."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.browser

MADE = """from viz.traces import made
from opdlab import viz
lens = viz.TokenLens(made([b'The', b' cat', b' sat', b' down']), channel='log_ratio')"""
CHOSEN = ".jp-OutputArea-output .opd-lens [aria-selected='true']"


def test_values_go_to_python_and_back(lab):
    lab.write("live.ipynb", MADE, "lens.live()")
    page = lab.open("live.ipynb")
    lab.run(page)
    page.wait_for_selector(CHOSEN)
    strip = page.locator(".opd-lens .opd-strip")
    strip.locator("[data-i='3']").click()
    lab.until(page, "lens.selected", "3")
    strip.press("Home")
    strip.press("2")
    lab.until(page, "lens.selected, lens.channel", "0 reverse_kl")
    lab.python(page, "lens.selected = 2")
    page.wait_for_selector(f"{CHOSEN}[data-i='2']")
    cells = page.locator(".jp-Cell").count()
    strip.press("x")  # in Lab: cut the cell
    strip.press("d")
    strip.press("d")
    assert page.locator(".jp-Cell").count() == cells
    assert not page.locator(".opd-detached").is_visible()


def test_an_output_is_interactive_beside_the_live_widget_and_linked_to_it(lab):
    lab.write("both.ipynb", MADE, "lens", "lens.live()")
    page = lab.open("both.ipynb")
    lab.run(page)
    page.wait_for_function("document.querySelectorAll('.opd-lens .opd-strip[role=listbox]').length === 2")
    first, second = page.locator(".opd-lens .opd-strip").all()
    first.locator("[data-i='1']").click()
    assert second.locator("[aria-selected='true']").get_attribute("data-i") == "1"
    lab.until(page, "lens.selected", "1")  # an HTML output reaches Python through the live view that follows it
