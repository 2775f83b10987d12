"""What is handed to `Policy.load` and `Policy.of`, and what wrong things are told."""

from __future__ import annotations

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from opdlab import Policy
from opdlab.errors import InvalidValue


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_model, words):
    path = tmp_path_factory.mktemp("model")
    make_model(70).save_pretrained(path)
    words.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        (None, torch.float32),
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("torch.bfloat16", torch.bfloat16),
        ("bf16", torch.bfloat16),
        (torch.float64, torch.float64),
    ],
)
def test_dtypes_are_honoured(dtype, kind, folder):
    policy = Policy.load(folder, dtype=dtype, device="cpu")
    assert {p.dtype for p in policy.weights.model.parameters()} == {kind}


@pytest.mark.parametrize("dtype", [torch.float16, "float16", "fp16", "half"])
def test_float16_is_refused(dtype, folder):
    with pytest.raises(InvalidValue, match=r"float16 overflows in training.*Use torch\.bfloat16"):
        Policy.load(folder, dtype=dtype)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "nope"}, "dtype='nope'. Use torch.float32"),
        ({"dtype": torch.int8}, r"dtype=torch.int8. Use torch.float32"),
        ({"dtype": 16}, "dtype=16. Use torch.float32"),
        ({"device": "nope"}, "device='nope'. Use 'cpu'"),
        ({"device": 3.5}, "device=3.5. Use 'cpu'"),
        ({"device": "meta"}, "device='meta', on which no model can run"),
        ({"eos": "eos"}, "Policy got eos="),
        ({"eos": 1.5}, "Policy got eos=1.5"),
        ({"eos": [70]}, r"eos=\[70\], but LlamaForCausalLM has tokens from 0 to 69"),
        ({"eos": [True]}, "Policy got eos=True"),
        (
            {"tokenizer": "a/path"},
            r"got a str as tokenizer.*AutoTokenizer\.from_pretrained\('a/path'\)",
        ),
    ],
)
def test_wrong_options_are_refused(options, said, folder):
    with pytest.raises(InvalidValue, match=said):
        Policy.load(folder, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda")])
def test_a_missing_gpu_is_told(device, folder):
    with pytest.raises(
        InvalidValue, match=r"device='cuda(:0)?', but PyTorch sees no GPU here. Use device='cpu'"
    ):
        Policy.load(folder, device=device)


@pytest.mark.parametrize("source", [None, "", "  ", 5, ["a"], "with\0nul"])
def test_sources_that_are_no_place_are_refused(source):
    with pytest.raises(InvalidValue, match=r"Policy\.load got"):
        Policy.load(source)


def test_missing_and_damaged_models_are_refused(tmp_path, folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        InvalidValue,
        match=r"No causal language model can be loaded from '.*nomodel'.*Give the folder of one",
    ):
        Policy.load(tmp_path / "nomodel")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InvalidValue, match="No causal language model can be loaded from"):
        Policy.load(empty)
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folder.iterdir():
        (broken / file.name).write_bytes(
            file.read_bytes() if file.suffix != ".safetensors" else b"not weights"
        )
    with pytest.raises(InvalidValue, match="No causal language model can be loaded from"):
        Policy.load(broken)


def test_objects_in_the_wrong_place_are_named(make_model, words, make_policy):
    model = make_model(70)
    policy = make_policy(0)
    for wrong, said in (
        (policy, "got a Policy as model.*a policy already"),
        (None, "got a NoneType as model"),
        ("a/path", r"got a str as model.*Policy\.load\('a/path'\)"),
        (words, "got a .* as model"),
        (model.model, "LlamaModel has no output head.*AutoModelForCausalLM"),
        (torch.nn.Linear(2, 2), "got a Linear as model"),
    ):
        with pytest.raises(InvalidValue, match=said):
            Policy.of(wrong, words)
    with pytest.raises(InvalidValue, match="got a NoneType as tokenizer"):
        Policy.of(model, None)
    with pytest.raises(InvalidValue, match="got a LlamaForCausalLM as tokenizer"):
        Policy.of(words, model)
    with pytest.raises(InvalidValue, match="Policy got a LlamaForCausalLM"):
        Policy(model)
    with pytest.raises(InvalidValue, match="seeing got 5"):
        policy.seeing(5)


def test_a_model_with_an_encoder_is_refused(words):
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=70, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    )
    with pytest.raises(
        InvalidValue, match="T5ForConditionalGeneration has an encoder and a decoder"
    ):
        Policy.of(model, words)
