"""`prefer_shared=`: one base model is in memory once, and others are told apart."""

from __future__ import annotations

import json

import pytest
import torch

from opdlab import Policy


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_model, words):
    path = tmp_path_factory.mktemp("model")
    make_model(len(words)).save_pretrained(path)
    words.save_pretrained(path)
    return path


@pytest.fixture
def student(folder):
    return Policy.load(folder, device="cpu")


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    """A folder with a trained adapter of the base."""
    policy = Policy.load(folder, device="cpu").adapt(4)
    state = policy.weights.adapter_state(policy.adapter)
    generator = torch.Generator().manual_seed(3)
    moved = {k: v + 0.3 * torch.randn(v.shape, generator=generator) for k, v in state.items()}
    policy.weights.set_adapter_state(policy.adapter, moved)
    path = tmp_path_factory.mktemp("adapter")
    policy.weights.write_adapter(policy.adapter, path)
    return path


def test_the_bare_base_and_its_adapters_share_the_students_weights(
    student, folder, adapter, prompts, recwarn
):
    rollout = student.sample(prompts, max_new_tokens=6)
    alone = Policy.load(adapter, device="cpu").log_probs(rollout)
    for source, options in ((adapter, {}), (folder, {"adapter": adapter})):
        shared = Policy.load(source, prefer_shared=student, **options)
        assert shared.weights is student.weights
        assert torch.equal(shared.log_probs(rollout), alone)
    bare = Policy.load(folder, prefer_shared=student)
    assert bare.weights is student.weights
    assert bare.adapter is None
    assert not [w for w in recwarn if "does not share" in str(w.message)]


def test_two_adapters_of_one_base_train_apart(student, adapter, prompts, perturb):
    shared = Policy.load(adapter, prefer_shared=student)
    rollout = student.sample(prompts, max_new_tokens=6)
    before = shared.log_probs(rollout)
    student.adapt(8)
    perturb(student)
    assert torch.equal(shared.log_probs(rollout), before)
    again = Policy.load(adapter, prefer_shared=student)  # the student's adapter moves no base
    assert again.weights is student.weights


def test_a_shared_adapter_goes_with_its_last_policy(student, adapter):
    shared = Policy.load(adapter, prefer_shared=student)
    assert student.weights.adapters == [shared.adapter]
    del shared
    student.weights.tidy()
    assert student.weights.adapters == []


def loads_alone(student, source, said, **options):
    with pytest.warns(UserWarning, match=f"does not share its weights: {said}"):
        policy = Policy.load(source, prefer_shared=student, **options)
    assert policy.weights is not student.weights
    return policy


def test_other_models_are_loaded_beside_it_and_the_reason_is_said(
    student, folder, tmp_path, make_model, words
):
    make_model(len(words), seed=1).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    loads_alone(student, tmp_path, "its base is")
    loads_alone(student, folder, "its dtype is float32, and bfloat16", dtype="bfloat16")
    loads_alone(student, folder, "its attention is none, and eager", attn_implementation="eager")
    loads_alone(student, folder, "another context_length", context_length=99)
    loads_alone(student, folder, "its texts end with other tokens", eos=[5])
    loads_alone(student, folder, "device_map was given", device_map={"": "cpu"})


def test_weights_that_moved_are_not_shared(student, folder):
    with torch.no_grad():
        student.weights.model.model.layers[0].mlp.down_proj.weight[0, 0] += 1
    loads_alone(student, folder, "its weights have changed since they were loaded")


def test_files_that_changed_are_loaded_anew(folder, tmp_path, make_model, words):
    make_model(len(words)).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    student = Policy.load(tmp_path, device="cpu")
    make_model(len(words), seed=7).save_pretrained(tmp_path)
    loads_alone(student, tmp_path, "the files of its model have changed")


def test_a_model_of_unknown_origin_is_not_taken_for_the_same(folder, make_policy):
    loads_alone(make_policy(0), folder, "nobody knows what its weights were loaded from")


def test_a_template_of_its_own_goes_along(student, folder):
    template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    shared = Policy.load(folder, prefer_shared=student, chat_template=template)
    assert shared.weights is student.weights
    assert shared.chat_template_kwargs == {"chat_template": template}
    assert student.chat_template_kwargs == {}


def test_an_adapter_with_embeddings_of_its_own_is_loaded_beside_it(
    student, folder, adapter, tmp_path, make_model
):
    from safetensors.torch import load_file, save_file

    rows = student.weights.embeddings.shape[0] + 3
    model = make_model(rows)
    state = load_file(adapter / "adapter_model.safetensors")
    for path in ("model.embed_tokens", "lm_head"):
        state[f"base_model.model.{path}.weight"] = model.get_submodule(path).weight.detach()
    save_file(state, tmp_path / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    policy = loads_alone(student, tmp_path, "the adapter brings embeddings")
    assert policy.weights.embeddings.shape[0] == rows
    assert torch.equal(policy.weights.embeddings, model.model.embed_tokens.weight)
