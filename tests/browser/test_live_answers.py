"""Live views that ask Python, in a real JupyterLab: trees, reasons and labels."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.browser

MADE = """import opdlab as opd
from opdlab import viz
from opdlab.data.labels import Labels
student, teacher, task = opd.load('market')
rollout = student.sample(task.prompts(2, seed=1), seed=1)
trace = opd.score(rollout, student, teacher)
trace.save('t.parquet')
both = {'student': student, 'teacher': teacher}
branches = viz.Branches(trace, policies=both, rollout=rollout, task=task, n=2)
why = viz.Why(trace, policies=both, rollout=rollout)
marks = viz.Marks(trace, Labels.beside('t.parquet'))"""


def test_a_token_of_the_lens_is_forced_explained_and_labelled(lab):
    lab.write(
        "answers.ipynb",
        MADE,
        "viz.TokenLens(trace).live()",
        "branches.live()",
        "why.live()",
        "marks.live()",
    )
    page = lab.open("answers.ipynb")
    lab.run(page)
    output = page.locator(".jp-OutputArea-output")
    output.locator(".opd-lens .opd-strip [data-i='15']").click()
    lab.until(page, "(branches.selected, why.selected)", "(15, 15)")
    output.locator(".opd-branches .opd-force").click()
    branch = output.locator(".opd-branches .opd-branch").first
    branch.wait_for()
    lab.until(page, "list(branches.trees)", "[15]")
    output.locator(".opd-why .opd-ask-why").click()
    output.locator(".opd-why .opd-piece").first.wait_for()
    lab.until(page, "list(why.reasons)", "[15]")
    label = output.locator(".opd-marks input").first
    label.fill("slip")
    label.press("Enter")
    lab.until(page, "[m.label for m in Labels.beside('t.parquet')]", "['slip']")
