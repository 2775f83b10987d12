"""A run is written as a config that makes the same run again, or refused in words."""

from __future__ import annotations

import json

import pytest
import torch

import opdlab as opd
from opdlab.errors import InvalidValue, OpdlabError
from opdlab.losses import TopK
from opdlab.tasks.market import model
from opdlab.tasks.verifiers import exact
from opdlab.training.config import parse_toml
from opdlab.training.exporting import _describe_sampler

SIZES = {"steps": 3, "batch": 4, "quiet": True}


def trained(run: opd.Run) -> dict[str, torch.Tensor]:
    run.train()
    return run.student.weights.adapter_state(str(run.student.adapter))


def assert_same_training(run: opd.Run) -> str:
    text = run.to_config()
    again = opd.from_config(text, quiet=True)
    assert again.to_config() == text
    one, two = trained(run), trained(again)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    without_time = [
        [
            {k: v for k, v in row.items() if k != "seconds" and not k.endswith("_s")}
            for row in one.metrics
        ]
        for one in (run, again)
    ]
    assert without_time[0] == without_time[1]
    return text


def test_market_goes_round_bit_for_bit():
    student, teacher, task = opd.load("market")
    method = opd.OPD("forward_kl", top_k=TopK(8, by="teacher"))
    text = assert_same_training(opd.distill(student, teacher, task, method=method, **SIZES))
    tables = parse_toml(text)
    assert tables["student"] == {"source": "student"}
    assert tables["method"]["top_k"] == {"k": 8, "by": "teacher", "tail": "bucket"}
    assert tables["settings"]["lr"] == 1e-3  # of the task's recipe


def test_contexts_and_policies_go_round():
    student = model("student")
    teacher = student.frozen().seeing("3 4 + 1 6 = 5 0")
    policies = {"reference": model("novice").seeing([{"role": "user", "content": "hello"}])}
    run = opd.distill(
        student, teacher, opd.tasks.market(), method=opd.GOPD(), policies=policies, **SIZES
    )
    tables = parse_toml(assert_same_training(run))
    assert tables["teacher"]["context"] == "3 4 + 1 6 = 5 0"
    assert tables["policies"]["reference"]["context"] == [{"role": "user", "content": "hello"}]


def test_several_teachers_go_round(tmp_path):
    records = [
        {"prompt": f"1 + {i}", "answer": str(1 + i), "who": ("one", "two")[i % 2]}
        for i in range(20)
    ]
    path = tmp_path / "sums.jsonl"
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    task = opd.tasks.from_records(path, test=4, max_new_tokens=5, keep="who")
    student, teacher, _ = opd.load("market")
    members = {"one": teacher, "two": model("novice").seeing("add")}
    many = opd.MultiTeacher(members, route="who")
    text = assert_same_training(opd.distill(student, many, task, **SIZES))
    tables = parse_toml(text)
    assert tables["task"]["keep"] == ["who"]
    assert tables["teacher"]["route"] == "who"
    assert tables["teacher"]["members"]["two"] == {"source": "novice", "context": "add"}
    mixed = opd.MultiTeacher(members, {"one": 1.0, "two": 3.0}, "geometric")
    text = opd.distill(model("student"), mixed, task, **SIZES).to_config()
    assert opd.from_config(text, quiet=True).teacher.route == {"one": 1.0, "two": 3.0}
    by_function = opd.MultiTeacher(members, lambda prompt: "one")
    assert "keep=" in refused(opd.distill(model("student"), by_function, task, **SIZES))
    with pytest.raises(InvalidValue, match=r"\[teacher.members.NAME\]"):
        opd.from_config(text.replace("members.one", "members.one.members.one"), quiet=True)


def test_a_combined_method_goes_round():
    student, teacher, task = opd.load("market")
    method = opd.Combined(opd.OPD(top_k=8), opd.GRPO(scale=False), weights=(1, 0.5))
    run = opd.distill(student, teacher, task, method=method, n=2, **SIZES)
    assert parse_toml(assert_same_training(run))["method"]["methods"][1] == {
        "name": "GRPO",
        "scale": False,
    }


