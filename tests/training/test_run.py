"""The loop: iteration, invariance of the update, sharing of weights, interrupts, and errors before
any compute.
"""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import dataclass, replace

import pytest
import torch
from accelerate.tracking import GeneralTracker

import opdlab as opd
from opdlab import errors
from opdlab.data.seeds import seed_of
from opdlab.methods import GRPO, OPD, SFT, SequenceKD
from opdlab.support.interrupts import hold_interrupts
from opdlab.training import phases
from opdlab.training.settings import Settings


@pytest.fixture
def market():
    """Student, teacher and task, fresh for every test: distilling moves the student."""
    return opd.load("market")


def adapter(run: opd.Run) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.parameters.items()}


def small(student, teacher, task, **settings) -> opd.Run:
    return opd.distill(
        student, teacher, task, quiet=True, **{"batch": 8, "steps": 2, "seed": 3, **settings}
    )


def test_the_loop_is_an_iterator_that_can_be_left_and_taken_up(market):
    run = small(*market, steps=4)
    for step in run:
        if step.number == 2:
            break
    assert run.done == 2
    assert [step.number for step in run] == [3, 4]
    assert list(run) == []
    assert run.history["step"].tolist() == [1, 2, 3, 4]


def test_leaving_and_taking_up_changes_nothing():
    whole = small(*opd.load("market"), steps=3).train()
    parts = small(*opd.load("market"), steps=3)
    next(parts)
    parts.train()
    assert all(torch.equal(p, adapter(whole)[name]) for name, p in adapter(parts).items())


def test_learning_lowers_the_divergence_it_descends(market):
    run = small(*market, steps=12, batch=32).train()
    kl = run.history["reverse_kl"]
    assert kl.tail(3).mean() < 0.6 * kl.head(3).mean()


def test_teacher_equal_to_student_gives_no_loss_and_no_gradient(market):
    student, _, task = market
    run = small(student, student.frozen(), task, steps=1)
    step = next(run)
    assert step.metrics["loss"] == pytest.approx(0, abs=1e-6)
    assert step.metrics["grad_norm"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("normalize", ["token", "sequence", "constant"])
def test_micro_batches_change_memory_and_not_the_update(normalize):
    updates = []
    for size in (None, 3, 1):
        run = small(*opd.load("market"), steps=1, normalize=normalize, micro_batch=size)
        next(run)
        updates.append({name: p.grad.clone() for name, p in run.parameters.items()})
    for other in updates[1:]:
        for name, grad in updates[0].items():
            torch.testing.assert_close(other[name], grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("completions", "longest", "size"),
    [(8, 192, 4), (5, 512, 2), (3, 5000, 1), (16, 42, 16), (25, 42, 13), (0, 42, 0)],
)
def test_on_a_cpu_a_backward_pass_has_at_most_1024_tokens(completions, longest, size):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert Settings().per_backward(completions, longest, cpu) == size
    assert size <= 1 or size * longest <= 1024
    assert Settings().per_backward(completions, longest, gpu) == completions
    assert Settings(micro_batch=3).per_backward(completions, longest, cpu) == 3


def test_passes_that_are_made_smaller_change_no_update(monkeypatch):
    seen, backward = [], phases._backward

    def watched(run, planned, rows, *rest, **options):
        seen.append(len(rows))
        return backward(run, planned, rows, *rest, **options)

    monkeypatch.setattr(phases, "_backward", watched)
    updates = []
    for size in (None, 64):
        run = small(*opd.load("market"), steps=1, batch=64, micro_batch=size)
        next(run)
        updates.append({name: p.grad.clone() for name, p in run.parameters.items()})
    *parts, whole = seen
    assert whole == sum(parts) == 64
    assert len(parts) > 1
    for name, grad in updates[0].items():
        torch.testing.assert_close(updates[1][name], grad, rtol=1e-4, atol=1e-7)


def uneven(run) -> opd.Rollout:
    """Three samples of each of five prompts, of very different lengths."""
    rollout = phases.write_rollout(run)
    lengths = torch.tensor([2, 9, 4, 8, 1, 7, 3, 9, 2, 8, 9, 1, 5, 2, 9])
    return replace(rollout, lengths=lengths.clamp(max=rollout.ids.shape[1]), learn=None)


@pytest.mark.parametrize("cost", [0, 4, 10**6])
@pytest.mark.parametrize("micro_batch", [None, 2])
def test_the_order_of_the_passes_changes_no_number(cost, micro_batch, monkeypatch):
    found = []
    for way in ("in order", "arranged"):
        run = small(*opd.load("market"), steps=1, batch=5, n=3, micro_batch=micro_batch, clip=0)
        if way == "in order":
            monkeypatch.setattr(phases, "micro_batches", lambda run, rollout: [list(range(15))])
        else:
            monkeypatch.undo()
            monkeypatch.setattr(
                "opdlab.models.micro_batches.PASS_COST", {"cpu": cost, "cuda": cost}
            )
        rollout = uneven(run)
        batches = phases.micro_batches(run, rollout)
        assert sorted(row for rows in batches for row in rows) == list(range(15))
        planned = phases.plan_step(run, rollout)
        learned = phases.accumulate_gradient(run, planned, rollout)
        found.append((learned.columns, {name: p.grad for name, p in run.parameters.items()}))
    assert len(batches) > 1 or cost == 10**6
    for whole, parts in zip(*found, strict=True):
        assert whole.keys() == parts.keys()
        for name, value in whole.items():
            torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-6)


