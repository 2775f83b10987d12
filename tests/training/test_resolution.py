"""Casting: who plays what a method names, which of them move with training, and that a run with an
average resumes exactly.
"""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file

import opdlab as opd
from opdlab import DOPD, SelfDistillation, Task
from opdlab.errors import DamagedFile, MissingPolicy, OpdlabError
from opdlab.losses.divergences import reverse_kl
from opdlab.teachers import TextOnly
from opdlab.training.resolution import grader_names, resolve_policies, trained_tensors

LIVE, STILL, MEAN = "student+hint", "reference+hint", "ema+hint"


def hinted(prompts) -> Task:
    return Task(
        "hinted",
        lambda n, seed, split: [prompts[(seed + i) % len(prompts)] for i in range(n)],
        max_new_tokens=6,
    )


@opd.method(needs=("student+hint", "reference", "reference+hint", "ema", "ema+hint"))
def everyone(rows):
    """A loss that looks at every view of the student."""
    return sum(reverse_kl(rows.student, rows[name]) for name in everyone.needs)


class Writer:
    """A teacher that only writes."""

    def write(self, prompts, n=1, **_):
        return [["a"] * n for _ in prompts]


class Grader(Writer):
    def grade(self, rollout): ...


# Casting.


def test_views_of_one_thing_share_one_adapter_and_one_set_of_weights(make_policy):
    student, teacher = make_policy(0), make_policy(1)
    cast = resolve_policies(student, teacher, (*everyone.needs, "teacher", "teacher+hint"), {})
    assert list(cast) == ["student", *everyone.needs, "teacher", "teacher+hint"]
    assert cast["student"] is student
    assert cast["teacher"] is teacher
    for name, base in (
        (LIVE, "student"),
        (STILL, "reference"),
        (MEAN, "ema"),
        ("teacher+hint", "teacher"),
    ):
        assert cast[name]._adapter is cast[base]._adapter
        assert cast[name].context is not None
        assert cast[base].context is None
    assert (
        len({id(cast[name]._adapter) for name in ("student", "reference", "ema", "teacher")}) == 4
    )
    assert all(cast[name].weights is student.weights for name in everyone.needs)


def test_only_what_is_needed_is_cast(make_policy):
    student = make_policy(0)
    assert list(resolve_policies(student, None, (), {})) == ["student"]
    assert list(resolve_policies(student, make_policy(1), ("reference",), {})) == [
        "student",
        "reference",
    ]
    assert "teacher" not in resolve_policies(
        student, None, ("teacher",), {}
    )  # `distill` says so in words


def test_what_is_given_replaces_a_name_or_what_the_name_is_made_of(make_policy):
    student, teacher, base, told = (make_policy(i) for i in range(4))
    cast = resolve_policies(
        student, teacher, ("teacher", "reference", STILL, LIVE), {"reference": base, LIVE: told}
    )
    assert cast["reference"] is base
    assert cast[STILL].weights is base.weights
    assert cast[LIVE] is told


def test_a_local_teacher_can_do_less(make_policy):
    student, teacher = make_policy(0), make_policy(1)
    cast = resolve_policies(student, teacher, ("teacher.text", "teacher.spans"), {})
    assert isinstance(cast["teacher.text"], TextOnly)
    assert not hasattr(cast["teacher.text"], "hidden")
    assert cast["teacher.spans"] is teacher
    assert grader_names(cast) == ["student"]


def test_other_teachers_play_what_they_can(make_policy):
    student, writer, grader = make_policy(0), Writer(), Grader()
    assert resolve_policies(student, writer, ("teacher.text",), {})["teacher.text"] is writer
    assert resolve_policies(student, grader, ("teacher",), {})["teacher"] is grader
    for name in ("teacher", "teacher+hint", "teacher.spans"):
        with pytest.raises(
            MissingPolicy,
            match=(
                rf"'{name.replace('+', '.')}' must grade tokens, but Writer only writes\. Use a"
                r" method"
            ),
        ):
            resolve_policies(student, writer, (name,), {})
    with pytest.raises(
        MissingPolicy,
        match=r"must be told hints, and only local models can\. Load the teacher with Policy\.load",
    ):
        resolve_policies(student, grader, ("teacher+hint",), {})


