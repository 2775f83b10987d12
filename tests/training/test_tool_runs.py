"""Conversations through training: gradients, traces, evaluation, diagnosis, resuming, views."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import opdlab as opd
from opdlab.data.conversation import FinalText, before_turn, transcript
from opdlab.engine.batch import Batch
from opdlab.engine.planned import run_plan
from opdlab.errors import InvalidValue
from opdlab.losses import reverse_kl
from opdlab.methods.windows import room
from opdlab.tasks import Tools, market
from opdlab.tasks.market import agent
from opdlab.tasks.market import model as market_model


@pytest.fixture(scope="module")
def task() -> opd.Task:
    return market(tools=True)


@pytest.fixture(scope="module")
def trainee() -> opd.Policy:
    """Shared; no test may train it."""
    return market_model("trainee")


@pytest.fixture(scope="module")
def clerk() -> opd.Policy:
    return market_model("clerk")


@pytest.fixture(scope="module")
def rollout(clerk, task) -> opd.Rollout:
    """Conversations of several turns."""
    prompts = task.prompts(4, seed=2)
    return clerk.sample(prompts, 2, max_new_tokens=120, seed=0, **task.sample_options)


def test_the_rollouts_have_several_turns_and_what_the_tool_said(rollout, clerk):
    assert int(rollout.turn.max()) >= 2
    said = rollout.ids[rollout.mask & ~rollout.learn]
    assert clerk.tokenizer.decode(said[:1]) == "<tool>"
    assert all(isinstance(text, FinalText) for text in rollout.texts)


def test_the_gradient_is_that_of_the_students_own_tokens(rollout, trainee, clerk):
    batch = Batch(rollout, {"student": trainee, "teacher": clerk})
    weight = torch.linspace(0.1, 1, rollout.tokens)
    found = run_plan(opd.OPD(), batch).gradient(weight)
    hidden = trainee.hidden(rollout).detach().requires_grad_()
    log_probs = trainee.head(hidden).log_softmax(-1)
    loss = reverse_kl(log_probs, clerk.log_probs(rollout))
    (loss * weight)[rollout.learned].sum().backward()
    torch.testing.assert_close(found.gradient, hidden.grad, rtol=1e-3, atol=1e-5)
    assert (found.gradient[~rollout.learned] == 0).all()


@pytest.mark.parametrize("method", [opd.OPD(), opd.OPD(estimator="sampled"), opd.OPDPlus()])
def test_what_a_tool_says_changes_no_loss_before_it(rollout, trainee, clerk, method):
    """Other digits in the tool's answers: the losses of all turns up to the first answer stay."""
    digits = torch.tensor(clerk.tokenizer.convert_tokens_to_ids([*"0123456789"]))
    is_said = torch.isin(rollout.ids, digits) & rollout.mask & ~rollout.learn
    other = replace(rollout, ids=torch.where(is_said, digits[3], rollout.ids))
    assert not torch.equal(other.ids, rollout.ids)
    losses = [
        Batch(one, {"student": trainee, "teacher": clerk}).spread(
            run_plan(method, Batch(one, {"student": trainee, "teacher": clerk})).losses()
        )
        for one in (rollout, other)
    ]
    before = rollout.learn & (is_said.cumsum(1) == 0)
    after = rollout.learn & (is_said.cumsum(1) > 0)
    torch.testing.assert_close(losses[0][before], losses[1][before], rtol=1e-5, atol=1e-6)
    assert (losses[0][after] - losses[1][after]).abs().max() > 1e-3


def test_windows_and_chunks_stay_within_a_turn(rollout, trainee, clerk):
    left, size = rollout.left_in_turn, 6
    fits = room(trainee, rollout, size)
    assert fits.any()
    for b, t in fits.nonzero().tolist():
        window = slice(t, t + size)
        assert rollout.learn[b, window].all()
        assert rollout.turn[b, window].unique().numel() == 1
    assert (left[~rollout.learn] == 0).all()
    method = opd.OmniOPD(chunks=3, continuations=1, length=4)
    audits = method.schedule(Batch(rollout, {"student": trainee}))
    assert {int(rollout.turn[audit.sample, audit.start]) for audit in audits} > {0}
    for audit in audits:
        chunk = slice(audit.start, audit.start + 4)
        assert rollout.learn[audit.sample, chunk].all()
        turn = int(rollout.turn[audit.sample, audit.start])
        said = [m["role"] for m in audit.prompt.messages or ()]
        assert said.count("assistant") == turn
        assert said[-1] == ("tool" if turn else "user")
    # The clerk, asked through its template, reads the very ids of the conversation.
    audit = next(a for a in audits if rollout.turn[a.sample, a.start])
    begun = trainee.tokenizer(audit.prefix, add_special_tokens=False)["input_ids"]
    start = clerk.encode(rollout.prompts[audit.sample])
    want = start + rollout.completions()[audit.sample][: audit.start]
    assert clerk.encode(audit.prompt) + begun == want


def test_a_run_learns_keeps_turns_in_its_trace_and_resumes_bit_for_bit(task, clerk, tmp_path):
    options = {"batch": 3, "max_new_tokens": 60, "quiet": True, "seed": 3}
    whole = opd.distill(market_model("trainee"), clerk, task, steps=2, **options)
    for step in whole:
        trace = step.trace()
        assert set(trace.column("turn").tolist()) >= {0, 1}
        assert (trace.column("learn") == step.rollout.learned.numpy()).all()
        assert step.metrics["tokens"] == int(step.rollout.learn.sum())
    folder = tmp_path / "run"
    first = opd.distill(
        market_model("trainee"), clerk, task, steps=1, save_every=1, save=folder, **options
    )
    first.train()
    again = opd.resume(folder, market_model("trainee"), clerk, task, steps=2, quiet=True)
    again.train()
    for name, values in whole.parameters.items():
        assert torch.equal(again.parameters[name], values), name


