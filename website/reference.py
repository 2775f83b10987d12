"""The reference: one page per folder of the package, with every public name that it defines."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import opdlab

# The modules whose own lists of names are public, beside those of `opdlab` itself.
MODULES = (
    "conformance",
    "diagnose",
    "engine",
    "errors",
    "exact",
    "losses",
    "methods",
    "notebook",
    "samplers",
    "tasks",
    "teachers",
    "viz",
)


@dataclass(frozen=True)
class Name:
    """A public name.

    Attributes:
        shown: The name as users write it, `opdlab.distill`.
        path: Where it is defined, `opdlab.training.run.distill`.
        summary: The first sentence of its docstring, "" for data.
    """

    shown: str
    path: str
    summary: str

    @property
    def folder(self) -> str:
        """The folder of the package that defines it, whose page describes it."""
        return self.path.split(".")[1]


def find_names() -> list[Name]:
    """Find the public names: those of `opdlab`, and those of its public modules.

    Returns:
        One entry per object, by the shortest name that users may write, in alphabetical order.
    """
    found: dict[str, Name] = {}
    for module, names in list_public().items():
        for name in names:
            value = getattr(importlib.import_module(module), name)
            if isinstance(value, ModuleType) and value.__name__ in list_public():
                continue
            one = _describe(f"{module}.{name}", value)
            found.setdefault(one.path, one)  # `opdlab.OPD` comes before `opdlab.methods.OPD`
    return sorted(found.values(), key=lambda one: one.shown.lower())


def list_public() -> dict[str, list[str]]:
    """Return the public names of each public module, `opdlab` first."""
    public = {"opdlab": list(opdlab.__all__)}
    for name in MODULES:
        module = importlib.import_module(f"opdlab.{name}")
        own = [
            key
            for key, value in vars(module).items()
            if inspect.isclass(value) and value.__module__ == module.__name__
        ]
        public[module.__name__] = list(getattr(module, "__all__", own))
    return public


def _describe(shown: str, value: object) -> Name:
    if isinstance(value, ModuleType):
        path = value.__name__
    elif inspect.isclass(value) or inspect.isroutine(value):
        path = f"{value.__module__}.{value.__qualname__}"
    else:
        return Name(shown, shown, "")
    return Name(shown, path, _first_sentence(value))


def _first_sentence(value: object) -> str:
    return (inspect.getdoc(value) or "").partition("\n\n")[0].replace("\n", " ")


def render_folder(folder: str, names: Sequence[Name], elsewhere: Mapping[str, str]) -> str:
    """Write the page of a folder as Markdown.

    Args:
        folder: A folder or module of the package.
        names: The public names that it defines.
        elsewhere: The pages of names that have one of their own, by path.

    Returns:
        The Markdown, in which mkdocstrings reads the docstrings.
    """
    module = importlib.import_module(f"opdlab.{folder}")
    parts = [f"# opdlab.{folder}", _first_sentence(module)]
    others = [name for name in names if name.path in elsewhere]
    if others:
        links = ", ".join(_link(name, elsewhere) for name in others)
        parts.append(f"On pages of their own: {links}.")
    parts += [_describe_here(name) for name in names if name.path not in elsewhere]
    return "\n\n".join(parts) + "\n"


def _describe_here(name: Name) -> str:
    """Write what mkdocstrings reads: the object, and the heading that users know it by."""
    heading = name.shown.removeprefix("opdlab.")
    return f"::: {name.path}\n    options:\n      heading: {name.shown}\n      toc_label: {heading}"


def render_index(names: Sequence[Name], elsewhere: Mapping[str, str]) -> str:
    """Write the list of all public names as Markdown.

    Args:
        names: The names.
        elsewhere: The pages of names that have one of their own, by path.

    Returns:
        The Markdown.
    """
    rows = [f"| {_link(name, elsewhere)} | {_cell(name.summary)} |" for name in names]
    head = "| name | what it is |\n| --- | --- |\n"
    words = "Every public name. Each leads to its page; `import opdlab as opd` is usual."
    return f"# All names\n\n{words}\n\n{head}" + "\n".join(rows) + "\n"


def _link(name: Name, elsewhere: Mapping[str, str]) -> str:
    if name.path in elsewhere:
        return f"[`{name.shown}`](../{elsewhere[name.path]})"
    return f"[`{name.shown}`][{name.path}]"  # mkdocstrings knows the place


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