def test_records_options_without_value_and_all_weights_go_round(tmp_path):
    records = [{"prompt": f"1 + {i}", "answer": str(1 + i)} for i in range(20)]
    path = tmp_path / "sums.jsonl"
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    task = opd.tasks.from_records(path, verify=exact, test=4, max_new_tokens=5)
    student, teacher, _ = opd.load("market")
    run = opd.distill(
        student, teacher, task, method=opd.OPDPlus(clip=None), lora=None, lr=1e-3, **SIZES
    )
    text = run.to_config(tmp_path / "run.toml")
    tables = parse_toml(text)
    assert tables["task"]["verify"] == "exact"
    assert (tables["settings"]["lora"], tables["method"]["clip"]) == (False, False)
    again = opd.from_config(tmp_path / "run.toml", quiet=True)
    assert (again.settings, again.method) == (run.settings, run.method)
    one, two = (dict(one.train().student.weights.model.state_dict()) for one in (run, again))
    assert all(torch.equal(one[name], two[name]) for name in one)


def refused(run: opd.Run) -> str:
    with pytest.raises(OpdlabError) as error:
        run.to_config()
    return str(error.value)


def test_code_and_objects_in_memory_are_refused_in_words(tmp_path):
    student, teacher, task = opd.load("market")

    def mine(rows):
        return -rows.logp_of("student")

    assert "--method FILE.py:NAME" in refused(
        opd.distill(student, teacher, task, method=mine, **SIZES)
    )
    student = model("student")
    told = teacher.seeing(lambda prompt: prompt)
    assert "Give seeing() a text" in refused(opd.distill(student, told, task, **SIZES))
    in_memory = opd.tasks.from_records(
        [{"prompt": "1", "answer": "2"}] * 3, test=0, max_new_tokens=4
    )
    assert "was made of objects in memory" in refused(
        opd.distill(model("student"), teacher, in_memory, **SIZES)
    )
    bare = model("student")
    bare = opd.Policy.of(bare.weights.model, bare.tokenizer)
    assert "was made of a model in memory" in refused(opd.distill(bare, teacher, task, **SIZES))


def test_a_student_that_changed_after_loading_is_refused():
    student, teacher, task = opd.load("market")
    opd.distill(student, teacher, task, **SIZES).train()
    assert "another adapter than was loaded" in refused(
        opd.distill(student, teacher, task, **SIZES)
    )
    changed = model("student")
    with torch.no_grad():
        next(changed.weights.model.parameters()).add_(0.01)
    assert "its weights have changed" in refused(opd.distill(changed, teacher, task, **SIZES))


def test_a_config_runs_no_code_and_holds_no_key():
    begin = '[student]\nsource = "student"\n[teacher]\nsource = "teacher"\n'
    with pytest.raises(OpdlabError, match="There is no method"):
        opd.from_config(begin + '[method]\nname = "mine.py:loss"\n')
    with pytest.raises(InvalidValue, match="OPDLAB_API_KEY"):
        opd.from_config(begin.replace('"teacher"', '"teacher"\napi_key = "abc"'))


def test_a_sampler_goes_round_or_is_refused():
    student = model("student")
    server = opd.samplers.VLLMServer("http://127.0.0.1:9/v1", timeout=7.0)
    sampler = _describe_sampler(server)
    assert sampler is not None
    assert sampler.name == "vllm-server"
    assert sampler.options["timeout"] == 7.0
    again = opd.samplers.VLLMServer(**sampler.options)
    assert again.given == server.given
    engine = _describe_sampler(opd.samplers.VLLM(gpu_memory_utilization=0.4))
    assert engine is not None
    assert (engine.name, engine.options) == ("vllm", {"gpu_memory_utilization": 0.4})
    with pytest.raises(OpdlabError, match="code of your own"):
        _describe_sampler(student)
    with pytest.raises(OpdlabError, match="no plain value"):
        _describe_sampler(opd.samplers.VLLM(compilation_config={"level": 0}))