def test_evaluation_lets_the_tool_answer(trainee, clerk, task):
    good = opd.evaluate(clerk, task, n=24, k=0, quiet=True)
    bad = opd.evaluate(trainee, task, n=24, k=0, quiet=True)
    assert good.accuracy > 0.8
    assert bad.accuracy < 0.45


def test_writers_of_one_turn_are_refused_early(trainee, clerk, task):
    class Sampler:
        def start(self, student): ...
        def update(self, student, step): ...
        def close(self): ...
        def sample(self, prompts, n=1, *, prefixes=None, batch_size=None, writer="", **options): ...

    with pytest.raises(InvalidValue, match="whose environment replies between turns"):
        opd.distill(trainee, clerk, task, steps=1, sampler=Sampler(), quiet=True)
    with pytest.raises(InvalidValue, match="replies between turns, in the student's own template"):
        opd.distill(trainee, clerk, task, steps=1, method=opd.SpanOPD(), quiet=True)


@pytest.mark.parametrize(
    "method",
    [
        opd.DOPD(),
        opd.TOPD(window=3),
        opd.GRPO(),
        opd.SelfDistillation(),
        opd.OmniOPD(chunks=1, continuations=2, length=4),
        opd.SequenceKD(),
    ],
    ids=lambda method: type(method).__name__,
)
def test_every_kind_of_method_takes_a_step(method, clerk, task):
    hinted = replace(
        task,
        draw=lambda n, seed, split: [
            replace(prompt, hint="hint total:12") for prompt in task.prompts(n, seed, split)
        ],
    )
    run = opd.distill(
        market_model("trainee"), clerk, hinted, method=method, steps=1, batch=3, n=2, quiet=True
    )
    step = next(run)
    assert np.isfinite(step.metrics["loss"])
    assert int(step.rollout.turn.max()) >= 1


def test_views_show_turns_and_sum_over_the_students_own_tokens(rollout, trainee, clerk):
    trace = opd.score(rollout, trainee, clerk)
    lens = opd.viz.TokenLens(trace, 0)
    turns = lens.data()["text"]["turns"]
    learn = rollout.learn[0][rollout.mask[0]].tolist()
    assert [own for _, size, _, own in turns for _ in range(size)] == learn
    assert np.isnan(lens.channels["log_ratio"].values[~np.array(learn)]).all()
    assert "font-style:italic" in lens.static()
    assert [name for name, *_ in lens.data()["segments"]][:3] == ["turn 1", "reply", "turn 2"]
    table = opd.viz.Timeline(trace, samples=[0]).turns
    kl = opd.viz.TokenLens(trace, 0).channels["reverse_kl"].values
    assert table["tokens"].sum() == sum(learn)
    np.testing.assert_allclose(table["kl"].sum(), np.nansum(kl), rtol=1e-3)
    rollouts = opd.viz.Rollouts(trace)
    assert rollouts.table["turns"].tolist() == (rollout.turn.max(1).values + 1).tolist()
    assert "Sums by turn" in rollouts.static()


def test_a_trace_of_single_turns_shows_none_of_this(student, teacher, prompts):
    trace = opd.score(student.sample(prompts[:2], max_new_tokens=6), student, teacher)
    lens = opd.viz.TokenLens(trace, 0)
    assert "turns" not in lens.data()["text"]
    assert "italic" not in lens.static()
    assert "turns" not in opd.viz.Rollouts(trace).table
    assert opd.viz.Timeline(trace, samples=[0]).turns["turn"].tolist() == [0]


def test_conversations_can_be_read_as_texts(rollout):
    text = rollout.texts[0]
    told = transcript(text)
    assert told.startswith("assistant: price({'item':")
    assert "\ntool: " in told
    assert transcript("total:12") == "total:12"
    first = before_turn(rollout.prompts[0], text, 0)
    assert first is rollout.prompts[0]
    last = before_turn(rollout.prompts[0], text, int(rollout.turn[0].max()))
    assert (last.messages or ())[-1]["role"] == "tool"


def test_types_are_ground_truth(rollout, clerk, task):
    kinds = task.token_types(rollout, clerk.tokenizer)
    learn = [row[mask].tolist() for row, mask in zip(rollout.learn, rollout.mask, strict=True)]
    for row, own in zip(kinds, learn, strict=True):
        assert [kind == "tool" for kind in row] == [not one for one in own]
    seen = {kind for row in kinds for kind in row}
    assert {"call", "argument", "copied", "form", "end", "tool"} <= seen <= set(agent.TYPES)


def test_a_limit_of_time_is_kept_in_a_run(clerk):
    import time

    def price(item: str, stall: int) -> int:
        """Look up a price.

        Args:
            item: The goods.
            stall: The stall.
        """
        time.sleep(60)
        return 1

    slow = replace(market(tools=True), environment=Tools(price, seconds=0.05, max_turns=2))
    began = time.monotonic()
    rollout = clerk.sample(slow.prompts(2), max_new_tokens=60, **slow.sample_options)
    assert time.monotonic() - began < 55
    assert "took longer" in transcript(rollout.texts[0]) or rollout.finish[0] == "length"
