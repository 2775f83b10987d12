"""vLLM writes the turns of conversations with a tool, in this process and behind a server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from with_vllm.servers import Server, vllm_server

import opdlab as opd
from opdlab.data.conversation import messages_of
from opdlab.samplers import VLLM, VLLMServer
from opdlab.tasks import market
from opdlab.tasks.market import model
from opdlab.teachers import LogprobServer, TextServer

GREEDY = {"max_new_tokens": 100, "temperature": 0}


@pytest.fixture(scope="module")
def task() -> opd.Task:
    return market(tools=True)


@pytest.fixture(scope="module")
def engine() -> Iterator[VLLM]:
    with VLLM() as sampler:
        yield sampler


@pytest.fixture(scope="module")
def trainee_server(tmp_path_factory) -> Iterator[Server]:
    server = vllm_server(
        "trainee",
        tmp_path_factory.mktemp("servers"),
        *("--enable-lora", "--max-lora-rank", "16"),
        VLLM_ALLOW_RUNTIME_LORA_UPDATING="True",
    )
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def clerk_server(tmp_path_factory) -> Iterator[Server]:
    server = vllm_server("clerk", tmp_path_factory.mktemp("servers"))
    server.start()
    yield server
    server.kill()


def check_same(found: opd.Rollout, want: opd.Rollout) -> None:
    """Check that two rollouts hold the same conversations, with log-probs that agree."""
    assert found.completions() == want.completions()
    assert torch.equal(found.learn, want.learn)
    assert torch.equal(found.turn, want.turn)
    assert (found.texts, found.finish) == (want.texts, want.finish)
    assert [messages_of(text) for text in found.texts] == [messages_of(t) for t in want.texts]
    torch.testing.assert_close(found.logp, want.logp, rtol=1e-3, atol=1e-4)


def check_graded(student: opd.Policy, rollout: opd.Rollout) -> None:
    """Check the sampled log-probs of every turn against grading the whole conversation."""
    graded = student.log_probs(rollout).gather(-1, rollout.ids[rollout.mask][:, None])[:, 0]
    own = rollout.learned
    torch.testing.assert_close(rollout.logp[rollout.mask][own], graded[own], rtol=1e-3, atol=1e-4)


def test_greedy_conversations_are_those_of_the_students_own_loop(engine, task):
    student, prompts = model("clerk").adapt(16), task.prompts(8, seed=1)
    engine.start(student)
    want = student.sample(prompts, **GREEDY, **task.sample_options)
    found = engine.sample(prompts, **GREEDY, **task.sample_options)
    check_same(found, want)
    assert int(found.turn.max()) >= 2
    sampled = engine.sample(prompts, 2, max_new_tokens=100, seed=5, **task.sample_options)
    check_graded(student, sampled)
    parts = engine.sample(
        prompts, 2, max_new_tokens=100, seed=5, batch_size=3, **task.sample_options
    )
    assert parts.completions() == sampled.completions()


def test_a_server_plays_turns_and_a_run_follows_it(trainee_server, task):
    student = model("trainee").adapt(16)
    with VLLMServer(trainee_server.url) as sampler:
        sampler.start(student)
        prompts = task.prompts(6, seed=2)
        want = student.sample(prompts, **GREEDY, **task.sample_options)
        check_same(sampler.sample(prompts, **GREEDY, **task.sample_options), want)
        run = opd.distill(
            model("trainee"),
            model("clerk"),
            task,
            steps=25,
            batch=12,
            sampler=sampler,
            lora=16,
            lr=3e-3,
            seed=1,
            quiet=True,
        )
        before = opd.evaluate(run.student, task, n=60, k=0)
        run.train()
        assert run.history["sampler_gap"].max() < 1e-5
        after = opd.evaluate(run.student, task, n=60, k=0, sampler=sampler)
        print(f"task success {before.accuracy:.2f}, after 25 steps {after.accuracy:.2f}")
        assert after.accuracy > before.accuracy + 0.3


def test_teachers_behind_servers_grade_and_play_conversations(clerk_server, task):
    options = {"cache": None, "quiet": True}
    grader = LogprobServer(clerk_server.url, k=8, **options)
    run = opd.distill(
        model("trainee"),
        grader,
        task,
        steps=1,
        batch=3,
        quiet=True,
        max_new_tokens=80,
        method=opd.OPD("forward_kl", top_k=opd.TopK(8, by="teacher")),
    )
    assert next(run).metrics["loss"] > 0
    writer = TextServer(clerk_server.url, continue_by="completion", **options)
    played = [
        next(
            opd.distill(
                model("trainee"),
                teacher,
                task,
                method=opd.SequenceKD(),
                steps=1,
                batch=6,
                temperature=0.0,
                quiet=True,
            )
        ).rollout
        for teacher in (writer, model("clerk"))
    ]
    assert int(played[0].turn.max()) >= 1
    assert played[0].completions() == played[1].completions()
    assert torch.equal(played[0].learn, played[1].learn)
