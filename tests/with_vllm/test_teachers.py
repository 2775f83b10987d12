"""Teachers behind a real vLLM server give the losses that the same model gives in this process."""

from __future__ import annotations

import time
import warnings

import pytest
import torch

import opdlab as opd
from opdlab.errors import OpdlabError, TeacherError
from opdlab.losses import TopK
from opdlab.tasks.market import model
from opdlab.teachers import LogprobServer, TextServer


def first_step(teacher, method):
    student, _, task = opd.load("market")
    return next(opd.distill(student, teacher, task, method=method, steps=1, batch=16, quiet=True))


@pytest.mark.parametrize(
    "method",
    [
        opd.OPD(top_k=TopK(20, by="teacher")),
        opd.OPD("forward_kl", top_k=TopK(20, by="teacher")),
        opd.OPD(estimator="sampled"),
    ],
)
def test_its_losses_are_those_of_the_local_teacher(teacher_server, method):
    local = first_step(model("teacher"), method)
    served = first_step(LogprobServer(teacher_server.url, k=20, quiet=True), method)
    assert served.rollout.completions() == local.rollout.completions()
    losses = {name: step.columns["loss"] for name, step in (("here", local), ("there", served))}
    gap = (losses["there"] - losses["here"]).abs()
    # The mass beyond the top 20 is one minus the rest: float32 leaves it 1e-7, which matters where
    # the student is outside the top 20 and the teacher leaves hardly any mass there.
    is_plain = losses["here"].abs() < 5
    assert is_plain.float().mean() > 0.9
    assert float(gap[is_plain].max()) < 1e-4  # nats
    assert float((gap / losses["here"].abs().clamp(min=1)).max()) < 1e-4


def test_it_writes_texts(teacher_server):
    task = opd.tasks.market()
    teacher = TextServer(teacher_server.url, quiet=True)
    student = model("student")
    step = next(
        opd.distill(
            student, teacher, task, method=opd.SequenceKD(), steps=1, batch=8, lr=3e-3, quiet=True
        )
    )
    assert set(step.rollout.writer) == {"teacher"}
    scores = task.scores(step.rollout.prompts, step.rollout.texts)
    assert sum(scores) / len(scores) > 0.7  # they are the teacher's, who is right


def test_too_many_log_probs_are_refused_before_the_run(teacher_server):
    teacher = LogprobServer(teacher_server.url, k=40, quiet=True)
    with pytest.raises(OpdlabError, match=r"(?i)log-?probs") as refused:
        first_step(teacher, opd.OPD(estimator="sampled"))
    assert "20" in str(refused.value)  # what the server allows


def test_a_wrong_model_is_refused(teacher_server):
    with pytest.raises(TeacherError, match="404"):
        first_step(TextServer(teacher_server.url, "nobody", quiet=True), opd.SequenceKD())


def weights(run):
    return torch.cat([parameter.detach().flatten() for parameter in run.parameters.values()])


@pytest.mark.parametrize("ahead", [False, True])
def test_one_of_two_servers_is_killed_and_started_again(
    ahead, teacher_server, second_teacher_server
):
    """The other answers in its place, and the run is that of one server: grades do not depend on
    which server gives them. Started again, it takes its share once more.
    """
    method = opd.OPD("forward_kl", top_k=TopK(20, by="teacher"))

    def run_on(urls, steps=8, **options):
        student, _, task = opd.load("market")
        served = LogprobServer(urls, k=20, cache=None, quiet=True, **options)
        chosen = {"steps": steps, "batch": 6, "quiet": True, "generate_ahead": ahead}
        return opd.distill(student, served, task, method=method, **chosen), served

    alone, _ = run_on(teacher_server.url)
    want = weights(alone.train())
    run, served = run_on([teacher_server.url, second_teacher_server.url], retries=3)
    first, second = served.text.service.servers.all
    next(run)
    second_teacher_server.kill()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(4):
            next(run)
        assert run.done == 5
        assert second.failures >= 1
        assert first.failures == 0
        second_teacher_server.start()
        time.sleep(max(0.0, second.until - time.monotonic()))
        run.train()
    assert second.failures == 0, "it was not tried again"
    assert any("does not answer" in str(one.message) for one in said)
    torch.testing.assert_close(weights(run), want, rtol=1e-4, atol=0.05 * run.settings.lr)
