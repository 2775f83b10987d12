"""Views in a real JupyterLab: values go to Python and back, outputs survive, keys are safe, cells
train and are interrupted.
"""

from __future__ import annotations

import json
import re

import nbformat
import pytest
from browser.jupyter import IDLE
from nbconvert import HTMLExporter

pytestmark = pytest.mark.browser

MADE = """from viz.traces import made
from opdlab import viz
lens = viz.TokenLens(made([b'The', b' cat', b' sat', b' down']), channel='log_ratio')"""
ROLLOUTS = """import numpy as np
from viz.traces import made, several
from opdlab import viz
viz.rollouts.ROOM = 3
texts = [made([b'The', b' cat', b' sat'], seed=i, prompt=f'Question {i}?') for i in range(3)]
trace = several(*texts).with_columns(teacher_reverse_kl=np.repeat([1.0, 2.0, 3.0], 3))
view = viz.Rollouts(trace)"""
TRAIN = """import opdlab as opd
from opdlab import viz
student, teacher, task = opd.load('market')
run = opd.distill(student, teacher, task, batch=2, steps=5000, max_new_tokens=6, quiet=True)
board = viz.RunBoard(run)"""
METHODS = """import opdlab
from opdlab import viz
student, teacher, task = opdlab.load('market')
method = opdlab.TOPD(window=6)
run = opdlab.distill(student, teacher, task, method=method, steps=1, batch=4, lr=0, quiet=True)
step = run.train().last
forks = viz.Forks(step.trace(), policies=step.policies, prompts=step.rollout.prompts)
regimes = viz.Regimes(step.trace())"""
BRANCHES = """import opdlab
from opdlab import viz
student, teacher, task = opdlab.load('market')
rollout = student.sample(task.prompts(2, split='test'), max_new_tokens=24, seed=0)
trace = opdlab.score(rollout, student, teacher)
lens = viz.TokenLens(trace)
both = {'student': student, 'teacher': teacher}
branches = viz.Branches(trace, policies=both, rollout=rollout, task=task, n=2)
worst = int(trace.sample(0).column('teacher_reverse_kl').argmax())"""
OWN_LOSS = """from opdlab import viz
scale = [1.0]
def mine(rows):
    return scale[0] * (rows.student.exp() * (rows.student - rows.teacher)).sum(-1)
play = viz.Playground({'mine': mine})"""
DARKNESS = (
    "node => getComputedStyle(node).backgroundColor.match(/[\\d.]+/g).slice(0, 3).every((v) =>"
    " Number(v) < 60)"
)
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
    assert (
        page.locator(".jp-OutputArea-output .opd-strip").count() == 1
    )  # the widget, and not the still picture beside it
    lab.save(page)
    (output,) = json.loads((lab.root / "live.ipynb").read_text())["cells"][1]["outputs"]
    assert "Largest log ratio" in "".join(
        output["data"]["text/html"]
    )  # for GitHub, nbconvert, and whoever has no kernel
    assert "TokenLens: completion 0, 4 tokens" in "".join(output["data"]["text/plain"])


def test_notebook_7_shows_outputs_and_live_views_and_python_hears_of_them(lab):
    lab.write("seven.ipynb", MADE, "lens", "lens.live()", "print('chosen', lens.selected)")
    page = lab.open_afresh("seven.ipynb", front_end="notebooks")
    cells = page.locator(".jp-CodeCell")
    for _ in range(60):  # what is asked before the kernel is there is lost
        cells.nth(0).locator(".cm-content").click()
        page.keyboard.press("Shift+Enter")
        page.wait_for_timeout(2000)
        if re.search(r"\d", cells.nth(0).locator(".jp-InputPrompt").text_content() or ""):
            break
    for _ in range(2):
        page.keyboard.press("Shift+Enter")
    strips = page.locator(".jp-OutputArea-output .opd-lens .opd-strip[role=listbox]")
    strips.nth(1).wait_for()
    strips.nth(0).locator("[data-i='3']").click()
    assert strips.nth(1).locator("[aria-selected='true']").get_attribute("data-i") == "3"
    cells.nth(3).locator(".cm-content").click()
    page.keyboard.press("Shift+Enter")
    page.get_by_text("chosen 3", exact=True).wait_for()
    page.context.close()


def test_an_output_is_interactive_beside_the_live_widget_and_linked_to_it(lab):
    lab.write("both.ipynb", MADE, "lens", "lens.live()")
    page = lab.open("both.ipynb")
    lab.run(page)
    page.wait_for_function(
        "document.querySelectorAll('.opd-lens .opd-strip[role=listbox]').length === 2"
    )
    first, second = page.locator(".opd-lens .opd-strip").all()
    first.locator("[data-i='1']").click()
    assert second.locator("[aria-selected='true']").get_attribute("data-i") == "1"
    lab.until(
        page, "lens.selected", "1"
    )  # an HTML output reaches Python through the live view that follows it


