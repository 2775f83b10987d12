"""What an engine wrote becomes the rollout that `Policy.sample` would make of it, or an error."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import opdlab as opd
from opdlab.data.sampling_config import SamplingConfig
from opdlab.errors import InvalidValue, OpdlabError, SamplerError, UnknownOption
from opdlab.models.protocols import StudentSampler
from opdlab.samplers import VLLM, VLLMServer
from opdlab.samplers.adapter_files import AdapterFiles, check_adapter
from opdlab.samplers.completions import Completion, mean_gap, measure, probe_ids
from opdlab.samplers.fields import SEEDS, fields_of, seed_of_prompt
from opdlab.samplers.requests import Request, sample_with
from opdlab.samplers.vllm_engine import EngineOptions
from opdlab.tasks.market import model


@pytest.fixture(scope="module")
def market():
    return opd.load("market")


def completions_of(rollout: opd.Rollout) -> list[Completion]:
    """A rollout as an engine would give it back."""
    return [
        Completion(ids, logp[: len(ids)], finish)
        for ids, logp, finish in zip(
            rollout.completions(), rollout.logp.tolist(), rollout.finish, strict=True
        )
    ]


def rollout_of(student, prompts, n, completions, config, writer) -> opd.Rollout:
    """What a sampler makes of an engine's completions."""
    request = Request(prompts, n, config, writer=writer)
    return sample_with(lambda orders, _: completions, lambda *_: None, student, request)


@pytest.mark.parametrize("options", [{"max_new_tokens": 9}, {"max_new_tokens": 40}])
def test_a_rollout_comes_back_as_it_was(market, options):
    student, _, task = market
    prompts = task.prompts(3)
    want = student.sample(prompts, 2, seed=5, **options)
    found = rollout_of(student, prompts, 2, completions_of(want), SamplingConfig(**options), "me")
    assert torch.equal(found.ids, want.ids)
    assert torch.equal(found.logp, want.logp)
    assert (found.texts, found.finish, found.n) == (want.texts, want.finish, want.n)
    assert found.vocabulary == want.vocabulary
    assert set(found.writer) == {"me"}
    assert (found.entropy == 0).all()


def test_a_stop_text_ends_a_completion_where_the_loop_ends_it(market):
    student, _, task = market
    prompts = task.prompts(4)
    options = {"max_new_tokens": 40, "seed": 1, "stop": ("sum",)}
    want = student.sample(prompts, **options)
    assert "stop" in want.finish
    config = SamplingConfig(**options)
    longer = student.sample(prompts, max_new_tokens=40, seed=1)  # as if the engine knew no stop
    found = rollout_of(student, prompts, 1, completions_of(longer), config, "student")
    assert torch.equal(found.lengths, want.lengths)
    assert found.texts == want.texts
    assert found.finish == want.finish


@pytest.mark.parametrize(
    ("ids", "logp", "finish", "said"),
    [
        ([], [], "stop", "0 log-probs for a completion of 0 tokens"),
        ([5, 6], [-1.0], "length", "1 log-probs for a completion of 2 tokens"),
        ([5, 7000], [-1.0, -1.0], "length", "the token id 7000"),
        ([5, 6], [-1.0, float("nan")], "length", "gave nan as the log-prob"),
        ([5, 6], [-1.0, 0.5], "length", "gave 0.5 as the log-prob"),
        ([5, 6], [-1.0, -1.0], "abort", r"after 2 of 4 tokens.*it says 'abort'"),
        ([5, 6], [-1.0, -1.0], "length", "Give it room"),
    ],
)
def test_what_is_no_completion_is_refused(market, ids, logp, finish, said):
    with pytest.raises(SamplerError, match=said):
        measure(market[0], Completion(ids, logp, finish), SamplingConfig(max_new_tokens=4))


def test_tokens_behind_the_end_are_dropped(market):
    student = market[0]
    (eos,) = student.weights.eos
    completion = Completion([5, eos, 6, 7], [-1.0] * 4, "length")
    assert measure(student, completion, SamplingConfig(max_new_tokens=4)) == (2, True)


def test_the_gap_tells_the_students_model_from_another(market):
    student, teacher, _ = market
    start = probe_ids(student)
    assert not {*start} & {*student.tokenizer.all_special_ids, *student.weights.eos}
    prompt = opd.Prompt(student.tokenizer.decode(start))
    assert student.encode(prompt) == start
    written = completions_of(student.sample([prompt], 4, max_new_tokens=16))
    assert mean_gap(student, start, written) < 1e-5
    assert mean_gap(teacher, start, written) > 0.5


def test_all_that_shapes_the_distribution_is_said(market):
    student = market[0]
    plain = fields_of(SamplingConfig(), student)
    assert plain["stop_token_ids"] == sorted(student.weights.eos)
    assert plain["ignore_eos"]
    assert (plain["temperature"], plain["top_p"], plain["top_k"], plain["min_p"]) == (1, 1, 0, 0)
    assert plain["repetition_penalty"] == 1
    assert "stop" not in plain
    stopped = fields_of(SamplingConfig(stop=("x",), top_k=3), student)
    assert (stopped["stop"], stopped["include_stop_str_in_output"]) == (["x"], True)
    assert stopped["top_k"] == 3
    assert "min_tokens" not in plain
    assert fields_of(SamplingConfig(min_new_tokens=2), student)["min_tokens"] == 2
    seeds = {seed_of_prompt(SamplingConfig(seed=2**64 - 1 - i), j) for i in (0, 1) for j in (0, 1)}
    assert len(seeds) == 4
    assert all(0 <= seed < SEEDS for seed in seeds)


