"""What a run keeps and when: the last step always, nothing half, snapshots across resume, files
that others read.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from warm_start import python

import opdlab as opd
from opdlab import errors
from opdlab.models.policy import Policy

OPTIONS = {"batch": 2, "steps": 3, "seed": 5, "lr": 1e-2, "quiet": True}


def task(**options) -> opd.Task:
    records = [
        {"prompt": f"{name} has 4 7 apples", "answer": "9"} for name in "ana ben cleo dan".split()
    ]
    return opd.tasks.from_records(records, **{"test": 2, "max_new_tokens": 4, **options})


def run(make_policy, folder=None, student=None, **options) -> opd.Run:
    return opd.distill(
        student or make_policy(0), make_policy(1), task(), save=folder, **{**OPTIONS, **options}
    )


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


# When.


def test_the_last_step_is_saved_without_save_every(make_policy, tmp_path):
    run(make_policy, tmp_path / "run").train()
    assert names(tmp_path / "run") == ["step-000003"]


def test_the_last_step_is_saved_where_save_every_does_not_divide_it(make_policy, tmp_path):
    run(make_policy, tmp_path, save_every=2).train()
    assert names(tmp_path) == ["step-000002", "step-000003"]


def test_a_run_that_is_left_early_is_saved_on_request(make_policy, tmp_path):
    left = run(make_policy, tmp_path)
    next(left)
    assert names(tmp_path) == []
    assert left.save() == tmp_path / "step-000001"


@pytest.fixture
def heard():
    """SIGINT as a terminal sets it: a test run in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_during_an_evaluation_loses_nothing(make_policy, tmp_path, monkeypatch):
    stopped = run(make_policy, tmp_path / "run", save_every=2, snapshot_every=2, evaluate_every=2)
    whole = run(make_policy, tmp_path / "whole", save_every=2, evaluate_every=2).train()
    with monkeypatch.context() as patched:
        patched.setattr(
            sys.modules[opd.Run.__module__],
            "evaluate",
            lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        next(stopped)
        with pytest.raises(KeyboardInterrupt):
            next(stopped)
    assert (stopped.done, list(stopped.snapshots), names(tmp_path / "run")) == (
        2,
        [0, 2],
        ["snapshots", "step-000002"],
    )
    again = opd.resume(tmp_path / "run", make_policy(0), make_policy(1), task(), quiet=True)
    next(again)  # the evaluation of step 2 is made up for
    assert again.history["accuracy"].tolist()[1] == whole.history["accuracy"].tolist()[1]
    history = json.loads((tmp_path / "run" / "step-000002" / "history.json").read_text())
    assert history[1]["accuracy"] == again.metrics[1]["accuracy"]
    assert (
        opd.resume(
            tmp_path / "run", make_policy(0), make_policy(1), task(), step=2, quiet=True
        ).done
        == 2
    )  # checksums hold


def test_every_state_of_the_manifest_fits_the_files(make_policy, tmp_path, monkeypatch):
    """A kill between any two of the writes that add an evaluation leaves a checkpoint that
    verifies.
    """
    from opdlab.training import checkpoint

    made = run(make_policy, tmp_path, steps=1).train()
    made.metrics[-1]["accuracy"] = 0.5
    replace, left = checkpoint.write_file, [0]

    def limited(path, data, flush):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        replace(path, data, flush)

    monkeypatch.setattr(checkpoint, "write_file", limited)
    for allowed in (1, 2, 3):
        left[0] = allowed
        try:
            checkpoint.update_history(made, tmp_path / "step-000001")
        except KeyboardInterrupt:
            assert allowed < 3
        checkpoint.find_checkpoint(tmp_path)
        made.metrics[-1]["accuracy"] += 0.1


def test_an_interrupt_waits_for_the_checkpoint(make_policy, tmp_path, heard, monkeypatch):
    from opdlab.training import checkpoint

    made, flush = run(make_policy, tmp_path, steps=1), checkpoint._flush_files
    monkeypatch.setattr(
        checkpoint,
        "_flush_files",
        lambda folder: (os.kill(os.getpid(), signal.SIGINT), flush(folder)),
    )
    with pytest.raises(KeyboardInterrupt):
        next(made)
    assert names(tmp_path) == ["step-000001"]
    assert checkpoint.find_checkpoint(tmp_path)


TERMINATED = """
import os, signal
from opdlab.support.interrupts import hold_interrupts

with hold_interrupts():
    os.kill(os.getpid(), signal.SIGTERM)
    print("finished", flush=True)
print("not reached")
"""


def test_a_termination_waits_too_and_then_ends_the_process():
    done = subprocess.run(
        [python(), "-c", TERMINATED], capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "finished\n")


def test_only_the_main_process_writes(make_policy, tmp_path):
    other = run(make_policy, tmp_path, steps=1)
    other.accelerator = type(
        "Second",
        (),
        {
            "is_main_process": False,
            "num_processes": 2,
            "process_index": 1,
            "device": torch.device("cpu"),
            "log": lambda *_, **__: None,
            "reduce": staticmethod(lambda value, _: value),
            "gather": staticmethod(lambda value: value),
        },
    )()
    next(other)
    assert other.save() == tmp_path / "step-000001"
    assert names(tmp_path) == []


# Where.


@pytest.mark.parametrize(
    ("save", "said"),
    [
        ("", "save=''"),
        ("  ", "save=' '"),
        (5, "save=5"),
        (True, "save=True"),
        (b"runs", "save=b'runs'"),
        ("a\0b", "null character"),
        ("n" * 300, "nothing can be written"),
        ("lone \udcff", "lone surrogate"),
        ("~nobody_of_that_name/x", "no such home directory"),
        ("{tmp}/file", "nothing can be written"),
        ("{tmp}/file/under", "nothing can be written"),
        ("{tmp}/run/step-000001", "itself a checkpoint"),
    ],
)
def test_a_folder_that_cannot_be_is_refused_before_the_first_step(
    make_policy, tmp_path, save, said
):
    (tmp_path / "file").write_text("")
    (tmp_path / "run" / "step-000001").mkdir(parents=True)
    (tmp_path / "run" / "step-000001" / "manifest.json").write_text("{}")
    save = save.replace("{tmp}", str(tmp_path)) if isinstance(save, str) else save
    with pytest.raises(errors.InvalidValue, match=said):
        run(make_policy, save)
    made = run(make_policy)
    next(made)
    with pytest.raises(errors.InvalidValue, match="save got path"):
        made.save(save)


def test_the_home_directory_is_understood(make_policy, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(make_policy, "~/runs/first", steps=1).train().folder == tmp_path / "runs" / "first"
    assert opd.resume("~/runs/first", make_policy(0), make_policy(1), task(), quiet=True).done == 1


def test_odd_names_are_fine(make_policy, tmp_path):
    folder = tmp_path / "a [b]*? \N{SNOWMAN}"
    run(make_policy, folder, steps=1, snapshot_every=1).train()
    again = opd.resume(folder, make_policy(0), make_policy(1), task(), quiet=True)
    assert opd.snapshots.steps(again) == [0, 1]


def test_settings_that_keep_nothing_are_refused(make_policy):
    with pytest.raises(errors.InvalidValue, match=r"save_every=5.*no folder.*save="):
        run(make_policy, save_every=5)
    with pytest.raises(
        errors.InvalidValue, match=r"snapshot_every=2.* lora=None trains all weights"
    ):
        run(make_policy, snapshot_every=2, lora=None)


@pytest.mark.parametrize(
    ("log_with", "said"),
    [
        ("nope", "which is no tracker. Use aim"),
        (5, "which is no tracker"),
        (["wandb", "nope"], "tracker|not installed"),
    ],
)
def test_trackers_that_are_none_are_refused(make_policy, log_with, said):
    with pytest.raises(errors.InvalidValue, match=said):
        run(make_policy, log_with=log_with)


def test_a_tracker_that_is_not_installed_is_refused(make_policy, monkeypatch):
    from opdlab.training import trackers

    monkeypatch.setattr(trackers, "get_available_trackers", list)
    with pytest.raises(
        errors.InvalidValue, match="log_with='wandb', whose package is not installed"
    ):
        run(make_policy, log_with="wandb")


# Snapshots.


def test_snapshots_survive(make_policy, tmp_path):
    first = run(make_policy, tmp_path, steps=4, snapshot_every=1, save_every=2)
    rollout = first.student.sample(task().prompts(2), max_new_tokens=4)
    seen = {0: first.student.log_probs(rollout)} | {
        step.number: first.student.log_probs(rollout) for step in first
    }
    again = opd.resume(tmp_path, make_policy(0), make_policy(1), task(), step=2, quiet=True)
    assert list(again.snapshots) == [0, 1, 2]
    again.train()
    assert list(again.snapshots) == [0, 1, 2, 3, 4]
    for step, log_probs in seen.items():
        assert torch.equal(again.at(step).log_probs(rollout), log_probs)


def test_a_damaged_snapshot_is_said_and_left_out(make_policy, tmp_path):
    run(make_policy, tmp_path, snapshot_every=1).train()
    (damaged,) = (tmp_path / "snapshots").glob("step-000002-*")
    damaged.write_bytes(damaged.read_bytes()[:-3])
    with pytest.warns(UserWarning, match="snapshot of step 2 is lost: .* not what was written"):
        again = opd.resume(tmp_path, make_policy(0), make_policy(1), task(), quiet=True)
    assert list(again.snapshots) == [0, 1, 3]


# What others read.


def whole_model(folder) -> Policy:
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager"
    )  # as the tests' tiny models
    return Policy.of(model, AutoTokenizer.from_pretrained(folder))


@pytest.mark.parametrize("config", [{}, {"tie_word_embeddings": True}])
def test_a_checkpoint_of_full_training_is_a_model_that_transformers_loads(
    make_policy, tmp_path, config
):
    make_policy(0, **config).weights.model.save_pretrained(tmp_path / "base")
    make_policy(0).tokenizer.save_pretrained(tmp_path / "base")
    made = run(make_policy, tmp_path, whole_model(tmp_path / "base"), lora=None, steps=2).train()
    rollout = made.student.sample(task().prompts(2), max_new_tokens=4)
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= set(
        names(tmp_path / "step-000002")
    )
    assert torch.equal(
        whole_model(tmp_path / "step-000002").log_probs(rollout), made.student.log_probs(rollout)
    )


def test_full_training_with_tied_weights_resumes_exactly(make_policy, tmp_path):
    options = {"lora": None, "save_every": 1, "steps": 2}
    run(make_policy, tmp_path / "a", make_policy(0, tie_word_embeddings=True), **options).train()
    run(
        make_policy,
        tmp_path / "b",
        make_policy(0, tie_word_embeddings=True),
        **{**options, "steps": 1},
    ).train()
    opd.resume(
        tmp_path / "b",
        make_policy(0, tie_word_embeddings=True),
        make_policy(1),
        task(),
        steps=2,
        quiet=True,
    ).train()
    for name in ("model", "optimizer"):
        one, two = (
            load_file(tmp_path / which / "step-000002" / f"{name}.safetensors") for which in "ab"
        )
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_full_training_beside_an_adapter_that_is_not_used_saves_the_model(make_policy, tmp_path):
    student = make_policy(0)
    other = Policy(student.weights).adapt(4)
    made = run(make_policy, tmp_path, student, lora=None, steps=1).train()
    assert other.adapter is not None
    rollout = made.student.sample(task().prompts(2), max_new_tokens=4)
    assert torch.equal(
        whole_model(tmp_path / "step-000001").log_probs(rollout), made.student.log_probs(rollout)
    )


def test_generation_settings_that_transformers_will_not_save_do_not_cost_the_checkpoint(
    make_policy, tmp_path
):
    student = make_policy(0)
    student.weights.model.generation_config.temperature = 0.5  # without do_sample
    run(make_policy, tmp_path, student, lora=None, steps=1).train()
    assert (
        json.loads((tmp_path / "step-000001" / "generation_config.json").read_text())["temperature"]
        == 0.5
    )


ADAPTERS = [
    {},
    {"use_dora": True},
    {"use_rslora": True, "lora_alpha": 7},
    {"target_modules": r".*\.(q_proj|up_proj)"},
    {"modules_to_save": ["embed_tokens"]},
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"rank_pattern": {"q_proj": 3}},
]


