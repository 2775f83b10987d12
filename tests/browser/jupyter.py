"""A real JupyterLab for the tests: no network, no token, folders of its own; notebooks made from
sources, opened in Chromium.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from playwright.sync_api import Browser, Page, Request

KERNEL = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel"
IDLE = f"{KERNEL}?.status === 'idle'"
RAN = (
    "[...document.querySelectorAll('.jp-CodeCell .jp-InputArea-prompt')].every((n) =>"
    " /\\[\\d+\\]/.test(n.textContent))"
)
SAY = """(source) => {
  window.said = null;
  let text = "";
  const { session } = window.jupyterapp.shell.currentWidget.sessionContext;
  const future = session.kernel.requestExecute({ code: source });
  future.onIOPub = ({ content }) => {
    text += content.text ?? (content.ename ? `${content.ename}: ${content.evalue}` : "");
  };
  future.done.then(() => (window.said = text));
}"""
FOLDERS = (
    "JUPYTER_CONFIG_DIR",
    "JUPYTER_DATA_DIR",
    "JUPYTER_RUNTIME_DIR",
    "IPYTHONDIR",
    "JUPYTERLAB_SETTINGS_DIR",
    "JUPYTERLAB_WORKSPACES_DIR",
)
SPEC = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


ALONE = """async ([name, kernel]) => {
  const { commands, shell } = window.jupyterapp;
  // Without the question whether to save.
  for (const old of [...shell.widgets("main")]) old.dispose();
  const options = { path: name, factory: "Notebook", kernel: { id: kernel } };
  await commands.execute("docmanager:open", options);
}"""


class Lab:
    """A running server.

    `write` a notebook, `open` it, `run` it, `python` in it, `save` and `restart` it.

    A window of JupyterLab takes four seconds and a kernel that knows opdlab six, so tests share one
    of each: names and settings that a cell leaves behind are there in the next test.
    """

    def __init__(self, root: Path, browser: Browser) -> None:
        self.root, self.browser, self.contexts = root / "work", browser, []
        self.window: Page | None = None
        self.kernel = ""
        self.root.mkdir()
        self.requests: list[str] = []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        env = (
            os.environ
            | {name: str(root / name.lower()) for name in FOLDERS}
            | {"OPDLAB_RENDERER": "html", "PYTHONPATH": _tests()}
        )
        settings = Path(env["JUPYTERLAB_SETTINGS_DIR"]) / "@jupyterlab" / "apputils-extension"
        settings.mkdir(parents=True)
        (settings / "notification.jupyterlab-settings").write_text(
            '{"fetchNews": "false", "checkForUpdates": false}'
        )
        self.theme = settings / "themes.jupyterlab-settings"
        options = [
            "--no-browser",
            "--allow-root",
            "--ip=127.0.0.1",
            f"--port={self.port}",
            "--ServerApp.port_retries=0",
            "--IdentityProvider.token=",
            "--ServerApp.password=",
            "--ServerApp.disable_check_xsrf=True",
            f"--ServerApp.root_dir={self.root}",
            "--LabApp.expose_app_in_browser=True",
            "--LabApp.extension_manager=readonly",
        ]
        log = open(root / "server.log", "w")  # noqa: SIM115
        self.server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options], env=env, stdout=log, stderr=log
        )
        self._wait(root / "server.log")

    def write(self, name: str, *cells: str) -> None:
        """A notebook of code cells; without a kernelspec Lab would open a dialog."""
        book = [
            {
                "cell_type": "code",
                "id": f"c{i}",
                "metadata": {},
                "outputs": [],
                "execution_count": None,
                "source": source,
            }
            for i, source in enumerate(cells)
        ]
        (self.root / name).write_text(
            json.dumps({"cells": book, "metadata": SPEC, "nbformat": 4, "nbformat_minor": 5})
        )

    def open(self, name: str) -> Page:
        """The notebook alone in the window that all tests share, on the kernel that they share."""
        if self.window is None:
            self.window = self.open_afresh(name)
            self.window.wait_for_function(IDLE, timeout=600_000)
            self.kernel = self.window.evaluate(f"{KERNEL}.id")
        else:
            self.window.evaluate(ALONE, [name, self.kernel])
            self.window.wait_for_function(IDLE, timeout=600_000)
        return self.window

    def open_afresh(self, name: str, *, dark: bool = False, front_end: str = "lab/tree") -> Page:
        """The notebook in a window of its own, as one finds it that opens JupyterLab at it, or
        Notebook 7 (`front_end="notebooks"`); its kernel may not be ready.
        """
        self.theme.write_text(
            json.dumps({"theme": "JupyterLab Dark" if dark else "JupyterLab Light"})
        )
        context = self.browser.new_context(viewport={"width": 1200, "height": 1000})
        self.contexts.append(context)
        page = context.new_page()
        page.on("request", self._note)
        page.goto(f"http://127.0.0.1:{self.port}/{front_end}/{name}?reset")
        page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=600_000)
        return page

    def run(self, page: Page) -> None:
        """All cells, to the end."""
        self.command(page, "notebook:run-all-cells")
        page.wait_for_function(RAN, timeout=900_000)

    def python(self, page: Page, source: str) -> str:
        """What a statement prints, run in the notebook's kernel as a new last cell would."""
        page.evaluate(SAY, source)
        page.wait_for_function("window.said !== null", timeout=600_000)
        return str(page.evaluate("window.said")).strip()

    def until(self, page: Page, source: str, wanted: str, seconds: float = 120) -> None:
        """Waits until a Python expression prints what is wanted; asserts that it did."""
        end, said = time.monotonic() + seconds, ""
        while time.monotonic() < end and (said := self.python(page, f"print({source})")) != wanted:
            time.sleep(0.1)
        assert said == wanted

    def save(self, page: Page) -> None:
        self.command(page, "docmanager:save")
        page.wait_for_function(
            "!window.jupyterapp.shell.currentWidget.context.model.dirty", timeout=240_000
        )

    def restart(self, page: Page) -> None:
        """The kernel, without the question."""
        page.evaluate(
            "void (window.restarted = false,"
            " window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart().then(()"
            " => (window.restarted = true)))"
        )
        page.wait_for_function("window.restarted", timeout=600_000)
        page.wait_for_function(IDLE, timeout=600_000)

    def command(self, page: Page, name: str) -> None:
        page.evaluate(
            f"void window.jupyterapp.commands.execute({json.dumps(name)})"
        )  # without void a hanging command hangs the test

    def close(self) -> None:
        for context in self.contexts:
            context.close()
        self.server.terminate()
        try:
            self.server.wait(15)
        except subprocess.TimeoutExpired:
            self.server.kill()
            self.server.wait()

    def foreign(self) -> Sequence[str]:
        """Requests that did not go to this server."""
        own = (f"http://127.0.0.1:{self.port}/", f"ws://127.0.0.1:{self.port}/", "data:", "blob:")
        return [url for url in self.requests if not url.startswith(own)]

    def _note(self, request: Request) -> None:
        self.requests.append(request.url)

    def _wait(self, log: Path) -> None:
        for _ in range(3000):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api", timeout=20).close()
                return
            except OSError:
                assert self.server.poll() is None, log.read_text()[-2000:]
                time.sleep(0.2)
        raise AssertionError(f"JupyterLab did not start: {log.read_text()[-2000:]}")


def _tests() -> str:
    """So that cells can `from viz.traces import made`."""
    root = Path(__file__).parents[2]
    return os.pathsep.join([str(root / "tests"), str(root)])
