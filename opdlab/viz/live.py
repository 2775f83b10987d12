"""The live half of a view: an anywidget made from the same module as the HTML output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from opdlab.errors import OpdlabError
from opdlab.viz import embed, payload
from opdlab.viz.traits import find_traits

try:
    import anywidget
    import traitlets
except ImportError as error:
    raise OpdlabError(
        f"Live views need anywidget ({error}). Install it: pip install 'opdlab[notebooks]'."
    ) from error


class Mirrored(Protocol):
    """A view, as far as its widget needs it.

    Attributes:
        name: The view's name in JavaScript.
        scripts: Files of `static/` that draw it.
        styles: Its style sheets of `static/`.
    """

    name: ClassVar[str]
    scripts: ClassVar[tuple[str, ...]]
    styles: ClassVar[tuple[str, ...]]

    @property
    def traits(self) -> dict[str, Any]:
        """The values of all traits, by name."""
        ...

    def data(self) -> Mapping[str, Any]:
        """Return all that the script draws.

        Returns:
            Plain data and numpy arrays (see `payload`).
        """
        ...

    def answer(self, question: Mapping[str, Any]) -> Any:
        """Return the reply to a question of the page.

        Args:
            question: Plain data that the page's script sent.

        Returns:
            Plain data.
        """
        ...

    def html(self, assets: bool = True, script: bool = True) -> str:
        """Return the picture as HTML.

        Args:
            assets: False leaves styles and module to the page around it.
            script: False leaves out all scripts and data: a still picture.

        Returns:
            An HTML fragment.
        """
        ...


_TRAITLETS = {
    int: traitlets.Int,
    float: traitlets.Float,
    str: traitlets.Unicode,
    list: traitlets.List,
    dict: traitlets.Dict,
    bool: traitlets.Bool,
}
_classes: dict[type, type[LiveView]] = {}


class LiveView(anywidget.AnyWidget):
    """A view as a widget.

    Its traits are the view's, its data travel as one binary block, and it replies to what its page
    asks.
    """

    view = traitlets.Unicode().tag(sync=True)
    packed = traitlets.Bytes().tag(sync=True)
    _shown: Mirrored | None = None

    def _repr_mimebundle_(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the widget with the still picture and the text summary beside it.

        JupyterLab shows the first kind that it knows, which is the widget; GitHub and nbconvert,
        which have no kernel or know no widgets, show the picture.
        """
        found = super()._repr_mimebundle_(**options)
        data, metadata = found if isinstance(found, tuple) else (found or {}, {})
        picture = {} if self._shown is None else {"text/html": self._shown.html(script=False)}
        return {**data, **picture, "text/plain": repr(self)}, metadata

    def __repr__(self) -> str:
        return type(self).__name__ if self._shown is None else repr(self._shown)


def make_widget(view: Mirrored) -> LiveView:
    """Make a live widget that mirrors the traits of `view`, both ways.

    Args:
        view: The view.

    Returns:
        The widget; it sends the page's questions to `view.answer`.
    """
    kind = _widget_class(type(view))
    widget = kind(view=view.name, packed=payload.pack(view.data()), **view.traits)
    widget._shown = view

    def follow(change: Mapping[str, Any]) -> None:
        setattr(view, change["name"], change["new"])

    def reply(_: Any, content: Mapping[str, Any], __: Any) -> None:
        widget.send(_reply(view, content))

    widget.observe(follow, list(view.traits))
    widget.on_msg(reply)
    return widget


def _widget_class(kind: type[Mirrored]) -> type[LiveView]:
    """A widget class with the module, the style and the traits of this kind of view."""
    if kind not in _classes:
        members: dict[str, Any] = {
            "_esm": embed.script_text(kind.scripts),
            "_css": embed.style_text(*embed.STYLES, *kind.styles),
        }
        for name, trait in find_traits(kind).items():
            members[name] = _TRAITLETS[type(trait.default)](trait.default).tag(sync=True)
        _classes[kind] = type(f"Live{kind.__name__}", (LiveView,), members)
    return _classes[kind]


def _reply(view: Mirrored, content: Mapping[str, Any]) -> dict[str, Any]:
    """`{"id", "answer"}` or `{"id", "error"}`; a question of None is only a sign of life."""
    number, question = content.get("id"), content.get("ask")
    try:
        return {"id": number, "answer": None if question is None else view.answer(question)}
    except Exception as error:  # the page shows it; the kernel has nobody to raise it to
        return {"id": number, "error": f"{type(error).__name__}: {error}"}
