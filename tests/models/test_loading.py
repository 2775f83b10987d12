"""What is handed to `Policy.load` and `Policy.of`, and what wrong things are told."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

import opdlab as opd
from opdlab import Policy, Prompt
from opdlab.errors import InvalidValue
from opdlab.models.load_options import LoadOptions, default_dtype, read_device


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
        ({"tokenizer": "a/path"}, "No tokenizer can be loaded from 'a/path'"),
        ({"tokenizer": 5}, "got a int as tokenizer"),
        ({"device": "cpu", "device_map": "auto"}, "device='cpu' and device_map='auto'. Use device"),
        ({"device_map": "everywhere"}, "in device_map the device 'everywhere'. Use 'cpu'"),
        ({"device_map": {}}, "device_map={}. Use 'auto'"),
        ({"device_map": {"model": 2.5}}, "got 2.5 as a device in device_map"),
        ({"attn_implementation": "flash_attention_2"}, "needs the package flash-attn"),
        ({"attn_implementation": "nope"}, "No causal language model can be loaded"),
        ({"attn_implementation": ""}, "attn_implementation=''. Use a text"),
        ({"revision": "main"}, "revision='main', which names a version on the Hub"),
        ({"revision": 3}, "revision=3. Use a text"),
        ({"adapter": 3}, "adapter=3. Use the folder of a PEFT adapter"),
        ({"adapter": "no/such"}, "adapter='no/such', where no adapter can be found"),
        ({"gguf_file": "a.gguf"}, "gguf_file='a.gguf', which is not in .*; there are none"),
        ({"chat_template": "no such file"}, "chat_template='no such file', which is neither"),
        (
            {"chat_template": "{{ 1 }}", "chat_template_kwargs": {"chat_template": "{{ 2 }}"}},
            "got chat_template twice",
        ),
        ({"prefer_shared": 3}, "prefer_shared=3"),
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


# Adapters.


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, folder):
    """An adapter as plain PEFT trains and saves it, with a whole module of its own."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    config = LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"], use_dora=True
    )
    peft_model = get_peft_model(model, config)
    with torch.no_grad():
        for name, value in peft_model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                value.add_(0.2 * torch.randn_like(value))
    path = tmp_path_factory.mktemp("adapter")
    peft_model.save_pretrained(path)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        logits = peft_model.eval()(input_ids=ids).logits[0, :-1]
    return path, ids, logits.log_softmax(-1)


def log_probs(policy: Policy, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), policy.weights.using(policy.adapter) as model:
        return model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)


def test_an_adapter_on_its_own_finds_its_base(adapter, folder):
    path, ids, want = adapter
    policy = Policy.load(path, device="cpu")
    torch.testing.assert_close(log_probs(policy, ids), want)
    assert policy.weights.source == str(folder)
    assert policy.adapter == "default"
    halved = Policy.load(path, dtype="bfloat16", device="cpu")
    assert halved.weights.model.dtype == torch.bfloat16
    assert {v.dtype for v in halved.weights.adapter_state("default").values()} == {torch.float32}


def test_an_adapter_is_put_on_a_given_base(adapter, folder, make_model, words, tmp_path):
    path, ids, want = adapter
    torch.testing.assert_close(
        log_probs(Policy.load(folder, adapter=path, device="cpu"), ids), want
    )
    with pytest.raises(InvalidValue, match=r"which is an adapter itself\. Give the base model"):
        Policy.load(path, adapter=path)
    make_model(70, hidden_size=64).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    with pytest.raises(
        InvalidValue, match=r"does not fit LlamaForCausalLM.*Use the base model that it was trained"
    ):
        Policy.load(tmp_path, adapter=path)


