"""The notebooks as pages of JupyterLab: pictures first, and little code."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser.measure_pages import FOLD, measure, whole_notebooks

pytestmark = pytest.mark.browser
NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


# The notebook with the most code, and one whose first picture is furthest down; the script
# tests/browser/measure_pages.py measures all.
@pytest.mark.parametrize("name", ["01_from_scratch", "23_black_box"])
def test_the_first_picture_is_above_the_fold_and_code_is_a_quarter_at_most(lab, name):
    with whole_notebooks(lab):
        size = measure(lab, NOTEBOOKS / f"{name}.ipynb")
    assert 0 < size.picture < FOLD
    assert size.share_of_code <= 0.25
