"""Models by their names on the Hub: loaded, missing, gated, and without a network."""

from __future__ import annotations

import time

import pytest
from huggingface_hub import constants
from imitation_hub.repositories import ADAPTER, EARLIER, OWN_CODE, STUDENT, TEACHER
from imitation_hub.server import TOKEN, TOKEN_WITHOUT_ACCESS

import opdlab as opd
from opdlab.errors import InvalidValue

GATED = "meta-llama/Llama-3.2-1B-Instruct"
CHAT = opd.Prompt(messages=({"role": "user", "content": "What is 2 + 2?"},))


def test_a_pair_is_loaded_by_name_and_grades(hub):
    student, teacher = opd.Policy.load(STUDENT), opd.Policy.load(TEACHER)
    rollout = student.sample([CHAT], 3, max_new_tokens=24, seed=0)
    assert teacher.grade(rollout).logp().shape == (rollout.tokens, 151_669)
    assert student.weights.eos == {151_643, 151_645}
    assert str(student.weights.model.dtype) == "torch.float32"  # stored in bf16, which is slow here


def test_an_adapter_by_name_finds_its_base(hub):
    adapted = opd.Policy.load(ADAPTER)
    rollout = adapted.sample([CHAT], max_new_tokens=8, seed=0)
    base = opd.Policy.load(STUDENT).grade(rollout).logp()
    assert adapted.adapter is not None
    assert (adapted.grade(rollout).logp() - base).abs().max() > 0.01


def test_a_missing_name_is_told_at_once(hub):
    began = time.perf_counter()
    with pytest.raises(InvalidValue, match=r"'someone/nothing'.*Give the folder of one"):
        opd.Policy.load("someone/nothing")
    assert time.perf_counter() - began < 20


def test_a_revision_has_weights_of_its_own(hub):
    rollout = opd.Policy.load(STUDENT).sample([CHAT], max_new_tokens=8, seed=0)
    graded = {
        revision: opd.Policy.load(STUDENT, revision=revision).grade(rollout).logp()
        for revision in (None, "main", EARLIER, hub.hub.snapshot(STUDENT, EARLIER).commit)
    }
    now, main, before, by_hash = graded.values()
    assert now.equal(main)
    assert before.equal(by_hash)
    assert (now - before).abs().max() > 0.1
    with pytest.raises(InvalidValue, match="nothing"):
        opd.Policy.load(STUDENT, revision="nothing")


def test_code_of_a_repository_never_runs(hub):
    with pytest.raises(InvalidValue, match="brings its own code"):
        opd.Policy.load(OWN_CODE)


def test_a_gated_model_needs_a_token_with_access(empty_hub, monkeypatch):
    for token in (None, TOKEN_WITHOUT_ACCESS):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(InvalidValue, match="gated") as refused:
            opd.Policy.load(GATED)
        assert TOKEN_WITHOUT_ACCESS not in str(refused.value)
    monkeypatch.delenv("HF_TOKEN")
    assert opd.Policy.load(GATED, token=TOKEN).name == GATED
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert opd.Policy.load(GATED).weights.eos == {128_001, 128_008, 128_009}


def test_without_a_network_the_cache_serves_at_once(hub, monkeypatch):
    before = opd.Policy.load(STUDENT)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    began = time.perf_counter()
    with pytest.warns(UserWarning, match=r"127.0.0.1:9 does not answer \(ConnectError\)"):
        again = opd.Policy.load(STUDENT)
    assert constants.HF_HUB_OFFLINE is False
    texts = [p.sample([CHAT], max_new_tokens=8, seed=0).texts for p in (before, again)]
    assert texts[0] == texts[1]
    with (
        pytest.warns(UserWarning, match="its cache"),
        pytest.raises(InvalidValue, match="'someone/nothing'"),
    ):
        opd.Policy.load("someone/nothing")
    assert time.perf_counter() - began < 40  # the libraries alone try for 45 s each time
