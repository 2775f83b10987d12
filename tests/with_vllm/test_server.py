"""A real vLLM server follows a student through training, and is waited for when it goes away."""

from __future__ import annotations

import json
import random
import threading
import time
import urllib.request

import pytest
import torch

import opdlab as opd
from opdlab.errors import InvalidValue, OpdlabError, SamplerError
from opdlab.samplers import VLLMServer
from opdlab.tasks.market import model


def run_with(sampler, steps=3, **settings):
    student, teacher, task = opd.load("market")
    options = {"batch": 16, "lora": 16, "lr": 3e-3, "quiet": True, **settings}
    return opd.distill(student, teacher, task, sampler=sampler, steps=steps, **options)


def served_models(server, key: str) -> list[str]:
    request = urllib.request.Request(
        f"{server.url}/models", headers={"Authorization": f"Bearer {key}"}
    )
    with urllib.request.urlopen(request, timeout=30) as reply:
        return [one["id"] for one in json.load(reply)["data"]]


def test_it_follows_ten_updates(student_server, key, tmp_path):
    with VLLMServer(student_server.url, adapter_folder=tmp_path) as sampler:
        run = run_with(sampler, steps=11).train()
        assert sampler.model == "student"
        assert run.history["sampler_gap"].max() < 1e-5
        assert run.history["sampler_gap_max"].max() < 1e-3
        assert run.history["reverse_kl"].iloc[-3:].mean() < 0.7 * run.history["reverse_kl"].iloc[0]
        assert len(served_models(student_server, key)) == 2  # the base and one adapter
        assert len(list(tmp_path.iterdir())) == 1
    assert served_models(student_server, key) == ["student"]
    assert list(tmp_path.iterdir()) == []


def test_its_texts_are_those_of_the_students_own_loop(student_server, key):
    student, _, task = opd.load("market")
    student.adapt(8)
    prompts = task.prompts(6)
    with VLLMServer(student_server.url) as sampler:
        sampler.check(student, prompts, 40)
        sampler.start(student)
        for options in (
            {"max_new_tokens": 40},
            {"max_new_tokens": 5},
            {"max_new_tokens": 40, "stop": ("sum",)},
            {"max_new_tokens": 40, "prefixes": [[5, 9, 12]] * 6},
        ):
            mine = student.sample(prompts, temperature=0, **options)
            theirs = sampler.sample(prompts, temperature=0, **options)
            assert theirs.completions() == mine.completions(), options
            assert theirs.finish == mine.finish
            torch.testing.assert_close(theirs.logp, mine.logp, rtol=1e-3, atol=1e-4)
        one, two = (sampler.sample(prompts, 2, seed=7, max_new_tokens=9) for _ in range(2))
        assert one.completions() == two.completions()


def test_a_key_is_required(student_server, monkeypatch):
    monkeypatch.delenv("OPDLAB_API_KEY", raising=False)
    with pytest.raises(SamplerError, match=r"401.*environment variable OPDLAB_API_KEY"):
        run_with(VLLMServer(student_server.url))
    monkeypatch.setenv("OPDLAB_API_KEY", "wrong-key-98765")
    with pytest.raises(SamplerError, match="401") as refused:
        run_with(VLLMServer(student_server.url))
    assert "wrong-key-98765" not in str(refused.value)


def test_a_wrong_model_is_refused(student_server, key):
    with pytest.raises(SamplerError, match=r"404.*model's name"):
        run_with(VLLMServer(student_server.url, "teacher"))


def test_a_server_that_takes_no_adapters_is_refused(teacher_server):
    with pytest.raises(OpdlabError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"):
        run_with(VLLMServer(teacher_server.url))


def test_a_server_of_another_model_is_refused(teacher_server):
    with pytest.raises(SamplerError, match="it serves another model"):
        VLLMServer(teacher_server.url).start(model("student"))


def test_full_training_and_large_ranks_are_refused(student_server, key):
    with pytest.raises(InvalidValue, match="trains all weights"):
        next(run_with(VLLMServer(student_server.url), lora=None))
    with pytest.raises(SamplerError, match="larger --max-lora-rank"):
        next(run_with(VLLMServer(student_server.url), lora=32))


def test_a_server_that_is_killed_at_a_random_moment_and_started_again(student_server, key):
    """It has lost the adapter; the run waits, hands it over again, and goes on."""
    with VLLMServer(student_server.url, retries=1, timeout=60) as sampler:
        run = run_with(sampler, steps=4)
        next(run)
        moment = random.SystemRandom().uniform(0, run.metrics[-1]["seconds"])

        def restart() -> None:
            student_server.kill()
            time.sleep(2)
            student_server.start(wait=False)

        again = threading.Timer(moment, restart)
        again.start()
        run.train()
        again.join()
        student_server.wait()  # where the run was quicker
        assert run.done == 4, moment
        assert len(run.history) == 4
        assert run.history["sampler_gap"].max() < 1e-5


def test_a_server_that_stays_away_loses_nothing(student_server, key, tmp_path):
    sampler = VLLMServer(student_server.url, retries=0, timeout=60, patience=1.0)
    run = run_with(sampler, steps=2, save=tmp_path, save_every=1)
    next(run)
    student_server.kill()
    try:
        with pytest.raises(SamplerError, match="last step and its checkpoints are intact"):
            next(run)
        assert (run.done, len(run.history)) == (1, 1)
    finally:
        student_server.start()
    student, teacher, task = opd.load("market")
    again = opd.resume(tmp_path, student, teacher, task, sampler=sampler, quiet=True)
    assert next(again).number == 2
    assert again.history["sampler_gap"].max() < 1e-5
    sampler.close()
