"""Taking up a run: exact whatever the adapter is called, and only with what the run was made of."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import opdlab as opd
from opdlab import errors, methods
from opdlab.models.policy import Policy
from opdlab.tasks.market import tokenizers as market

OPTIONS = {"batch": 2, "steps": 4, "seed": 5, "lr": 1e-2, "quiet": True, "save_every": 2}


def task(words: str = "ana ben cleo dan", **options) -> opd.Task:
    records = [
        {"prompt": f"{name} has 4 7 apples", "answer": "9", "hint": "say 9"}
        for name in words.split()
    ]
    return opd.tasks.from_records(records, test=0, **{"max_new_tokens": 4, **options})


def run(folder, student, teacher=None, problems=None, **options) -> opd.Run:
    return opd.distill(student, teacher, problems or task(), save=folder, **{**OPTIONS, **options})


def same_files(one: Path, two: Path, *names: str) -> bool:
    for name in names:
        a, b = load_file(one / f"{name}.safetensors"), load_file(two / f"{name}.safetensors")
        if a.keys() != b.keys() or not all(torch.equal(a[key], b[key]) for key in a):
            return False
    return True


@pytest.fixture(scope="module")
def saved(make_policy, tmp_path_factory) -> Path:
    """A run of four steps, saved at the second and the fourth."""
    folder = tmp_path_factory.mktemp("saved")
    run(folder, make_policy(0), make_policy(1)).train()
    return folder


def half(saved, tmp_path) -> Path:
    """The first half of the saved run, alone in a folder."""
    import shutil

    shutil.copytree(saved / "step-000002", tmp_path / "half" / "step-000002")
    return tmp_path / "half"


# Exactness.


def test_another_adapter_name_changes_nothing(saved, make_policy, tmp_path):
    student = make_policy(0)
    student.adapt(4)
    student._adapter.name = None
    student.weights.use(None)
    again = opd.resume(half(saved, tmp_path), student, make_policy(1), task(), quiet=True)
    assert again.student.adapter == "lora1"  # lora0 in the run that was saved
    assert len(again.optimizer.state) == len(again.parameters) > 0
    again.train()
    assert same_files(
        saved / "step-000004", tmp_path / "half" / "step-000004", "adapter_model", "optimizer"
    )


def test_names_of_modules_and_adapters_that_coincide():
    from opdlab.training.optimizer_files import plain_name

    assert (
        plain_name("model.layers.0.q_proj.lora_A.model.weight", "model")
        == "model.layers.0.q_proj.lora_A.weight"
    )
    assert (
        plain_name("model.layers.0.q_proj.lora_A.weight.weight", "weight")
        == "model.layers.0.q_proj.lora_A.weight"
    )
    assert (
        plain_name("base_model.model.model.q.lora_B.default.weight", "default")
        == "model.q.lora_B.weight"
    )
    assert (
        plain_name("model.embed_tokens.lora_embedding_A.lora3", "lora3")
        == "model.embed_tokens.lora_embedding_A"
    )


def as_first_format(folder: Path) -> None:
    """Rewrite a checkpoint as the first version wrote it: the adapter's name in the optimizer's
    names, no identities.
    """
    import hashlib

    state = load_file(folder / "optimizer.safetensors")
    for side in ("lora_A", "lora_B"):
        state = {
            key.replace(f"{side}.weight", f"{side}.lora7.weight"): value
            for key, value in state.items()
        }
    save_file(state, folder / "optimizer.safetensors")
    said = json.loads((folder / "run.json").read_text())
    said["method"]["options"] = {
        "divergence": "reverse_kl",
        "options": {},
        "top_k": None,
        "estimator": "full",
        "baseline": None,
        "discount": 0.0,
        "on_policy": 1.0,
    }
    for key in ("format", "identity", "moved", "forgotten", "run", "processes", "snapshots"):
        del said[key]
    (folder / "run.json").write_text(json.dumps(said))
    sums = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name != "manifest.json"
    }
    (folder / "manifest.json").write_text(json.dumps(sums))


def test_checkpoints_of_the_first_format_resume_exactly_and_say_what_is_unknown(
    saved, make_policy, tmp_path
):
    folder = half(saved, tmp_path)
    as_first_format(folder / "step-000002")
    with pytest.warns(
        UserWarning, match=r"earlier version.*whether the student's weights.*could not be checked"
    ):
        again = opd.resume(folder, make_policy(0), make_policy(1), task(), quiet=True)
    again.train()
    assert same_files(saved / "step-000004", folder / "step-000004", "adapter_model", "optimizer")


def test_what_the_first_format_knows_is_compared(saved, make_policy, tmp_path):
    folder = half(saved, tmp_path)
    as_first_format(folder / "step-000002")
    with pytest.raises(errors.OpdlabError, match=r"the task 'records' and 'others' is given"):
        opd.resume(folder, make_policy(0), make_policy(1), replace(task(), name="others"))
    with pytest.raises(errors.OpdlabError, match=r"the method 'OPD' and 'GOPD' is given"):
        opd.resume(folder, make_policy(0), make_policy(1), task(), method=opd.GOPD())


def rewrite_optimizer(folder: Path, change) -> None:
    import hashlib

    path = folder / "optimizer.safetensors"
    save_file(change(load_file(path)), path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def without_first(state):
    gone = sorted(key for key in state if key.startswith("exp_avg/"))[0]
    return {key: value for key, value in state.items() if key != gone}


def reshaped(state):
    first = sorted(key for key in state if key.startswith("exp_avg/"))[0]
    return {**state, first: state[first][:1].clone()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_first, "has nothing for .* tensors are missing"),
        (reshaped, "of shape .*, but the run has"),
    ],
)
def test_an_optimizer_state_that_does_not_fit_is_refused(
    saved, make_policy, tmp_path, change, said
):
    folder = half(saved, tmp_path)
    rewrite_optimizer(folder / "step-000002", change)
    with pytest.raises(errors.DamagedFile, match=said):
        opd.resume(folder, make_policy(0), make_policy(1), task())


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"]},
        {"modules_to_save": ["embed_tokens"]},
    ],
)
def test_an_adapter_of_your_own_comes_back_with_its_settings(make_policy, tmp_path, options):
    from peft import LoraConfig

    config = LoraConfig(
        **{"target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM", **options}
    )

    def adapted() -> Policy:
        policy = make_policy(0)
        policy._adapter.name = policy.weights.add_adapter(config)
        return policy

    run(tmp_path / "whole", adapted(), make_policy(1)).train()
    run(tmp_path / "parts", adapted(), make_policy(1), steps=2).train()
    again = opd.resume(
        tmp_path / "parts", make_policy(0), make_policy(1), task(), steps=4, quiet=True
    ).train()
    assert same_files(
        tmp_path / "whole" / "step-000004",
        tmp_path / "parts" / "step-000004",
        "adapter_model",
        "optimizer",
    )
    now = again.student.weights.model.peft_config[again.student.adapter]
    assert {key: getattr(now, key) for key in ("r", "lora_alpha", "use_dora")} == {
        key: getattr(config, key) for key in ("r", "lora_alpha", "use_dora")
    }


def test_an_adapter_with_other_settings_is_refused(saved, make_policy):
    student = make_policy(0)
    student.adapt(16, alpha=8)
    with pytest.raises(errors.OpdlabError, match=r"has lora_alpha=8.* and that of .* has 32"):
        opd.resume(saved, student, make_policy(1), task())


# What a run was made of.


class SFT:
    """A user's method that happens to be called as one of opdlab's."""

    needs = ("teacher",)

    def loss(self, rows):
        return opd.losses.reverse_kl(rows.student, rows.teacher)


@dataclass(frozen=True)
class Mine:
    weight: float = 1.0
    needs: tuple = ("teacher",)

    def loss(self, rows):
        return self.weight * opd.losses.reverse_kl(rows.student, rows.teacher)


def refused(folder, *given, match, **options):
    with pytest.raises(errors.OpdlabError, match=match):
        opd.resume(folder, *given, quiet=True, **options)


def test_another_student_is_refused(saved, make_policy):
    refused(
        saved,
        make_policy(3),
        make_policy(1),
        task(),
        match=r"the student has other weights.*fingerprint \w+ was saved and \w+ is given",
    )
    refused(
        saved,
        make_policy(0, rms_norm_eps=1e-3),
        make_policy(1),
        task(),
        match="rms_norm_eps was .* and is 0.001",
    )
    refused(
        saved,
        make_policy(0, dtype=torch.float64),
        make_policy(1),
        task(),
        match="another precision: float32 was saved and float64",
    )


def test_a_refusal_leaves_the_student_as_it_was(saved, make_policy):
    student = make_policy(0)
    refused(saved, student, make_policy(2), task(), match="the teacher has other weights")
    assert student.adapter is None
    assert not getattr(student.weights.model, "peft_config", None)
    assert opd.resume(saved, student, make_policy(1), task(), quiet=True).done == 4


def test_a_student_that_is_already_trained_is_refused(saved, make_policy, tmp_path):
    student = make_policy(0)
    run(tmp_path / "a", student, make_policy(1), steps=1).train()
    refused(
        saved,
        student,
        make_policy(1),
        task(),
        match="the student is already trained: its adapter .* was fresh when the run began",
    )
    whole = make_policy(0)
    run(tmp_path / "b", whole, make_policy(1), steps=1, lora=None).train()
    refused(
        tmp_path / "b",
        whole,
        make_policy(1),
        task(),
        match="other weights than at the beginning of the run",
    )


def test_a_run_on_a_trained_adapter_goes_on_from_it_only(make_policy, perturb, tmp_path):
    def trained() -> Policy:
        policy = make_policy(0).adapt(4)
        perturb(policy)
        return policy

    run(tmp_path, trained(), make_policy(1), steps=2, method=opd.GOPD()).train()
    refused(
        tmp_path,
        make_policy(0),
        make_policy(1),
        task(),
        match="began the run with a trained adapter .* now has none",
    )
    assert (
        opd.resume(tmp_path, trained(), make_policy(1), task(), steps=4, quiet=True).train().done
        == 4
    )


def test_another_teacher_is_refused_or_allowed_on_purpose(saved, make_policy, tmp_path):
    refused(
        saved,
        make_policy(0),
        make_policy(2),
        task(),
        match=r"the teacher has other weights.*allow=\('teacher',\)",
    )
    refused(
        saved,
        make_policy(0),
        make_policy(1).seeing("say 9"),
        task(),
        match="the teacher reads the prompts in another way",
    )
    with pytest.warns(
        UserWarning, match="goes on from step 2 although the teacher has other weights"
    ):
        again = opd.resume(
            half(saved, tmp_path),
            make_policy(0),
            make_policy(2),
            task(),
            allow="teacher",
            quiet=True,
        )
    assert again.train().done == 4


def test_another_task_is_refused(saved, make_policy):
    both = make_policy(0), make_policy(1)
    refused(
        saved,
        *both,
        replace(task(), name="market"),
        match="the task 'records' and 'market' is given",
    )
    refused(saved, *both, task("ana ben cleo"), match="the task 'records' has other prompts")
    refused(
        saved,
        *both,
        replace(task(), settings={"hard": True}),
        match=r"other settings: \{\} was saved and \{'hard': True\} is given",
    )
    refused(
        saved,
        *both,
        replace(task(), verify=lambda prompt, text: 1.0),
        match="another verifier: opdlab.same_answer",
    )


def test_another_chat_template_is_refused(make_policy, tmp_path):
    chats = opd.tasks.from_records(
        [{"messages": [{"role": "user", "content": "ana has 4 7"}]}] * 3, test=0, max_new_tokens=4
    )
    student = make_policy(0, tokenizer=market.words())
    run(tmp_path, student, make_policy(1), chats, steps=1).train()
    other = market.words()
    other.chat_template = other.chat_template + " "
    both = make_policy(0, tokenizer=other), make_policy(1, tokenizer=other)
    refused(tmp_path, *both, chats, match="the tokenizer has another chat template")


def test_another_method_is_refused(make_policy, saved, tmp_path):
    both = make_policy(0), make_policy(1)
    refused(
        saved,
        *both,
        task(),
        method=opd.GOPD(),
        match=r"the method opdlab.OPD and opdlab.GOPD is given",
    )
    refused(
        saved,
        *both,
        task(),
        method=opd.OPD("forward_kl"),
        match="has divergence='forward_kl' and was saved with divergence='reverse_kl'",
    )
    run(tmp_path / "mine", *both, method=Mine(0.5), steps=1).train()
    both = make_policy(0), make_policy(1)
    refused(
        tmp_path / "mine",
        *both,
        task(),
        method=Mine(0.7),
        match="has weight=0.7 and was saved with weight=0.5",
    )
    assert opd.resume(tmp_path / "mine", *both, task(), method=Mine(0.5), quiet=True).done == 1


def test_a_class_of_your_own_with_a_name_of_ours_is_not_taken_for_ours(make_policy, tmp_path):
    run(tmp_path, make_policy(0), make_policy(1), method=SFT(), steps=2).train()
    both = make_policy(0), make_policy(1)
    refused(
        tmp_path, *both, task(), match=r"The run used .*test_resuming.SFT, a method of your own"
    )
    refused(
        tmp_path,
        *both,
        task(),
        method=methods.SFT(),
        match=r"test_resuming.SFT and opdlab.SFT is given",
    )
    assert opd.resume(tmp_path, *both, task(), method=SFT(), quiet=True).done == 2


def made(beta):
    @opd.method(needs=("teacher",))
    def loss(rows):
        return beta * opd.losses.reverse_kl(rows.student, rows.teacher)

    return loss


def test_a_function_is_compared_by_its_code_and_by_what_it_was_made_with(make_policy, tmp_path):
    run(tmp_path, make_policy(0), make_policy(1), method=made(0.5), steps=1).train()
    both = make_policy(0), make_policy(1)

    @opd.method(needs=("teacher",))
    def other(rows):
        return opd.losses.forward_kl(rows.student, rows.teacher)

    refused(tmp_path, *both, task(), method=other, match="the method's function is another one")
    refused(
        tmp_path,
        *both,
        task(),
        method=made(0.7),
        match="the method's function is another one: .*0.5.*0.7",
    )
    assert opd.resume(tmp_path, *both, task(), method=made(0.5), quiet=True).done == 1


def test_policies_must_be_given_again(make_policy, tmp_path):
    student = make_policy(0)
    given = {"teacher": make_policy(2)}
    run(tmp_path, student, policies=given, steps=1).train()
    refused(
        tmp_path,
        make_policy(0),
        make_policy(2),
        task(),
        match="policies= for teacher, and now for none",
    )
    refused(
        tmp_path,
        make_policy(0),
        None,
        task(),
        policies={"teacher": make_policy(3)},
        match="the policy 'teacher' has other weights",
    )
    assert opd.resume(tmp_path, make_policy(0), None, task(), policies=given, quiet=True).done == 1


def test_a_writing_teacher_is_known_by_the_model_behind_it(make_policy, tmp_path):
    from opdlab.teachers import TextOnly

    run(
        tmp_path, make_policy(0), TextOnly(make_policy(1)), method=opd.SequenceKD(), steps=1
    ).train()
    refused(
        tmp_path,
        make_policy(0),
        TextOnly(make_policy(2)),
        task(),
        match="the teacher has other weights",
    )
    refused(
        tmp_path,
        make_policy(0),
        make_policy(1),
        task(),
        match=r"the teacher is of another kind: TextOnly.* was saved and Policy",
    )


# Settings.


def test_settings_that_change_the_training_are_taken_and_said(saved, make_policy, tmp_path):
    with pytest.warns(
        UserWarning, match=r"from step 2 with other settings: lr 0.01 → 0.02, clip 1.0 → 0.5"
    ):
        again = opd.resume(
            half(saved, tmp_path),
            make_policy(0),
            make_policy(1),
            task(),
            lr=0.02,
            clip=0.5,
            quiet=True,
        )
    assert (again.settings.lr, again.settings.clip) == (0.02, 0.5)
    assert next(again).metrics["lr"] == 0.02


def test_settings_that_change_no_number_are_taken_in_silence(saved, make_policy, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = opd.resume(
            half(saved, tmp_path),
            make_policy(0),
            make_policy(1),
            task(),
            quiet=True,
            micro_batch=1,
            save_every=1,
            steps=5,
        )
    assert (again.settings.micro_batch, again.settings.steps) == (1, 5)


def test_more_steps_of_a_schedule_are_said(make_policy, tmp_path):
    run(tmp_path, make_policy(0), make_policy(1), steps=2, schedule="cosine").train()
    with pytest.warns(UserWarning, match=r"steps 2 → 3 \(the schedule 'cosine' depends on them\)"):
        opd.resume(tmp_path, make_policy(0), make_policy(1), task(), steps=3, quiet=True)


def test_settings_that_cannot_be_are_refused(saved, make_policy):
    both = make_policy(0), make_policy(1)
    refused(
        saved,
        *both,
        task(),
        lora=None,
        match="resume got lora=None, but the run was trained with lora=16",
    )
    refused(
        saved,
        *both,
        task(),
        lora=4,
        match="resume got lora=4, but the run was trained with lora=16",
    )
    refused(saved, *both, task(), steps=1, match=r"steps=1, but .* has done 4")
    refused(
        saved,
        *both,
        task(),
        allow="everything",
        match="allow='everything'. Use some of student, tokenizer",
    )
    refused(saved, *both, task(), step=-1, match="step=-1")
    refused(saved, *both, task(), step=2.5, match="step=2.5")
    refused(
        saved, *both, task(), stepz=9, match="resume has no option stepz. There are policies, save"
    )
    refused("", *both, task(), match="path=''")
    refused(None, *both, task(), match="path=None")
    refused(
        saved / "step-000002",
        *both,
        task(),
        step=4,
        match="is the checkpoint of step 2, not of step 4",
    )


# Two runs, one folder.


def test_the_checkpoint_written_last_is_taken_not_the_highest(saved, make_policy, tmp_path):
    import shutil

    shutil.copytree(saved, tmp_path / "run")
    with pytest.warns(UserWarning, match="later checkpoints in its folder will be replaced"):
        again = opd.resume(
            tmp_path / "run",
            make_policy(0),
            make_policy(1),
            task(),
            step=2,
            lr=0.03,
            save_every=1,
            quiet=True,
        )
    next(again)  # step 3 of the new path; step 4 of the old one is still there
    again = opd.resume(tmp_path / "run", make_policy(0), make_policy(1), task(), quiet=True)
    assert again.done == 3
    assert opd.snapshots.steps(again) == [2, 3]
    again.train()
    assert opd.snapshots.steps(again) == [2, 3, 4]


def test_a_new_run_in_the_folder_of_another_is_refused(saved, make_policy, tmp_path):
    with pytest.raises(
        errors.OpdlabError, match=r"holds checkpoints of another run \(steps 2, 4\).*opdlab.resume"
    ):
        run(saved, make_policy(0), make_policy(1))
    other = run(tmp_path / "other", make_policy(0), make_policy(1))
    with pytest.raises(errors.OpdlabError, match="holds checkpoints of another run"):
        other.save(saved)
    again = opd.resume(
        saved,
        make_policy(0),
        make_policy(1),
        task(),
        step=2,
        save=tmp_path / "elsewhere",
        quiet=True,
    ).train()
    assert again.folder == tmp_path / "elsewhere"
    assert (
        opd.resume(saved, make_policy(0), make_policy(1), task(), save=None, quiet=True).folder
        is None
    )
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["step-000004"]


@dataclass(frozen=True)
class Dictionary:
    """A teacher of one's own that knows its answers by heart."""

    answers: dict[str, str]

    def write(self, prompts, n=1, *, prefixes=None, **options):
        return [[self.answers.get(prompt.text, "4")] * n for prompt in prompts]


def test_a_teacher_of_ones_own_is_compared_by_its_fields(make_policy, tmp_path):
    options = {"steps": 2, "batch": 2, "quiet": True, "save_every": 1, "max_new_tokens": 4}
    method = opd.SequenceKD()
    teacher = Dictionary({"ana has 1": "3 a"})
    opd.distill(make_policy(0), teacher, task(), method=method, save=tmp_path, **options).train()
    other = Dictionary({"ana has 1": "secret"})
    with pytest.raises(
        errors.OpdlabError, match="has other fields than the one that was saved"
    ) as caught:
        opd.resume(tmp_path, make_policy(0), other, task(), step=1, quiet=True)
    assert "secret" not in str(caught.value)
    assert "3 a" not in (tmp_path / "step-000001" / "run.json").read_text()
    again = opd.resume(tmp_path, make_policy(0), teacher, task(), step=1, quiet=True)
    assert again.done == 1