def test_a_missing_policy_is_said_in_words(make_policy, prompts):
    with pytest.raises(
        MissingPolicy,
        match=r"DOPD needs 'teacher\+hint', but there is no such policy\. Give distill a teacher",
    ):
        opd.distill(make_policy(0), task=hinted(prompts), method=DOPD(), batch=4)


# Who moves.


def trained(
    make_policy, prompts, method=everyone, **settings
) -> tuple[opd.Run, torch.Tensor, dict[str, torch.Tensor]]:
    student = make_policy(0)
    run = opd.distill(
        student,
        make_policy(1),
        hinted(prompts),
        method=method,
        **{"batch": 4, "lr": 2e-2, "quiet": True, "steps": 3, **settings},
    )
    rollout = student.sample(prompts, seed=9, max_new_tokens=5)
    return run, rollout, {name: policy.log_probs(rollout) for name, policy in run.policies.items()}


@pytest.mark.parametrize(
    "settings", [{"lr": 2e-3}, {"lora": None, "lr": 1e-4}], ids=["adapter", "full"]
)
def test_everybody_begins_as_the_student_and_only_some_move(make_policy, prompts, settings):
    run, rollout, before = trained(make_policy, prompts, **settings)
    for name in ("reference", "ema"):
        assert torch.equal(before[name], before["student"])
    for name in (STILL, MEAN):
        assert torch.equal(before[name], before[LIVE])
    assert not torch.allclose(
        before[LIVE], before["student"], atol=1e-2
    )  # the hint does change something
    run.train()
    after = {name: policy.log_probs(rollout) for name, policy in run.policies.items()}
    moved = {name: (after[name] - before[name]).abs().max().item() for name in after}
    assert moved["reference"] == moved[STILL] == 0
    assert moved["student"] > 5 * moved["ema"] > 0  # (1 + 2 + 3) of 20 parts of a step, after three
    assert moved[LIVE] > 5 * moved[MEAN] > 0


@pytest.mark.parametrize("settings", [{}, {"lora": None, "lr": 2e-3}], ids=["adapter", "full"])
def test_the_average_is_the_recursion(make_policy, prompts, settings):
    run, _, _ = trained(make_policy, prompts, ema_rate=0.3, **settings)
    (average,) = run.averages
    want = {name: value.clone() for name, value in trained_tensors(run.student).items()}
    ours = trained_tensors(average)
    assert ours.keys() == want.keys()
    assert len(ours) > 10
    assert not {p.data_ptr() for p in run.parameters.values()} & {
        value.data_ptr() for value in ours.values()
    }
    for _ in run:
        for name, value in trained_tensors(run.student).items():
            want[name] = 0.7 * want[name] + 0.3 * value
        for name, value in trained_tensors(average).items():
            torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-7)
    assert any(
        not torch.equal(value, trained_tensors(run.student)[name]) for name, value in want.items()
    )


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_the_ends_of_the_rate_are_frozen_and_live(make_policy, prompts, rate):
    run, rollout, before = trained(make_policy, prompts, ema_rate=rate)
    run.train()
    want = before[MEAN] if rate == 0 else run.policies[LIVE].log_probs(rollout)
    torch.testing.assert_close(run.policies[MEAN].log_probs(rollout), want, rtol=1e-5, atol=1e-5)