@pytest.mark.parametrize("options", ADAPTERS)
def test_peft_loads_an_adapters_checkpoint(make_policy, tmp_path, options):
    base = make_policy(0)
    base.weights.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    student = Policy.load(tmp_path / "base", device="cpu")
    student._adapter.name = student.weights.add_adapter(
        LoraConfig(
            **{"r": 4, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM", **options}
        )
    )
    made = run(make_policy, tmp_path / "run", student, steps=2, lr=5e-2).train()
    rollout = made.student.sample(task().prompts(2), max_new_tokens=4)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "run" / "step-000002"
    )
    assert torch.equal(plain(model, rollout, made.student), made.student.log_probs(rollout))
    again = opd.resume(
        tmp_path / "run",
        Policy.load(tmp_path / "base", device="cpu"),
        make_policy(1),
        task(),
        quiet=True,
    )
    assert torch.equal(again.student.log_probs(rollout), made.student.log_probs(rollout))


def plain(model, rollout, student) -> torch.Tensor:
    """Log-probs of a model that PEFT has wrapped, through a policy's own padding and head."""
    inner = model.get_base_model()
    policy = Policy.of(inner, student.tokenizer)
    return policy.log_probs(rollout)


def test_resized_embeddings_are_saved_and_come_back(make_policy, tmp_path):
    base = make_policy(0)
    base.weights.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")

    def resized(seed: int) -> Policy:
        model, tokenizer = (
            AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
            AutoTokenizer.from_pretrained(tmp_path / "base"),
        )
        tokenizer.add_tokens(["<think>", "</think>"])
        torch.manual_seed(seed)  # another session
        model.resize_token_embeddings(len(tokenizer))
        return Policy.of(model, tokenizer)

    problems = opd.tasks.from_records(
        [{"prompt": "ana <think> has"}, {"prompt": "ben has <think>"}], test=0, max_new_tokens=4
    )
    made = opd.distill(resized(1), resized(9), problems, save=tmp_path / "run", **OPTIONS).train()
    saved = load_file(tmp_path / "run" / "step-000003" / "adapter_model.safetensors")
    assert {
        "base_model.model.model.embed_tokens.weight",
        "base_model.model.lm_head.weight",
    } <= saved.keys()
    rollout = made.student.sample(problems.prompts(2), max_new_tokens=4)
    again = opd.resume(tmp_path / "run", resized(2), resized(9), problems, quiet=True)
    assert torch.equal(again.student.log_probs(rollout), made.student.log_probs(rollout))
    model = PeftModel.from_pretrained(resized(3).weights.model, tmp_path / "run" / "step-000003")
    assert torch.equal(plain(model, rollout, made.student), made.student.log_probs(rollout))


