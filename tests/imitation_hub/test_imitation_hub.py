"""The imitation answers as the Hub does, to the libraries that ask the Hub."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from imitation_hub.repositories import ADAPTER, EARLIER, QWEN3, STUDENT, SUMS, TEACHER
from imitation_hub.server import TOKEN, TOKEN_WITHOUT_ACCESS
from imitation_hub.store import ImitationHub

GATED = "google/gemma-3-270m-it"


def test_a_model_has_the_vocabulary_and_the_template_of_the_real_one(hub):
    model = AutoModelForCausalLM.from_pretrained(STUDENT)
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    assert model.get_input_embeddings().weight.shape == (151_936, 16)
    assert model.generation_config.eos_token_id == QWEN3.generation["eos_token_id"]
    assert str(AutoConfig.from_pretrained(STUDENT).dtype) == "torch.bfloat16"
    chat = [{"role": "user", "content": "Hi"}]
    spelled = tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert spelled == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


def test_weights_are_the_same_each_time_and_other_in_other_revisions(hub, tmp_path):
    again = ImitationHub(tmp_path).snapshot(STUDENT)
    assert again.commit == hub.hub.snapshot(STUDENT).commit
    assert again.commit == HfApi().model_info(STUDENT).sha
    assert HfApi().model_info(STUDENT, revision=EARLIER).sha != again.commit
    by_hash = huggingface_hub.hf_hub_download(STUDENT, "config.json", revision=again.commit)
    assert again.commit in by_hash
    names = [branch.name for branch in HfApi().list_repo_refs(STUDENT).branches]
    assert names == ["main", EARLIER]


def test_large_files_come_in_parts_from_another_host_without_the_token(empty_hub):
    folder = huggingface_hub.snapshot_download(TEACHER, token=TOKEN)
    index = json.loads(Path(folder, "model.safetensors.index.json").read_text("utf-8"))
    assert len(set(index["weight_map"].values())) == 2
    stored = [user for _, path, user in empty_hub.hub.requests if path.startswith("/cdn/")]
    asked = {user for _, path, user in empty_hub.hub.requests if not path.startswith("/cdn/")}
    assert (set(stored), asked) == ({None}, {"reader"})
    assert len(stored) == 2  # the tokenizer and the embeddings


def test_a_second_download_sends_no_file(empty_hub):
    huggingface_hub.hf_hub_download(STUDENT, "model.safetensors")
    huggingface_hub.hf_hub_download(STUDENT, "model.safetensors")
    assert [method for method, *_ in empty_hub.hub.requests].count("GET") == 1


def test_what_is_missing_is_told_apart(empty_hub):
    with pytest.raises(RepositoryNotFoundError, match="401"):
        HfApi().model_info("someone/nothing")
    with pytest.raises(RepositoryNotFoundError, match="404"):
        HfApi().model_info("someone/nothing", token=TOKEN)
    with pytest.raises(RevisionNotFoundError):
        HfApi().model_info(STUDENT, revision="nothing")
    with pytest.raises(RemoteEntryNotFoundError):
        huggingface_hub.hf_hub_download(STUDENT, "nothing.json")
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        HfApi().model_info(STUDENT, token="hf_wrong")


def test_gated_models_ask_for_a_token_with_access(empty_hub):
    assert HfApi().model_info(GATED).gated == "manual"
    for token, status in ((None, "401"), (TOKEN_WITHOUT_ACCESS, "403")):
        with pytest.raises(GatedRepoError, match=status):
            huggingface_hub.hf_hub_download(GATED, "config.json", token=token)
    assert huggingface_hub.hf_hub_download(GATED, "config.json", token=TOKEN)


def test_without_a_network_the_cache_answers(empty_hub, monkeypatch):
    AutoConfig.from_pretrained(STUDENT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    empty_hub.hub.requests.clear()
    assert AutoConfig.from_pretrained(STUDENT).vocab_size == 151_936
    with pytest.raises(LocalEntryNotFoundError):
        huggingface_hub.hf_hub_download(STUDENT, "tokenizer.json")
    assert empty_hub.hub.requests == []


def test_an_adapter_finds_its_base(hub):
    model = AutoModelForCausalLM.from_pretrained(ADAPTER)
    assert model.active_adapters() == ["default"]
    assert model.get_input_embeddings().weight.shape == (151_936, 16)


def test_a_data_set_is_loaded_by_its_name(hub):
    rows = datasets.load_dataset(SUMS, split="train")
    assert rows[0] == {"question": "What is 2 + 1?", "answer": "3"}
    assert len(datasets.load_dataset(SUMS, split="test")) == 32


def test_a_folder_is_uploaded_and_loaded_again(empty_hub, tmp_path):
    from transformers import GenerationConfig

    api, name = HfApi(token=TOKEN), "reader/mine"
    api.create_repo(name, exist_ok=True)
    api.create_repo(name, exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(STUDENT)
    model.generation_config = GenerationConfig(max_new_tokens=7)
    model.push_to_hub(name, token=TOKEN)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "one.txt").write_text("written\n")
    api.upload_folder(repo_id=name, folder_path=tmp_path)
    assert GenerationConfig.from_pretrained(name).max_new_tokens == 7
    again = huggingface_hub.hf_hub_download(name, "notes/one.txt")
    assert Path(again).read_text("utf-8") == "written\n"
    weights = AutoModelForCausalLM.from_pretrained(name).get_input_embeddings().weight
    assert weights.equal(model.get_input_embeddings().weight)
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi().create_repo("reader/other")
