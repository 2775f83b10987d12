"""The script for a GPU runs from end to end on a CPU: cases, JSON, failures and resuming."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from warm_start import python

from benchmarks.gpu import __main__ as script
from benchmarks.gpu import one, sizes, targets
from benchmarks.gpu.cases import CASES, GROUPS
from benchmarks.run import judge

HERE = [name for name, case in CASES.items() if case.lacking() is None and case.group != "check"]
CHEAP = [name for name in HERE if not name.startswith("step/")]


@pytest.fixture
def results(tmp_path, monkeypatch):
    """The folder that results are written to."""
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    return tmp_path


def run(**options):
    script.main(size="tiny", name="tried", **{"python": python(), **options})


def read(results):
    return json.loads((results / "tried.json").read_text())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    sizes.build_wide_tokenizer(sizes.SIZES["tiny"].vocab).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("case", CHEAP)
def test_every_case_that_a_cpu_can_run_gives_a_record(case, tokenizer):
    record = one.measure("tiny", tokenizer, case)
    assert "failed" not in record
    assert record["seconds"]
    assert all(second >= 0 for second in record["seconds"])
    assert math.isfinite(record["peak_mib"])


def test_all_sides_agree_on_the_divergence(tokenizer):
    names = [name for name in CHEAP if name.startswith("loss/") and "/reverse_kl/" in name]
    found = {name: one.measure("tiny", tokenizer, name)["value"] for name in names}
    values = [value for value in found.values() if not math.isnan(value)]  # products give none
    assert len(values) >= 4
    assert max(values) == pytest.approx(min(values), rel=0.02)  # some round logits to bfloat16


@pytest.mark.slow
def test_whole_steps_from_end_to_end(results):
    run(only=("step",))
    written = read(results)
    assert set(written["cases"]) == {name for name in HERE if name.startswith("step/")}
    assert written["failed"] == {}
    assert all("not here" in why for why in written["left_out"].values())
    assert {"machine", "versions", "seconds", "date"} <= set(written)
    for (record,) in written["cases"].values():
        assert record["losses"][0] == pytest.approx(0.0079, rel=0.05)
        assert 0 < record["generate"][0] < record["seconds"][0]


def test_a_case_that_fails_is_noted_and_the_rest_goes_on(results, capsys):
    run(only=("check",), having="s", limit=1, python=sys.executable)  # too short for any
    assert set(read(results)["failed"].values()) == {"took more than 1 s"}
    run(only=("check",), having="fails", resume=True, retry=True)
    assert read(results)["failed"] == {"check/fails": "RuntimeError: no card has 33000 GiB"}
    run(only=("check",), having="measured", resume=True)
    written = read(results)
    assert set(written["cases"]) == {"check/measured"}
    assert set(written["failed"]) == {"check/fails"}
    assert "check/fails: RuntimeError" in capsys.readouterr().out


def test_a_process_that_dies_is_noted(results, tmp_path):
    program = tmp_path / "dies"
    program.write_text("#!/bin/sh\necho 'MemoryError: all of it' >&2; exit 3\n")
    program.chmod(0o755)
    run(only=("check",), having="measured", python=str(program))
    assert read(results)["failed"] == {"check/measured": "MemoryError: all of it"}
    assert script.first_line("", -9) == "ended with -9"


def test_what_was_measured_is_not_measured_again(results):
    run(only=("check",), having="measured")
    before = read(results)["cases"]
    run(only=("check",), having="measured", resume=True, python="/there/is/no/such/program")
    assert read(results)["cases"] == before
    with pytest.raises(FileNotFoundError):  # without resume it is
        run(only=("check",), having="measured", python="/there/is/no/such/program")


def test_no_case_starts_when_the_minutes_are_over(results, capsys):
    run(only=("check",), minutes=0, python="/there/is/no/such/program")
    assert capsys.readouterr().out.count("left for --resume") == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_full_sizes_are_refused_without_a_gpu():
    with pytest.raises(SystemExit, match="--size tiny"):
        script.main()


def test_results_of_another_size_are_not_mixed(results):
    (results / "tried.json").write_text(json.dumps({"size": "full", "cases": {}, "failed": {}}))
    with pytest.raises(SystemExit, match="--size full"):
        run(resume=True)


# The targets.


def record(seconds, **numbers):
    return [{"seconds": [seconds], "peak_mib": 1.0, **numbers}]


def test_targets_are_shares_of_the_measured_rate_and_of_trl():
    results = {
        "limits/square product": record(1.0, operations=1000),
        "loss/opdlab/reverse_kl/frozen": record(2.0, operations=1000),  # half of the rate
        "loss/opdlab/reverse_kl/trainable": record(1.25, operations=1000),  # 80 % of it
        "step/opdlab/few": record(2.0, all_mib=1024),
        "step/TRL/few": record(5.0, all_mib=1024),
        "step/opdlab/many": record(2.0, all_mib=41 * 1024),
        "step/TRL/many": record(3.0, all_mib=1024),
    }
    judged = judge(results, targets.targets())
    cells = [list(column.cells) for column in judged.columns]
    rows = {
        (name, unit): (number, said) for name, unit, number, _, said in zip(*cells, strict=True)
    }
    assert rows["loss, frozen head", "x products"] == ("2", "missed")
    assert rows["loss, trainable head", "x products"] == ("1.25", "met")
    assert rows["step, few", "x TRL's s"] == ("0.4", "met")
    assert rows["step, many", "x TRL's s"] == ("0.667", "missed")
    assert rows["step, many", "GiB"] == ("41", "missed")
    assert "step with vLLM, many" not in {name for name, _ in rows}  # was not measured


def test_targets_name_cases_that_there_are():
    asked = set()

    class Asked(dict):
        def __missing__(self, name):
            asked.add(name)
            return [{"seconds": [1.0], "peak_mib": 1.0, "operations": 1, "all_mib": 1.0}]

    judge(Asked(), targets.targets())
    assert asked <= set(CASES)
    assert {case.group for case in CASES.values()} == set(GROUPS)


def test_the_cases_of_a_piece_fit_into_ten_minutes():
    """As the page says: three commands."""
    for groups in (("limits", "loss", "scoring"), ("writing",), ("step",)):
        cases = [case for case in CASES.values() if case.group in groups]
        assert sum(case.about_s for case in cases) <= 600