def test_the_base_model_and_other_adapters_stay_and_do_not_train(make_policy, prompts):
    student = make_policy(0)
    base = {name: p.detach().clone() for name, p in student.weights.model.named_parameters()}
    run = opd.distill(
        student,
        make_policy(1),
        hinted(prompts),
        method=everyone,
        batch=4,
        steps=2,
        lr=2e-2,
        quiet=True,
    ).train()
    assert all(f".{student.adapter}." in name for name in run.parameters)
    now = {
        name.replace(".base_layer", ""): p
        for name, p in student.weights.model.named_parameters()
        if "lora_" not in name
    }
    assert now.keys() == base.keys()
    assert all(torch.equal(now[name], base[name]) for name in base)


def test_a_student_that_was_trained_before_is_its_own_reference(make_policy, prompts, perturb):
    student = make_policy(0).adapt(4)
    perturb(student)
    rollout = student.sample(prompts, seed=9, max_new_tokens=5)
    begun = student.log_probs(rollout)
    run = opd.distill(
        student,
        make_policy(1),
        hinted(prompts),
        method=everyone,
        batch=4,
        steps=2,
        lr=2e-2,
        quiet=True,
    )
    for name in ("reference", "ema"):
        torch.testing.assert_close(run.policies[name].log_probs(rollout), begun)
    run.train()
    torch.testing.assert_close(run.policies["reference"].log_probs(rollout), begun)
    assert not torch.allclose(student.log_probs(rollout), begun, atol=1e-2)
    assert not torch.equal(run.policies["ema"].log_probs(rollout), begun)


def test_a_given_average_is_what_was_given(make_policy, prompts):
    """Replacing `ema` means a policy that somebody else takes care of: it is neither moved nor
    touched.
    """
    student, other = make_policy(0), make_policy(1)
    run = opd.distill(
        student,
        None,
        hinted(prompts),
        method=SelfDistillation.sdft(),
        policies={"ema": other},
        batch=4,
        steps=2,
        quiet=True,
    )
    rollout = student.sample(prompts, seed=9, max_new_tokens=5)
    before = other.seeing().log_probs(rollout)
    assert run.averages == []
    run.train()
    assert other.adapter is None
    assert torch.equal(other.seeing().log_probs(rollout), before)


def test_one_given_view_leaves_the_other_an_average(make_policy, prompts):
    student = make_policy(0)
    ruled = student.frozen().seeing("say sum")
    run = opd.distill(
        student,
        None,
        hinted(prompts),
        method=everyone,
        policies={MEAN: ruled},
        batch=4,
        steps=2,
        lr=2e-2,
        quiet=True,
    )
    rollout = student.sample(prompts, seed=9, max_new_tokens=5)
    before = {name: run.policies[name].log_probs(rollout) for name in ("ema", MEAN)}
    assert run.averages == [run.policies["ema"]]
    run.train()
    assert torch.equal(run.policies[MEAN].log_probs(rollout), before[MEAN])
    assert not torch.equal(run.policies["ema"].log_probs(rollout), before["ema"])


def test_full_training_of_a_student_with_an_adapter_is_refused(make_policy, prompts):
    student = make_policy(0).adapt(4)
    with pytest.raises(
        OpdlabError,
        match=(
            r"looks through the adapter 'lora\d', which lora=None would leave beside.*Leave lora as"
            r" it is"
        ),
    ):
        opd.distill(student, make_policy(1), hinted(prompts), batch=4, lora=None)
    assert not any(
        p.requires_grad and "lora_" not in name
        for name, p in student.weights.model.named_parameters()
    )


