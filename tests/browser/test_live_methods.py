"""The views of methods in a real JupyterLab: lines reach Python, and a click has the policies write."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.browser

MADE = """import opdlab
from opdlab import viz
student, teacher, task = opdlab.load('market')
step = opdlab.distill(student, teacher, task, method=opdlab.TOPD(window=6), steps=1, batch=4, lr=0, quiet=True).train().last
forks = viz.Forks(step.trace(), policies=step.policies, prompts=step.rollout.prompts)
regimes = viz.Regimes(step.trace())"""


def test_lines_reach_python_and_policies_write_at_a_click(lab):
    lab.write("methods.ipynb", MADE, "forks.live()", "regimes.live()")
    page = lab.open("methods.ipynb")
    lab.run(page)
    root = page.locator(".jp-OutputArea-output .opd-forks")
    root.locator(".opd-strip [data-i]:not([data-fork])").first.click()
    assert root.locator(".opd-verdict").text_content() == "no windows from here"
    root.get_by_role("button", name="Write new windows here").click()
    page.wait_for_function("!document.querySelector('.opd-forks .opd-verdict').textContent.startsWith('no windows')")
    lab.until(page, "len(forks.windows), forks.windows[forks.selected]['asked']", "5 True")
    root.get_by_role("button", name="The teacher goes on").click()
    page.wait_for_selector(".opd-forks .opd-more")
    said = root.locator(".opd-more").text_content()
    assert said.strip() == lab.python(page, "print(forks.goes_on(forks.selected, 'teacher'))") != ""

    handle = page.locator(".jp-OutputArea-output .opd-regimes .opd-handle-y")
    handle.focus()
    handle.press("ArrowDown")
    at = float(handle.get_attribute("aria-valuenow"))
    lab.until(page, "round(regimes.thresholds['confidence'], 6)", str(round(at, 6)))
    lab.python(page, "regimes.thresholds = {**regimes.thresholds, 'confidence': 1.5}")
    page.wait_for_selector(".opd-regimes .opd-handle-y[aria-valuenow='1.5']")
    page.locator(".opd-regimes .opd-points").press("4")
    lab.until(page, "len(regimes.region), len(regimes.picked) == regimes.quadrants['tokens']['high x, low y']", "4 True")
