"""View: the base of every picture.

A subclass says what it shows; the base shows it in a notebook, a file or a PNG.

The picture is one ES module without imports (`static/`), mounted three ways: in a self-contained
HTML output (the default), as a live widget from `.live()`, and by the tests. How to add a view:
`opdlab/viz/README.md`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from opdlab.data.trace import Trace
from opdlab.errors import OpdlabError, printable
from opdlab.viz import embed, markup, payload
from opdlab.viz.markup import escape
from opdlab.viz.traits import Trait, find_traits

if TYPE_CHECKING:
    import pandas as pd
    from typing_extensions import Self

    from opdlab.viz.live import LiveView

RENDERERS = ("html", "live", "static")
# The tokens and words of examples, unless other ones are asked for.
EXAMPLE_TOKENS = (b"Five", b" pears", b" and", b" two", b" plums", b" are", b" 7", b".")
EXAMPLE_WORDS = "Five pears and two plums"
_renderer: list[str] = []  # what set_renderer chose, if anything


def set_renderer(name: str) -> None:
    """Choose how views show themselves in a notebook.

    Args:
        name: "html" (interactive, needs no kernel), "live" (widgets) or "static" (no script). The
            default is the environment's OPDLAB_RENDERER, else "html".

    Raises:
        OpdlabError: There is no such renderer.
    """
    _renderer[:] = [_known_renderer(name)]


def renderer() -> str:
    """Return the renderer in force.

    Returns:
        "html", "live" or "static".

    Raises:
        OpdlabError: OPDLAB_RENDERER names no renderer.
    """
    return _renderer[0] if _renderer else _known_renderer(os.environ.get("OPDLAB_RENDERER", "html"))


def _as_printable(say: Callable[[Any], str]) -> Callable[[Any], str]:
    """Wrap a `__repr__`."""

    @functools.wraps(say)
    def say_printable(view: Any) -> str:
        return printable(say(view))

    return say_printable


class View:
    """The base of all views.

    A subclass declares itself (`caption`, `fits`, `example`), sets `name`, `scripts` and `styles`,
    and implements `data`, `static`, `__repr__` and `df`. Views of the same completion on a page
    follow each other's selection, in the browser, without the kernel.

    Args:
        traits: Values of traits at first, by name.

    Attributes:
        caption: One sentence: the question that the view answers.
        takes: The data that the view is made of, in words.
        name: The view's name in JavaScript, `define("lens", …)`, and in the class `opd-lens` of its
            root node.
        scripts: Files of `static/`, after those of the base; none for a still picture.
        styles: Style sheets of `static/`, after that of the base.
        title: The user's title; "" for none.
        selected: The row of `df` that is looked at; -1 for none.
        hovered: The row of `df` under the pointer; -1 for none.
        brush: [first, last] of a range of rows; [] for none.
    """

    caption: ClassVar[str]
    takes: ClassVar[str] = "a trace"
    name: ClassVar[str]
    scripts: ClassVar[tuple[str, ...]]
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

    # A subclass declares itself.

    def __init_subclass__(cls, **options: Any) -> None:
        """Make what a view says in a terminal printable: titles and tokens come from elsewhere."""
        super().__init_subclass__(**options)
        if "__repr__" in vars(cls):
            cls.__repr__ = _as_printable(cls.__repr__)  # type: ignore[method-assign]

    @classmethod
    def fits(cls, given: object, sample: int = 0) -> bool:
        """Return whether the view has something to draw.

        The overview asks every view this about a trace.

        Args:
            given: Anything; `takes` names what the view is made of.
            sample: The completion that a view of a single completion would show.

        Returns:
            Whether the view can be made of it.
        """
        raise NotImplementedError

    @classmethod
    def of_trace(cls, trace: Trace, sample: int = 0) -> Self:
        """Make the view of a trace that it fits.

        Args:
            trace: The trace.
            sample: The completion that a view of a single completion shows.

        Returns:
            The view.

        Raises:
            OpdlabError: The trace has no such completion.
        """
        raise NotImplementedError

    @classmethod
    def example(cls, tokens: Sequence[bytes] = EXAMPLE_TOKENS, words: str = EXAMPLE_WORDS) -> Self:
        """Make a small instance of made-up data, for the gallery and the tests.

        Args:
            tokens: The tokens of the completions that it shows.
            words: All other texts: title, prompts, names.

        Returns:
            The view.
        """
        raise NotImplementedError

    # A subclass says what it shows.

    def data(self) -> Mapping[str, Any]:
        """Return all that the script draws: plain data and numpy arrays (see `payload`).

        Returns:
            A mapping whose arrays travel as one deflated block.
        """
        raise NotImplementedError

    def static(self) -> str:
        """Return markup that carries the message where no script runs.

        Every foreign string in it goes through `markup.escape`.

        Returns:
            The markup, without the box around it.
        """
        raise NotImplementedError

    @property
    def df(self) -> pd.DataFrame:
        """The rows behind the picture."""
        raise NotImplementedError

    def answer(self, question: Mapping[str, Any]) -> Any:
        """Return the reply to `ask` of the page's script, as plain data.

        Only pages of live views can ask.

        Args:
            question: Plain data that the page's script sent.

        Returns:
            The reply, which JSON can hold.
        """
        raise NotImplementedError

    # All views can be shown, written, watched and made live.

    def html(self, assets: bool = True, script: bool = True) -> str:
        """Return an HTML fragment that needs nothing else.

        Args:
            assets: False leaves styles and module to the page around it.
            script: False leaves out all scripts and data: a still picture.

        Returns:
            The fragment, with the picture of `static` in it for where no script runs, which says
            so: a script that runs replaces both.
        """
        style = embed.style(*embed.STYLES, *self.styles) if assets else ""
        module = embed.module(self.scripts) if assets and script else ""
        note = markup.BARE_NOTE if self.scripts else ""
        block = ""
        if script:
            packed = payload.to_base64(payload.pack(self.data()))
            content = {"view": self.name, "traits": self.traits, "packed": packed}
            block = embed.script_json(content, "opd-data")
        return (
            f'<div class="opd opd-{self.name}">{style}'
            f'<div class="opd-view"><div class="opd-box">{self.static()}{note}</div></div>'
            f"{block}</div>{module}"
        )

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write a page that stands alone, atomically, and return its path.

        Args:
            path: The file.

        Returns:
            The path.
        """
        from opdlab.viz.page import page

        return page(path, title=self._page_title, lenses=[("", self)])

    def to_png(self, path: str | os.PathLike[str], dark: bool = False, width: int = 1200) -> Path:
        """Draw the view with the Chromium or Chrome of this machine.

        Args:
            path: The file of the PNG.
            dark: Whether to draw it as on a dark page.
            width: Width in CSS pixels; the picture has twice as many.

        Returns:
            The path.

        Raises:
            OpdlabError: There is no browser, or it does not answer.
        """
        from opdlab.viz import camera

        look = (
            "body{margin:0;background:Canvas}"
            ".opd{max-width:none!important}"
            ".opd-block{content-visibility:visible!important}"
        )
        page = embed.document(escape(self._page_title), f"<style>{look}</style>", self.html())
        return camera.shoot(page, path, dark=dark, width=width)

    @property
    def _page_title(self) -> str:
        """The title of a page with this view alone: its own, else its class and what it answers."""
        return self.title or ": ".join(filter(None, (type(self).__name__, self.caption)))

    def live(self) -> LiveView:
        """Return the same picture as a widget; its traits are this view's attributes.

        There is one widget for each view, made at the first call.

        Returns:
            The widget, which needs anywidget.
        """
        from opdlab.viz.live import make_widget

        if self._widget is None:
            self._widget = make_widget(self)
        return self._widget

    @property
    def traits(self) -> dict[str, Any]:
        """The values of all traits, by name."""
        return {name: getattr(self, name) for name in find_traits(type(self))}

    def on(self, trait: str, act: Callable[[Any], object]) -> None:
        """Call `act(value)` whenever a trait changes, from Python or from the live widget's page.

        Args:
            trait: The trait's name.
            act: The function to call; it gets the new value.

        Raises:
            OpdlabError: The view has no such trait.
        """
        if trait not in self.traits:
            raise OpdlabError(
                f"{type(self).__name__} has no {trait!r} to watch. It has {', '.join(self.traits)}."
            )
        self._watchers.append((trait, act))

    def refresh(self) -> None:
        """Send `data()` again to the live widget, whose page draws it anew."""
        if self._widget is not None:
            self._widget.packed = payload.pack(self.data())

    @property
    def limits(self) -> Mapping[str, float]:
        """The values that get full colour, by name; a page makes those of all its views agree."""
        return {}

    def with_limits(self, limits: Mapping[str, float]) -> View:
        """Return the view with full colour at these values, or at its own where they are larger.

        Args:
            limits: The values by name, as in `limits`.

        Returns:
            A copy, or the view itself where it has no limits.
        """
        return self

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> Any:
        how = renderer()
        if how == "live":
            return self.live()._repr_mimebundle_()
        return {"text/html": self.html(script=how == "html"), "text/plain": repr(self)}

    def _set(self, name: str, value: Any) -> None:
        """Set a trait, here and in the widget, and tell those who watch it."""
        if self.traits[name] == value:
            return
        self._traits[name] = value
        if self._widget is not None and getattr(self._widget, name) != value:
            setattr(self._widget, name, value)
        for trait, act in list(self._watchers):
            if trait == name:
                act(value)


def _known_renderer(name: str) -> str:
    if name not in RENDERERS:
        raise OpdlabError(
            f"There is no renderer {name!r}. Use {', '.join(RENDERERS[:-1])} or {RENDERERS[-1]}."
        )
    return name
