"""The sources of the site: links, notebooks, methods, names, and the check of built pages."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # website/ is part of the repository, not of the package

from website import check, contents, methods, notebooks, reference  # noqa: E402
from website.links import BrokenLinkError, Links  # noqa: E402

LINKS = Links(contents.list_pages())


@pytest.mark.parametrize(
    ("target", "wanted"),
    [
        ("trl.md", "trl.md"),
        ("trl.md#shards", "trl.md#shards"),
        ("../README.md", "../overview.md"),
        ("../notebooks/00_start.ipynb", "../notebooks/00_start.md"),
        ("../benchmarks", "../benchmarks.md"),
        ("../examples", "https://github.com/opdlab/opdlab/tree/main/examples"),
        ("../opdlab/losses/__init__.py", "/blob/main/opdlab/losses/__init__.py"),
        ("map_opd_plus.png", "../pictures/docs/map_opd_plus.png"),
        ("https://arxiv.org/abs/2606.01039", "https://arxiv.org/abs/2606.01039"),
    ],
)
def test_links_lead_to_pages_of_the_site_or_to_the_repository(target, wanted):
    text = LINKS.rewrite(f"[x]({target}) `[x](kept.md)`", "docs/views.md", "docs/views.md")
    assert re.fullmatch(r"\[x\]\((.*?)\) `\[x\]\(kept\.md\)`", text)[1].endswith(wanted)


def test_a_link_to_no_file_ends_the_build():
    with pytest.raises(BrokenLinkError, match=r"docs/views.md links to nothing.md, but"):
        LINKS.rewrite("[x](nothing.md)", "docs/views.md", "docs/views.md")


def test_every_file_of_the_documentation_has_a_page():
    files = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
    files |= {f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert files <= contents.list_pages().keys()
    assert len(set(contents.list_pages().values())) == len(contents.list_pages())


def test_a_notebook_keeps_its_outputs_and_loses_no_text(tmp_path):
    html = '<div class="opd opd-lens"><script>let a = 1 < 2;\n\n\n# b</script></div>'
    outputs = [
        {"output_type": "stream", "name": "stdout", "text": ["<b>hostile</b>\n"]},
        {"output_type": "display_data", "metadata": {}, "data": {"text/html": [html]}},
    ]
    hidden = {"jupyter": {"source_hidden": True}}
    cells = [
        {"cell_type": "markdown", "metadata": {}, "source": ["# 1 · A title\n", "Let $x$ be."]},
        {"cell_type": "code", "metadata": hidden, "source": ["draw()"], "outputs": outputs},
    ]
    path = tmp_path / "1_a.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    text, fragments = notebooks.render_notebook(path, "notebooks/1_a.ipynb", "n/1_a.md", LINKS)
    assert text.startswith("# 1 · A title")
    assert "```python\ndraw()\n```" in text
    assert html not in text  # Markdown would change it
    math, opened, closed, shown = fragments.pieces
    assert "<math" in math
    assert opened.startswith("<details")
    assert closed == "</details>"
    assert html in shown
    assert "&lt;b&gt;hostile" in shown
    assert all(f"⟦n/1_a:{number}⟧" in text for number in range(4))


def test_a_method_has_a_page_with_its_equation_beside_its_code():
    uses = methods.read_uses((ROOT / "README.md").read_text(encoding="utf-8"))
    found = {method.name: method for method in methods.find_methods()}
    assert found.keys() == uses.keys()
    page = methods.render_method(found["OPDPlus"], uses)
    equation, code = page.index("A_t = w_f(u_t)"), page.index("def loss(self, rows")
    assert 0 < equation < code
    assert "**Use it when:** Only the sampled token's log-prob is known" in page
    grpo = methods.render_method(found["GRPO"], uses)
    assert "[arXiv 2402.03300](https://arxiv.org/abs/2402.03300)" in grpo
    assert '"""' not in page  # docstrings are prose, and stand below


def test_every_public_name_has_an_entry():
    names = reference.find_names()
    shown = {name.path for name in names}
    index = reference.render_index(names, {})
    assert len(names) > 150
    for module, own in reference.list_public().items():
        for name in own:
            value = getattr(sys.modules[module], name)
            path = getattr(value, "__module__", module) + "." + getattr(value, "__qualname__", name)
            is_module = getattr(value, "__name__", "") in sys.modules
            assert is_module or path in shown or f"{module}.{name}" in shown, (module, name)
    assert index.count("\n| [") == len(names)


PAGE = """<link rel="stylesheet" href="{style}"><img src="{image}"><a href="{link}">x</a>
<a href="https://arxiv.org">elsewhere</a><p id="here" style="background: url({style})"></p>
<img srcset="data:image/png;base64,AA==,x 2x">"""


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({}, None),
        ({"style": "https://fonts.example/a.css"}, "x.html fetches https://fonts.example/a.css"),
        ({"image": "//counter.example/p.gif"}, "x.html fetches //counter.example/p.gif"),
        ({"link": "gone.html"}, "x.html links to gone.html, which is not there"),
        ({"link": "#gone"}, "x.html links to #gone, but the page has no such place"),
    ],
)
def test_the_check_finds_requests_and_dead_links(given, fault, tmp_path):
    (tmp_path / "a.css").write_text("p { color: red }")
    (tmp_path / "a.png").write_bytes(b"")
    whole = {"style": "a.css", "image": "a.png", "link": "x.html#here"} | given
    (tmp_path / "x.html").write_text(PAGE.format(**whole))
    faults = check.find_faults(tmp_path)
    assert (faults == []) if fault is None else (fault in faults)


def test_the_check_reads_style_sheets(tmp_path):
    (tmp_path / "a.css").write_text('@import "https://fonts.example/a.css";')
    assert check.find_faults(tmp_path) == ["a.css fetches https://fonts.example/a.css"]