def test_rows_of_different_length_are_hardly_padded(monkeypatch):
    """The tokens that the student's backbone runs are about those that there are."""
    monkeypatch.setattr("opdlab.models.micro_batches.PASS_COST", {"cpu": 2, "cuda": 2})
    run = small(*opd.load("market"), steps=1, batch=15, max_new_tokens=24)
    rollout = phases.write_rollout(run)
    lengths = torch.arange(len(rollout)) % 3 * 9 + 3
    rollout = replace(rollout, lengths=lengths.clamp(max=rollout.ids.shape[1]), learn=None)
    seen: list[int] = []
    run.student.weights.model.get_input_embeddings().register_forward_hook(
        lambda module, ids, out: seen.append(ids[0].numel())
    )
    starts = run.student.encode_all(rollout.prompts)
    real = sum(map(len, starts)) + rollout.tokens
    padded = len(rollout) * (max(map(len, starts)) + int(lengths.max()))
    planned = phases.plan_step(run, rollout)
    seen.clear()
    phases.accumulate_gradient(run, planned, rollout)
    assert padded > 1.2 * real
    assert sum(seen) < 1.1 * real


def test_normalisation_is_the_mean_it_says(market):
    run = small(*market, steps=1)
    step = next(run)
    lengths, total = step.rollout.lengths, step.rollout.tokens
    weights = {
        rule: phases.token_weights(small(*opd.load("market"), normalize=rule), step.rollout)
        for rule in ("token", "sequence", "constant")
    }
    assert weights["token"].unique().tolist() == pytest.approx([1 / total])
    rows = weights["sequence"].split(lengths.tolist())
    assert [float(row.sum()) for row in rows] == pytest.approx([1 / len(lengths)] * len(lengths))
    assert weights["constant"].unique().tolist() == pytest.approx(
        [1 / (len(lengths) * run.settings.max_new_tokens)]
    )


def test_gradient_checkpointing_changes_memory_and_not_the_update():
    runs = [small(*opd.load("market"), steps=1, checkpointing=on) for on in (False, True)]
    for run in runs:
        next(run)
        assert not run.student.weights.model.training
    for name, p in runs[0].parameters.items():
        torch.testing.assert_close(p.grad, runs[1].parameters[name].grad, rtol=1e-4, atol=1e-7)


