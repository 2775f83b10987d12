"""Pictures of pages by a headless Chromium that is on the machine.

It is driven through its debugging pipe: no driver, no port, no network.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess  # nosec B404  # starts the browser, from a list and without a shell
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from select import select
from typing import Any

from opdlab.errors import OpdlabError
from opdlab.support.files import write_file
from opdlab.viz import embed

NAMES = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "microsoft-edge",
)
MAC = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)
FLAGS = (
    "--headless=new --remote-debugging-pipe --disable-gpu --hide-scrollbars --no-first-run"
    " --disable-background-networking --disable-component-update --disable-sync"
    " --disable-dev-shm-usage --disable-quic --disable-extensions"
).split()
PATIENCE = 60  # seconds without a word from the browser
_SILENT = (
    "The browser stopped or fell silent before the picture was made. See what it says: chromium"
    " --headless=new about:blank."
)
# of the content, whatever the height of the window
_HEIGHT = "Math.ceil(document.documentElement.getBoundingClientRect().height)"
_SETTLED = (
    "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done,"
    " 150))))"
)
# The browser reads commands from descriptor 3 and writes to 4: this child puts the pipes there and
# becomes the browser.
_BECOME = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4);"
    " os.execv(sys.argv[3], sys.argv[3:])"
)


def browser() -> str:
    """Return the path of a Chromium-like browser; OPDLAB_BROWSER overrides the search.

    Returns:
        The path.

    Raises:
        OpdlabError: There is none. The message says what to install.
    """
    named = os.environ.get("OPDLAB_BROWSER")
    found = (
        [named]
        if named
        else [*map(shutil.which, NAMES), *(path for path in MAC if Path(path).exists())]
    )
    for path in found:
        if path and Path(path).exists():
            return path
    looked = named or ", ".join(NAMES)
    raise OpdlabError(
        f"No browser to draw with: looked for {looked}. Install Chromium (apt-get install chromium)"
        " or Chrome."
    )


def shoot(
    document: str,
    path: str | os.PathLike[str],
    *,
    dark: bool = False,
    width: int = 1200,
    density: float = 2.0,
    least: int = 600,
    clear: bool = False,
) -> Path:
    """Write a PNG of a whole HTML document, as high as it is.

    Args:
        document: The HTML.
        path: The file of the PNG.
        dark: Whether the page is told that the system is dark.
        width: The width of the window in CSS pixels.
        density: Pixels of the picture for each CSS pixel.
        least: The height of the window in CSS pixels.
        clear: Whether the picture is transparent where the document paints nothing.

    Returns:
        The path.

    Raises:
        OpdlabError: There is no browser, or it does not answer.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="opdlab-", ignore_cleanup_errors=True) as folder,
        _running(Path(folder)) as ask,
    ):
        page = embed.write(Path(folder) / "page.html", document)
        target = ask("Target.createTarget", url="about:blank")["targetId"]
        session = ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = partial(ask, session=session)
        _set_up(tab, dark=dark, width=width, height=least, density=density, clear=clear)
        tab("Page.enable")
        tab("Page.navigate", url=page.as_uri())
        ask.wait("Page.loadEventFired")
        tab("Runtime.evaluate", expression=_SETTLED, awaitPromise=True)
        height = tab("Runtime.evaluate", expression=_HEIGHT)["result"]["value"]
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        shot = tab("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)[
            "data"
        ]
    return write_file(path, base64.b64decode(shot))


def _set_up(
    tab: Callable[..., Any], *, dark: bool, width: int, height: int, density: float, clear: bool
) -> None:
    """Give a tab its theme, its size in CSS pixels, and its background."""
    theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    tab(
        "Emulation.setEmulatedMedia",
        features=[theme, {"name": "prefers-reduced-motion", "value": "reduce"}],
    )
    tab(
        "Emulation.setDeviceMetricsOverride",
        width=width,
        height=height,
        deviceScaleFactor=density,
        mobile=False,
    )
    if clear:
        nothing = {"r": 0, "g": 0, "b": 0, "a": 0}
        tab("Emulation.setDefaultBackgroundColorOverride", color=nothing)


class _Pipe:
    """Commands to the browser, one at a time; JSON with a zero byte at the end, both ways."""

    def __init__(self, read: int, write: int) -> None:
        self.read, self.write = read, write
        self.buffer = b""
        self.number = 0
        self.events: set[str] = set()

    def __call__(self, method: str, session: str | None = None, **values: Any) -> dict[str, Any]:
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": values}
        if session:
            message["sessionId"] = session
        try:
            os.write(self.write, json.dumps(message).encode() + b"\0")
        except BrokenPipeError:
            raise OpdlabError(_SILENT) from None
        while True:
            reply = self._next()
            if reply.get("id") == self.number:
                if "error" in reply:
                    raise OpdlabError(
                        f"The browser refused {method}: {reply['error'].get('message')}. Try a"
                        " newer Chromium."
                    )
                result: dict[str, Any] = reply["result"]
                return result

    def wait(self, event: str) -> None:
        """Read messages until an event has come."""
        while event not in self.events:
            self._next()

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            chunk = os.read(self.read, 1 << 20) if select([self.read], [], [], PATIENCE)[0] else b""
            if not chunk:
                raise OpdlabError(_SILENT)
            self.buffer += chunk
        line, self.buffer = self.buffer.split(b"\0", 1)
        message: dict[str, Any] = json.loads(line)
        self.events.add(message.get("method", ""))
        return message


@contextmanager
def _running(folder: Path) -> Iterator[_Pipe]:
    if sys.platform == "win32":
        raise OpdlabError(
            "to_png needs a POSIX system. Write to_html and take the picture in a browser."
        )
    flags = [
        *FLAGS,
        f"--user-data-dir={folder / 'profile'}",
        *(["--no-sandbox"] if os.geteuid() == 0 else []),
        "about:blank",
    ]
    to_browser, from_browser = os.pipe(), os.pipe()
    inherit = (to_browser[0], from_browser[1])
    command = [sys.executable, "-c", _BECOME, *map(str, inherit), browser(), *flags]
    process = subprocess.Popen(  # nosec B603  # Chromium with flags that no trace or user writes
        command,
        pass_fds=inherit,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        close_fds=True,
    )
    for end in inherit:
        os.close(end)
    try:
        yield _Pipe(from_browser[0], to_browser[1])
    finally:
        os.close(to_browser[1])
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(from_browser[0])