def test_an_average_asks_nobody(make_model, words, prompts):
    """It reads the adapter at every step, without a file, the network or a warning."""
    model = make_model(len(words))
    model.name_or_path = "nobody/nothing"
    student = opd.Policy.of(model, words)
    run = opd.distill(
        student, None, hinted(prompts), method=SelfDistillation.sdft(), batch=4, steps=2, quiet=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.train()
    assert all("lora_" in name for name in trained_tensors(student))


# Checkpoints.

AVERAGED = [
    DOPD(anchor="ema"),
    SelfDistillation.sdft(),
    SelfDistillation("reverse_kl", top_k=opd.TopK(8, by="teacher"), anchor="ema"),
]


@pytest.mark.parametrize("settings", [{}, {"lora": None, "lr": 2e-3}], ids=["adapter", "full"])
@pytest.mark.parametrize("method", AVERAGED, ids=["dopd", "sdft", "top-k"])
def test_resume_with_an_average_is_bit_identical(make_policy, prompts, tmp_path, method, settings):
    options = {
        "batch": 4,
        "seed": 5,
        "quiet": True,
        "save_every": 1,
        "lr": 2e-2,
        "ema_rate": 0.2,
        **settings,
    }
    teacher = make_policy(1) if isinstance(method, DOPD) else None
    opd.distill(
        make_policy(0),
        teacher,
        hinted(prompts),
        method=method,
        save=tmp_path / "whole",
        steps=4,
        **options,
    ).train()
    opd.distill(
        make_policy(0),
        teacher,
        hinted(prompts),
        method=method,
        save=tmp_path / "parts",
        steps=2,
        **options,
    ).train()
    run = opd.resume(
        tmp_path / "parts", make_policy(0), teacher, hinted(prompts), steps=4, quiet=True
    )
    assert run.method == method
    assert run.done == 2
    run.train()
    for name in ("ema", "optimizer", "adapter_model" if options.get("lora", 16) else "model"):
        one, two = (
            load_file(tmp_path / which / "step-000004" / f"{name}.safetensors")
            for which in ("whole", "parts")
        )
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    losses = [
        json.loads((tmp_path / which / "step-000004" / "history.json").read_text())
        for which in ("whole", "parts")
    ]
    assert [row["loss"] for row in losses[0]] == [row["loss"] for row in losses[1]]


def test_the_average_is_kept_and_matters(make_policy, prompts, tmp_path):
    """The saved average is neither the student nor the start, and a run that lost it goes
    elsewhere.
    """
    options = {"batch": 4, "seed": 5, "quiet": True, "lr": 2e-2, "ema_rate": 0.2}
    run = opd.distill(
        make_policy(0),
        None,
        hinted(prompts),
        method=SelfDistillation.sdft(),
        save=tmp_path,
        steps=4,
        save_every=2,
        **options,
    )
    next(run), next(run)
    saved = load_file(tmp_path / "step-000002" / "ema.safetensors")
    (average,) = run.averages
    assert all(torch.equal(saved[name], value) for name, value in trained_tensors(average).items())
    assert any(
        not torch.equal(saved[name], value) for name, value in trained_tensors(run.student).items()
    )
    run.train()
    lost = opd.resume(
        tmp_path, make_policy(0), None, hinted(prompts), step=2, quiet=True, save_every=0
    )
    for name, value in trained_tensors(lost.averages[0]).items():
        value.copy_(trained_tensors(lost.student)[name])
    lost.train()
    assert any(
        not torch.equal(value, trained_tensors(run.student)[name])
        for name, value in trained_tensors(lost.student).items()
    )


def test_no_average_no_file_and_a_damaged_one_is_noticed(make_policy, prompts, tmp_path):
    options = {"batch": 4, "quiet": True, "steps": 1, "save_every": 1}
    opd.distill(
        make_policy(0),
        None,
        hinted(prompts),
        method=SelfDistillation.opsd(),
        save=tmp_path / "frozen",
        **options,
    ).train()
    assert not (tmp_path / "frozen" / "step-000001" / "ema.safetensors").exists()
    opd.distill(
        make_policy(0),
        None,
        hinted(prompts),
        method=SelfDistillation.sdft(),
        save=tmp_path / "ema",
        **options,
    ).train()
    path = tmp_path / "ema" / "step-000001" / "ema.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DamagedFile, match=r"ema\.safetensors is missing or not what was written"):
        opd.resume(tmp_path / "ema", make_policy(0), None, hinted(prompts))
