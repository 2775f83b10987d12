"""A teacher that grades over HTTP against the same teacher in memory: the same numbers, the same
training, little memory.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import opdlab as opd
from opdlab import OPD, TopK, errors
from opdlab.methods import SequenceKD
from opdlab.tasks.market import model
from opdlab.teachers import LogprobServer, logprob_server

TASK = opd.tasks.market()
PROMPTS = TASK.prompts(3)


def grader(url: str, **options) -> LogprobServer:
    return LogprobServer(url, **{"cache": None, "quiet": True, "k": 8, **options})


@pytest.fixture(scope="module")
def student() -> opd.Policy:
    return model("student")


@pytest.fixture(scope="module")
def rollout(student) -> opd.Rollout:
    return student.sample(PROMPTS, 2, max_new_tokens=16)


@pytest.mark.parametrize("k", [1, 8, 500])
@pytest.mark.parametrize("way", logprob_server.WAYS)
def test_grades_are_the_log_probs_of_the_teacher(
    way, k, serve, student, rollout, market_teacher, monkeypatch
):
    """In each of the forms in which servers give them."""
    monkeypatch.setattr(logprob_server, "WAYS", {way: logprob_server.WAYS[way]})
    _, url = serve(dialect="legacy" if way == "echo" else "vllm")
    one = grader(url, k=k)
    one.check(student, PROMPTS, 16)
    got, want = one.grade(rollout), market_teacher.log_probs(rollout)
    top, ids = want.topk(min(k, 70), -1)
    assert torch.equal(got.token, rollout.ids[rollout.mask])
    torch.testing.assert_close(got.top, top, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        want.gather(-1, got.ids), top, rtol=0, atol=1e-5
    )  # ties may stand in another order
    torch.testing.assert_close(
        got.sampled, want.gather(-1, got.token[:, None])[:, 0], rtol=0, atol=1e-5
    )
    assert ids.shape == got.ids.shape


def test_the_best_form_is_found_by_asking(serve, student):
    for dialect, way in (("vllm", "prompt_logprobs"), ("legacy", "echo")):
        one = grader(serve(dialect=dialect)[1])
        one.check(student, PROMPTS, 16)
        assert one._way == way


def trained(teacher, method, **options) -> tuple[opd.Run, dict[str, torch.Tensor]]:
    run = opd.distill(
        model("student"),
        teacher,
        TASK,
        method=method,
        quiet=True,
        **{"batch": 6, "steps": 3, "seed": 1, **options},
    ).train()
    return run, {name: p.detach().clone() for name, p in run.parameters.items()}


@pytest.mark.parametrize(
    ("method", "k"),
    [
        (OPD(top_k=TopK(70, by="teacher")), 70),
        (OPD(top_k=TopK(8, by="teacher")), 8),
        (OPD("forward_kl", top_k=TopK(8, by="teacher")), 12),
        (OPD(top_k=TopK(8, by="teacher", tail="renormalize")), 8),
        (OPD(estimator="sampled"), 1),
        (OPD(estimator="sampled", discount=0.9), 4),
    ],
    ids=["all", "top-k", "forward", "renormalized", "sampled", "returns"],
)
def test_training_is_that_of_the_local_teacher(method, k, wire, market_teacher):
    """Losses and weights after three updates.

    A tail is known to 1e-7 and not exactly, and this teacher's are smaller.
    """
    (local, want), (served, got) = (
        trained(t, method) for t in (market_teacher, grader(wire[2], k=k))
    )
    close = 5e-3 if k < 70 and method.top_k and method.top_k.tail == "bucket" else 1e-5
    assert served.history["loss"].tolist() == pytest.approx(
        local.history["loss"].tolist(), rel=close / 5
    )
    moved = torch.cat([p.flatten() for p in want.values()])
    away = torch.cat([(got[name] - p).flatten() for name, p in want.items()])
    assert away.norm() < close * moved.norm()
    assert served.history["reverse_kl"].notna().all()


def test_micro_batches_and_traces_work_as_with_a_local_teacher(wire):
    run, whole = trained(grader(wire[2]), OPD(top_k=TopK(8, by="teacher")), steps=1)
    _, parts = trained(grader(wire[2]), OPD(top_k=TopK(8, by="teacher")), steps=1, micro_batch=4)
    assert all(torch.allclose(parts[name], p, atol=1e-5) for name, p in whole.items())
    trace = run.last.trace()
    assert {"teacher_logp", "teacher_coarse_reverse_kl"} <= set(trace.table.column_names)


def test_a_resumed_run_repeats_the_uninterrupted_one(wire, tmp_path):
    method = OPD(top_k=TopK(8, by="teacher"))
    _, whole = trained(grader(wire[2]), method)
    run = opd.distill(
        model("student"),
        grader(wire[2]),
        TASK,
        method=method,
        quiet=True,
        batch=6,
        steps=3,
        seed=1,
        save=tmp_path,
    )
    next(run)
    run.save()
    again = opd.resume(tmp_path, model("student"), grader(wire[2]), TASK, quiet=True).train()
    assert all(torch.equal(p, whole[name]) for name, p in again.parameters.items())


def test_it_writes_too(wire):
    run, _ = trained(grader(wire[2]), SequenceKD(), steps=1, batch=2)
    assert run.last.rollout.writer == ("teacher",) * 2


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.numel = max(self.numel, out.numel() if isinstance(out, torch.Tensor) else 0)
        return out


def test_memory_is_tokens_times_k(wire, student, rollout):
    one = grader(wire[2], k=2)
    one.check(student, PROMPTS, 16)
    with Largest() as seen:
        one.grade(rollout)
    assert seen.numel <= rollout.tokens * 2 < rollout.tokens * 70


def test_an_empty_rollout_has_no_grades(wire, student):
    one = grader(wire[2])
    one.check(student, PROMPTS, 16)
    nothing = (
        opd.rollout_from_texts(student, PROMPTS, ["", "", ""])
        if student.tokenizer.eos_token_id is None
        else None
    )
    empty = nothing or student.sample(PROMPTS, max_new_tokens=1)
    none = opd.Rollout(
        empty.prompts,
        empty.ids,
        torch.zeros(3, dtype=torch.long),
        empty.logp,
        empty.entropy,
        empty.finish,
        empty.texts,
        empty.writer,
    )
    got = one.grade(none)
    assert got.ids.shape == (0, 8)
    assert got.sampled.shape == (0,)


# What is refused, before anything is trained.


def test_tokens_that_mean_something_else(serve, student, make_tokenizer):
    server, url = serve()
    student_tokens = student.tokenizer
    pieces = student_tokens.convert_ids_to_tokens(list(range(6, 70)))
    server.tokenizer = make_tokenizer(
        " ".join(piece.replace("▁", "") for piece in [pieces[1], pieces[0], *pieces[2:]])
    )
    with pytest.raises(
        errors.TokenizerMismatch,
        match=(
            r"The server's tokenizer differs from the student's: id 6 is 'ben' there and 'ana'"
            r" here\."
        ),
    ):
        grader(url).check(student, PROMPTS, 16)


def test_texts_that_fall_into_other_tokens(serve, student):
    server, url = serve()
    answer = server.answer
    server.answer = lambda path, body: (
        (200, {"tokens": [7, 8]}) if path == "/tokenize" else answer(path, body)
    )
    with pytest.raises(
        errors.TokenizerMismatch,
        match=r"has the ids \[7, 8\] there and \[\d+, .*\] here\. A token-level loss would compare",
    ):
        grader(url).check(student, PROMPTS, 16)


def test_a_model_with_a_smaller_vocabulary(serve, student):
    server, url = serve()
    server.vocab = 60
    with pytest.raises(
        errors.TeacherError,
        match=r"gives no log-probs of a prompt that can be used.*Token id is out of vocabulary",
    ):
        grader(url).check(student, PROMPTS, 16)


def test_strings_that_name_no_single_token(serve, student, bytes_bpe, make_policy):
    """A byte-level tokenizer: pieces of characters all read as the replacement sign."""
    other = make_policy(0, bytes_bpe)
    server, url = serve(dialect="legacy")
    server.model, server.tokenizer, server.vocab, server.eos = (
        other.weights.model,
        bytes_bpe,
        len(bytes_bpe),
        other.weights.eos,
    )
    with pytest.raises(
        errors.TeacherError,
        match=(
            r"the server names a token '.', which is \d+ of the student's tokens\. Serve the"
            r" teacher with vLLM"
        ),
    ):
        grader(url).check(other, [opd.Prompt("the dog 世界")], 16)


@pytest.mark.parametrize("dialect", ["chat", "mistral"])
def test_a_server_without_log_probs(dialect, serve, student):
    _, url = serve(dialect=dialect)
    with pytest.raises(
        errors.TeacherError,
        match=r"gives no log-probs of a prompt.*use it as a TextServer .*OmniOPD, SequenceKD",
    ):
        grader(url, continue_by="prefix").check(student, PROMPTS, 16)


def test_a_server_that_allows_fewer(serve, student):
    _, url = serve(most=5)
    with pytest.raises(
        errors.TeacherError, match="Requested 8 log-probs, which is greater than max allowed: 5"
    ):
        grader(url).check(student, PROMPTS, 16)
    grader(url, k=5).check(student, PROMPTS, 16)


def test_what_it_cannot_do_is_said(wire, student, rollout):
    one = grader(wire[2])
    with pytest.raises(errors.OpdlabError, match="has not been compared with a student yet"):
        one.grade(rollout)
    with pytest.raises(
        errors.OpdlabError, match=r"LogprobServer got k=0\. Use a whole number of at least 1"
    ):
        grader(wire[2], k=0)
    with pytest.raises(
        errors.PartialDistribution,
        match=r"OPD\(top_k=TopK\(8, by='teacher'\)\), OPD\(estimator='sampled'\)",
    ):
        opd.distill(model("student"), one, TASK)
    with pytest.raises(errors.ContextTooLong):
        one.check(student, PROMPTS, 1000)
    with pytest.raises(errors.MissingPolicy, match="must be told hints, and only local models can"):
        opd.distill(
            model("student"),
            one,
            TASK,
            method=opd.method(needs=("teacher+hint",))(lambda rows: rows.logp),
        )