def changed(adapter, tmp_path, **fields):
    path = tmp_path / "changed"
    shutil.copytree(adapter, path)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | fields))
    return path


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"base_model_name_or_path": "gone/model"},
            "belongs to the base model 'gone/model', which cannot be loaded.*adapter='",
        ),
        (
            {"base_model_name_or_path": None},
            "does not say which model it belongs to. Give the base",
        ),
        ({"peft_type": "IA3"}, "of the kind IA3, and opdlab works with LoRA"),
    ],
)
def test_adapters_that_cannot_be_used_are_told(fields, said, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # it is asked in vain
    with pytest.raises(InvalidValue, match=said):
        Policy.load(changed(adapter[0], tmp_path, **fields), device="cpu")


def test_a_pickled_adapter_and_a_damaged_one_are_refused(adapter, tmp_path):
    path = changed(adapter[0], tmp_path)
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    with pytest.raises(InvalidValue, match="a pickle, which opdlab does not open"):
        Policy.load(path)
    (path / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(InvalidValue, match="cannot be read"):
        Policy.load(path)


def test_a_tensor_that_is_missing_or_too_much_is_named(adapter, tmp_path):
    path = changed(adapter[0], tmp_path)
    file = path / "adapter_model.safetensors"
    # Copies: loaded tensors may lie in the very file that is written next.
    state = {key: value.clone() for key, value in load_file(file).items()}
    name = next(iter(state))
    save_file({key: value for key, value in state.items() if key != name}, file)
    with pytest.raises(InvalidValue, match="does not fit"):
        Policy.load(path)
    save_file({**state, "base_model.model.model.layers.9.lora_A.weight": torch.ones(2)}, file)
    with pytest.raises(InvalidValue, match="does not fit"):
        Policy.load(path)


def test_a_second_stage_saves_the_name_of_the_base(adapter, folder, tmp_path):
    policy = Policy.load(adapter[0], device="cpu")
    task = opd.tasks.from_prompts([Prompt("ana has 4"), Prompt("ben")], name="t")
    opd.distill(
        policy,
        policy.without_adapter(),
        task,
        steps=1,
        batch=2,
        max_new_tokens=4,
        save=tmp_path,
        quiet=True,
    ).train()
    said = json.loads((tmp_path / "step-000001" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(folder)


def test_weights_write_an_adapter_that_peft_loads(adapter, folder, tmp_path):
    policy = Policy.load(adapter[0], device="cpu")
    policy.weights.write_adapter("default", tmp_path / "new")
    torch.testing.assert_close(
        log_probs(Policy.load(tmp_path / "new", device="cpu"), adapter[1]), adapter[2]
    )


# Tokenizers and templates.


def test_a_tokenizer_may_be_named_and_a_template_given(folder, words, tmp_path):
    words.save_pretrained(tmp_path / "tokens")
    (tmp_path / "t.jinja").write_text("{% for m in messages %}<{{ m['content'] }}>{% endfor %}")
    for template in ((tmp_path / "t.jinja"), (tmp_path / "t.jinja").read_text()):
        policy = Policy.load(folder, tokenizer=str(tmp_path / "tokens"), chat_template=template)
        assert policy.tokenizer.chat_template.startswith("{% for m in messages %}<")
    before = words.chat_template
    policy = Policy.load(folder, tokenizer=words, chat_template="{{ messages[0]['content'] }}")
    assert policy.tokenizer.chat_template != before
    assert words.chat_template == before, "the user's own tokenizer was changed"


def test_code_that_comes_with_weights_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "custom")
    file = tmp_path / "custom" / "config.json"
    config = json.loads(file.read_text())
    own = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    file.write_text(json.dumps(config | {"auto_map": own, "model_type": "my_own"}))
    (tmp_path / "custom" / "code.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(
        InvalidValue, match=r"brings its own code.*yourself with transformers.*Policy\.of"
    ):
        Policy.load(tmp_path / "custom")
    file.write_text(json.dumps(config | {"auto_map": own}))  # transformers has a class of its own
    assert Policy.load(tmp_path / "custom").weights.vocab_size == 70


def test_a_token_is_shown_nowhere(folder):
    secret = "hf_secretsecret"
    assert secret not in repr(LoadOptions(token=secret))
    policy = Policy.load(folder, token=secret)
    assert secret not in repr(policy)
    assert secret not in policy.weights.model.config.to_json_string(use_diff=False)
    with pytest.raises(InvalidValue) as caught:
        Policy.load(f"no/such{secret[:0]}", token=secret)
    assert secret not in str(caught.value)
    with pytest.raises(InvalidValue, match="got a list as token") as caught:
        Policy.load(folder, token=[secret])
    assert secret not in str(caught.value)


def test_a_cpu_never_chooses_bfloat16(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "half")
    file = tmp_path / "half" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "bfloat16"}))
    assert Policy.load(tmp_path / "half", device="cpu").weights.model.dtype == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: True)
    assert default_dtype(torch.device("cuda")) == torch.bfloat16
    assert default_dtype(torch.device("cpu")) == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: False)
    assert default_dtype(torch.device("cuda")) == torch.float32


@pytest.mark.parametrize(
    ("process", "wanted"), [(None, "cuda"), ("0", "cuda:0"), ("1", "cuda:1"), ("3", "cuda:1")]
)
def test_each_process_of_a_machine_loads_onto_a_gpu_of_its_own(monkeypatch, process, wanted):
    """As Accelerate places them; all on the first GPU, no two could talk over NCCL."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if process is not None:
        monkeypatch.setenv("LOCAL_RANK", process)
    assert read_device(None) == torch.device(wanted)
