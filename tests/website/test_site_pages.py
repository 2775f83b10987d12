"""The sources of the site: links, notebooks, methods, names, and the check of built pages."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # website/ is part of the repository, not of the package

from website import build, check, contents, methods, notebooks, reference  # noqa: E402
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


def test_prose_and_equations_of_a_page_stay_in_their_order():
    found = {method.name: method for method in methods.find_methods()}
    dopd = methods.render_method(found["DOPD"], {})
    sampled, equation, code = map(dopd.index, ("student sampled:", "A_n = |", "def plan("))
    assert sampled < equation < code < dopd.index("In words: LH")
    opd_page = methods.render_method(found["OPD"], {})
    words = (
        "with the detached advantage",
        "A_t = log q(y_t)",
        "which is the gradient",
        "def loss(",
    )
    places = [opd_page.index(one) for one in words]
    assert places == sorted(places)
    for method in found.values():  # no sentence ends in a colon with nothing behind it
        page = methods.render_method(method, {})
        assert not re.search(r"[^*]:\n+(<|#|$)", page), method.name


OWN = '''"""Reverse KL where the teacher is <unsure>.

    loss_t = H(q_t) KL(p_t || q_t)

p is the student and q the teacher.
"""

import opdlab as opd


class Careful:
    """Reverse KL times the teacher's entropy."""

    needs = ("teacher",)

    def plan(self, batch):
        return {"weight": batch.signals["teacher_entropy"]}

    def loss(self, rows):
        return rows.weight * opd.losses.reverse_kl(rows.student, rows.teacher)


@opd.method(needs=("teacher",))
def plain(rows):
    """The forward KL."""
    return opd.losses.forward_kl(rows.student, rows.teacher)
'''


@pytest.fixture
def own_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    path = tmp_path / "careful_losses.py"
    path.write_text(OWN)
    yield path
    sys.modules.pop("careful_losses", None)


def test_a_file_of_a_users_own_has_pages(own_file):
    found = methods.read_methods(own_file)
    assert [method.name for method in found] == ["Careful", "plain"]
    page = methods.render_method(found[0], {})
    assert page.index("loss_t = H(q_t)") < page.index("def plan(") < page.index("def loss(")
    assert "Its code is in `careful_losses.py`." in page  # no link: it is not in the repository
    assert "::: careful_losses.Careful" in page
    page = methods.render_method(found[1], {})
    assert "def plain(rows):" in page
    assert ":::" not in page  # a function under @method has no parameters
    own_file.write_text(OWN.split('"""', 2)[2])
    page = methods.render_method(methods.read_methods(own_file)[1], {})
    assert "None of its own." in page  # the equation is that of the file
    assert "\n\nThe forward KL.\n\n" in page


def test_single_pages_leave_the_whole_site_as_it_is(tmp_path, monkeypatch):
    with monkeypatch.context() as changed:
        changed.setattr(build, "ROOT", tmp_path)
        whole, alone = build.find_folder([]), build.find_folder(["OPD"])
    assert whole == tmp_path / "build" / "docs"
    assert alone == whole / "only"
    kept = [whole / "site" / "index.html", alone / "site" / "index.html"]
    for path in kept:
        path.parent.mkdir(parents=True)
        path.write_text("built")
    build.write_site(alone, ["docs/site.md"])
    assert [path.exists() for path in kept] == [True, False]
    alone.joinpath("mine.txt").write_text("a file of a user's own")
    build.write_site(whole, ["docs/site.md"])
    assert not kept[0].exists()
    assert alone.joinpath("mine.txt").exists()


def test_the_method_of_the_guide_has_a_page(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    guide = (ROOT / "docs" / "own_loss.md").read_text(encoding="utf-8")
    (block,) = re.findall(r'```python\n(""".*?)```', guide, re.DOTALL)
    (tmp_path / "relative.py").write_text(block)
    site = build.write_site(tmp_path / "site", ["Relative"], [tmp_path / "relative.py"])
    text = (site.source / "methods" / "relative.md").read_text(encoding="utf-8")
    assert text.index("w_t = H(q_t) / mean H(q)") < text.index("batch.mean(entropy)")
    sys.modules.pop("relative")


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("nothing.py", None, "is no Python file"),
        ("my-loss.py", OWN, "is no Python file"),
        ("torch.py", OWN, "another module 'torch'"),
        ("empty.py", "x = 1", "has no method"),
    ],
)
def test_files_without_methods_are_refused(name, text, fault, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit, match=fault):
        methods.read_methods(tmp_path / name)


def test_single_pages_are_written_and_others_refused(own_file, tmp_path):
    site = build.write_site(tmp_path / "one", ["Careful", "OPD"], [own_file])
    assert site.pages == ["methods/careful.md", "methods/opd.md"]
    text = (site.source / "methods" / "careful.md").read_text()
    assert "loss_t = H(q_t)" in text
    assert not (site.source / "methods" / "index.md").exists()
    kept = tmp_path / "one" / "site"
    kept.mkdir()
    for wrong in ("Nothing", "docs/nothing.md", "careful_losses.py"):
        with pytest.raises(SystemExit, match=f"--only {wrong} is no page"):
            build.write_site(tmp_path / "one", [wrong], [own_file])
    assert kept.exists()  # a slip removes no site
    own_file.write_text(OWN.replace("Careful", "OPD"))
    with pytest.raises(SystemExit, match="there is a method OPD already"):
        build.write_site(tmp_path / "one", ["OPD"], [own_file])


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