def test_the_update_is_autograd_on_full_logits(market):
    student, teacher, task = market
    run = small(student, teacher, task, steps=1, clip=0)
    rollout = phases.write_rollout(run)
    next(run)
    ours = {name: p.grad.clone() for name, p in run.parameters.items()}
    for p in run.parameters.values():
        p.grad = None
    with torch.no_grad():
        for name, p in run.parameters.items():
            p.copy_(torch.zeros_like(p) if "lora_B" in name else p)  # back to where the step began
    with student.weights.using(student.adapter):
        hidden = student.hidden(rollout)
        logp = student.weights.head(hidden).log_softmax(-1)
        loss = (logp.exp() * (logp - teacher.log_probs(rollout))).sum(-1).mean()
        loss.backward()
    for name, p in run.parameters.items():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-3, atol=1e-6)


def test_the_bare_model_stays_what_it_was_and_live_views_follow(market):
    student, teacher, task = market
    before, live, still = student.frozen(), student.seeing("hint say total"), student.frozen()
    rollout = student.sample(task.prompts(2), seed=0, max_new_tokens=8)
    old = before.log_probs(rollout)
    old_live = live.log_probs(rollout)
    small(student, teacher, task, lr=0.05).train()
    assert torch.equal(before.log_probs(rollout), old)
    assert torch.equal(still.log_probs(rollout), old)
    assert not torch.allclose(student.log_probs(rollout), old, atol=1e-2)
    assert not torch.allclose(live.log_probs(rollout), old_live, atol=1e-2)


def test_full_training_moves_the_weights_and_keeps_the_reference(market):
    student, teacher, task = market

    @opd.method(needs=("teacher", "reference"))
    def loss(rows):
        return opd.losses.reverse_kl(rows.student, rows.teacher) + opd.losses.reverse_kl(
            rows.student, rows.reference
        )

    run = small(student, teacher, task, method=loss, lora=None, lr=1e-3)
    assert len(run.parameters) == len(list(student.weights.model.parameters()))
    rollout = student.sample(task.prompts(2), seed=0, max_new_tokens=8)
    old = run.policies["reference"].log_probs(rollout)
    run.train()
    assert torch.equal(run.policies["reference"].log_probs(rollout), old)
    assert not torch.equal(student.log_probs(rollout), old)


@pytest.mark.parametrize(
    "method",
    [
        OPD("forward_kl"),
        OPD("jensen_shannon"),
        OPD("generalized_jsd", {"beta": 0.9, "normalize": True}),
        OPD("skew_forward_kl"),
        OPD("skew_reverse_kl"),
        OPD("alpha_divergence", {"alpha": 0.3}),
        OPD("total_variation"),
        OPD(top_k=opd.TopK(8)),
        OPD("forward_kl", top_k=opd.TopK(8, by="teacher", tail="renormalize")),
        OPD(estimator="sampled"),
        OPD(estimator="sampled", baseline="value"),
        OPD(estimator="sampled", baseline="value", discount=0.9),
        OPD(on_policy=0.5),
        SequenceKD(),
        SFT(),
        GRPO(),
    ],
    ids=lambda m: (
        f"{type(m).__name__}-{getattr(m, 'divergence', '')}-{getattr(m, 'estimator', '')}"
    ),
)
def test_every_method_trains(market, method):
    diverse = (
        {"n": 4, "temperature": 2.0} if isinstance(method, GRPO) else {}
    )  # equal rewards in a group teach nothing
    run = small(*market, method=method, **diverse)
    start = adapter(run)
    run.train()
    assert torch.isfinite(torch.tensor(run.history["loss"].tolist())).all()
    assert any(not torch.equal(p, start[name]) for name, p in adapter(run).items())


def test_on_policy_share_is_who_writes(market):
    run = small(*market, method=OPD(on_policy=0.25), batch=8, steps=4)
    writers = [step.rollout.writer.count("student") for step in run]
    assert sum(writers) == pytest.approx(8, abs=2)
    assert (
        phases.write_rollout(small(*opd.load("market"), method=SequenceKD())).writer
        == ("teacher",) * 8
    )
    answers = phases.write_rollout(small(*opd.load("market"), method=SFT()))
    assert answers.texts[0] == answers.prompts[0].answer


