"""`opdlab distill` as a user meets it: separate processes, killed and taken up, bit for bit."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file
from warm_start import python

import opdlab as opd
from opdlab.commands.report import find_run, write_report
from opdlab.errors import OpdlabError

CONFIG = """
[student]
source = "student"

[teacher]
source = "teacher"

[method]
name = "opd"
divergence = "forward_kl"

[settings]
steps = 6
batch = 8
save_every = 2
trace_k = 4

[run]
folder = "run"
eval_prompts = 12
trace_every = 3
trace_prompts = 2
"""


def opdlab(*words: object, cwd: Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python(), "-m", "opdlab.commands.cli", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=2500,
        check=False,
        cwd=cwd,
        **options,
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a config, whose run has been done without interruption, from elsewhere."""
    folder, elsewhere = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("elsewhere")
    (folder / "config.toml").write_text(CONFIG, encoding="utf-8")
    done = opdlab("distill", folder / "config.toml", "--json", cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    (folder / "printed.json").write_text(done.stdout, encoding="utf-8")
    assert list(elsewhere.iterdir()) == []
    return folder


def test_json_is_all_that_stdout_has_and_equals_the_report(home):
    printed = json.loads((home / "printed.json").read_text(encoding="utf-8"))
    assert printed == json.loads((home / "run" / "report.json").read_text(encoding="utf-8"))
    assert printed["is_finished"]
    assert printed["done"] == 6
    assert printed["gain"]["mean"] == pytest.approx(
        printed["accuracy"]["after"]["accuracy"] - printed["accuracy"]["before"]["accuracy"]
    )
    assert printed["accuracy"]["teacher"]["prompts"] == 12
    assert printed["cost"]["tokens"] > 0


def test_top_tokens_without_traces_are_refused(tmp_path):
    (tmp_path / "config.toml").write_text(CONFIG.replace("trace_every = 3\n", ""))
    done = opdlab("distill", "config.toml", cwd=tmp_path)
    assert done.returncode == 1
    assert "trace_k=4, which would change nothing" in done.stderr
    assert not (tmp_path / "run").exists()


def test_traces_are_of_the_same_prompts_at_each_step(home):
    traces = {path.stem: opd.Trace.load(path) for path in (home / "run" / "traces").iterdir()}
    updates = [traces.pop(f"update-{step:06d}") for step in (3, 6)]
    assert sorted(traces) == ["before-again", "step-000000", "step-000003", "step-000006"]
    for update in updates:  # of the texts of a training step: eight prompts, losses, top tokens
        assert len(update.meta["prompts"]) == 8
        assert {"loss", "student_top", "logit_gradient"} <= set(update.table.column_names)
        view = opd.viz.Equation(update)
        assert abs(view.values - view.trace.column("loss")).max() < 0.3  # four tokens of each
    first = traces["step-000000"]
    assert all(trace.meta["prompts"] == first.meta["prompts"] for trace in traces.values())
    again = traces["before-again"]
    assert again.meta["texts"] == first.meta["texts"]
    assert again.column("student_logp").tolist() != first.column("student_logp").tolist()
    assert again.column("teacher_logp").tolist() == pytest.approx(
        first.column("teacher_logp").tolist(), abs=1e-5
    )


def test_the_pages_need_nothing_else_and_rest_at_the_end(home):
    report = (home / "run" / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in report
    assert report.count("opd-lens") >= 3
    assert "forward_kl" in report
    assert "AutoPeftModelForCausalLM" in report
    assert "opd-refresh" not in (home / "run" / "board.html").read_text(encoding="utf-8")


def adapter(folder: Path, step: int) -> dict[str, object]:
    return load_file(folder / f"step-{step:06d}" / "adapter_model.safetensors")


def assert_equal_runs(one: Path, two: Path, step: int) -> None:
    mine, theirs = adapter(one, step), adapter(two, step)
    assert mine.keys() == theirs.keys()
    assert all(bool((mine[name] == theirs[name]).all()) for name in mine)


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    while not (folder / f"step-{step:06d}").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_run_that_was_stopped_is_taken_up_and_ends_equal(home, tmp_path, number):
    for _ in range(5):  # on a busy machine the run may end before it is told to stop
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        command = ["distill", home / "config.toml", "--out", tmp_path / "run"]
        process = subprocess.Popen(
            [python(), "-m", "opdlab.commands.cli", *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            # A job in the background ignores Ctrl-C, and so would the run that its tests start.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
        )
        wait_for_step(tmp_path / "run", 2, process)
        page = (tmp_path / "run" / "board.html").read_text(encoding="utf-8")
        process.send_signal(number)
        said = process.communicate()[1]
        if process.returncode != 0:
            break
    assert 'name="opd-refresh"' in page
    if number != signal.SIGKILL:
        assert process.returncode == 1
        last = said.strip().splitlines()[-1]
        found = re.match(r"opdlab: stopped after step (\d) of 6, which is saved\.", last)
        assert found, last
        step = int(found[1])
        if step < 6:
            assert (tmp_path / "run" / f"step-{step:06d}" / "manifest.json").exists()
        board = (tmp_path / "run" / "board.html").read_text(encoding="utf-8")
        assert "opd-refresh" not in board
        assert write_report(tmp_path / "run")["is_finished"] is (step == 6)
    done = opdlab(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^resuming after step [2-6] of 6$", done.stdout, re.MULTILINE) or (
        "has done all its 6 steps" in done.stdout
    )
    assert_equal_runs(home / "run", tmp_path / "run", 6)
    before = json.loads((home / "run" / "report.json").read_text(encoding="utf-8"))
    after = json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))
    assert after["accuracy"] == before["accuracy"]


def test_flags_go_over_the_file_and_the_same_run_can_be_made_of_flags(home, tmp_path):
    words = ["settings.steps=6", "settings.batch=8", "method.divergence=forward_kl"]
    words += ["run.eval_prompts=0", "run.trace_prompts=1"]
    done = opdlab(
        *("distill", "--student", "student", "--teacher", "teacher", "--method", "opd"),
        *("--out", "made/of flags", "--set", *words),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert_equal_runs(home / "run", tmp_path / "made" / "of flags", 6)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--set", "settings.lr=0.5"], "lr was 0.001 and is 0.5"),
        (["--teacher", "novice"], "the teacher has another configuration"),
        (["--set", "method.divergence=reverse_kl"], "has divergence='reverse_kl'"),
        (["--set", "settings.stepps=3"], "[settings] has no key 'stepps'. Did you mean 'steps'?"),
        (["--task", "marked"], "There is no task 'marked'"),
    ],
)
def test_a_changed_config_is_refused_in_one_line(home, tmp_path, changes, said):
    before = {path: path.stat().st_mtime_ns for path in (home / "run").rglob("*")}
    done = opdlab("distill", home / "config.toml", *changes, cwd=tmp_path)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("opdlab: ")
    assert said in last
    assert {path: path.stat().st_mtime_ns for path in (home / "run").rglob("*")} == before


def test_fresh_takes_the_next_folder_that_is_free(home):
    done = opdlab("distill", home / "config.toml", "--fresh", "--set", "settings.steps=1", cwd=home)
    assert done.returncode == 0, done.stderr
    assert (home / "run-2" / "step-000001").is_dir()


def test_a_report_of_no_run_says_so(tmp_path):
    with pytest.raises(OpdlabError, match="it is no run's folder"):
        find_run(tmp_path)
