"""One page per method: its equation and its code side by side, when to use it, its parameters."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opdlab import methods

_ARXIV = re.compile(r"arXiv (\d{4}\.\d{5})")
_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises):", re.MULTILINE)
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
        name: The name of its class.
        path: The import path of the class.
        summary: Its first sentence.
    """

    name: str
    path: str
    summary: str

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
        for name, value in vars(importlib.import_module(module.name)).items():
            if _is_method(value) and value.__module__ == module.name:
                summary = (inspect.getdoc(value) or "").partition("\n\n")[0].replace("\n", " ")
                found.append(MethodPage(name, f"{module.name}.{name}", summary))
    return sorted(found, key=lambda one: one.name.lower())


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
    equations, prose = split_docstring(inspect.getdoc(module) or "")
    file = module_name.replace(".", "/") + ".py"
    parts = [
        "---\nhide:\n  - navigation\n  - toc\n---",
        f"# {name}",
        prose[0] if prose else method.summary,
        f"Its code is in [`{file}`]({file})." + (f" {use[name]}" if use.get(name) else ""),
        draw_pair(equations, find_steps(getattr(module, name))),
        *prose[1:],
        f"## Parameters\n\n::: {method.path}\n    options:\n      members: []\n"
        "      show_root_heading: false\n      show_root_toc_entry: false",
    ]
    return "\n\n".join(parts) + "\n"


def split_docstring(text: str) -> tuple[list[str], list[str]]:
    """Split a module's docstring into its equations, which are indented, and its prose.

    Args:
        text: The docstring, without common indentation.

    Returns:
        The equations without their indentation, and the paragraphs in Markdown.
    """
    equations, prose = [], []
    for block in re.split(r"\n{2,}", text.strip("\n")):
        if all(line.startswith("    ") for line in block.splitlines()):
            equations.append(textwrap.dedent(block))
        else:
            prose.append(_ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", block))
    return equations, prose


def find_steps(cls: type) -> list[str]:
    """Return the source of a method's steps, without docstrings, each dedented."""
    steps = []
    for name in _STEPS:
        step = inspect.getattr_static(cls, name, None)
        if inspect.isfunction(step):
            steps.append(without_docstring(inspect.getsource(step)))
    return steps


def without_docstring(source: str) -> str:
    """Return the source of a function without its docstring and its indentation."""
    source = textwrap.dedent(source)
    (function,) = ast.parse(source).body
    lines = source.splitlines()
    first: Any = function.body[0]  # type: ignore[attr-defined]
    if ast.get_docstring(function) is not None:  # type: ignore[arg-type]
        del lines[first.lineno - 1 : first.end_lineno]
    return "\n".join(lines).strip()


def draw_pair(equations: list[str], steps: list[str]) -> str:
    """Draw equations and code side by side, below each other on a narrow screen."""
    left = "\n\n".join(f"```text\n{equation}\n```" for equation in equations)
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
