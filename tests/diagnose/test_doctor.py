"""The pre-flight check on pairs whose fate is known: the shipped models, and pairs with one thing
wrong.
"""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

import opdlab as opd
from opdlab import Policy, Prompt, Task, tasks
from opdlab.diagnose import Diagnosis, doctor, examination
from opdlab.diagnose.checks import Check
from opdlab.diagnose.terminal import draw_templates, render_text
from opdlab.diagnose.text_checks import auroc, check_memory, show_interval
from opdlab.errors import OpdlabError
from opdlab.models.same_tokens import RenderedChat
from opdlab.tasks.by_name import load_pair, load_task
from opdlab.tasks.market import data, model
from opdlab.teachers import TextOnly

MARKET = tasks.market()
QUICK = {"prompts": 16, "k": 8, "batch": 16, "budget": 600, "quiet": True}


def check(found: Diagnosis, name: str) -> Check:
    return next(c for c in found.checks if c.name == name)


@pytest.fixture(scope="module")
def shipped() -> dict[str, Diagnosis]:
    pairs = {
        "go": ("student", "teacher"),
        "prepare": ("novice", "teacher"),
        "stop": ("student", "scribe"),
    }
    return {want: doctor(model(a), model(b), MARKET, **QUICK) for want, (a, b) in pairs.items()}


@pytest.mark.parametrize("want", ["go", "prepare", "stop"])
def test_the_verdict_on_the_shipped_pairs(want, shipped):
    """The student's skill is dormant and 60 steps bring it back; the novice learns nothing in 60;
    the scribe has other tokens.
    """
    assert shipped[want].verdict == want
    assert str(shipped[want]).startswith(want.upper())


def test_a_good_pair_is_described_by_what_was_measured(shipped):
    found = shipped["go"]
    student, teacher = model("student"), model("teacher")
    rollout = found.rollout
    assert [p.id for p in rollout.prompts[::8]] == [p.id for p in MARKET.prompts(16, split="test")]
    right = np.array(
        [MARKET.verify(p, t) for p, t in zip(rollout.prompts, rollout.texts, strict=True)]
    ).reshape(-1, 8)
    solved = right.max(1).mean()
    assert check(found, "student").finding == (
        f"right {right.mean():.2f} of the time {show_interval(right.mean(), 16)}, pass@8"
        f" {solved:.2f} {show_interval(solved, 16)}"
    )
    agreed = opd.diagnose.overlap(student, teacher, rollout=rollout).mean
    assert (
        f"accepted with probability {agreed['acceptance']:.2f}" in check(found, "overlap").finding
    )
    alone = opd.evaluate(teacher, MARKET, n=16).accuracy
    assert f"right {alone:.2f} of the time alone" in check(found, "teacher").finding
    own = (teacher.log_probs(rollout) - student.log_probs(rollout)).gather(
        -1, rollout.ids[rollout.mask][:, None]
    )[:, 0]
    reward = torch.stack([part.sum() for part in own.split(rollout.lengths.tolist())]).numpy()
    area = auroc(reward[right.flatten() > 0.5], reward[right.flatten() <= 0.5])
    assert (
        f"with probability {area:.2f} ({int(right.sum())} right" in check(found, "grades").finding
    )
    assert found.cost.memory["weights"] > 0
    assert [row["length"] for _, row in found.probe.iterrows()] == [0, 11]


def test_a_student_that_never_had_the_skill_is_sent_to_sft(shipped):
    assert [c.name for c in shipped["prepare"].checks if c.state == "warn"] == ["student"]
    assert shipped["prepare"].sentence.startswith("prepare: student: right 0.0")
    assert "short SFT on the teacher's texts first" in shipped["prepare"].sentence
    assert repr(shipped["prepare"]) == "Diagnosis(prepare: student warn)"