def test_a_restarted_kernel_leaves_a_badge_and_a_view_that_still_moves(lab):
    lab.write("restart.ipynb", MADE, "lens.live()")
    page = lab.open("restart.ipynb")
    lab.run(page)
    page.wait_for_selector(CHOSEN)
    strip, badge = page.locator(".opd-lens .opd-strip"), page.locator(".opd-detached")
    strip.locator("[data-i='1']").click()
    lab.until(page, "lens.selected", "1")
    assert not badge.is_visible()
    lab.restart(page)
    strip.locator("[data-i='3']").click()
    badge.wait_for(state="visible", timeout=120_000)
    assert badge.text_content().startswith("detached: run the cell again")
    assert page.locator(CHOSEN).get_attribute("data-i") == "3"
    lab.run(page)
    page.wait_for_function(
        "!document.querySelector('.opd-detached') ||"
        " [...document.querySelectorAll('.opd-detached')].every((n) => n.hidden)"
    )
    page.locator(".opd-lens .opd-strip [data-i='0']").click()
    lab.until(page, "lens.selected", "0")


def test_an_executed_notebook_survives_reopening_distrust_and_export(lab, browser, tmp_path):
    lab.write("kept.ipynb", MADE, "lens")
    page = lab.open("kept.ipynb")
    lab.run(page)
    page.wait_for_selector(CHOSEN)
    lab.save(page)

    page = lab.open_afresh(
        "kept.ipynb", dark=True
    )  # by the same person: trusted, so the script runs
    page.wait_for_selector(CHOSEN)
    page.locator(".opd-lens .opd-strip [data-i='0']").click()
    assert page.locator(CHOSEN).get_attribute("data-i") == "0"
    assert page.locator(".opd-lens").evaluate(DARKNESS)
    page.context.close()

    book = json.loads((lab.root / "kept.ipynb").read_text())
    book["cells"].append(
        {
            "cell_type": "markdown",
            "id": "more",
            "metadata": {},
            "source": "changed by somebody else",
        }
    )
    (lab.root / "foreign.ipynb").write_text(json.dumps(book))
    page = lab.open_afresh("foreign.ipynb")  # not trusted: no script, but colours and message
    still = page.locator(".jp-OutputArea-output .opd-strip")
    still.wait_for()
    assert still.text_content() == "The cat sat down"
    assert "rgba(" in still.inner_html()
    assert "Largest log ratio" in page.locator(".jp-OutputArea-output .opd-peaks").text_content()
    assert page.locator("[data-mounted]").count() == 0

    html, _ = HTMLExporter().from_notebook_node(nbformat.reads(json.dumps(book), as_version=4))
    (tmp_path / "kept.html").write_text(html, encoding="utf-8")
    context = browser.new_context(offline=True)
    page = context.new_page()
    page.goto((tmp_path / "kept.html").as_uri(), wait_until="domcontentloaded")
    page.wait_for_selector(".opd-lens[data-mounted]")
    page.locator(".opd-lens .opd-strip [data-i='2']").click()
    assert page.locator(".opd-lens [aria-selected='true']").get_attribute("data-i") == "2"
    context.close()


def test_a_live_table_fetches_the_tokens_that_its_page_lacks(lab):
    lab.write("table.ipynb", ROLLOUTS, "view.live()")
    page = lab.open("table.ipynb")
    lab.run(page)
    strip, text = (
        page.locator(".opd-rollouts-text .opd-strip"),
        page.locator(".opd-rollouts-text .opd-prompt"),
    )
    strip.wait_for()
    assert lab.python(page, "print(view.rollout, sorted(set(view.df['sample'])))") == "2 [2]"
    page.locator(".opd-grid").press("ArrowDown")
    page.wait_for_function(
        "document.querySelector('.opd-rollouts-text .opd-prompt')?.textContent !== 'Question 2?'"
    )
    chosen = (text.text_content() or "").removeprefix("Question ").removesuffix("?")
    lab.until(page, "view.rollout", chosen)
    assert strip.text_content() == "The cat sat"
    strip.locator("[data-i='1']").hover()
    shown = lab.python(
        page,
        "print(viz.markup.format_number(viz.channels.find_channels(view.whole.sample(view.rollout))['log_ratio'].values[1],"
        " True))",
    )
    assert (
        f"log ratio {shown} nats" in page.locator(".opd-rollouts .opd-timeline-told").text_content()
    )


