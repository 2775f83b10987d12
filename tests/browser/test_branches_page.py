"""Branches in a real browser: the tree of the chosen token, and texts that nothing can break."""

from __future__ import annotations

import pytest
from viz.traces import NASTY

from opdlab.viz import Branches, TokenLens, page

pytestmark = pytest.mark.browser
WORDS = [*map(str.encode, NASTY[:6]), b" a", b" b"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_tree_of_a_token_is_drawn(open_page, tmp_path, axe, scheme):
    view = Branches.example(WORDS, NASTY[0])
    path = page(tmp_path / "p.html", title="p", lenses=[("", view), ("", TokenLens(view.trace))])
    shown = open_page(path, color_scheme=scheme, viewport={"width": 480, "height": 1200})
    tree = shown.locator(".opd-tree")
    branches = tree.locator(".opd-branch")
    assert branches.count() == 2
    results = tree.locator(".opd-writer > .opd-value").all_text_contents()
    assert results == ["1 of 2 right", "1 of 1 right"] * 2
    tree.locator("summary").first.click()
    texts = tree.locator(".opd-go .opd-text")
    assert texts.first.text_content() == NASTY[0]
    # A token of another view of the page: no tree there; n goes back to the one that has one.
    shown.locator(".opd-lens [data-i='3']").click()
    assert branches.count() == 0
    assert "No tree here" in tree.text_content()
    shown.locator(".opd-branches .opd-strip").press("n")
    assert branches.count() == 2
    assert shown.evaluate("window.broken") is None
    axe(shown, ".opd-branches")


def test_a_token_that_is_chosen_already_can_be_chosen_for_the_other_views(open_page, tmp_path):
    """Each view begins at a token of its own choice; a click says which one is meant."""
    view = Branches.example(WORDS, NASTY[0])
    lens = TokenLens(view.trace)
    shown = open_page(page(tmp_path / "p.html", title="p", lenses=[("", view), ("", lens)]))
    chosen = shown.locator(".opd-lens .opd-strip [aria-selected='true']")
    other = shown.locator(".opd-branches .opd-strip [aria-selected='true']")
    assert chosen.get_attribute("data-i") != other.get_attribute("data-i")
    chosen.click()
    assert chosen.get_attribute("data-i") == other.get_attribute("data-i")