def test_other_tokens_are_reported_and_the_rest_is_still_measured(shipped):
    found = shipped["stop"]
    assert "id 6 is '▁ana' in the student and 'a' in the teacher" in check(found, "tokens").finding
    assert "OmniOPD, SequenceKD" in found.sentence
    assert check(found, "overlap").state == "none"
    assert found.overlap is None
    assert found.cost is None
    assert (
        "right 1.00 of the time alone" in check(found, "teacher").finding
    )  # it can still write, if it gets the room
    with pytest.raises(opd.errors.TokenizerMismatch):
        opd.distill(model("student"), model("scribe"), MARKET)


def test_no_teacher_is_better_than_the_student(shipped):
    found = doctor(model("teacher"), model("student"), MARKET, **QUICK)
    assert check(found, "teacher").state == "warn"
    assert found.verdict == "prepare"
    assert "take a better teacher, or tell it a hint" in found.sentence


def test_a_student_told_more_needs_no_skill_of_its_own():
    """Self-distillation of hints: pass@k is 0 without them, and that is what is to be learnt."""
    student = model("novice")
    task = Task("say sum", MARKET.draw, lambda prompt, text: float("carry" in text), 8)
    plain = doctor(student, student.frozen().seeing("hint say sum"), task, prompts=4, k=2, batch=4)
    assert (
        "pass@2 0.00 [0.00, 0.49] (its own teacher, told more)" in check(plain, "student").finding
    )
    assert check(plain, "student").state == "ok"


def test_a_teacher_that_stops_elsewhere_or_reads_another_form_is_seen():
    teacher = model("teacher")
    weight, (eos,) = teacher.weights.head.weight, teacher.weights.eos
    with torch.no_grad():
        weight[[eos, 0]] = weight[[0, eos]].clone()
    found = doctor(model("student"), teacher, MARKET, **QUICK)
    assert check(found, "stopping").state == "warn"
    assert "accept it with probability 0.00" in check(found, "stopping").finding

    class Elsewhere(Policy):
        def encode_unchecked(self, prompts):
            return [row[:-1] for row in super().encode_unchecked(prompts)]

    found = doctor(model("student"), Elsewhere(model("teacher").weights), MARKET, **QUICK)
    assert check(found, "first token").state == "warn"
    assert found.verdict == "prepare"


@pytest.fixture(scope="module")
def strangers(make_policy, make_tokenizer) -> tuple[Policy, Policy]:
    """Random models: nothing of the one's is likely to the other."""
    return tuple(make_policy(seed, make_tokenizer(), initializer_range=0.8) for seed in (0, 1))


def test_strangers_are_sent_to_sft_and_plain_questions_need_no_task(strangers):
    found = doctor(*strangers, k=2, max_new_tokens=6, batch=4)
    assert check(found, "overlap").state == "warn"
    assert "SequenceKD" in check(found, "overlap").remedy
    assert check(found, "student").state == "none"
    assert "has no verifier" in check(found, "student").finding
    assert found.verdict == "prepare"


def test_what_cannot_fit_is_said_before_anything_runs(strangers):
    task = Task("long", lambda n, seed, split: [Prompt("a b c d " * 64, id="0")] * n)
    found = doctor(*strangers, task, prompts=1)
    assert found.verdict == "stop"
    assert "up to 256 tokens and 64 to come, in a context of 256" in found.sentence
    assert [c.name for c in found.checks][-1] == "room"


@pytest.mark.parametrize("has_same_ids", [True, False])
def test_answers_of_the_task_that_do_not_fit_the_teacher_are_shortened_and_said(
    strangers, make_policy, make_tokenizer, has_same_ids
):
    student, teacher = strangers
    if not has_same_ids:
        teacher = make_policy(1, make_tokenizer("abcd"))
    prompts = [Prompt("a b " * 20, id=str(i)) for i in range(2)]
    task = Task("long", lambda n, seed, split: prompts[:n], lambda prompt, text: 0.0, 300)
    found = doctor(student, teacher, task, prompts=2, k=2, max_new_tokens=4, quiet=True)
    left = 256 - len(teacher.encode(prompts[0]))
    said = check(found, "asked")
    assert said.state == "note"
    assert f"left it {left} tokens for an answer" in said.finding
    assert "Lower the task's max_new_tokens" in said.remedy
    assert len(found.probe) == 1


