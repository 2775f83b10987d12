"""A page of a run that trains loads itself again and stays where the reader is."""

from __future__ import annotations

from playwright.sync_api import expect

from opdlab.viz.page import page as write_page


def write(path, number: int, refresh: float = 0.5) -> None:
    lines = "\n\n".join(f"line {i}" for i in range(200))
    write_page(path, title=f"state {number}", note=lines, refresh=refresh)


def test_it_shows_the_next_state_at_the_same_place(tmp_path, open_page):
    path = tmp_path / "board.html"
    write(path, 1)
    page = open_page(path)
    page.evaluate("scrollTo(0, 700)")
    write(path, 2)
    expect(page).to_have_title("state 2")
    write(path, 3, refresh=0)  # the next state rests, so that the place can be read
    expect(page).to_have_title("state 3")
    assert page.evaluate("scrollY") == 700


def test_it_waits_while_the_reader_selects(tmp_path, open_page):
    path = tmp_path / "board.html"
    write(path, 1)
    page = open_page(path)
    page.evaluate("getSelection().selectAllChildren(document.querySelector('p'))")
    write(path, 2)
    page.wait_for_timeout(1600)
    assert "state 1" in page.title()
    page.evaluate("getSelection().removeAllRanges()")
    expect(page).to_have_title("state 2")


def test_a_finished_run_rests(tmp_path, open_page):
    path = tmp_path / "board.html"
    write(path, 1, refresh=0)
    page = open_page(path)
    write(path, 2, refresh=0)
    page.wait_for_timeout(1200)
    assert "state 1" in page.title()
