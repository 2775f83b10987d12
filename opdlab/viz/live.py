"""The live half of a view: an anywidget made from the same module as the HTML output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opdlab.errors import OpdlabError
from opdlab.viz import embed, payload

try:
    import anywidget
    import traitlets
except ImportError as error:
    raise OpdlabError(
        f"Live views need anywidget ({error}). Install it: pip install 'opdlab[notebooks]'."
    ) from error

if TYPE_CHECKING:
    from opdlab.viz.view import View

_KINDS = {
    int: traitlets.Int,
    float: traitlets.Float,
    str: traitlets.Unicode,
    list: traitlets.List,
    dict: traitlets.Dict,
    bool: traitlets.Bool,
}


_classes: dict[Any, type[LiveView]] = {}


class LiveView(anywidget.AnyWidget):
    """A view as a widget: its traits, its data as one binary block, and replies to what its page
    asks.
    """

    view = traitlets.Unicode().tag(sync=True)
    packed = traitlets.Bytes().tag(sync=True)
    _shown: View | None = None  # the view that this is the widget of

    def _repr_mimebundle_(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The widget, with the still picture and the text summary beside it, for readers that have
        no kernel or know no widgets.

        JupyterLab shows the first kind that it knows, which is the widget; GitHub and nbconvert
        show the picture.
        """
        found = super()._repr_mimebundle_(**options)
        data, metadata = found if isinstance(found, tuple) else (found or {}, {})
        picture = {} if self._shown is None else {"text/html": self._shown.html(script=False)}
        return {**data, **picture, "text/plain": repr(self)}, metadata

    def __repr__(self) -> str:
        return type(self).__name__ if self._shown is None else repr(self._shown)


def widget(view: View) -> LiveView:
    """A live widget that mirrors the traits of `view`, both ways."""
    made = _class(type(view))(view=view.name, packed=payload.pack(view.data()), **view.traits)
    made._shown = view
    made.observe(lambda change: setattr(view, change["name"], change["new"]), list(view.traits))
    made.on_msg(lambda _, content, __: made.send(_reply(view, content)))
    return made


def _class(kind: type[View]) -> type[LiveView]:
    """A widget class with the module, the style and the traits of this kind of view."""
    if kind in _classes:
        return _classes[kind]
    traits = {
        name: _KINDS[type(default)](default).tag(sync=True)
        for name, default in _defaults(kind).items()
    }
    script, style = embed.script_text(kind.scripts), embed.style_text(*embed.STYLES, *kind.styles)
    _classes[kind] = type(
        f"Live{kind.__name__}", (LiveView,), {"_esm": script, "_css": style, **traits}
    )
    return _classes[kind]


def _defaults(kind: type[View]) -> dict[str, Any]:
    from opdlab.viz.view import Trait

    return {
        name: x.default
        for owner in reversed(kind.__mro__)
        for name, x in vars(owner).items()
        if isinstance(x, Trait)
    }


def _reply(view: View, content: Any) -> dict[str, Any]:
    """`{"id", "answer"}` or `{"id", "error"}`; a question of None is only a sign of life."""
    number, question = content.get("id"), content.get("ask")
    try:
        return {"id": number, "answer": None if question is None else view.answer(question)}
    except Exception as error:  # the page shows it; the kernel has nobody to raise it to
        return {"id": number, "error": f"{type(error).__name__}: {error}"}
