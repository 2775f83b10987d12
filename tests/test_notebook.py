"""Freezing, profiles and the checks of exercises."""

from __future__ import annotations

import nbformat
import pytest

import opdlab as opd
from opdlab import notebook


def book(tmp_path, *sources):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources])
    path = tmp_path / "nb" / "x.ipynb"
    path.parent.mkdir()
    nbformat.write(nb, path)
    return path


def test_freeze_keeps_what_tells_and_drops_what_changes(tmp_path):
    path = book(tmp_path, "import os, sys\nprint('kept')\nprint('gone', file=sys.stderr)", "print(os.getcwd())", "1 + 1")
    notebook.execute(path)
    first = notebook.freeze(path)
    nb = nbformat.read(path, as_version=4)
    assert [o["text"] for o in nb.cells[0].outputs] == ["kept\n"]
    assert str(tmp_path) not in path.read_text()
    assert nb.cells[2].outputs[0]["data"]["text/plain"] == "2"
    assert nb.metadata["opdlab"]["source"] == notebook.source_hash(nb)
    assert notebook.freeze(path) == first  # twice is once
    nb.cells[2].source = "1 + 2"
    assert nb.metadata["opdlab"]["source"] != notebook.source_hash(nb)


def test_freeze_refuses_errors_and_too_much(tmp_path):
    path = book(tmp_path, "print('x' * 1_100_000)")
    notebook.execute(path)
    with pytest.raises(opd.OpdlabError, match="more than 1,000,000"):
        notebook.freeze(path)
    nb = nbformat.read(path, as_version=4)
    nb.cells[0].outputs = [nbformat.v4.new_output("error", ename="ValueError", evalue="no", traceback=[])]
    nbformat.write(nb, path)
    with pytest.raises(opd.OpdlabError, match=r"holds an error \(ValueError: no\)"):
        notebook.freeze(path)


def test_profiles(monkeypatch, capsys):
    monkeypatch.setenv("OPDLAB_PROFILE", "ci")
    ctx = notebook.setup({"ci": 0.5})
    assert "profile ci · cpu · about 0.5 min" in capsys.readouterr().out
    assert ctx.pick(ci=1, cpu=2) == 1
    assert notebook.Context("cpu", "cpu").pick(ci=1, cpu=2) == 2
    assert notebook.Context("gpu", "cuda").pick(ci=1) == 1
    monkeypatch.setenv("OPDLAB_PROFILE", "huge")
    with pytest.raises(opd.OpdlabError, match=r"'huge'\. Use ci, cpu or gpu"):
        notebook.setup()


def stub(rows):
    raise NotImplementedError


@pytest.mark.parametrize(("fn", "says", "passes"), [
    (lambda r: (r.student.exp() * (r.student - r.teacher)).sum(-1), "✓ that is the reverse_kl", True),
    (lambda r: (r.teacher.exp() * (r.teacher - r.student)).sum(-1), "✗ that is the forward_kl", False),
    (lambda r: (r.student.exp() * (r.teacher - r.student)).sum(-1), "the sign is wrong", False),
    (lambda r: (r.student.exp() * (r.student - r.teacher)).sum(), "one number a token", False),
    (lambda r: r.student.sum(-1), "the values differ", False),
    (stub, "not written yet", False),
])  # fmt: skip
def test_the_check_says_what_was_written_instead(capsys, fn, says, passes):
    assert notebook.check_loss(fn, "reverse_kl") is passes
    assert says in capsys.readouterr().out