def test_too_little_memory_is_a_warning(shipped):
    predicted = shipped["go"].cost
    assert check_memory(predicted).state == "ok"
    tight = check_memory(replace(predicted, available=predicted.peak - 1))
    assert tight.state == "warn"
    assert "lower micro_batch" in tight.remedy


def test_a_teacher_that_only_writes_is_not_asked_to_grade(strangers):
    student, teacher = strangers
    found = doctor(student, TextOnly(teacher), prompts=[Prompt("a b")], max_new_tokens=4)
    assert found.verdict == "go"
    assert "only writes, so its tokens do not matter" in check(found, "tokens").finding
    found = doctor(student, TextOnly(teacher), prompts=[Prompt("a " * 255)], max_new_tokens=64)
    assert found.verdict == "stop"
    assert "context" in check(found, "teacher").finding


def test_auroc_counts_pairs():
    good, bad = np.array([3.0, 1.0, 2.0]), np.array([0.0, 2.0, 1.5, 1.0])
    assert auroc(good, bad) == pytest.approx(
        sum((a > b) + 0.5 * (a == b) for a in good for b in bad) / 12
    )


def test_nothing_of_a_models_becomes_markup_or_controls(make_policy, make_tokenizer):
    evil = make_tokenizer(
        "a b c d e [red]x[/red]\x1b[31m<script>", template="{{ '\x1b[2J[bold]<script>' }}"
    )
    found = doctor(
        make_policy(0, make_tokenizer()),
        make_policy(1, evil),
        prompts=[Prompt("a b")],
        k=1,
        max_new_tokens=3,
    )
    assert "\x1b" not in str(found)
    assert "[red]x[/red]" in str(found)
    assert "[bold]<script>" in str(found)
    assert "<script>" not in found._repr_html_()


def test_two_templates_side_by_side():
    table = draw_templates(RenderedChat("same <a>", "same (b)", 5), 5)
    cells = [next(iter(column.cells)) for column in table.columns]
    assert [cell.plain for cell in cells] == ["same <a>", "same (b)"]
    assert [str(span.style) for span in cells[0].spans] == ["bold reverse", "dim"]
    lines = render_text(Diagnosis((), RenderedChat("ab\n", "ab", 2), names=("s", "t"))).splitlines()
    assert any("ab\u23ce" in line and "ab(ends)" in line for line in lines)
    assert lines[0].startswith("GO s <- t")


def test_names_of_models_and_tasks(tmp_path):
    student, teacher, task = load_pair("student", "teacher")
    assert (student.weights.source, task.name) == (str(data() / "student"), "market")
    twice, frozen, _ = load_pair("novice", "novice")
    assert twice.weights is frozen.weights
    folder, _, task = load_pair(os.path.relpath(data() / "student"), "teacher", "market-secret")
    assert folder.weights.vocab_size == teacher.weights.vocab_size
    assert task.settings["secret"]
    (tmp_path / "t.jsonl").write_text(
        "".join(f'{{"text": "{i}", "answer": "b"}}\n' for i in range(20))
    )
    assert load_task(str(tmp_path / "t.jsonl")).verify is not None
    assert load_task("gym:chain_sum").name == "chain_sum"
    assert load_task("rule").name == "rule"
    with pytest.raises(
        OpdlabError,
        match=r"There is no task 'x'\. Use market, market-secret, market-tools, rule, gym:NAME",
    ):
        load_pair("student", "teacher", "x")
    with pytest.raises(
        OpdlabError,
        match=r"no shipped model .* and could not be loaded as a folder or from the Hub",
    ):
        load_pair(str(tmp_path), "teacher")