def test_weights_beside_an_adapter_are_refused(make_policy):
    for student in (make_policy(0), make_policy(0).adapt(4)):
        student.weights.model.get_input_embeddings().weight.requires_grad_(True)
        with pytest.raises(
            errors.OpdlabError,
            match=r"Beside the adapter, model.embed_tokens.weight is to be trained \(1 such",
        ):
            run(make_policy, student=student)


def test_an_adapter_after_full_training_is_fine(make_policy):
    student = make_policy(0)
    run(make_policy, student=student, lora=None, steps=1).train()
    assert run(make_policy, student=student, steps=1).train().done == 1


# Two runs, one student.


def test_two_runs_do_not_take_turns_on_one_student(make_policy):
    student = make_policy(0)
    one = run(make_policy, student=student)
    two = run(make_policy, student=student)
    next(one)
    with pytest.raises(
        errors.OpdlabError,
        match=(
            r"Another run has made 1 updates to this student since the last step of Run\(OPD,"
            r" step 0"
        ),
    ):
        next(two)
    three = run(make_policy, student=student)  # prepared afterwards: it goes on from there
    next(three)
    with pytest.raises(errors.OpdlabError, match="Another run"):
        next(one)
    assert next(three).number == 2


def test_runs_with_adapters_of_their_own_may_take_turns(make_policy):
    student = make_policy(0)
    other = Policy(student.weights)
    one, two = run(make_policy, student=student), run(make_policy, student=other)
    assert [next(made).number for made in (one, two, one, two)] == [1, 1, 2, 2]