def test_plan_columns_reach_the_loss_and_the_trace(market):
    def plan(batch):
        assert batch.signals["teacher_logp"].shape == batch.mask.shape
        return {
            "gate": (batch.signals["student_entropy"] > 0.1).float(),
            "weight": batch.rewards + 1,
        }

    @opd.method(needs=("teacher",), plan=plan)
    def gated(rows):
        return rows.gate * rows.weight * opd.losses.reverse_kl(rows.student, rows.teacher)

    step = next(small(*market, method=gated, micro_batch=3))
    trace = step.trace()
    assert set(trace.column("gate")) <= {0.0, 1.0}
    assert trace.meta["plan"] == ["gate", "weight"]
    assert (trace.column("loss")[trace.column("gate") == 0] == 0).all()
    assert trace.column("share").sum() == pytest.approx(1, abs=1e-5)


def test_seeds_of_steps_and_uses_are_all_different():
    seeds = {seed_of(s, t, u) for s in range(3) for t in range(50) for u in range(5)}
    assert len(seeds) == 3 * 50 * 5


def test_rates():
    s = Settings(steps=10, lr=1.0, warmup=3)
    assert [s.rate(i) for i in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert Settings(steps=10, lr=1.0, schedule="cosine").rate(5) == pytest.approx(0.5)


def test_snapshots_give_back_the_student_of_that_step(market):
    student, teacher, task = market
    run = small(student, teacher, task, steps=2, snapshot_every=1, lr=0.02)
    rollout = student.sample(task.prompts(2), seed=0, max_new_tokens=8)
    seen = {0: student.log_probs(rollout)} | {
        step.number: student.log_probs(rollout) for step in run
    }
    assert list(run.snapshots) == [0, 1, 2]
    for number, logp in seen.items():
        assert torch.equal(run.at(number).log_probs(rollout), logp)
    with pytest.raises(errors.OpdlabError, match="No snapshot of step 7; there are 0, 1, 2"):
        run.at(7)


@pytest.fixture
def heard():
    """SIGINT as a terminal sets it: a test run in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_waits_until_the_step_is_whole(market, heard):
    run = small(*market, steps=3)
    step = run.optimizer.step
    run.optimizer.step = lambda: (os.kill(os.getpid(), signal.SIGINT), step())[1]
    with pytest.raises(KeyboardInterrupt):
        next(run)
    assert run.done == len(run.metrics) == 1  # the update was finished and counted
    run.optimizer.step = step
    assert [s.number for s in run] == [2, 3]


def interrupt(run):
    raise KeyboardInterrupt


def test_an_interrupt_before_the_update_leaves_the_weights(market, monkeypatch):
    run = small(*market, steps=2)
    start = adapter(run)
    with monkeypatch.context() as patched:
        patched.setattr(phases, "reduce_gradients", interrupt)
        with pytest.raises(KeyboardInterrupt):
            next(run)
    assert all(torch.equal(p, start[name]) for name, p in adapter(run).items())
    assert [s.number for s in run] == [1, 2]


def test_other_threads_are_not_held_up():
    done = []
    thread = threading.Thread(
        target=lambda: [done.append(1) for _ in [0] if hold_interrupts().__enter__() is None]
    )
    thread.start()
    thread.join()
    assert done == [1]


class Notes(GeneralTracker):
    name, requires_logging_directory = "notes", False

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[int, dict]] = []

    @property
    def tracker(self):
        return self.seen

    def store_init_configuration(self, values):
        self.settings = values

    def log(self, values, step=None, **_):
        self.seen.append((step, values))


def test_trackers_of_accelerate_get_every_step(market):
    notes = Notes()
    opd.distill(*market, steps=2, batch=4, quiet=True, log_with=notes).train()
    assert [step for step, _ in notes.seen] == [1, 2]
    assert notes.seen[0][1]["loss"] > 0
    assert notes.settings["batch"] == 4


def test_autocast_stays_close_to_float32():
    exact, rough = (small(*opd.load("market"), steps=1, precision=p) for p in ("no", "bf16"))
    losses = [next(run).metrics["reverse_kl"] for run in (exact, rough)]
    assert losses[1] == pytest.approx(losses[0], rel=0.2)


# What bad input gets.


def test_unknown_setting_and_bad_sizes(market):
    with pytest.raises(errors.OpdlabError, match=r"no setting batchsize\. There are steps, batch"):
        opd.distill(*market, batchsize=3)
    with pytest.raises(errors.OpdlabError, match="steps=0"):
        opd.distill(*market, steps=0)
    with pytest.raises(errors.OpdlabError, match="normalize='mean'"):
        opd.distill(*market, normalize="mean")
    with pytest.raises(errors.OpdlabError, match="needs a task"):
        opd.distill(market[0], market[1])


def test_what_a_method_needs_is_checked_first(market):
    student, _, task = market
    with pytest.raises(errors.MissingPolicy, match="OPD needs 'teacher'"):
        opd.distill(student, None, task)
    with pytest.raises(errors.MissingPolicy, match="lets a teacher write"):
        opd.distill(
            student, None, task, method=SequenceKD(), policies={"teacher": student.frozen()}
        )


def test_a_hint_that_is_missing_is_named(market):
    student, teacher, _ = market
    bare = opd.tasks.from_records(
        [{"prompt": f"ana has 4 {i} apples", "id": f"p{i}"} for i in range(4)], test=1
    )

    @opd.method(needs=("teacher+hint",))
    def loss(rows):
        return opd.losses.reverse_kl(rows.student, rows["teacher+hint"])

    with pytest.raises(errors.MissingHint, match=r"Prompt 'p\d' has no hint"):
        opd.distill(student, teacher, bare, method=loss, max_new_tokens=8)


def test_other_tokenizer_is_refused_with_the_first_difference(market):
    student, _, task = market
    scribe = opd.load("market", teacher="scribe")[1]
    with pytest.raises(errors.TokenizerMismatch, match="id 6 is"):
        opd.distill(student, scribe, task)


def test_a_prompt_that_does_not_fit_is_refused(market):
    with pytest.raises(errors.ContextTooLong, match="context is 256"):
        opd.distill(*market, max_new_tokens=250)


@dataclass(frozen=True)
class Broken:
    """A loss that turns to NaN on one token id."""

    bad: int
    needs: tuple = ("teacher",)

    def loss(self, rows):
        value = opd.losses.reverse_kl(rows.student, rows.teacher)
        return value.masked_fill(rows.token == self.bad, float("nan"))


def test_nan_names_step_prompt_and_token_and_leaves_the_weights(market, tmp_path):
    student, teacher, task = market
    eos = student.tokenizer.eos_token_id
    run = small(student, teacher, task, method=Broken(bad=-1), save=tmp_path, save_every=1)
    next(run)
    run.method, start = Broken(bad=eos), adapter(run)
    with pytest.raises(
        errors.NonFinite, match=r"Step 2, prompt .train-.*, token \d+ \('<eos>'\): .*nan"
    ):
        next(run)
    assert all(torch.equal(p, start[name]) for name, p in adapter(run).items())
    assert run.done == 1
    assert (tmp_path / "step-000001" / "manifest.json").exists()


def test_a_truncated_completion_is_trained_on_and_counted(market):
    step = next(small(*market, max_new_tokens=5))
    assert step.metrics["cut"] == 1.0
    assert step.rollout.finish == ("length",) * 8


def test_an_empty_completion_is_counted_and_harmless(market):
    student, teacher, task = market
    run = small(student, teacher, task, method=SFT(), steps=1)
    run.student.weights.eos = frozenset()  # a policy whose texts have no end
    inner = run.task.draw
    object.__setattr__(
        run.task,
        "draw",
        lambda n, seed, split: [
            opd.Prompt(messages=p.messages, answer="" if i else p.answer, id=p.id)
            for i, p in enumerate(inner(n, seed, split))
        ],
    )
    step = next(run)
    assert step.metrics["empty"] == pytest.approx(7 / 8)
    assert step.metrics["loss"] > 0
