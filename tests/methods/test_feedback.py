"""Feedback on own attempts: SDPO, RLSD and SDAR against their formulas, on exact tables."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

import opdlab as opd
from opdlab import exact
from opdlab.engine.batch import Batch
from opdlab.errors import BadVerifier, InvalidValue, MissingPolicy, OpdlabError
from opdlab.losses.divergences import forward_kl, jensen_shannon
from opdlab.tasks.market import feedback, model

N = 4  # attempts at each of two prompts
STUDENT = exact.Table.random(4, 2, 2, seed=0)
TOLD = exact.Table.random(4, 2, 2, seed=1)
RIGHT = [True, False, True, False, False, False, False, False]  # none at the second prompt


class Hinted:
    """The hinted student: a table of its own for each prompt that is told something."""

    def __init__(self) -> None:
        self.hints: list[str | None] = []

    def grade(self, rollout):
        self.hints += [prompt.hint for prompt in rollout.prompts]
        own = {prompt.answer: prompt for prompt in STUDENT.prompts}
        prompts = tuple(own[prompt.answer] for prompt in rollout.prompts)
        return TOLD.grade(replace(rollout, prompts=prompts))


for place, asked in enumerate(STUDENT.prompts):
    object.__setattr__(asked, "answer", str(place))
TOLD = exact.Table(TOLD.logits, STUDENT.prompts, TOLD.length)


def attempts() -> tuple[opd.Rollout, torch.Tensor]:
    rollout = exact.everything(STUDENT.prompts, 4, 2, by=STUDENT)
    chosen = rollout.select([*range(N), *range(16, 16 + N)])
    texts = tuple(f"try {i}" for i in range(2 * N))
    return replace(chosen, texts=texts, n=N), torch.linspace(0.5, 1.5, 2 * N, dtype=torch.float64)


def world(said: bool = True) -> opd.Task:
    """A task that judges the attempts by their numbers, with or without feedback."""
    from opdlab.tasks.task import Task

    return Task(
        "tries",
        lambda n, seed, split: list(STUDENT.prompts)[:n],
        verify=lambda prompt, text: float(RIGHT[int(text.split()[1])]),
        feedback=(lambda prompt, text: f"no: {text}" if text != "try 7" else None)
        if said
        else None,
    )


def plan(method, task, step: int = 0):
    rollout, _ = attempts()
    hinted = Hinted()
    name = method.needs[0]
    batch = Batch(rollout, {"student": STUDENT, name: hinted}, task, step)
    return batch, method.plan(batch), hinted


def test_sdpo_tells_each_attempt_its_own_feedback_and_another_right_one():
    method = opd.SDPO(solution_form="right: {}", feedback_form="wrong: {}")
    batch, columns, hinted = plan(method, world())
    batch.states(method.needs[0])
    assert hinted.hints[:N] == [
        "right: try 2\nwrong: no: try 0",
        "right: try 0\nwrong: no: try 1",
        "right: try 0\nwrong: no: try 2",
        "right: try 0\nwrong: no: try 3",
    ]
    assert hinted.hints[N:7] == [f"wrong: no: try {i}" for i in (4, 5, 6)]
    assert columns["told"].values.tolist() == [1.0] * 7 + [0.0]
    failed = opd.SDPO(attempts="failed", solutions=False, feedback_form="{}")
    _, columns, _ = plan(failed, world())
    assert columns["told"].values.tolist() == [0, 1, 0, 1, 1, 1, 1, 0]


@pytest.mark.parametrize(
    ("method", "divergence"),
    [(opd.SDPO(), jensen_shannon), (opd.SDPO("forward_kl", solutions=False), forward_kl)],
)
def test_sdpo_is_the_mean_divergence_of_told_attempts(method, divergence):
    rollout, weight = attempts()
    policies = {"student": STUDENT, method.needs[0]: Hinted()}
    got = exact.gradient_on(method, policies, rollout, weight, task=world())
    told = torch.tensor([1.0] * 7 + [0.0], dtype=torch.float64)

    def value(table: exact.Table) -> torch.Tensor:
        x, state = table.where(rollout)
        each = divergence(table.logp[x, state], TOLD.logp[x, state]).view(2 * N, 2).sum(1)
        return (weight * told * each).sum() * (8 / 7)  # the mean is over told tokens

    want = exact.differences(value, STUDENT)
    assert want.norm() > 1e-2
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)


def test_without_feedback_a_right_attempt_is_all_that_is_told():
    _, columns, _ = plan(opd.SDPO(), world(said=False))
    assert columns["told"].values.tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    with pytest.raises(MissingPolicy, match="nothing to tell"):
        plan(opd.SDPO(solutions=False), world(said=False))


def test_a_step_without_any_feedback_is_warned_of():
    empty = replace(world(), feedback=lambda prompt, text: " ", verify=lambda prompt, text: 0.0)
    with pytest.warns(UserWarning, match="nothing to tell about any attempt of a step"):
        _, columns, _ = plan(opd.SDPO(), empty)
    assert (columns["scale"].values == 0).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan(opd.SDPO(), world())


def test_rlsd_is_grpo_with_the_weight_of_its_formula():
    rollout, _ = attempts()
    for step, mix in ((0, 0.5), (25, 0.25), (50, 0.0), (99, 0.0)):
        _, columns, _ = plan(opd.RLSD(), world(), step)
        advantage = opd.GRPO().plan(Batch(rollout, {}, world()))["advantage"].values[:, None]
        x, state = STUDENT.where(rollout)
        ids = rollout.ids.flatten()
        gap = (TOLD.logp[x, state, ids] - STUDENT.logp[x, state, ids]).view(2 * N, 2)
        weight = torch.exp(torch.sign(advantage) * gap).clip(0.8, 1.2)
        want = advantage * ((1 - mix) + mix * weight)
        torch.testing.assert_close(columns["advantage"].values.double(), want.double())
    assert bool((columns["advantage"].values.sign() == advantage.sign()).all())


def test_without_decay_the_weights_stay():
    early, late = (
        plan(opd.RLSD(mix=1.0, decay=0), world(), step)[1]["advantage"].values for step in (0, 500)
    )
    assert torch.equal(early, late)
    assert (early[:N].abs().std(1) > 1e-3).sum() == 3  # of one attempt both weights are clipped


def test_sdar_adds_the_gated_term_to_grpo():
    rollout, weight = attempts()
    policies = {"student": STUDENT, "student+hint": Hinted()}
    on = lambda method: exact.gradient_on(method, policies, rollout, weight, task=world())
    x, state = STUDENT.where(rollout)
    ids = rollout.ids.flatten()
    gap = TOLD.logp[x, state, ids] - STUDENT.logp[x, state, ids].detach()
    gate = torch.sigmoid(3.0 * gap)

    def value(table: exact.Table) -> torch.Tensor:
        each = gate * (TOLD.logp[x, state, ids] - table.logp[x, state, ids])
        return 0.4 * (weight.repeat_interleave(2) * each).sum()

    extra = exact.differences(value, STUDENT)
    got = on(opd.SDAR(weight=0.4, sharpness=3.0))
    torch.testing.assert_close(got, on(opd.GRPO()) + extra, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(on(opd.SDAR(weight=0.0)), on(opd.GRPO()))
    assert extra.norm() > 1e-2


def test_an_attempt_without_feedback_is_graded_without_a_hint():
    """On a real model: told rows as `seeing` grades them, the others as the plain student."""
    student, _, task = opd.load("market")
    rollout = student.sample(task.prompts(3), max_new_tokens=8, seed=0)
    batch = Batch(rollout, {"student": student, "student+hint": student.seeing()}, task)
    hints = ["hint total 4 4", None, "hint total 5 1"]
    batch.tell(hints)
    logp = batch.states("student+hint").logp()
    row = torch.arange(3).repeat_interleave(rollout.lengths)
    for i, hint in enumerate(hints):
        view = student.seeing(hint) if hint else student
        want = view.log_probs(rollout.select([i]))
        torch.testing.assert_close(logp[row == i], want, rtol=1e-4, atol=1e-4)
    with pytest.raises(OpdlabError, match="has graded already"):
        batch.tell(hints)
    with pytest.raises(OpdlabError, match="2 hints for 3 completions"):
        Batch(rollout, {}, task).tell(["a", None])


def test_the_market_says_what_a_wrong_text_should_have_calculated():
    (prompt,) = opd.tasks.market().prompts(1)
    assert feedback(prompt, prompt.answer) is None
    said = feedback(prompt, "total 0 0")
    assert said == prompt.answer.split(" . ")[0]
    odd = replace(opd.tasks.market(), feedback=lambda prompt, text: 3)
    with pytest.raises(BadVerifier, match="returned a int"):
        Batch(attempts()[0], {}, odd).feedback(prompt, "")
    with pytest.raises(InvalidValue, match="feedback"):
        replace(opd.tasks.market(), feedback=lambda prompt: None)


def test_runs_need_no_hints_in_the_prompts(tmp_path):
    student = model("student")
    prompts = [replace(p, hint=None) for p in opd.tasks.market().prompts(8)]
    task = opd.tasks.from_records(
        prompts, test=0, verify=opd.tasks.market().verify, max_new_tokens=24
    )
    task = replace(task, feedback=feedback)
    method = opd.SDPO(solution_form="hint {}", feedback_form="hint {}")
    options = {"batch": 4, "n": 2, "steps": 2, "seed": 1, "quiet": True, "save": tmp_path}
    run = opd.distill(student, None, task, method=method, **options).train()
    assert (run.history["loss"] > 0).all()
    other = replace(task, feedback=lambda prompt, text: "x")
    with pytest.raises(OpdlabError, match="other feedback"):
        opd.resume(tmp_path, model("student"), None, other, method=method, quiet=True)


def test_what_cannot_be_right_is_refused():
    for options in (
        {"attempts": "some"},
        {"solution_form": "no hole"},
        {"feedback_form": "{} {}"},
        {"threshold": 0},
        {"anchor": "other"},
        {"divergence": "nothing"},
    ):
        with pytest.raises(InvalidValue):
            opd.SDPO(**options)
    for kind, options in (
        (opd.RLSD, {"mix": 1.5}),
        (opd.RLSD, {"decay": -1}),
        (opd.SDAR, {"sharpness": 0}),
        (opd.SDAR, {"weight": -1}),
    ):
        with pytest.raises(InvalidValue):
            kind(**options)
