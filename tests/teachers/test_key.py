"""The key of a served teacher: it reaches the server, and nothing else that a user could share."""

from __future__ import annotations

import logging
import traceback
from pathlib import Path

import nbformat
import pyarrow.parquet as pq
import pytest

import opdlab as opd
from opdlab import errors, notebook
from opdlab.methods import SequenceKD
from opdlab.tasks.market import model
from opdlab.teachers import LogprobServer, TextServer

KEY = "sk-opdlab-3141592653589793"
CELLS = [
    "import logging, torch; torch.set_num_threads(1)",
    "logging.basicConfig(filename='log.txt', level=logging.DEBUG, force=True)",
    (
        "import opdlab as opd\nfrom opdlab.teachers import TextServer, LogprobServer\nstudent, _,"
        " task = opd.load('market')"
    ),
    "teacher = TextServer(URL, cache='answers.sqlite')\nteacher",
    (
        "vars(teacher), vars(teacher.service), teacher.service.servers.all[0].client and"
        " vars(teacher.service.servers.all[0].client)"
    ),
    (
        "run = opd.distill(student, teacher, task, method=opd.SequenceKD(), batch=2, steps=2,"
        " max_new_tokens=6, save='run', save_every=1)"
    ),
    "for step in run:\n    step.trace().save(f'{step.number}.parquet')\nrun.history",
    "vars(teacher.service.servers.all[0].client)",
    (
        "grader = LogprobServer(URL, k=4, cache=None)\nopd.distill(student, grader, task, batch=2,"
        " steps=1, max_new_tokens=6,            method=opd.OPD(top_k=opd.TopK(4,"
        " by='teacher'))).train().history"
    ),
    "%xmode Verbose",
    "TextServer(URL.replace('/v1', '/nowhere'), cache=None, retries=0).write(task.prompts(2))",
    "TextServer(URL, 'another model', cache=None, retries=0).write(task.prompts(2))",
]


@pytest.fixture
def guarded(serve, monkeypatch):
    """A server that wants the key, and repeats it in what it refuses."""
    monkeypatch.setenv("OPDLAB_API_KEY", KEY)
    server, url = serve()
    return server, url


def places(folder: Path) -> dict[str, bytes]:
    """All files under a folder, and the tables in them unpacked."""
    files = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    tables = {
        f"{name}, unpacked": (
            str((pq.read_table(name).to_pydict(), pq.read_schema(name).metadata)).encode()
        )
        for name in files
        if name.endswith(".parquet")
    }
    return files | tables


def test_a_notebook_with_logs_traces_checkpoints_and_errors_holds_no_key(guarded, tmp_path):
    server, url = guarded
    cells = [nbformat.v4.new_code_cell(source) for source in [f"URL = {url!r}", *CELLS]]
    for cell in cells[-2:]:
        cell.metadata["tags"] = ["raises-exception"]
    answer = server.answer
    server.answer = lambda path, body: (
        answer(path, body)
        if "nowhere" not in path
        else (401, {"error": f"Incorrect API key provided: {KEY}"})
    )
    book = tmp_path / "book.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), book)
    notebook.execute(book)
    assert {headers["authorization"] for _, _, headers in server.requests} == {f"Bearer {KEY}"}
    found = places(tmp_path)
    assert {"log.txt", "answers.sqlite", "book.ipynb", "1.parquet", "run.json"} <= {
        Path(name).name for name in found
    }
    assert b"Incorrect API key provided: \xe2\x80\xa6" in book.read_bytes()
    assert b"does not exist" in book.read_bytes()
    assert len(found[str(tmp_path / "log.txt")]) > 1000
    for name, content in found.items():
        assert KEY.encode() not in content, name
        assert KEY[3:].encode() not in content, name
    assert any(b"market-teacher" in content for content in found.values()), (
        "the search finds what is there"
    )


def test_no_error_no_repr_and_no_object_holds_the_key(guarded, caplog):
    server, url = guarded
    caplog.set_level(logging.DEBUG)
    one = TextServer(url, cache=None, quiet=True, retries=0)
    one.write(opd.tasks.market().prompts(1), max_new_tokens=2)
    server.answer = lambda path, body: (403, {"error": f"{KEY} may not do this, {KEY}!"})
    said = []
    for teacher in (
        one,
        TextServer(url, cache=None, quiet=True),
        LogprobServer(url, cache=None, quiet=True),
    ):
        with pytest.raises(errors.TeacherError) as caught:
            opd.distill(
                model("student"),
                teacher,
                opd.tasks.market(),
                method=SequenceKD(),
                batch=1,
                quiet=True,
            ).train()
        error = caught.value
        assert error.__cause__ is None
        assert error.__context__ is None
        said.append(
            "".join(
                traceback.TracebackException.from_exception(error, capture_locals=True).format()
            )
        )
        said.append(repr(teacher) + repr(vars(teacher)))
    said += [
        repr(one.service),
        repr(vars(one.service)),
        repr(vars(one.service.servers.all[0].client)),
        caplog.text,
    ]
    assert all(KEY not in text for text in said)
    assert "… may not do this, …!" in said[0]
    assert server.requests[-1][2]["authorization"] == f"Bearer {KEY}"


def test_another_variable_may_hold_it(serve, monkeypatch):
    server, url = serve()
    monkeypatch.setenv("MY_KEY", KEY)
    TextServer(url, cache=None, quiet=True, key_env="MY_KEY").meet(opd.tasks.market().prompts(1))
    assert server.requests[-1][2]["authorization"] == f"Bearer {KEY}"
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    TextServer(url, cache=None, quiet=True).meet(opd.tasks.market().prompts(1))
    assert (
        server.requests[-1][2]["authorization"] == "Bearer none"
    )  # a key for somebody else does not go here
