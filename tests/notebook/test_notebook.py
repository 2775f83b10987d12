"""Freezing, profiles and exercises."""

from __future__ import annotations

import base64
import io
import re
import runpy
import shutil
from pathlib import Path

import nbformat
import pytest
import torch

import opdlab as opd
from opdlab import notebook
from opdlab.notebook import cases, checking
from opdlab.notebook.checking import describe_difference, find_exercise

ROOT = Path(__file__).parents[2]


def book(tmp_path, *sources):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources])
    path = tmp_path / "nb" / "x.ipynb"
    path.parent.mkdir()
    nbformat.write(nb, path)
    return path


def test_freeze_keeps_what_tells_and_drops_what_changes(tmp_path):
    path = book(
        tmp_path,
        "import os, sys\nprint('kept')\nprint('gone', file=sys.stderr)",
        "print(os.getcwd())",
        "1 + 1",
    )
    notebook.execute(path)
    first = notebook.freeze(path)
    nb = nbformat.read(path, as_version=4)
    assert [o["text"] for o in nb.cells[0].outputs] == ["kept\n"]
    assert str(tmp_path) not in path.read_text()
    assert nb.cells[2].outputs[0]["data"]["text/plain"] == "2"
    assert nb.metadata["opdlab"]["source"] == notebook.hash_source(nb)
    assert notebook.freeze(path) == first  # twice is once
    nb.cells.insert(0, nbformat.v4.new_markdown_cell("# New words"))
    assert nb.metadata["opdlab"]["source"] == notebook.hash_source(nb)  # which no output depends on
    nb.cells[3].source = "1 + 2"
    assert nb.metadata["opdlab"]["source"] != notebook.hash_source(nb)


def test_the_same_results_are_the_same_file(tmp_path):
    sources = (
        (
            "import pandas as pd\ntable = lambda n: pd.DataFrame({'T_abcde':"
            " [n]}).style.highlight_max()\ntable(1)"
        ),
        "table(2)",
        "object()",
        "import sys, time\nprint('a')\nsys.stdout.flush()\ntime.sleep(0.5)\nprint('b')",
    )
    texts = []
    for name in "ab":
        (tmp_path / name).mkdir()
        path = book(tmp_path / name, *sources)
        notebook.execute(path)
        notebook.freeze(path)
        texts.append(
            re.sub(r'"id": "\w+"', "", path.read_text())
        )  # nbformat's own names of the cells
    assert texts[0] == texts[1]
    cells = nbformat.read(path, as_version=4).cells
    first, second = (cell.outputs[0]["data"]["text/html"] for cell in cells[:2])
    assert '<table id="T_00000">' in first
    assert "#T_00000_row0_col0" in first
    assert '<table id="T_00001">' in second
    assert "T_abcde" in second  # a name of ours
    assert cells[2].outputs[0]["data"]["text/plain"] == "<object>"
    assert [o["text"] for o in cells[3].outputs] == ["a\nb\n"]


def test_freeze_drops_the_progress_of_others(tmp_path):
    path = book(
        tmp_path,
        "from tqdm.notebook import tqdm\nfor x in tqdm(range(3), desc='Loading'):\n   "
        " pass\nprint('kept')",
    )
    notebook.execute(path)
    shown = [
        o.get("data", {}).get("text/plain", "")
        for o in nbformat.read(path, as_version=4).cells[0].outputs
    ]
    assert any("Loading" in text for text in shown)
    notebook.freeze(path)
    assert [o.get("text") for o in nbformat.read(path, as_version=4).cells[0].outputs] == ["kept\n"]


def test_freeze_refuses_errors_and_too_much(tmp_path):
    path = book(tmp_path, "print('x' * 1_100_000)")
    notebook.execute(path)
    with pytest.raises(opd.OpdlabError, match="more than 1,000,000"):
        notebook.freeze(path)
    nb = nbformat.read(path, as_version=4)
    nb.cells[0].outputs = [
        nbformat.v4.new_output("error", ename="ValueError", evalue="no", traceback=[])
    ]
    nbformat.write(nb, path)
    with pytest.raises(opd.OpdlabError, match=r"holds an error \(ValueError: no\)"):
        notebook.freeze(path)


@pytest.mark.browser
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{}", "it has no cells"),
        ("[1]", "it has no cells"),
        ('{"cells": 3}', "it has no cells"),
        ("print(1)", "Expecting value"),
        ("", "Expecting"),
        (b"\xff\xfe", "utf-8"),
        ("[" * 100_000, "recursion"),
        ('{"worksheets": []}', "format 3: open and save it"),
        ('{"cells": [1]}', "cell 1 has no source"),
        ('{"cells": [{"cell_type": "code", "source": "1"}]}', "cell 1 has no list of outputs"),
    ],
)
def test_what_is_no_notebook_is_refused_and_left_alone(text, why, tmp_path):
    path = tmp_path / "odd.ipynb"
    raw = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(raw)
    for act in (notebook.freeze, notebook.execute):
        with pytest.raises(
            opd.OpdlabError,
            match=(
                rf"odd\.ipynb is no notebook that can be read \(.*{why}.*Give the path of an"
                r" \.ipynb"
            ),
        ):
            act(path)
    assert path.read_bytes() == raw
    with pytest.raises(opd.OpdlabError, match="No such file"):
        notebook.freeze(tmp_path / "missing.ipynb")


