"""Models that Accelerate spreads: the same log-probs, and clear words where they cannot train."""

from __future__ import annotations

import pytest
import torch
from accelerate import dispatch_model

import opdlab as opd
from opdlab import Policy, Prompt
from opdlab.errors import InvalidValue
from opdlab.models import placement

WAYS = {
    "one device": {"": "cpu"},
    "a layer on disk": {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    },
    "head and embeddings on disk": {
        "model.embed_tokens": "disk",
        "model.layers": "cpu",
        "model.norm": "disk",
        "model.rotary_emb": "cpu",
        "lm_head": "disk",
    },
    "all on disk but one": {"model": "disk", "lm_head": "cpu"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_model, words):
    path = tmp_path_factory.mktemp("model")
    make_model(len(words)).save_pretrained(path)
    words.save_pretrained(path)
    return path


@pytest.mark.parametrize("way", WAYS)
def test_a_spread_model_grades_and_samples_the_same(way, folder, prompts):
    plain = Policy.load(folder, device="cpu")
    spread = Policy.load(folder, device_map=WAYS[way])
    assert placement.is_offloaded(spread.weights.model) == ("disk" in WAYS[way].values())
    assert spread.weights.device == torch.device("cpu")
    one, two = (p.sample(prompts, 2, max_new_tokens=8, seed=1) for p in (plain, spread))
    assert torch.equal(one.ids, two.ids)
    torch.testing.assert_close(one.logp, two.logp)
    torch.testing.assert_close(plain.log_probs(one), spread.log_probs(one))


def test_an_offloaded_teacher_trains_a_student_as_the_plain_one_does(folder):
    task = opd.tasks.from_prompts([Prompt("ana has 4"), Prompt("ben"), Prompt("dan")], name="t")
    given = {"steps": 3, "batch": 2, "max_new_tokens": 6, "lr": 1e-2, "lora": 4, "quiet": True}
    states = []
    for options in ({"device": "cpu"}, {"device_map": WAYS["head and embeddings on disk"]}):
        teacher = Policy.load(folder, dtype="float32", **options)
        student = Policy.load(folder, device="cpu")
        with torch.no_grad():  # another model than the teacher
            for value in student.weights.model.parameters():
                value.mul_(0.9)
        run = opd.distill(student, teacher, task, **given).train()
        states.append(run.student.weights.adapter_state(run.student.adapter))
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name])


def test_a_lora_trains_through_hooks_that_move_tensors(folder, make_policy, words):
    """Every weight is on the CPU, and every module has a hook, as on several GPUs."""
    task = opd.tasks.from_prompts([Prompt("ana has 4"), Prompt("ben"), Prompt("dan")], name="t")
    teacher = make_policy(5)
    states = []
    for hooks in (False, True):
        student = Policy.load(folder, device="cpu")
        if hooks:
            model = student.weights.model
            places = dict.fromkeys(("model.embed_tokens", "model.norm", "lm_head"), "cpu")
            places |= {f"model.layers.{i}": "cpu" for i in range(2)} | {"model.rotary_emb": "cpu"}
            student = Policy.of(dispatch_model(model, places, force_hooks=True), words)
            assert placement.is_spread(student.weights.model)
        run = opd.distill(
            student, teacher, task, steps=3, batch=2, max_new_tokens=6, lora=4, quiet=True
        ).train()
        states.append(run.student.weights.adapter_state(run.student.adapter))
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_offloaded_weights_are_not_trained_or_copied(folder):
    policy = Policy.load(folder, device_map=WAYS["a layer on disk"])
    task = opd.tasks.from_prompts([Prompt("ana")], name="t")
    with pytest.raises(InvalidValue, match=r"offloaded.*cannot carry a LoRA.*quantization='4bit'"):
        opd.distill(policy, policy.frozen(), task, steps=1, max_new_tokens=4, quiet=True)
    with pytest.raises(InvalidValue, match=r"offloaded.*cannot carry a LoRA"):
        policy.adapt(4)
    for make in (policy.copied, policy.merged):
        with pytest.raises(InvalidValue, match="spread over several places, and cannot be copied"):
            make()


def test_an_adapter_on_offloaded_weights_is_refused(folder, tmp_path):
    policy = Policy.load(folder, device="cpu").adapt(4)
    policy.weights.write_adapter(policy.adapter, tmp_path)
    with pytest.raises(InvalidValue, match=r"offloaded.*cannot carry a LoRA"):
        Policy.load(tmp_path, device_map=WAYS["a layer on disk"])


def test_weights_that_are_nowhere_are_refused(make_model, words):
    model = make_model(len(words)).to("meta")
    with pytest.raises(InvalidValue, match=r"are nowhere: .* is on the meta device"):
        Policy.of(model, words)
