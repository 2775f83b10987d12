"""Measure the notebooks as pages of JupyterLab: where the first picture begins, how much is code.

    python -m tests.browser.measure_pages [notebooks/00_start.ipynb …]

The page is that of a fresh clone: 1280 pixels wide, the notebook not trusted, nothing run.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from browser.jupyter import Lab  # noqa: E402
from playwright.sync_api import Page, sync_playwright  # noqa: E402

FOLD = 780  # pixels of a notebook that JupyterLab shows at first
WIDTH = 1280
MEASURE = """() => {
  const cells = [...document.querySelectorAll(".jp-Notebook .jp-Cell")];
  const top = cells[0].getBoundingClientRect().top;
  const bottom = cells.at(-1).getBoundingClientRect().bottom;
  const heightOf = (nodes) =>
    [...nodes].reduce((sum, node) => sum + node.getBoundingClientRect().height, 0);
  const code = document.querySelectorAll(".jp-CodeCell .jp-InputArea-editor");
  const shown = document.querySelectorAll(
    ".jp-OutputArea-output img, .jp-OutputArea-output table, .jp-OutputArea-output .js-plotly-plot",
  );
  const first = [...shown].map((n) => n.getBoundingClientRect()).find((box) => box.height > 40);
  return { picture: first ? first.top - top : -1, code: heightOf(code), height: bottom - top };
}"""


@dataclass(frozen=True)
class PageSize:
    """A notebook's page.

    Attributes:
        picture: Where the first picture or table begins, in pixels from the top; -1 for none.
        code: Height of all code that is not folded, in pixels.
        height: Height of the notebook, in pixels.
    """

    picture: float
    code: float
    height: float

    @property
    def share_of_code(self) -> float:
        """The share of the height that is code."""
        return self.code / self.height


@contextmanager
def whole_notebooks(lab: Lab) -> Iterator[None]:
    """Let JupyterLab put all cells on the page, seen or not."""
    settings = lab.theme.parents[1] / "notebook-extension" / "tracker.jupyterlab-settings"
    settings.parent.mkdir(exist_ok=True)
    settings.write_text('{"windowingMode": "none"}')
    yield
    settings.unlink()


def measure(lab: Lab, path: Path) -> PageSize:
    """Open a copy of a notebook and measure its page."""
    name = path.name
    (lab.root / name).write_bytes(path.read_bytes())
    page = lab.open_afresh(name)
    page.set_viewport_size({"width": WIDTH, "height": FOLD + 120})
    _settle(page)
    found = page.evaluate(MEASURE)
    page.context.close()
    return PageSize(**found)


def _settle(page: Page) -> None:
    """Wait until nothing changes its height any more."""
    before, heights = -1.0, 0
    for _ in range(60):
        height = page.evaluate(MEASURE)["height"]
        heights = heights + 1 if height == before and height > FOLD else 0
        if heights == 4:
            return
        before = height
        page.wait_for_timeout(500)


def main(names: list[str]) -> None:
    """Print a line for each notebook."""
    import shutil

    paths = [Path(name) for name in names] or sorted((ROOT / "notebooks").glob("*.ipynb"))
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        lab = Lab(Path(folder), browser)
        try:
            print("notebook                 picture at  code  height")
            with whole_notebooks(lab):
                for path in paths:
                    size = measure(lab, path)
                    at, share = f"{size.picture:7.0f} px", f"{size.share_of_code:5.0%}"
                    print(f"{path.stem:24s} {at} {share} {size.height:7.0f} px", flush=True)
        finally:
            lab.close()
            browser.close()


if __name__ == "__main__":
    main(sys.argv[1:])
