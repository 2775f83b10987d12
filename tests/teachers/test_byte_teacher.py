"""A teacher of another tokenizer in the student's tokens: against enumeration, both ways round."""

from __future__ import annotations

from functools import cache

import pytest
import torch

import opdlab as opd
from opdlab.data.byte_maps import ByteMap
from opdlab.errors import InvalidValue, OpdlabError, TokenizerMismatch
from opdlab.losses import DIVERGENCES
from opdlab.models.translated import Translated
from opdlab.tasks.market import market, model
from opdlab.teachers import ByteTeacher

TASK = market()


def rollout_of(policy: opd.Policy, texts: list[str]) -> opd.Rollout:
    return opd.rollout_from_texts(policy, TASK.prompts(len(texts), seed=2), texts)


def graded(student: opd.Policy, teacher: opd.Policy, rollout: opd.Rollout, **options) -> Translated:
    one = ByteTeacher(teacher, floor=0.0, **options)
    one.check(student, list(rollout.prompts), 64)
    found = one.grade(rollout)
    assert isinstance(found, Translated)
    return found


def words(policy: opd.Policy, at_start: bool) -> dict[int, str]:
    """The text that each token adds, by transformers' own decoder."""
    special = set(policy.tokenizer.all_special_ids)
    out = {}
    for i in range(policy.weights.vocab_size):
        if i not in special:
            text = policy.tokenizer.decode([i])
            alone = policy.tokenizer.decode([i, i])[len(text) :]
            out[i] = text if at_start else alone
    return out


def greedy(text: str, tokens: dict[int, str]) -> int | None:
    fitting = [i for i, token in tokens.items() if token and text.startswith(token)]
    return max(fitting, key=lambda i: len(tokens[i]), default=None)


def test_the_map_follows_the_longest_match():
    maps = ByteMap([b"a", b"ab", b"abcd", b"", b"x"], [b"a", b"ab", b"abc", b"q", b""], 3, [4])
    table = maps.to_ours(b"", b"")
    assert table.target.tolist() == [0, 1, 1, maps.residual, 3]
    assert table.is_open.tolist() == [True, True, True, False, False]
    within = maps.to_ours(b"a", b"")  # the student has read the a
    assert within.target.tolist() == [
        maps.impossible,  # it ends where the student stands
        maps.residual,  # goes on with b
        maps.residual,  # goes on with bc
        maps.impossible,
        maps.impossible,
    ]
    after = maps.to_ours(b"", b"ab")
    assert after.target.tolist() == [1, 1, 1, 1, 1]
    assert not after.is_open.any()
    maps = ByteMap([b"ab", b"abcd"], [b"c", b"cd", b"d", b"cx", b""], None, [4])
    after = maps.to_ours(b"", b"ab")
    assert after.target.tolist() == [0, 1, 0, 0, 0]
    assert after.is_open.tolist() == [True, False, False, False, False]


def test_characters_taught_by_words_are_exact_in_one_pass():
    """The student writes characters: every token of the teacher settles the next one."""
    student, teacher = model("scribe"), model("teacher")
    texts = ["4 7 + 3 8 = 8 5 ; 8", "total 6 6"]
    rollout = rollout_of(student, texts)
    mass, residual, unresolved = graded(student, teacher, rollout).masses()
    assert unresolved.max() < 1e-6
    torch.testing.assert_close(mass.sum(-1) + residual, torch.ones(len(mass)))
    characters = {token: i for i, token in words(student, False).items()}
    row = 0
    for prompt, text in zip(rollout.prompts, texts, strict=True):
        ids = teacher.tokenizer(text, add_special_tokens=False)["input_ids"]
        whole = opd.rollout_from_texts(teacher, [prompt], [text])
        law = teacher.log_probs(whole).exp()
        pieces = [teacher.tokenizer.decode(ids[: j + 1]) for j in range(len(ids))]
        for place in range(len(text) + 1):
            done = sum(len(piece) <= place for piece in pieces)
            known = text[len(pieces[done - 1]) if done else 0 : place]
            want = torch.zeros(student.weights.vocab_size)
            for i, token in words(teacher, done == 0).items():
                rest = token[len(known) :]
                if token.startswith(known) and rest and rest[0] in characters:
                    want[characters[rest[0]]] += law[done, i]
            if not known:
                want[student.tokenizer.eos_token_id] += law[done, sorted(teacher.weights.eos)].sum()
            want = want / want.sum() if known else want
            torch.testing.assert_close(mass[row], want, rtol=1e-3, atol=1e-6)
            row += 1
    assert row == len(mass)


def test_words_taught_by_characters_match_enumeration():
    """Each of the student's words is spelled to the scribe, character by character."""
    student, teacher = model("student"), model("scribe")
    text = "4 7 + 3 8 = 8 5 ; 8"
    rollout = rollout_of(student, [text])
    found = graded(student, teacher, rollout, lookahead=1e-6)
    mass, _, unresolved = found.masses()
    assert unresolved.max() < 1e-3
    characters = {token: i for i, token in words(teacher, False).items() if len(token) == 1}

    @cache
    def law(before: str) -> torch.Tensor:
        written = opd.rollout_from_texts(teacher, list(rollout.prompts), [before])
        return teacher.log_probs(written)[len(before)].exp()

    @cache
    def probability(before: str, more: str) -> float:
        if not more:
            return 1.0
        if more[0] not in characters:
            return 0.0
        first = float(law(before)[characters[more[0]]])
        return first * probability(before + more[0], more[1:]) if first > 1e-7 else 0.0

    pieces = [student.tokenizer.decode(rollout.ids[0, :j]) for j in range(8)]
    for row in (0, 1, 3, 6):
        before, tokens = pieces[row], words(student, row == 0)
        for i, token in tokens.items():
            if not token:
                continue
            longer = [other for other in tokens.values() if other.startswith(token) != 0]
            longer = {other for other in longer if other != token}
            first = {
                other
                for other in longer
                if not any(other.startswith(x) and other != x for x in longer)
            }
            want = probability(before, token) - sum(probability(before, x) for x in first)
            assert float(mass[row, i]) == pytest.approx(want, abs=2e-3), (before, token)
        assert float(mass[row].max()) > 0.5


