"""Write the table of all views into `opdlab/viz/README.md`: `python -m opdlab.viz.table`."""

from __future__ import annotations

from pathlib import Path

from opdlab.viz import VIEWS

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- views: begin -->", "<!-- views: end -->"


def table_of_views() -> str:
    """Return the table of all views in Markdown: question, ingredients, files.

    Returns:
        Markdown without a newline at the end.
    """
    rows = ["| view | question | made of | files |", "|---|---|---|---|"]
    for view in VIEWS:
        module = view.__module__.rpartition(".")[2]
        script = view.scripts[-1:] or view.styles[-1:]
        files = ", ".join(f"`{name}`" for name in (f"{module}.py", *script))
        rows.append(f"| `{view.__name__}` | {view.caption} | {view.takes} | {files} |")
    return "\n".join(rows)


def write_table(path: Path = README) -> None:
    """Replace the table between the two marks of the README.

    Args:
        path: The README, which has both marks.
    """
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n{table_of_views()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    write_table()
