"""Trusting notebooks: signatures as Jupyter checks them."""

from __future__ import annotations

import nbformat
import pytest
from nbformat.sign import NotebookNotary

import opdlab as opd
from opdlab.notebook import trust


def test_trusted_until_an_output_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    cell = nbformat.v4.new_code_cell("1", outputs=[nbformat.v4.new_output("stream", text="a")])
    book, path = nbformat.v4.new_notebook(cells=[cell]), tmp_path / "x.ipynb"
    nbformat.write(book, path)
    before = path.read_bytes()
    assert not NotebookNotary().check_signature(nbformat.read(path, as_version=4))
    trust([path])
    assert path.read_bytes() == before
    assert NotebookNotary().check_signature(nbformat.read(path, as_version=4))
    book.cells[0].outputs[0]["text"] = "b"
    nbformat.write(book, path)
    assert not NotebookNotary().check_signature(nbformat.read(path, as_version=4))


def test_what_is_no_notebook_is_refused(tmp_path):
    (tmp_path / "x.ipynb").write_text("{}")
    with pytest.raises(opd.OpdlabError, match="no notebook that can be read"):
        trust([tmp_path / "x.ipynb"])