def test_without_looking_ahead_the_target_is_a_bound():
    student, teacher = model("student"), model("scribe")
    rollout = rollout_of(student, ["4 7 + 3 8 = 8 5"])
    bound, _, open_mass = graded(student, teacher, rollout).masses()
    exact, _, left = graded(student, teacher, rollout, lookahead=1e-6).masses()
    assert left.max() < 1e-3
    apart = (bound - exact).abs().sum(-1)
    assert bool((apart <= 2 * open_mass + 1e-3).all())


def test_with_the_same_tokens_it_is_the_teacher():
    student, teacher = model("student"), model("teacher")
    rollout = student.sample(TASK.prompts(3), max_new_tokens=24, seed=0)
    found = graded(student, teacher, rollout)
    torch.testing.assert_close(
        found.logp().exp(), teacher.grade(rollout).logp().exp(), rtol=1e-3, atol=1e-4
    )
    index = torch.tensor([4, 0, 9])
    torch.testing.assert_close(found.part(index).logp(), found.logp()[index])


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_every_divergence_trains(name):
    student = model("student")
    teacher = ByteTeacher(model("scribe"))
    run = opd.distill(
        student, teacher, TASK, method=opd.OPD(name), steps=2, batch=2, quiet=True, lr=1e-3
    ).train()
    assert run.history["loss"].between(0.01, 50).all()
    said = teacher.report()
    assert 0 < said["exact"] < 1
    assert said["left_out"] == 0
    rollout = rollout_of(student, ["4 7 + 3"])
    teacher.check(student, list(rollout.prompts), 24)
    logp = teacher.grade(rollout).logp()
    assert torch.isfinite(logp).all()
    torch.testing.assert_close(logp.logsumexp(-1), torch.zeros(len(logp)), rtol=0, atol=1e-5)
    ours = student.log_probs(rollout)
    assert bool((DIVERGENCES[name](ours, logp) >= -1e-5).all())


def test_completions_that_cannot_be_read_teach_nothing():
    student, teacher = model("student"), ByteTeacher(model("scribe"), floor=0.0)
    rollout = rollout_of(student, ["4 7 + 3", "4 7"])
    special = next(i for i in student.tokenizer.all_special_ids if i not in student.weights.eos)
    rollout.ids[1, 0] = special
    teacher.check(student, list(rollout.prompts), 24)
    logp = teacher.grade(rollout).logp()
    own = student.grade(rollout).logp()
    second = torch.arange(2).repeat_interleave(rollout.lengths) == 1
    torch.testing.assert_close(logp[second], own[second], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logp[~second], own[~second], atol=0.1)
    assert teacher.report()["left_out"] == 1


def test_a_teacher_that_can_spell_nothing_is_said_once():
    student, teacher = model("scribe"), ByteTeacher(model("teacher"))
    rollout = rollout_of(student, ["47+38=85"])
    teacher.check(student, list(rollout.prompts), 24)
    with pytest.warns(UserWarning, match="spells none of these 1 completions"):
        logp = teacher.grade(rollout).logp()
    assert torch.equal(logp, student.grade(rollout).logp())


def test_teachers_of_different_tokens_teach_one_student():
    student = model("student")
    members = {"scribe": ByteTeacher(model("scribe")), "words": model("teacher")}
    many = opd.MultiTeacher(members, route=lambda p: "words" if "buys" in str(p) else "scribe")
    run = opd.distill(student, many, TASK, steps=1, batch=6, quiet=True).train()
    assert run.history["loss"].notna().all()


def test_a_config_names_it():
    config = """
[student]
source = "student"
[teacher]
source = "scribe"
kind = "bytes"
[task]
name = "market"
[settings]
steps = 1
batch = 2
"""
    run = opd.from_config(config, quiet=True)
    assert isinstance(run.teacher, ByteTeacher)
    again = opd.from_config(run.to_config(), quiet=True)
    assert next(run).metrics["loss"] == next(again).metrics["loss"]


def test_what_does_not_fit_is_refused():
    with pytest.raises(InvalidValue, match="Give it a local model"):
        ByteTeacher("teacher")
    with pytest.raises(InvalidValue):
        ByteTeacher(model("scribe"), floor=-1)
    with pytest.raises(InvalidValue, match=r"floor=1\.0"):
        ByteTeacher(model("scribe"), floor=1.0)
    with pytest.raises(OpdlabError, match="Call check"):
        ByteTeacher(model("scribe")).grade(rollout_of(model("student"), ["4"]))


def test_the_error_of_opd_names_the_ways_that_work():
    with pytest.raises(TokenizerMismatch) as error:
        opd.distill(model("student"), model("scribe"), TASK, steps=1, quiet=True)
    for way in ("SpanOPD()", "ByteTeacher(teacher)", "OmniOPD()", "SequenceKD()", "family"):
        assert way in str(error.value)
