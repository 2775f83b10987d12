"""One page per method: its equation and its code side by side, when to use it, its parameters."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from opdlab import methods
from opdlab.methods.contract import FunctionMethod
from website.links import ROOT

_ARXIV = re.compile(r"arXiv (\d{4}\.\d{5})")
# The steps of a method, in the order in which a training step calls them.
_STEPS = ("plan_reward", "plan", "ask", "reward", "weight", "loss")
_ADVICE = (
    "The last column is what [the maps](docs/maps.md) say: small exact worlds in which the premise"
    " of each method is a knob, three seeds each. Methods without an entry there were not mapped."
    " Before training, [the doctor](docs/doctor.md) measures whether a pair can work at all, and"
    " names a method to begin with."
)


@dataclass(frozen=True)
class MethodPage:
    """Hold what a page says about a method.

    Attributes:
        name: The name of its class, or of its function.
        path: The import path of the class or function.
        summary: Its first sentence.
        folder: The folder of a file of a user's own; None for methods of the package.
    """

    name: str
    path: str
    summary: str
    folder: Path | None = None

    @property
    def page(self) -> str:
        """The page in the site."""
        return f"methods/{self.name.lower()}.md"


def find_methods() -> list[MethodPage]:
    """Find every class of `opdlab.methods` that has what a method has, `needs` and `loss`.

    Returns:
        The methods, in alphabetical order of their names.
    """
    found = []
    for module in pkgutil.iter_modules(methods.__path__, "opdlab.methods."):
        found += _list_methods(importlib.import_module(module.name))
    return sorted(found, key=lambda one: one.name.lower())


def read_methods(file: Path) -> list[MethodPage]:
    """Find the methods in a file of a user's own, which may be anywhere.

    The file is imported under its own name. Methods are classes with `needs` and `loss`, and
    functions under `@opdlab.method`.

    Args:
        file: The file.

    Returns:
        Its methods, in their order in the file.

    Raises:
        SystemExit: There is no such file, its name is none for a module, or it has no method.
    """
    name = file.stem
    if not file.is_file() or file.suffix != ".py" or not name.isidentifier():
        raise SystemExit(f"opdlab: {file} is no Python file. Name one such as my_method.py.")
    path = file.resolve()
    known = importlib.util.find_spec(name)
    if known is not None and known.origin != str(path):
        raise SystemExit(f"opdlab: there is another module {name!r}. Rename {file}.")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # last: its neighbours replace nothing
    sys.modules.pop(name, None)
    importlib.invalidate_caches()
    module = importlib.import_module(name)
    found = _list_methods(module, path.parent)
    if not found:
        raise SystemExit(
            f"opdlab: {file} has no method. Give it a class with needs and loss, or put"
            " @opdlab.method(needs=…) above a function of rows."
        )
    return found


def _list_methods(module: ModuleType, folder: Path | None = None) -> list[MethodPage]:
    """The methods that a module defines."""
    found = []
    for name, value in vars(module).items():
        own = value.function if isinstance(value, FunctionMethod) else value
        is_here = getattr(own, "__module__", None) == module.__name__
        if is_here and not name.startswith("_") and (own is not value or _is_method(value)):
            summary = (inspect.getdoc(own) or "").partition("\n\n")[0].replace("\n", " ")
            found.append(MethodPage(name, f"{module.__name__}.{name}", summary, folder))
    return found


def _is_method(value: object) -> bool:
    if not isinstance(value, type) or value.__name__.startswith("_"):
        return False
    is_protocol = getattr(value, "_is_protocol", False)
    return hasattr(value, "needs") and hasattr(value, "loss") and not is_protocol


def render_method(method: MethodPage, use: Mapping[str, str]) -> str:
    """Write the page of a method as Markdown.

    Args:
        method: The method.
        use: "Use it when …" by method, as the README's table has it.

    Returns:
        The Markdown. Links in it are relative to the repository's root.
    """
    module_name, _, name = method.path.rpartition(".")
    module = importlib.import_module(module_name)
    value = getattr(module, name)
    blocks = split_docstring(inspect.getdoc(module) or "")
    first, beside, below = arrange(blocks)
    parts = [
        "---\nhide:\n  - navigation\n  - toc\n---",
        f"# {name}",
        first or method.summary,
        _name_file(method) + (f" {use[name]}" if use.get(name) else ""),
        draw_pair(beside, find_steps(value)),
        *below,
    ]
    if isinstance(value, type):
        parts.append(
            f"## Parameters\n\n::: {method.path}\n    options:\n      members: []\n"
            "      show_root_heading: false\n      show_root_toc_entry: false"
        )
    return "\n\n".join(part for part in parts if part) + "\n"


def _name_file(method: MethodPage) -> str:
    """Say where the code is, with a link to a file of the repository."""
    file = method.path.rpartition(".")[0].replace(".", "/") + ".py"
    if method.folder is None:
        return f"Its code is in [`{file}`]({file})."
    path = method.folder / file
    if path.is_relative_to(ROOT):
        inside = path.relative_to(ROOT).as_posix()
        return f"Its code is in [`{inside}`]({inside})."
    return f"Its code is in `{file}`."


@dataclass(frozen=True)
class Block:
    """A paragraph of a docstring, as Markdown.

    Attributes:
        text: The text.
        is_equation: Whether it is an equation, which is indented in the docstring.
    """

    text: str
    is_equation: bool = False


def split_docstring(text: str) -> list[Block]:
    """Split a module's docstring into its equations, which are indented, and its prose.

    Args:
        text: The docstring, without common indentation.

    Returns:
        Its paragraphs in order.
    """
    blocks = []
    for block in filter(str.strip, re.split(r"\n{2,}", text.strip("\n"))):
        if all(line.startswith("    ") for line in block.splitlines()):
            blocks.append(Block(f"```text\n{textwrap.dedent(block)}\n```", is_equation=True))
        else:
            blocks.append(Block(_ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", block)))
    return blocks


def arrange(blocks: Sequence[Block]) -> tuple[str, list[str], list[str]]:
    """Arrange a docstring on a page: nothing between two equations is torn from them.

    Args:
        blocks: The paragraphs of the docstring.

    Returns:
        The first paragraph of prose; what stands beside the code (the equations, the prose between
        them, and the end of a sentence that they interrupt); and the prose below.
    """
    first = blocks[0].text if blocks and not blocks[0].is_equation else ""
    rest = list(blocks[1:] if first else blocks)
    places = [place for place, block in enumerate(rest) if block.is_equation]
    end = places[-1] + 1 if places else 0
    if end and end < len(rest) and rest[end].text[0].islower():
        end += 1
    texts = [block.text for block in rest]
    return first, texts[:end], texts[end:]


def find_steps(method: Any) -> list[str]:
    """Return the source of a method's steps, without docstrings, each dedented.

    Args:
        method: A class, or a function that was made a method.

    Returns:
        A text for each step, in the order in which a training step calls them.
    """
    if isinstance(method, FunctionMethod):
        steps = [method.planner, method.function]
    else:
        steps = [inspect.getattr_static(method, name, None) for name in _STEPS]
    named = [one for one in steps if inspect.isfunction(one) and one.__name__ != "<lambda>"]
    return [without_docstring(inspect.getsource(step)) for step in named]


def without_docstring(source: str) -> str:
    """Return the source of a function without its docstring and its indentation."""
    source = textwrap.dedent(source)
    (function,) = ast.parse(source).body
    lines = source.splitlines()
    first: Any = function.body[0]  # type: ignore[attr-defined]
    if ast.get_docstring(function) is not None:  # type: ignore[arg-type]
        del lines[first.lineno - 1 : first.end_lineno]
    return "\n".join(lines).strip()


def draw_pair(equations: Sequence[str], steps: Sequence[str]) -> str:
    """Draw equations and code side by side, below each other on a narrow screen."""
    left = "\n\n".join(equations)
    right = "```python\n" + "\n\n\n".join(steps) + "\n```"
    return (
        '<div class="site-pair" markdown>\n<div markdown>\n**Equation**\n\n'
        f"{left or 'None of its own.'}\n</div>\n<div markdown>\n**Code**\n\n{right}\n</div>\n</div>"
    )


def render_choice(readme: str) -> str:
    """Write the page "which method when": the README's table of methods.

    Args:
        readme: The README's text.

    Returns:
        The Markdown. Links in it are relative to the repository's root.
    """
    rows = [row for row in readme.splitlines() if re.match(r"\| `\w+\(", row)]
    table = "\n".join(["| method | what it does | use it when |", "|---|---|---|", *rows])
    return f"# Which method when\n\n{_ADVICE}\n\n{table}\n"


def list_methods(found: Sequence[MethodPage]) -> str:
    """Write links to the pages of methods, for a page beside them."""
    names = [f"- [{one.name}]({one.page.rpartition('/')[2]}): {one.summary}" for one in found]
    words = "Each page has the equation and the code side by side."
    return f"## Every method\n\n{words}\n\n" + "\n".join(names) + "\n"


def read_uses(readme: str) -> dict[str, str]:
    """Read the README's column "use it when".

    Args:
        readme: The README's text.

    Returns:
        A sentence by method, "" for methods that no map covers.
    """
    uses = {}
    for names, _, use in re.findall(r"^\| (`\w+\(.+?) \| (.+?) \| ?(.*?) ?\|$", readme, re.M):
        for name in re.findall(r"`(\w+)\(", names):
            uses[name] = f"**Use it when:** {use}." if use else ""
    return uses
