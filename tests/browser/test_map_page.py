"""The map of methods in a real browser: menus and keys move it, without Python."""

from __future__ import annotations

import pytest

from opdlab.viz import MethodMap
from opdlab.viz.method_map import example_results

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_menus_and_keys_move_it(open_page, tmp_path, axe, scheme):
    wanted = MethodMap(example_results("knob"))
    view = open_page(wanted.to_html(tmp_path / "m.html"), color_scheme=scheme)
    cells, said = view.locator(".opd-mm-button"), view.locator(".opd-mm-said")
    assert cells.count() == len(wanted.df)
    assert cells.first.text_content() == "+0.3"
    assert "Clearly better in 6 of 12 cells, clearly worse in 3" in said.text_content()
    view.get_by_label("held equal").select_option(index=1)
    wanted.budget = "teacher"
    assert [float(x.replace("−", "-")) for x in cells.all_text_contents()] == pytest.approx(
        wanted.df["mean"].tolist(), abs=0.01
    )
    cells.first.click()
    cells.first.press("ArrowDown")
    assert cells.nth(4).get_attribute("aria-pressed") == "true"
    assert "knob 1" in view.locator(".opd-mm-detail b").text_content()
    axe(view)