def test_freeze_adds_a_picture_to_charts(tmp_path):
    from PIL import Image

    layout = {"height": 200, "margin": {"l": 40, "r": 0, "t": 0, "b": 20}}
    figure = {
        "data": [{"type": "bar", "x": [1], "y": [1], "marker": {"color": "#0072B2"}}],
        "layout": layout,
    }
    path = book(
        tmp_path,
        f"from IPython.display import display\ndisplay({{{notebook.freezing.CHART!r}: {figure!r}}},"
        " raw=True)",
    )
    notebook.execute(path)
    first = notebook.freeze(path)
    data = nbformat.read(path, as_version=4).cells[0].outputs[0]["data"]
    picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")
    assert picture.size == (760, 200)
    blue = sum(
        count for count, colour in picture.getcolors(1 << 20) if colour == (0x00, 0x72, 0xB2)
    )
    assert blue > 0.5 * 760 * 200
    assert dict(data[notebook.freezing.CHART]) == figure
    assert notebook.freeze(path) == first


def test_freeze_refuses_charts_that_need_webgl(tmp_path):
    figure = {"data": [{"type": "scattergl", "x": [1], "y": [1]}], "layout": {}}
    path = book(tmp_path, "1")
    nb = nbformat.read(path, as_version=4)
    nb.cells[0].outputs = [
        nbformat.v4.new_output("display_data", {notebook.freezing.CHART: figure})
    ]
    nbformat.write(nb, path)
    with pytest.raises(opd.OpdlabError, match=r"needs WebGL.*Give it render_mode='svg'"):
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


# The exercises of all notebooks.

EVERY = {
    key: task
    for number in checking.list_notebooks()
    for key, task in checking.list_exercises(number).items()
}


def stub(*_):
    raise NotImplementedError


def test_keys_say_where_they_belong():
    for number in checking.list_notebooks():
        assert number.isdigit()
        assert list(checking.list_exercises(number)) == [
            f"{number}.{i + 1}" for i in range(len(checking.list_exercises(number)))
        ]
        assert len(list((ROOT / "notebooks").glob(f"{number}_*.ipynb"))) == 1


@pytest.mark.parametrize("key", EVERY)
def test_solutions_agree_with_the_library_and_stubs_go_on(key, capsys):
    task = EVERY[key]
    assert task.judge(task.solution) is None
    assert notebook.exercise(key)(stub) is task.solution
    said = capsys.readouterr().out
    assert (
        said == f"… {key} is not written yet: {task.request}. Until then the notebook uses the"
        " reference solution.\n"
    )
    assert notebook.exercise(key)(task.solution) is task.solution
    assert capsys.readouterr().out == f"✓ {key}: {task.confirmation}.\n"


@pytest.mark.parametrize(
    ("key", "sentence"),
    [(key, sentence) for key, task in EVERY.items() for sentence in task.mistakes],
)
def test_mistakes_are_named(key, sentence, capsys):
    task = EVERY[key]
    assert sentence.endswith(".")
    assert notebook.exercise(key)(task.mistakes[sentence]) is task.solution
    assert capsys.readouterr().out.startswith(f"✗ {key}: {sentence} Until")


@pytest.mark.parametrize("step", [1e-2, 1e-3, 1e-4, 1e-6])
@pytest.mark.parametrize("side", [1, -1])
def test_a_one_sided_difference_is_named_at_any_step(step, side):
    def slope(loss, logits, teacher):
        here = loss(logits.log_softmax(-1), teacher)
        nudges = side * step * torch.eye(logits.shape[-1], dtype=logits.dtype)
        return torch.stack(
            [
                side * (loss((logits + nudge).log_softmax(-1), teacher) - here) / step
                for nudge in nudges
            ],
            -1,
        )

    assert "one-sided" in find_exercise("50.3").judge(slope)


def test_autograd_is_told_from_differences():
    def slope(loss, logits, teacher):
        logits = logits.clone().requires_grad_()
        loss(logits.log_softmax(-1), teacher).sum().backward()
        return logits.grad

    assert "autograd" in find_exercise("50.3").judge(slope)


