"""The command line as a user meets it: separate processes, exit codes, one-line errors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from warm_start import python

import opdlab as opd
from opdlab.commands.demo import demo
from opdlab.viz.made_up import make_trace


def opdlab(*words: str, timeout: int = 2500) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python(), "-m", "opdlab.commands.cli", *words],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def check_the_printed_code(printed: str, folder: Path) -> None:
    """Run the lines that the demo prints, in a process without opdlab; its student writes alike."""
    lines = [line.strip() for line in printed.splitlines() if line.startswith("    ")]
    code = "\n".join([line for line in lines if "PeftModel" in line or "base =" in line])
    code += (
        "\nimport sys, torch\nassert 'opdlab' not in sys.modules"
        "\nwith torch.no_grad(): logits = student(torch.tensor([[5, 9, 12, 7]])).logits"
        "\nprint('changed', float((logits - base_logits).abs().max()) > 0.1)"
    )
    before = "base_logits = base(__import__('torch').tensor([[5, 9, 12, 7]])).logits.detach()\n"
    code = code.replace("student = PeftModel", before + "student = PeftModel", 1)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["changed", "True"]


def test_demo_learns_and_writes_what_it_says(tmp_path):
    done = opdlab("demo", "--steps", "20", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    last = done.stdout.strip().splitlines()[-1]
    found = re.fullmatch(
        r"demo: accuracy (\d\.\d\d) -> (\d\.\d\d) \(teacher (\d\.\d\d)\) in (\d+) s", last
    )
    assert found, last
    before, after, teacher = map(float, found.groups()[:3])
    assert 0.25 <= before <= 0.45
    assert after >= before + 0.3  # a third of the demo's own steps
    assert teacher >= 0.97
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert page.count("opd-lens") >= 3
    assert done.stdout.startswith("opdlab demo: starting")
    check_the_printed_code(done.stdout, tmp_path)
    assert (
        len(opd.Trace.load(tmp_path / "before.parquet"))
        == len(opd.Trace.load(tmp_path / "after.parquet"))
        > 0
    )


def test_show_draws_any_trace(tmp_path):
    student, teacher, task = opd.load("market")
    path = opd.score(student.sample(task.prompts(2)), student, teacher).save(tmp_path / "t.parquet")
    done = opdlab("show", str(path), "--sample", "1", "--no-open")
    assert done.returncode == 0, done.stderr
    assert "opd-lens" in (tmp_path / "t.html").read_text(encoding="utf-8")


def test_show_loads_no_library_of_models(tmp_path):
    path = make_trace([b"a", b" b"]).save(tmp_path / "t.parquet")
    code = (
        "import sys\n"
        "from opdlab.commands import cli\n"
        f"sys.argv = ['opdlab', 'show', {str(path)!r}, '--no-open']\n"
        "cli.main()\n"
        "heavy = ('torch', 'transformers', 'peft', 'accelerate', 'datasets', 'scipy')\n"
        "print('heavy:', *[name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy:"


def test_errors_are_one_line_and_say_what_to_do(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    done = opdlab("show", str(tmp_path / "bad.parquet"), "--no-open")
    assert done.returncode == 1
    assert re.fullmatch(r"opdlab: .*bad\.parquet is not an opdlab trace .*", done.stderr.strip())
    done = opdlab("demo", "--profile", "huge")
    assert done.returncode == 1
    assert (
        done.stderr.strip().splitlines()[-1]
        == "opdlab: There is no profile 'huge'. Use market, sharpening, small or gpu."
    )


def test_doctor_looks_at_the_pair_of_a_config(tmp_path):
    config = tmp_path / "run.toml"
    config.write_text(
        '[student]\nsource = "student"\n[teacher]\nsource = "teacher"\nhint = true\n'
        '[task]\nname = "market-secret"\n[settings]\nbatch = 3\n',
        encoding="utf-8",
    )
    done = opdlab("doctor", config, "--prompts", "4", "--k", "2")
    assert done.returncode == 0, done.stderr
    assert "prompts of up to 18 (26 for the teacher) tokens" in done.stdout  # it reads the hint
    assert "begin with" in done.stdout
    for wrong, said in (
        (["student"], "Give two models"),
        ([config, "--task", "market"], "which has its own"),
    ):
        refused = opdlab("doctor", *wrong)
        assert refused.returncode == 1
        assert said in refused.stderr


def test_doctor_says_whether_it_can_work_by_words_and_exit_code():
    done = opdlab("doctor", "student", "teacher", "--prompts", "16", "--k", "4")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("GO student <- teacher")
    assert re.search(r"ok +stop tokens +both end with '<eos>'", done.stdout)
    done = opdlab("doctor", "student", "scribe", "--prompts", "4", "--k", "2")
    assert done.returncode == 1
    assert done.stdout.startswith("STOP student <- scribe")
    assert "'▁ana' in the student and 'a' in the teacher" in done.stdout


@pytest.mark.small
def test_two_steps_of_the_small_demo(tmp_path):
    """SmolLM2 on the CPU: one set of weights, a real vocabulary, the rule that only the teacher is
    told.
    """
    line = demo("small", steps=2, out=tmp_path, settings={"batch": 4}, prompts=8)
    before, after, teacher = map(float, re.findall(r"\d\.\d\d", line))
    assert before < 0.2 < teacher
    assert (tmp_path / "index.html").exists()
    assert 0 <= after <= 1


def test_trace_answers_people_and_programs(tmp_path):
    first, second = tmp_path / "a.parquet", tmp_path / "b.parquet"
    trace = make_trace([b"one", b" \x1b[2Jtwo", b" three"])
    trace.save(first)
    trace.with_columns(teacher_reverse_kl=[0.0, 9.0, 0.0]).save(second)
    done = opdlab("trace", str(first), "worst", "--by", "reverse_kl", "--n", "1", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    largest = trace.column("teacher_reverse_kl").max()
    assert said["tokens"][0]["values"]["reverse_kl"] == largest
    done = opdlab("trace", str(first), "compare", str(second), "--by", "reverse_kl")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert "position 1" in done.stdout
    wrong = opdlab("trace", str(first), "where")
    assert wrong.returncode == 1
    assert wrong.stderr.count("\n") == 1
    assert "Add one" in wrong.stderr


def test_it_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "opdlab", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert done.stdout.startswith("usage: opdlab ")
