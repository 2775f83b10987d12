"""Quantised base models: exact kernels, exact gradients, and LoRA training on them."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import opdlab as opd
from opdlab import Policy
from opdlab.errors import InvalidValue, OpdlabError
from opdlab.models import adapters, quantization

pytest.importorskip("bitsandbytes")
WAYS = ("4bit", "8bit")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_model, words):
    path = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}
    make_model(len(words), **sizes).save_pretrained(path)
    words.save_pretrained(path)
    return path


def load(folder, way, **options) -> Policy:
    return Policy.load(folder, quantization=way, device="cpu", **options)


def plain_twin(policy: Policy) -> Policy:
    """The same numbers in ordinary weights, by transformers' own dequantisation."""
    model = quantization.dequantized(policy.weights.copy(None).model)
    return Policy.of(model, policy.tokenizer)


@pytest.mark.parametrize("way", WAYS)
def test_a_quantised_model_computes_with_its_dequantised_weights(way, folder, prompts):
    policy = load(folder, way)
    rollout = policy.sample(prompts, 2, max_new_tokens=8)
    twin = plain_twin(policy)
    assert not quantization.is_quantized(twin.weights.model)
    torch.testing.assert_close(
        policy.log_probs(rollout), twin.log_probs(rollout), atol=1e-3, rtol=0
    )
    with torch.no_grad():
        row = rollout.completions()[0]
        start = policy.encode(prompts[0])
        own = policy.weights.model(torch.tensor([start + row])).logits[0, len(start) - 1 : -1]
    torch.testing.assert_close(
        policy.log_probs(rollout)[: len(row)], own.log_softmax(-1), atol=1e-4, rtol=0
    )


def test_kernels_that_round_are_switched_off_and_what_they_packed_is_unpacked(folder, words):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    )
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        model.eval()(input_ids=ids)  # packs the weights on CPUs that have a kernel for it
        policy = Policy.of(model, words)
        want = plain_twin(policy).weights.model(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, want, atol=1e-4, rtol=1e-4)
    assert not model.training


@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_of_an_adapter_is_that_on_dequantised_weights(way, folder, prompts, perturb):
    policy = load(folder, way)
    twin = plain_twin(policy)
    rollout = policy.sample(prompts, 1, max_new_tokens=6)
    found = []
    for one in (policy, twin):
        one.adapt(4)
        perturb(one)
        adapters.make_trainable(one.weights.model, one.adapter)
        one.head(one.hidden(rollout)).log_softmax(-1)[:, 3].sum().backward()
        gradients = {
            name: value.grad
            for name, value in one.weights.model.named_parameters()
            if value.grad is not None
        }
        assert all("lora_" in name for name in gradients)
        found.append(gradients)
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        off = (gradient - found[1][name]).norm() / found[1][name].norm()
        assert off < 1e-3, name


@pytest.mark.parametrize("way", WAYS)
def test_views_copies_and_folding_keep_the_numbers(way, folder, prompts, perturb):
    policy = load(folder, way)
    rollout = policy.sample(prompts, 1, max_new_tokens=6)
    bare = policy.log_probs(rollout)
    policy.adapt(4)
    perturb(policy)
    now = policy.log_probs(rollout)
    assert (now - bare).abs().max() > 0.1
    assert torch.equal(policy.frozen().log_probs(rollout), now)
    assert torch.equal(policy.without_adapter().log_probs(rollout), bare)
    copied = policy.copied()
    assert torch.equal(copied.log_probs(rollout), now)
    assert quantization.is_quantized(copied.weights.model)
    merged = policy.merged()
    assert not quantization.is_quantized(merged.weights.model)
    assert merged.adapter is None
    torch.testing.assert_close(merged.log_probs(rollout), now, atol=2e-3, rtol=0)
    assert torch.equal(policy.log_probs(rollout), now)


@pytest.mark.parametrize("way", WAYS)
def test_a_qlora_run_trains_saves_and_resumes_bit_for_bit(way, tmp_path):
    student, teacher, task = opd.load("market")
    source = student.weights.source

    def begin() -> Policy:
        return load(source, way)

    given = {"steps": 16, "batch": 16, "max_new_tokens": 16, "lr": 3e-3, "quiet": True}
    run = opd.distill(begin(), teacher, task, save=tmp_path / "run", save_every=8, **given)
    before = {
        name: value.clone()
        for name, value in run.student.weights.model.state_dict().items()
        if "lora_" not in name
    }
    run.train()
    loss = run.history["loss"]
    assert loss.iloc[-4:].mean() < 0.8 * loss.iloc[:4].mean()
    after = run.student.weights.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    resumed = opd.resume(
        tmp_path / "run", begin(), teacher, task, step=8, save=tmp_path / "b", quiet=True
    )
    resumed.train()
    one, two = (r.student.weights.adapter_state(r.student.adapter) for r in (run, resumed))
    assert all(torch.equal(one[name], two[name]) for name in one)
    loaded = Policy.load(tmp_path / "run" / "step-000016", quantization=way, device="cpu")
    rollout = run.student.sample(task.prompts(3), max_new_tokens=6)
    assert torch.equal(loaded.log_probs(rollout), run.student.log_probs(rollout))


def test_all_weights_of_a_quantised_model_are_not_trained(folder):
    policy = load(folder, "4bit")
    with pytest.raises(InvalidValue, match=r"is 4-bit, whose weights cannot move\. Train a LoRA"):
        opd.distill(policy, policy.frozen(), opd.tasks.market(), lora=None, steps=1, quiet=True)


def test_a_quantised_policy_says_so(folder):
    assert "4-bit, no adapter" in repr(load(folder, "4bit"))
    assert "8-bit" in repr(load(folder, "8bit"))


def test_a_quantised_head_is_refused_in_words(folder):
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["none"])
    with pytest.raises(OpdlabError, match=r"output head .* is no plain matrix but a quantised"):
        load(folder, config)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"quantization": "3bit"}, r"quantization='3bit'\. Use '4bit', '8bit', or a"),
        ({"quantization": True}, r"quantization=True\. Use '4bit'"),
        ({"quantization": "4bit", "dtype": "float64"}, "quantization with dtype=float64"),
        ({"quantization": "4bit", "gguf_file": "a.gguf"}, "quantised already"),
    ],
)
def test_what_cannot_work_is_refused_before_loading(options, said, folder):
    with pytest.raises(InvalidValue, match=said):
        Policy.load(folder, **options)


def test_a_missing_package_is_named(folder, monkeypatch):
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(InvalidValue, match=r"pip install 'opdlab\[quantized\]'"):
        Policy.load(folder, quantization="8bit")