def test_unknown_settings_are_refused(strangers):
    with pytest.raises(
        OpdlabError, match=r"doctor has no setting bach. It takes those of distill: steps, batch"
    ):
        doctor(*strangers, bach=3)


def test_a_teacher_that_begins_out_of_reach_is_named_with_its_cure(marked):
    teacher, task = marked
    found = doctor(model("student"), teacher, task, **QUICK | {"k": 2})
    assert check(found, "in reach").state == "warn"
    assert "16 of 16, as ' lot'" in check(found, "in reach").finding
    said = check(found, "in reach").remedy
    assert said.startswith(
        "The student gives the teacher's first tokens less than 1e-4: use forward"
    )
    assert 'OPD("jeffreys") would pull as well' in said
    assert "Under reverse KL and Jensen-Shannon divergence such a run stalls" in said
    assert found.method == 'method=opd.OPD("forward_kl")'
    assert found.method in str(found)
    assert "method=opd.OPD(&quot;forward_kl&quot;)" in found._repr_html_()
    table = found.first_tokens.table
    at_first = table[table["position"] == 0]
    student = model("student")
    begun = teacher.sample(task.prompts(16, split="test"), max_new_tokens=1, temperature=0)
    want = student.log_probs(begun).exp().gather(-1, begun.ids)[:, 0]
    np.testing.assert_allclose(at_first["student"], want, rtol=1e-3)


@pytest.mark.parametrize("want", ["go", "prepare"])
def test_the_advised_method_can_be_pasted(want, shipped):
    assert check(shipped[want], "in reach").state == "ok"
    _, _, line = shipped[want].method.partition("=")
    method = eval(line, {"opd": opd})  # noqa: S307 (the test is that it is Python)
    assert method == {"go": opd.OPD(), "prepare": opd.OPD("forward_kl", on_policy=0.5)}[want]
    assert shipped["stop"].method == ""


def test_a_small_budget_asks_less_and_says_so():
    options = QUICK | {"budget": 1e-3}
    found = doctor(model("student"), model("teacher"), MARKET, **options)
    asked = check(found, "asked")
    assert asked.state == "note"
    assert asked.finding.startswith("2 of 16 prompts in ")
    assert "texts were cut after 8 of 24 tokens, so they were not scored" in asked.finding
    assert "shares are known to ±0.41 at worst" in asked.finding
    assert found.rollout.ids.shape[1] == 8
    assert check(found, "student").state == "none"
    assert found.overlap is not None
    assert found.cost is not None


def test_an_interrupt_keeps_what_was_found(monkeypatch):
    """The stop button while the teacher answers in the second round."""
    answers = []
    answer = examination._answer

    def interrupted(*arguments):
        answers.append(arguments)
        if len(answers) == 2:
            raise KeyboardInterrupt
        return answer(*arguments)

    monkeypatch.setattr(examination, "_answer", interrupted)
    found = doctor(model("student"), model("teacher"), MARKET, **QUICK)
    assert "; then it was interrupted" in check(found, "asked").finding
    assert check(found, "teacher").finding.startswith("right 1.00 of the time alone [0.34, 1.00]")
    assert len(found.rollout) > 2 * 8  # the second round's texts were written before
    assert found.probe["texts"].tolist()[0] == 2


def test_an_interrupt_before_anything_was_written_leaves_the_checks(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(examination, "_measure_pace", interrupted)
    found = doctor(model("student"), model("teacher"), MARKET, **QUICK)
    assert check(found, "tokens").state == "ok"
    assert check(found, "student's texts").state == "none"
    assert check(found, "asked").finding.startswith("0 of 16 prompts")


def test_it_shows_what_it_does_on_stderr(capsys):
    doctor(model("student"), model("teacher"), MARKET, **QUICK | {"quiet": False, "prompts": 2})
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "doctor" in shown.err
    assert "tokens and templates are compared" in shown.err
    assert "left at most" in shown.err