def test_every_field_of_the_config_is_translated():
    """A field that is added to `SamplingConfig` must be said to vLLM, and be added here."""
    assert {field.name for field in dataclasses.fields(SamplingConfig)} == {
        "max_new_tokens",
        "min_new_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "stop",
        "seed",
    }


@pytest.mark.parametrize("temperature", [0.005, 2.5])
def test_temperatures_that_vllm_would_change_are_refused(market, temperature):
    with pytest.raises(InvalidValue, match=r"from 0\.01 to 2"):
        fields_of(SamplingConfig(temperature=temperature), market[0])


# Adapters on disk.


def test_an_adapter_is_read_by_peft_with_the_same_numbers(tmp_path, perturb):
    student = model("student").adapt(4)
    perturb(student, 1)
    files = AdapterFiles(tmp_path / "adapters")
    first = files.write(student, "adapter-1")
    second = files.write(student, "adapter-2")
    files.keep_only(second)
    assert not first.exists()
    assert sorted(path.name for path in files.folder.iterdir()) == ["adapter-2"]  # nothing partial
    assert json.loads((second / "adapter_config.json").read_text())["r"] == 4
    assert load_file(second / "adapter_model.safetensors")
    base = AutoModelForCausalLM.from_pretrained(student.weights.source, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, second).eval()
    rollout = student.sample([opd.Prompt("ana has 4 7 apples")], max_new_tokens=4)
    ids = torch.tensor([student.encode(rollout.prompts[0]) + rollout.completions()[0]])
    length = int(rollout.lengths[0])
    with torch.no_grad():
        theirs = loaded(ids).logits[0, -length - 1 : -1, : student.weights.vocab_size]
    torch.testing.assert_close(
        theirs.log_softmax(-1), student.log_probs(rollout), rtol=1e-4, atol=1e-5
    )
    files.close()
    assert (tmp_path / "adapters").exists()  # the user's own folder stays
    assert not second.exists()


def test_a_temporary_folder_goes_with_its_files():
    files = AdapterFiles()
    files.write(model("student").adapt(2), "one")
    folder = files.folder
    files.close()
    assert not folder.exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern="),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
    ],
)
def test_adapters_that_vllm_does_not_compute_are_refused(make_policy, options, said):
    student = make_policy(3).adapt(4, **options)
    with pytest.raises(InvalidValue, match=f"vLLM runs no adapter with {said}"):
        check_adapter(student.weights.config_of(student.adapter))


# Options, without vLLM.


def test_both_fit_the_protocol():
    assert isinstance(VLLM(), StudentSampler)
    assert isinstance(VLLMServer("http://127.0.0.1:1/v1"), StudentSampler)
    assert repr(VLLM(dtype="bfloat16")) == "VLLM(dtype='bfloat16')"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization=1.5"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size=0"),
        ({"enforce_eager": "yes"}, "enforce_eager='yes'"),
        ({"trust_remote_code": True}, "code from model folders is never run"),
        ({"model": "x"}, "base=… names a folder"),
        ({"logprobs_mode": "processed_logprobs"}, "at temperature 1"),
        ({"base": 3}, "base=3"),
    ],
)
def test_options_that_cannot_be_right_are_refused(options, said):
    with pytest.raises(InvalidValue, match=said):
        VLLM(**options)


def test_every_option_that_is_documented_is_checked():
    from opdlab.samplers import vllm_engine

    assert EngineOptions.__annotations__.keys() - vllm_engine._TYPES.keys() == {"seed"}


@pytest.mark.parametrize("sampler", [VLLM(), VLLMServer("http://127.0.0.1:1/v1")])
def test_nothing_is_sampled_before_the_start(sampler, market):
    with pytest.raises(SamplerError, match="holds no student yet"):
        sampler.sample(market[2].prompts(1))


def test_a_server_that_is_not_there_is_refused_before_the_run(market):
    student, teacher, task = market
    sampler = VLLMServer("http://127.0.0.1:1/v1", retries=0)
    with pytest.raises(SamplerError, match="no connection"):
        opd.distill(student, teacher, task, sampler=sampler, steps=1, quiet=True)


def test_without_vllm_the_run_is_refused_in_words(market, monkeypatch):
    monkeypatch.setattr("opdlab.samplers.vllm_engine.find_spec", lambda _: None)
    student, teacher, task = market
    with pytest.raises(OpdlabError, match="needs vllm, which is not installed"):
        opd.distill(student, teacher, task, sampler=VLLM(), steps=1, quiet=True)


def test_several_processes_share_a_server(market, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    student, _, task = market
    with pytest.raises(OpdlabError, match="several train here"):
        VLLM().check(student, task.prompts(1), 8)


def test_unknown_options_of_the_server_are_refused():
    with pytest.raises(UnknownOption):
        VLLMServer("http://127.0.0.1:1/v1", api_key="secret")
