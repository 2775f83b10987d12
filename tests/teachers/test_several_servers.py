"""Several servers of one teacher share its requests, and losing one loses nothing."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from wire import Proxy

import opdlab as opd
from opdlab import OPD, TopK, errors
from opdlab.methods import SequenceKD
from opdlab.tasks.market import model
from opdlab.teachers import Budget, LogprobServer, TextServer, servers
from opdlab.teachers.reply import Fault
from opdlab.teachers.servers import Servers

TASK = opd.tasks.market()
PROMPTS = TASK.prompts(6)
METHODS = {"texts": SequenceKD(), "grades": OPD(top_k=TopK(6, by="teacher"))}
GONE = Fault("no connection", status=None)


def run_on(urls: str | list[str], kind: str, steps: int = 2, **options) -> opd.Run:
    options = {"cache": None, "quiet": True, "retries": 2, **options}
    teacher = (
        TextServer(urls, **options) if kind == "texts" else LogprobServer(urls, k=6, **options)
    )
    settings = {"batch": 4, "n": 2, "max_new_tokens": 6, "temperature": 2.0, "quiet": True}
    method = METHODS[kind]
    return opd.distill(model("student"), teacher, TASK, method=method, steps=steps, **settings)


def weights(run: opd.Run) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in run.parameters.values()]


def is_same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Which server is asked.


def test_the_one_that_should_answer_first_is_asked():
    group = Servers(["a", "b"], concurrency=8)
    a, b = group.all
    for server, seconds in ((a, 1.0), (b, 3.0)):
        assert group.take() is server  # they take turns while nothing is known
        group.give_back(server, seconds, None)
    taken = Counter(group.take().url for _ in range(8))
    assert taken == {"a": 6, "b": 2}  # three times as fast, three times as many


def test_it_waits_where_each_has_as_many_as_it_may_have():
    group = Servers(["a", "b"], concurrency=1)
    a, b = group.take(), group.take()
    found = []
    waiting = threading.Thread(target=lambda: found.append(group.take()))
    waiting.start()
    waiting.join(0.2)
    assert not found
    group.give_back(b, 1.0, None)
    waiting.join(60)
    assert found == [b]
    assert a.in_flight == b.in_flight == 1


def test_a_server_that_fails_rests_is_tried_once_and_returns(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(servers.time, "monotonic", lambda: now[0])
    group = Servers(["a", "b"], concurrency=8)
    a, b = group.all
    first, second = group.take(), group.take()
    assert (first, second) == (a, b)
    assert group.give_back(a, 0.1, GONE)
    assert not group.give_back(b, 0.1, None)
    assert {group.take() for _ in range(3)} == {b}  # a rests
    now[0] += servers.FIRST_REST + 0.01
    assert group.take() is a  # a trial, of one request
    assert group.take() is b
    assert not group.give_back(a, 0.1, GONE)  # it had left already
    now[0] += servers.FIRST_REST + 0.01
    assert group.take() is b  # the second rest is longer
    now[0] += servers.FIRST_REST + 0.01
    assert group.take() is a
    group.give_back(a, 0.1, None)
    assert a.failures == 0
    assert a in {group.take() for _ in range(8)}


def test_a_server_that_answers_nothing_rests_as_long_as_it_was_waited_for(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(servers.time, "monotonic", lambda: now[0])
    group = Servers(["a", "b"], concurrency=8)
    a = group.take()
    group.give_back(a, 30.0, GONE)
    now[0] += 29
    assert a.is_resting
    now[0] += 2
    assert not a.is_resting


def test_where_all_rest_they_are_asked_all_the_same():
    group = Servers(["a", "b"], concurrency=8)
    for _ in range(2):
        group.give_back(group.take(), 0.1, GONE)
    first = group.take()
    second = group.take([first])
    assert {first, second} == set(group.all)
    assert group.take([first, second]) is None


def test_a_fault_of_the_request_is_not_the_servers():
    group = Servers(["a", "b"], concurrency=8)
    server = group.take()
    assert not group.give_back(server, 0.1, Fault("bad request", status=400, final=True))
    assert server.failures == 0


# Runs.


@pytest.mark.parametrize("kind", METHODS)
def test_a_run_on_two_servers_is_that_on_one(kind, serve):
    (one, first), (two, second) = serve(), serve()
    alone = run_on(first, kind)
    want = weights(alone.train())
    one.requests.clear()
    run = run_on([first, second], kind)
    assert is_same(weights(run.train()), want)
    asked = [sum("completions" in path for path, _, _ in each.requests) for each in (one, two)]
    assert min(asked) >= 4  # they share the work


def test_a_server_that_is_stuck_holds_up_no_more_than_it_has(serve):
    (stuck, first), (free, second) = serve(), serve()
    answer = stuck.answer

    def later(path, body):
        while body.get("max_tokens") == 2 and len(free.requests) < 25:
            time.sleep(0.05)
        return answer(path, body)

    stuck.answer = later
    teacher = TextServer([first, second], cache=None, quiet=True, concurrency=2)
    teacher.write(TASK.prompts(30), max_new_tokens=2)
    asked = [sum(body["max_tokens"] == 2 for _, body, _ in each.requests) for each in (stuck, free)]
    assert sum(asked) == 30
    assert asked[1] > 20


@pytest.mark.parametrize("kind", METHODS)
def test_a_server_may_go_and_return(kind, serve, monkeypatch):
    """Its requests go to the other one, the weights are those without the loss."""
    monkeypatch.setattr(servers, "FIRST_REST", 0.01)
    (one, first), (two, second) = serve(), serve()
    with closing(Proxy(int(first.split(":")[2].split("/")[0]))) as proxy:
        through = f"http://127.0.0.1:{proxy.port}/v1"
        want = weights(run_on(through, kind, steps=3).train())
        run = run_on([through, second], kind, steps=3)
        next(run)
        proxy.mode = "drop"
        proxy.hang_up()
        one.requests.clear()
        with pytest.warns(UserWarning, match=f"{through} does not answer as it should: no conn"):
            next(run)
        assert not one.requests
        proxy.mode = "pass"
        time.sleep(0.3)  # the rest after one failed request
        two.requests.clear()
        next(run)
        assert one.requests
        assert is_same(weights(run), want)


@pytest.mark.parametrize("kind", METHODS)
def test_with_none_left_the_error_lists_each_and_nothing_is_paid_twice(kind, serve):
    (one, first), (two, second) = serve(), serve()
    alone = run_on(first, kind)
    next(alone)
    one.requests.clear()
    next(alone)
    want, usual = weights(alone), len(one.requests)
    run = run_on([first, second], kind, retries=0, concurrency=1)
    next(run)
    answers = {each: each.answer for each in (one, two)}
    lock, seen = threading.Lock(), []

    def fail_after_three(each):
        def answer(path, body):
            with lock:
                seen.append(path)
                if len(seen) > 3:
                    return 503, {"error": {"message": "full"}}
            return answers[each](path, body)

        return answer

    for each in (one, two):
        each.requests.clear()
        each.answer = fail_after_three(each)
    with pytest.warns(UserWarning, match="503"), pytest.raises(errors.TeacherError) as caught:
        next(run)
    said = str(caught.value)
    assert said.startswith("None of 2 servers gives a usable answer. ")
    assert all(f"{url}{seen[0][3:]}: it answers 503" in said for url in (first, second))
    assert "Start the server or wait for it" in said
    for each in (one, two):
        each.answer = answers[each]
    next(run)
    assert is_same(weights(run), want)
    refused = len(seen) - 3
    assert len(one.requests) + len(two.requests) - refused <= usual


def test_a_budget_counts_over_all_servers(serve):
    (one, first), (two, second) = serve(), serve()
    budget = Budget(requests=9)
    teacher = TextServer([first, second], cache=None, quiet=True, budget=budget)
    with pytest.raises(errors.BudgetSpent):
        teacher.write(TASK.prompts(30), max_new_tokens=2)
    assert len(one.requests) + len(two.requests) == budget.spent.requests == 9


def test_the_cache_is_one_whichever_server_answered(serve, tmp_path):
    (_, first), (_, second) = serve(), serve()
    kept = {"cache": tmp_path / "answers.sqlite", "quiet": True}
    name = "market-teacher"
    texts = TextServer([first, second], name, **kept).write(PROMPTS, 2, max_new_tokens=6)
    dead = TextServer(first, name, **kept)
    dead.service.servers.all[0].url = "http://127.0.0.1:9/v1"  # nobody answers
    assert dead.write(PROMPTS, 2, max_new_tokens=6) == texts


def test_a_teacher_may_serve_one_run_after_another(serve):
    urls = [serve()[1], serve()[1]]
    teacher = LogprobServer(urls, k=6, cache=None, quiet=True)
    ends = []
    for _ in range(2):
        run = opd.distill(
            model("student"), teacher, TASK, method=METHODS["grades"], steps=1, batch=2, quiet=True
        )
        ends.append(weights(run.train()))
    assert is_same(*ends)


# Servers that are not the same.


def test_another_model_is_refused_before_a_run_that_grades(serve):
    (_, first), (_, second) = serve(), serve(name="another")
    with pytest.raises(errors.TeacherError, match="does not exist"):
        run_on([first, second], "grades")


def test_another_model_is_left_out_where_texts_are_asked_for(serve):
    (_, first), (other, second) = serve(), serve(name="another")
    teacher = TextServer([first, second], cache=None, quiet=True)
    teacher.meet(PROMPTS)
    with pytest.warns(UserWarning, match=f"{second} is not asked, since it is not the teacher"):
        teacher.write(PROMPTS, 2, max_new_tokens=4)
    asked = len(other.requests)
    teacher.write(PROMPTS, 2, max_new_tokens=5)
    assert len(other.requests) == asked


def test_a_server_that_is_down_at_the_start_is_compared_when_it_returns(serve, monkeypatch):
    monkeypatch.setattr(servers, "FIRST_REST", 0.01)
    (early, first), (late, second) = serve(), serve()
    with closing(Proxy(int(second.split(":")[2].split("/")[0]))) as proxy:
        proxy.mode = "drop"
        through = f"http://127.0.0.1:{proxy.port}/v1"
        with pytest.warns(UserWarning, match="is left out"):
            run = run_on([first, through], "grades", steps=3)
        proxy.mode = "pass"
        assert not late.requests
        time.sleep(0.3)
        run.train()
    first_asked = [
        next(body["prompt"] for path, body, _ in each.requests if "prompt_logprobs" in body)
        for each in (early, late)
    ]
    assert first_asked[0] == first_asked[1]  # the comparison of the vocabulary comes first
    assert len(late.requests) > 4


def test_addresses_are_checked():
    for urls, said in (
        ([], "url got no address"),
        (["http://a/v1", "http://a/v1/"], r"http://a/v1 twice"),
        (["http://a/v1", "ftp://a"], "must look like"),
        (["http://a/v1", 3], "a list of those of servers"),
    ):
        with pytest.raises(errors.InvalidValue, match=said):
            TextServer(urls, cache=None)


def test_a_config_keeps_the_list(serve, tmp_path):
    (_, first), (_, second) = serve(), serve()
    run = run_on([first, second], "texts", cache=tmp_path / "c.sqlite")
    text = run.to_config(tmp_path / "run.toml")
    assert f'url = [\n    "{first}",\n    "{second}",\n]' in text
    again = opd.from_config(tmp_path / "run.toml").teacher.service
    assert [server.url for server in again.servers.all] == [first, second]


# Processes that are killed.


def _start(port: int) -> subprocess.Popen[bytes]:
    script = Path(__file__).with_name("serve_wire.py")
    path = os.pathsep.join([str(script.parent), *filter(None, sys.path)])
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.Popen([sys.executable, str(script), str(port)], env=env)


def _wait(process: subprocess.Popen[bytes], port: int) -> None:
    for _ in range(4800):
        assert process.poll() is None
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=5):
                return
        except OSError:
            time.sleep(0.25)
    raise AssertionError(f"no server at {port}")


@pytest.fixture(scope="module")
def three_processes() -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    ports = []
    for _ in range(3):
        with socket.create_server(("127.0.0.1", 0)) as free:
            ports.append(free.getsockname()[1])
    running = {f"http://127.0.0.1:{port}/v1": _start(port) for port in ports}
    try:
        for process, port in zip(running.values(), ports, strict=True):
            _wait(process, port)
        yield running
    finally:
        for process in running.values():
            process.kill()
            process.wait()


@pytest.mark.parametrize(("kind", "victim"), [("texts", 1), ("grades", 2)])
def test_killing_a_server_at_a_random_moment_loses_nothing(kind, victim, three_processes):
    urls = list(three_processes)
    undisturbed = run_on(urls[0], kind, steps=4)
    began = time.monotonic()
    want = weights(undisturbed.train())
    took = time.monotonic() - began
    killed = three_processes[urls[victim]]
    run = run_on([urls[0], urls[victim]], kind, steps=4)
    moment = random.SystemRandom().uniform(0, took)
    killer = threading.Timer(moment, killed.send_signal, [signal.SIGKILL])
    killer.start()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        got = weights(run.train())
    killer.join()
    assert is_same(got, want), f"killed after {moment} of {took} s"
    assert killed.wait(60) == -signal.SIGKILL
    assert len(run.history) == 4
    assert all("does not answer" in str(one.message) for one in said)
