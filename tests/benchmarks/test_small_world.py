"""The benchmark of a real model, with a tiny model in its place."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import small, small_world
from opdlab.data.prompt import Prompt

METHODS = ("opd", "topd", "omniopd", "sft", "privileged")


@pytest.fixture(scope="module")
def pool() -> list[Prompt]:
    return small_world.questions(drawn=4000, kept=40)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, make_model, bytes_bpe) -> str:
    """The folder of a random model with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("tiny")
    make_model(len(bytes_bpe)).save_pretrained(folder)
    bytes_bpe.save_pretrained(folder)
    return str(folder)


def test_every_question_has_its_sum_as_answer_and_hint(pool):
    for prompt in pool:
        left, sign, right = str(prompt.text).partition(": ")[2].removesuffix(" =").split()
        expected = int(left) + int(right) if sign == "+" else int(left) - int(right)
        assert prompt.answer == f" {expected}."
        assert prompt.hint == f"{left} {sign} {right} = {expected}."
        assert max(int(left), int(right)) in small_world.GRADES[prompt.metadata["grade"]]
    assert len({prompt.text for prompt in pool}) == len(pool)
    assert {prompt.metadata["grade"] for prompt in pool} == set(small_world.GRADES)


@pytest.mark.parametrize(
    ("text", "score"),
    [(" -9.", 1), ("-9", 1), (" -9.\n", 1), (" 9.", 0), ("-9..", 0), (" -9. So", 0), ("", 0)],
)
def test_a_right_text_is_the_number_alone(text, score):
    assert small_world.is_right(Prompt("20 - 29 =", answer=" -9."), text) == score


def test_the_world_holds_out_sums_that_nobody_trains_on(pool):
    held_out = small_world.questions(drawn=600, kept=40, split="test")
    task = small_world.make_task(pool, held_out)
    asked = task.prompts(len(held_out), split="test")
    trained = task.prompts(200, split="train")
    assert 10 < len(asked) == len({prompt.text for prompt in asked})
    assert len({prompt.text for prompt in trained}) > 10
    assert all(" + " in str(prompt.text) for prompt in (*asked, *trained))
    assert any(" - " in str(prompt.text) for prompt in pool)  # the teacher's own task has both
    assert not {prompt.text for prompt in asked} & {prompt.text for prompt in pool}
    assert task.prompts(8, seed=1) == task.prompts(8, seed=1) != task.prompts(8, seed=2)


def test_the_command_runs_to_its_end_and_skips_what_is_kept(tiny, tmp_path, capsys):
    options = {"quick": True, "model": tiny, "folder": tmp_path}
    small.main(only=METHODS, **options)
    stored = json.loads((tmp_path / "quick" / "small.json").read_text())
    assert set(stored["methods"]) == set(METHODS)
    assert set(stored["not_run"]) == set(small.ENTRIES) - set(METHODS)
    assert set(stored["controls"]["arms"]) == {"teacher", *small.ARMS}
    runs = {name: one["runs"]["0"] for name, one in stored["methods"].items()}
    assert {name: run["updates"] for name, run in runs.items()} == dict.fromkeys(METHODS, 2)
    assert all(len(run["greedy"]) == len(run["sampled"]) == 8 for run in runs.values())
    before = np.mean(stored["before"]["greedy"])
    for name, one in stored["methods"].items():
        gain = np.mean(runs[name]["greedy"]) - before
        assert one["greedy"]["gain"] == pytest.approx(gain)
    plain = runs["opd"]["teacher"]
    assert plain["graded"] > 0
    assert plain["written"] == 0
    assert runs["sft"]["teacher"] == {"graded": 0, "written": 0}
    assert runs["privileged"]["teacher"]["written"] == 0
    assert runs["topd"]["teacher"]["written"] > 0
    assert runs["omniopd"]["teacher"]["graded"] == 0
    assert runs["omniopd"]["teacher"]["written"] > 0
    assert "Not run" in capsys.readouterr().out

    files = sorted((tmp_path / "quick").glob("**/runs/*.json"))
    assert len(files) == 4 + 8  # what the controls do not share, and their arms
    when = [file.stat().st_mtime_ns for file in files]
    small.main(only=METHODS, **options)
    assert [file.stat().st_mtime_ns for file in files] == when
    again = json.loads((tmp_path / "quick" / "small.json").read_text())
    assert again["methods"] == stored["methods"]

    small.main(only=("soda",), **options)  # what ran before stays in the results
    more = json.loads((tmp_path / "quick" / "small.json").read_text())
    assert {name: one for name, one in more["methods"].items() if name != "soda"} == again[
        "methods"
    ]
    assert more["controls"] == again["controls"]
    written = more["methods"]["soda"]["runs"]["0"]["teacher"]["written"]
    assert 0 < written <= 2 * 4 * small_world.MAX_NEW_TOKENS

    lost = tmp_path / "quick" / "runs" / "soda-0.json"
    lost.unlink()
    small.main(only=("soda",), **options)  # its result is enough
    assert json.loads((tmp_path / "quick" / "small.json").read_text())["methods"] == more["methods"]
    assert not lost.exists()

    kept = tmp_path / "quick" / "runs" / "sft-0.json"
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "identity": "other"}))
    with pytest.raises(SystemExit, match=r"sft-0\.json is of another world"):
        small.main(only=("sft",), **options)


def test_a_name_that_does_not_exist_is_refused():
    with pytest.raises(SystemExit, match="There is no 'opdd'"):
        small.main(only=("opdd",))


def test_the_gain_counts_seeds_and_prompts_and_equal_tokens():
    before = {"greedy": [0.0, 1.0, 0.0, 0.0], "sampled": [0.0, 0.0, 0.0, 0.0]}
    run = {
        "greedy": [1.0, 1.0, 0.0, 1.0],
        "sampled": [0.0, 1.0, 0.0, 0.0],
        "teacher": {"graded": 10, "written": 4},
        "cpu_seconds": 2.0,
        "at_budget": {
            "updates": 5,
            "greedy": [1.0, 1.0, 0.0, 0.0],
            "sampled": [0.0, 0.0, 0.0, 1.0],
        },
    }
    other = {**run, "greedy": [0.0, 1.0, 0.0, 1.0]}
    found = small.summarise("topd", {"0": run, "1": other}, before)
    assert found["greedy"]["accuracy"] == pytest.approx(np.mean([0.75, 0.5]))
    assert found["greedy"]["gain"] == pytest.approx(np.mean([0.5, 0.25]))
    assert found["sampled"]["gain"] == pytest.approx(0.25)
    assert (found["greedy"]["prompts"], found["greedy"]["seeds"]) == (4, 2)
    assert found["equal_teacher_tokens"]["greedy"]["accuracy"] == 0.5
    assert found["equal_teacher_tokens"]["updates"] == 5
    assert (found["teacher_graded"], found["teacher_written"]) == (10, 4)
