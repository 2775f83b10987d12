"""View: what every picture has in common.

A subclass says what it shows; this shows it in a notebook, a file or a PNG.

The picture is one ES module without imports (`static/`), mounted three ways: in a self-contained
HTML output (the default), as a live widget from `.live()`, and by the tests. How to add a view:
`opdlab/viz/README.md`.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from opdlab.errors import OpdlabError
from opdlab.viz import embed, payload
from opdlab.viz.markup import safe

if TYPE_CHECKING:
    import pandas as pd

    from opdlab.viz.live import LiveView

RENDERERS = ("html", "live", "static")
_renderer: list[str] = []  # what set_renderer chose, if anything
V = TypeVar("V", bound="View")


def set_renderer(name: str) -> None:
    """How views show themselves in a notebook: "html" (interactive, needs no kernel), "live"
    (widgets) or "static" (no script).

    The default is the environment's OPDLAB_RENDERER, else "html".
    """
    _renderer[:] = [_known(name)]


def renderer() -> str:
    """The renderer in force."""
    return _renderer[0] if _renderer else _known(os.environ.get("OPDLAB_RENDERER", "html"))


class Trait:
    """An attribute that the page shares: what a reader clicks changes it, and setting it changes
    the page of the live widget.

    The default's type is the trait's type; a value of another type raises TypeError.
    """

    def __init__(self, default: Any) -> None:
        self.default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, view: Any, owner: type | None = None) -> Any:
        return self if view is None else view._traits.get(self.name, copy.copy(self.default))

    def __set__(self, view: View, value: Any) -> None:
        view._set(self.name, self.checked(value))

    def checked(self, value: Any) -> Any:
        kind = type(self.default)
        if kind is int and hasattr(value, "__index__"):
            return int(value)
        if kind is list and isinstance(value, tuple):
            return list(value)
        if not isinstance(value, kind):
            raise TypeError(
                f"{self.name} is of type {kind.__name__}, not {type(value).__name__} ({value!r})."
                f" Give a {kind.__name__}."
            )
        return value


class View:
    """The base of all views.

    A subclass sets `name`, `scripts`, `styles` and implements `data`, `static`, `__repr__` and
    `df`.

    `selected` and `hovered` are rows of `df` (-1: none), `brush` is [first, last] of a range of
    rows ([]: none). Views of one completion on the same page follow each other's, in the browser,
    without the kernel.
    """

    name: ClassVar[
        str
    ]  # of the view in JavaScript, `define("lens", …)`, and of its root's class `opd-lens`
    scripts: ClassVar[tuple[str, ...]]  # files of static/, after the base's
    styles: ClassVar[tuple[str, ...]] = ()
    title: str = ""

    selected = Trait(-1)
    hovered = Trait(-1)
    brush = Trait([])

    def __init__(self, **traits: Any) -> None:
        self._traits: dict[str, Any] = {}
        self._watchers: list[tuple[str, Callable[[Any], object]]] = []
        self._widget: LiveView | None = None
        for name, value in traits.items():
            setattr(self, name, value)

    # What a subclass says.

    def data(self) -> Mapping[str, Any]:
        """All that the script draws: plain data and numpy arrays (see `payload`)."""
        raise NotImplementedError

    def static(self) -> str:
        """Markup that carries the message where no script runs; every foreign string in it through
        `markup.safe`.
        """
        raise NotImplementedError

    @property
    def df(self) -> pd.DataFrame:
        """The rows behind the picture."""
        raise NotImplementedError

    def answer(self, question: Mapping[str, Any]) -> Any:
        """The reply to `ask` of the page's script: plain data. Only live views can ask."""
        raise NotImplementedError

    # What all views can do.

    def html(self, assets: bool = True, script: bool = True) -> str:
        """An HTML fragment that needs nothing else; `assets=False` leaves styles and module to the
        page around it.
        """
        style = embed.style(*embed.STYLES, *self.styles) if assets else ""
        block = (
            embed.script_json(
                {"view": self.name, "traits": self.traits, "packed": self._block()}, "opd-data"
            )
            if script
            else ""
        )
        module = embed.module(self.scripts) if assets and script else ""
        return (
            f'<div class="opd opd-{self.name}">{style}<div class="opd-view">'
            f'<div class="opd-box">{self.static()}</div></div>'
            f"{block}</div>{module}"
        )

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write a page that stands alone, atomically."""
        from opdlab.viz.page import page

        return page(path, title=self.title or self.name, lenses=[("", self)])

    def to_png(self, path: str | os.PathLike[str], dark: bool = False, width: int = 1200) -> Path:
        """A picture of the view, `width` pixels wide at double density, by the Chromium or Chrome
        on this machine.
        """
        from opdlab.viz import camera

        look = "body{margin:0;background:Canvas}.opd{max-width:none!important}.opd-block{content-visibility:visible!important}"
        page = embed.document(safe(self.title or self.name), f"<style>{look}</style>", self.html())
        return camera.shoot(page, path, dark=dark, width=width)

    def live(self) -> LiveView:
        """The same picture as a widget whose traits are this view's attributes; one a view, made at
        the first call.
        """
        from opdlab.viz.live import widget

        if self._widget is None:
            self._widget = widget(self)
        return self._widget

    @property
    def traits(self) -> dict[str, Any]:
        """What the page shares, by name."""
        names = [
            name
            for owner in reversed(type(self).__mro__)
            for name, x in vars(owner).items()
            if isinstance(x, Trait)
        ]
        return {name: getattr(self, name) for name in names}

    def on(self, trait: str, act: Callable[[Any], object]) -> None:
        """Call `act(value)` whenever the trait changes, from Python or from the live widget's page."""
        if trait not in self.traits:
            raise OpdlabError(
                f"{type(self).__name__} has no {trait!r} to watch. It has {', '.join(self.traits)}."
            )
        self._watchers.append((trait, act))

    def refresh(self) -> None:
        """Send `data()` again to the live widget, whose page draws it anew."""
        if self._widget is not None:
            self._widget.packed = payload.pack(self.data())

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> Any:
        how = renderer()
        if how == "live":
            return self.live()._repr_mimebundle_()
        return {"text/html": self.html(script=how == "html"), "text/plain": repr(self)}

    def _block(self) -> str:
        return payload.base64_of(payload.pack(self.data()))

    def _set(self, name: str, value: Any) -> None:
        if self.traits[name] == value:
            return
        self._traits[name] = value
        if self._widget is not None and getattr(self._widget, name) != value:
            setattr(self._widget, name, value)
        for trait, act in list(self._watchers):
            if trait == name:
                act(value)


def _known(name: str) -> str:
    if name not in RENDERERS:
        raise OpdlabError(
            f"There is no renderer {name!r}. Use {', '.join(RENDERERS[:-1])} or {RENDERERS[-1]}."
        )
    return name