def test_a_gradient_that_cancels_up_to_rounding_is_zero():
    assert (
        describe_difference(torch.tensor([1e-17, -2e-17]), torch.tensor([0.3, -0.3]), 1e-5)
        == "it is zero everywhere."
    )
    assert (
        describe_difference(0.563612, 0.563614, 1e-9)
        == "the values differ: 0.563612, wanted 0.563614."
    )


def test_the_author_of_what_the_notebook_goes_on_with_is_known(capsys):
    task = find_exercise("20.1")
    checking._authors.pop("31.3", None)
    with pytest.raises(opd.OpdlabError, match=r"Exercise 31\.3 has not run yet"):
        notebook.author("31.3")
    notebook.exercise("20.1")(stub)
    assert notebook.author("20.1") == "the reference solution's"
    notebook.exercise("20.1")(task.solution)
    assert notebook.author("20.1") == "yours"
    notebook.exercise("20.1")(next(iter(task.mistakes.values())))
    assert notebook.author("20.1") == "the reference solution's"


def test_every_exercise_knows_a_mistake():
    assert [key for key, task in EVERY.items() if not task.mistakes] == []


@pytest.mark.parametrize(
    ("written", "says"),
    [
        (
            lambda r: (r.student.exp() * (r.teacher - r.student)).sum(-1),
            "value: the sign is wrong.",
        ),
        (
            lambda r: 2 * (r.student.exp() * (r.student - r.teacher)).sum(-1),
            "value: it is 2 times what is wanted.",
        ),
        (
            lambda r: (r.student.exp() * (r.student - r.teacher)).sum(-1).detach(),
            "it carries no gradient, so it trains nothing.",
        ),
        (lambda r: (r.student - r.student.detach()).sum(-1) * 0, "value: it is zero everywhere."),
        (
            lambda r: r.student.exp() * (r.student - r.teacher),
            "value: shape [5] is wanted; you returned shape [5, 7].",
        ),
        (lambda r: r.student.sum(-1), "value: the values differ: "),
        (lambda r: None, "value: it returned None. Is there a return?"),
        (lambda r: "kl", "value: shape [5] is wanted; you returned a str."),
        (
            lambda r: r.pupil,
            "it stopped with UnknownColumn: rows has no 'pupil'; there are student, teacher",
        ),
    ],
)
def test_what_is_wrong_is_said(written, says):
    assert says in find_exercise("00.1").judge(written)


def test_the_line_that_stopped_is_shown(tmp_path):
    source = tmp_path / "cell.py"
    source.write_text(
        "def loss(rows):\n    gap = rows.student - 1\n    return gap / rows.token.foo\n"
    )
    made = runpy.run_path(str(source))
    assert (
        "AttributeError: 'Tensor' object has no attribute 'foo' (in the line `return gap /"
        " rows.token.foo`)" in find_exercise("00.1").judge(made["loss"])
    )


def test_methods_are_judged_as_functions():
    assert (
        find_exercise("00.1").judge(opd.method(needs=("teacher",))(find_exercise("00.1").solution))
        is None
    )


@pytest.mark.parametrize(
    ("got", "want", "says"),
    [
        (0.1 + 0.2, 0.3, None),
        (1.0, 2.0, "the values differ: 1, wanted 2."),
        (torch.tensor([1.0, torch.nan]), [1.0, torch.nan], None),
        ((1.0, "a"), (1.0, "a"), None),
        ((1.0, "b"), (1.0, "a"), "result 2: it returned 'b', wanted 'a'."),
        (1.0, (1.0, "a"), "2 results are wanted; you returned a float."),
        ({"x": 1.0}, {"x": 1.0, "y": 2.0}, "results by name are wanted: x, y; you returned x."),
        (1, True, "it returned 1, wanted True."),
        (
            torch.zeros(2, 3),
            torch.zeros(3, 2),
            "shape [3, 2] is wanted; you returned shape [2, 3].",
        ),
        ([0.0, 1.0, 5.0], [0.0, 1.0, 2.0], "the values differ: 5 at [2], wanted 2."),
    ],
)
def test_results_are_compared(got, want, says):
    assert describe_difference(got, want, 1e-6) == says


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("99.1", r"There is no exercise '99\.1'\. There are exercises for the notebooks 00"),
        ("00.9", r"There is no exercise '00\.9'\. Notebook 00 has 00\.1, 00\.2\."),
        ("../x", "There is no exercise"),
    ],
)
def test_unknown_keys_list_what_there_is(key, says):
    with pytest.raises(opd.OpdlabError, match=says):
        notebook.exercise(key)


def test_what_a_loss_trains_is_its_slope_in_the_logits():
    given = cases.random_rows(4, 6)
    p, q = given.student.detach(), given.teacher
    reverse_kl = cases.evaluate_loss(
        lambda r: (r.student.exp() * (r.student - r.teacher)).sum(-1), given
    )
    assert torch.allclose(reverse_kl["gradient"], p.exp() * (p - q - reverse_kl["value"][:, None]))