def test_a_cell_that_trains_is_followed_interrupted_and_reopened(lab):
    lab.write("board.ipynb", TRAIN, "board.train()")
    page = lab.open("board.ipynb")
    lab.command(page, "notebook:run-all-cells")
    page.locator(".jp-OutputArea-output .opd-board .opd-l").first.wait_for(
        timeout=600_000
    )  # while it trains
    assert page.locator(".opd-board[data-mounted]").count() == 0
    lab.command(page, "notebook:interrupt-kernel")
    page.locator(".opd-board[data-mounted]").wait_for(timeout=240_000)
    assert page.locator(".jp-OutputArea-output .opd-board").count() == 1  # one picture, redrawn
    page.wait_for_function(IDLE)
    done = int(lab.python(page, "print(run.done)"))
    assert 0 < done < 5000
    assert f"OPD {done} of 5000 steps" in page.locator(".opd-said").text_content()
    assert lab.python(page, "step = next(run); print(step.number)") == str(done + 1)
    lab.save(page)
    again = lab.open_afresh("board.ipynb")
    again.locator(".opd-board[data-mounted] input").wait_for(timeout=240_000)
    again.locator(".opd-board input").fill("1")
    assert again.locator(".opd-board .opd-at").text_content() == "step 1"


def test_an_own_loss_is_evaluated_where_it_lives(lab):
    lab.write("play.ipynb", OWN_LOSS, "play.live()")
    page = lab.open("play.ipynb")
    lab.run(page)
    arrows = page.locator(".opd-playground .opd-arrows").first
    arrows.wait_for(state="attached")
    before = arrows.get_attribute("d")
    lab.python(page, "play.teacher = [0.1, 0.1, 0.8]")
    page.wait_for_function(
        "before => document.querySelector('.opd-arrows').getAttribute('d') !== before", arg=before
    )
    up = arrows.get_attribute("d")
    lab.python(
        page, "scale[0] = -1.0"
    )  # the function lives there: the next question is answered by what it is now
    page.get_by_label("steps taken").fill("100")
    lab.until(page, "play.steps", "100")
    page.locator(".opd-world .opd-hills figcaption").first.wait_for()
    page.wait_for_function(
        "up => document.querySelector('.opd-arrows').getAttribute('d') !== up", arg=up
    )


def test_lines_reach_python_and_policies_write_at_a_click(lab):
    lab.write("methods.ipynb", METHODS, "forks.live()", "regimes.live()")
    page = lab.open("methods.ipynb")
    lab.run(page)
    root = page.locator(".jp-OutputArea-output .opd-forks")
    root.locator(".opd-strip [data-i]:not([data-fork])").first.click()
    assert root.locator(".opd-verdict").text_content() == "no windows from here"
    root.get_by_role("button", name="Write new windows here").click()
    page.wait_for_function(
        "!document.querySelector('.opd-forks .opd-verdict').textContent.startsWith('no windows')"
    )
    lab.until(page, "len(forks.windows), forks.windows[forks.selected]['asked']", "5 True")
    root.get_by_role("button", name="The teacher goes on").click()
    page.wait_for_selector(".opd-forks .opd-more")
    said = root.locator(".opd-more").text_content()
    assert (
        said.strip()
        == lab.python(page, "print(forks.continue_text(forks.selected, 'teacher'))")
        != ""
    )

    handle = page.locator(".jp-OutputArea-output .opd-regimes .opd-handle-y")
    handle.focus()
    handle.press("ArrowDown")
    at = float(handle.get_attribute("aria-valuenow"))
    lab.until(page, "round(regimes.thresholds['confidence'], 6)", str(round(at, 6)))
    lab.python(page, "regimes.thresholds = {**regimes.thresholds, 'confidence': 1.5}")
    page.wait_for_selector(".opd-regimes .opd-handle-y[aria-valuenow='1.5']")
    page.locator(".opd-regimes .opd-points").press("4")
    lab.until(
        page,
        "len(regimes.region), len(regimes.picked) == regimes.quadrants['tokens']['high x, low y']",
        "4 True",
    )


def test_a_forced_token_grows_a_tree_where_the_kernel_lives(lab):
    """Chosen in the lens, forced in the branches: both models go on from both tokens."""
    lab.write("grow.ipynb", BRANCHES, "lens.live()", "branches.live()")
    page = lab.open("grow.ipynb")
    lab.run(page)
    worst = lab.python(page, "print(worst)")
    root = page.locator(".jp-OutputArea-output .opd-branches")
    force = root.get_by_role("button", name="Force the teacher")
    force.wait_for()  # views hear of a choice once they are there
    page.locator(f".jp-OutputArea-output .opd-lens .opd-strip [data-i='{worst}']").click()
    root.get_by_text(f"at position {worst}").wait_for()
    force.click()
    lab.until(page, "list(branches.trees)", f"[{worst}]")
    root.get_by_text("the teacher’s token", exact=True).wait_for()
    grown = "[len(texts) for one in branches.trees[worst].branches for texts in one.texts.values()]"
    assert lab.python(page, f"print({grown})") == "[2, 2, 2, 2]"
    assert root.get_by_text("the teacher goes on").count() == 2
