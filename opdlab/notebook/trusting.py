"""Mark notebooks as trusted, so that JupyterLab runs the scripts of their stored outputs."""

from __future__ import annotations

import os
from collections.abc import Iterable

from opdlab.notebook.freezing import read_notebook


def trust(paths: Iterable[str | os.PathLike[str]]) -> None:
    """Sign notebooks for this user, as `jupyter trust` does.

    The signature covers the stored outputs: a notebook that changes later is not trusted any more.

    Args:
        paths: .ipynb files. They are not changed; the signatures lie in Jupyter's data folder.

    Raises:
        OpdlabError: A file is not a notebook.
    """
    import nbformat
    from nbformat.sign import NotebookNotary

    notary = NotebookNotary()
    for path in paths:
        read_notebook(path)
        notary.sign(nbformat.read(path, as_version=4))
