"""Traces: exact round trips, atomic files, and `what_if` against the full divergence."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

import opdlab
from opdlab import Policy, Prompt, Trace, score, what_if
from opdlab.data.column import Column, Description
from opdlab.data.notes import Windows
from opdlab.data.rollout import Rollout, concat_rollouts
from opdlab.engine.batch import Batch
from opdlab.engine.planned import Planned, run_plan
from opdlab.engine.recording import record_trace, rollout_from_trace
from opdlab.errors import (
    BadLoss,
    DamagedFile,
    InvalidValue,
    NonFinite,
    OpdlabError,
    TokenizerMismatch,
)
from opdlab.losses.divergences import entropy, forward_kl, jensen_shannon, reverse_kl
from opdlab.models.text_rollouts import rollout_from_texts


@pytest.fixture(scope="module")
def rollout(student, prompts) -> Rollout:
    return student.sample(prompts, n=2, max_new_tokens=10, seed=1)


@pytest.fixture(scope="module")
def trace(rollout, student, teacher) -> Trace:
    return score(rollout, student, teacher, k=5, **{"teacher+hint": teacher.seeing()})


def test_one_row_a_token_in_order(trace, rollout):
    bodies = rollout.completions()
    assert len(trace) == rollout.tokens
    assert trace.column("token_id").tolist() == [i for body in bodies for i in body]
    assert trace.column("sample").tolist() == [b for b, body in enumerate(bodies) for _ in body]
    assert trace.column("position").tolist() == [t for body in bodies for t in range(len(body))]
    assert trace.column("prompt").tolist() == [
        rollout.prompts[b].id for b, body in enumerate(bodies) for _ in body
    ]
    assert trace.sample(3).column("token_id").tolist() == bodies[3]


def test_numbers_are_those_of_the_policies(trace, rollout, student, teacher):
    p, q = student.log_probs(rollout), teacher.seeing().log_probs(rollout)
    close = lambda name, want: np.testing.assert_allclose(
        trace.column(name), want.numpy(), rtol=1e-3, atol=1e-4
    )
    close("student_logp", rollout.logp[rollout.mask])
    close("student_entropy", entropy(p))
    close("teacher+hint_reverse_kl", reverse_kl(p, q))
    close("teacher+hint_forward_kl", forward_kl(p, q))


def test_pieces_rejoin_to_the_texts(trace, rollout, student):
    for i, body in enumerate(rollout.completions()):
        joined = b"".join(trace.sample(i).tokens()).decode()
        assert joined.removeprefix(" ") == student.tokenizer.decode(body)
    for i in trace.column("support").flatten():
        assert i == -1 or trace.piece(
            int(i)
        ).decode().strip() == student.tokenizer.convert_ids_to_tokens(int(i)).replace("▁", "")


def plan_of(rollout, student, columns=None, notes=None) -> Planned:
    """A rollout as a plan that returns `columns` and leaves `notes` hands it on."""

    class Noting:
        def plan(self, batch):
            batch.notes.update(notes or {})
            return columns or {}

    return run_plan(Noting(), Batch(rollout, {"student": student}))


def test_tokens_of_noted_windows_can_be_read(rollout, student):
    written_ids = {i for body in rollout.completions() for i in body}
    unseen = next(i for i in range(student.weights.vocab_size) if i not in written_ids)
    windows = Windows(
        [
            {"student": [unseen], "teacher": []},
            {"student": [], "teacher": [next(iter(written_ids))]},
        ]
    )
    planned = plan_of(rollout, student, notes={"pairs": windows})
    trace = record_trace(rollout, {"student": student}, {}, planned=planned)
    shown = {"support": torch.tensor([[unseen]] * rollout.tokens)}
    assert trace.piece(unseen) == record_trace(rollout, {"student": student}, shown).piece(unseen)
    assert trace.note(Windows) == windows


def test_byte_pieces_survive_the_file(bytes_bpe, make_model, tmp_path):
    policy = Policy.of(make_model(len(bytes_bpe)), bytes_bpe)
    text = "naïve 🙂 世界 the fox"
    trace = Trace.load(
        score(rollout_from_texts(policy, [Prompt("the")], [text]), policy).save(
            tmp_path / "t.parquet"
        )
    )
    assert b"".join(trace.tokens()) == text.encode() + b"<|end|>"


def test_save_and_load(trace, tmp_path):
    path = trace.save(tmp_path / "new" / "t.parquet")
    again = Trace.load(str(path))
    pd.testing.assert_frame_equal(again.to_pandas(), trace.to_pandas())
    assert again.meta == trace.meta
    assert again.policies == ["student", "teacher", "teacher+hint"]
    assert repr(again) == repr(trace)
    frame = pd.read_parquet(path)
    assert {"token_id", "teacher_reverse_kl", "student_top"} <= set(frame.columns)
    np.testing.assert_array_equal(frame["student_logp"], trace.column("student_logp"))
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_save_leaves_the_old_file(trace, tmp_path, monkeypatch):
    path = trace.sample(0).save(tmp_path / "t.parquet")
    before = path.read_bytes()

    def full(table, where, **options):
        where.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(OSError, match="No space left"):
        trace.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_damaged_files_are_named(trace, tmp_path):
    whole = trace.save(tmp_path / "t.parquet").read_bytes()
    (cut := tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    (flipped := tmp_path / "flipped.parquet").write_bytes(whole[:-200] + bytes(100) + whole[-100:])
    (empty := tmp_path / "empty.parquet").write_bytes(b"")
    pd.DataFrame({"a": [1]}).to_parquet(foreign := tmp_path / "foreign.parquet")
    for path in (cut, flipped, empty, foreign):
        with pytest.raises(DamagedFile, match=f"{path} is not an opdlab trace .*write it again"):
            Trace.load(path)
    with pytest.raises(FileNotFoundError):
        Trace.load(tmp_path / "nothing.parquet")


def test_an_unknown_column_lists_what_exists(trace):
    with pytest.raises(KeyError, match="no column 'reward'; it has run, step, sample"):
        trace.column("reward")


def test_other_tokens_are_refused(rollout, student, make_policy, make_tokenizer):
    with pytest.raises(TokenizerMismatch, match="The teacher's tokenizer differs"):
        score(rollout, student, make_policy(0, make_tokenizer()))


# What if.

DIVERGENCES = {"reverse_kl": reverse_kl, "forward_kl": forward_kl, "jsd": jensen_shannon}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_what_if_is_a_lower_bound(trace, name):
    asked = what_if(trace, lambda rows: DIVERGENCES[name](rows.student, rows.teacher))
    bound, full = asked.column("loss"), trace.column(f"teacher_{name}")
    assert (bound >= -1e-6).all()
    assert (bound <= full + 1e-5).all()
    assert (bound < full - 1e-3).any()
    assert asked.column("share").sum() == pytest.approx(1)
    assert "loss" not in trace.table.column_names


@pytest.mark.parametrize("name", DIVERGENCES)
def test_what_if_is_exact_where_the_support_is_everything(rollout, student, teacher, name):
    trace = score(rollout, student, teacher, k=70)
    asked = what_if(trace, lambda rows: DIVERGENCES[name](rows.student, rows.teacher))
    np.testing.assert_allclose(
        asked.column("loss"), trace.column(f"teacher_{name}"), rtol=1e-4, atol=1e-5
    )
    logits = student.log_probs(rollout).requires_grad_()
    value = DIVERGENCES[name](logits.log_softmax(-1), teacher.log_probs(rollout))
    want = torch.autograd.grad(value.sum(), logits)[0].norm(dim=-1)
    np.testing.assert_allclose(asked.column("grad_norm"), want.numpy(), rtol=1e-3, atol=1e-5)


def test_what_if_takes_a_loss_written_by_hand(trace):
    by_hand = what_if(
        trace, lambda rows: (rows.student.exp() * (rows.student - rows.teacher)).sum(-1)
    )
    librarys = what_if(trace, lambda rows: reverse_kl(rows.student, rows.teacher))
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(
            by_hand.column(name), librarys.column(name), rtol=1e-4, atol=1e-6
        )


def test_what_if_sees_the_sampled_token_and_the_plan(rollout, student, teacher):
    trace = score(rollout, student, teacher)
    advantage = torch.randn(rollout.tokens)
    with_plan = replace(
        trace.with_columns(advantage=advantage.numpy()), meta={**trace.meta, "plan": ["advantage"]}
    )
    asked = what_if(with_plan, lambda rows: -rows.logp * rows.advantage)
    np.testing.assert_allclose(
        asked.column("loss"),
        -trace.column("student_logp") * advantage.numpy(),
        rtol=1e-4,
        atol=1e-5,
    )


def test_what_if_needs_top_tokens(rollout, student):
    trace = record_trace(
        rollout, {"student": student}, {"student_logp": rollout.logp[rollout.mask]}
    )
    with pytest.raises(OpdlabError, match=r"kept no top tokens.*opdlab\.score"):
        what_if(trace, lambda rows: rows.logp)


def test_records_name_the_run_and_share_the_gradient(rollout, student):
    norm = torch.rand(rollout.tokens)
    shape = rollout.ids.shape
    route = Column(torch.randint(2, shape), labels=("imitate", "steady"), description="how")
    planned = plan_of(rollout, student, {"route": route, "targets": torch.randn(*shape, 3)})
    trace = record_trace(
        rollout, {"student": student}, {"grad_norm": norm}, run="r1", step=7, planned=planned
    )
    frame = trace.to_pandas()
    assert set(frame["run"]) == {"r1"}
    assert set(frame["step"]) == {7}
    assert trace.column("share") == pytest.approx((norm / norm.sum()).numpy())
    assert trace.column("targets").shape == (rollout.tokens, 3)
    assert trace.meta["plan"] == ["route", "targets"]
    assert trace.meta["finish"] == list(rollout.finish)
    assert trace.meta["method"] == "Noting"
    assert trace.describe("route") == route.description
    assert trace.describe("targets") == Description()


@pytest.mark.parametrize("texts", [["a b", "", "c"], ["", ""]])
def test_empty_completions(make_model, make_tokenizer, tmp_path, texts):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    student, teacher = (Policy.of(make_model(12, seed), tokenizer, eos=[]) for seed in (0, 1))
    rollout = rollout_from_texts(student, [Prompt(text) for text in "abc"[: len(texts)]], texts)
    trace = opdlab.score(rollout, student, teacher)
    assert len(trace) == rollout.tokens
    assert trace.meta["texts"] == texts
    again = Trace.load(trace.save(tmp_path / "t.parquet"))
    assert again.sample(1).tokens() == []
    assert (
        len(what_if(again, lambda rows: reverse_kl(rows.student, rows.teacher))) == rollout.tokens
    )


# What cannot be right.


class OnlyWrites:
    def write(self, prompts, n=1, **options):
        return [["a"] * n for _ in prompts]


def test_score_says_what_it_cannot_grade(rollout, student, teacher):
    cases = [
        (lambda: score([rollout], student), r"score got \[Rollout.* for a rollout"),
        (lambda: score("texts", student), "score got 'texts' for a rollout"),
        (lambda: score(rollout, None), "score got None for the student. Give a Policy"),
        (
            lambda: score(rollout, student, OnlyWrites()),
            "got a OnlyWrites for 'teacher', which has no log-probs",
        ),
        (lambda: score(rollout, student, "teacher"), "score got 'teacher' for 'teacher'"),
        (lambda: score(rollout, student, teacher, reference=3), "score got 3 for 'reference'"),
        *(
            (lambda k=k: score(rollout, student, teacher, k=k), "score got k=.*at least 1")
            for k in (0, -1, 2.5, "8", True, None)
        ),
    ]
    for ask, said in cases:
        with pytest.raises(OpdlabError, match=said):
            ask()


def test_a_rollout_is_scored_only_with_its_own_tokens(
    rollout, student, make_policy, make_tokenizer
):
    """As many tokens, and other ones: no number would show it."""
    other = make_policy(0, make_tokenizer(" ".join(f"w{i}" for i in range(64))))
    assert other.weights.vocab_size == student.weights.vocab_size
    with pytest.raises(
        TokenizerMismatch,
        match=r"written with another tokenizer than that of the student.*rollout_from_texts",
    ):
        score(rollout, other)
    with pytest.raises(
        TokenizerMismatch, match=r"holds the token id \d+, but the student has 12 tokens"
    ):
        score(replace(rollout, vocabulary=None), make_policy(0, make_tokenizer()))
    score(rollout_from_texts(other, rollout.prompts, ["w1 w2"] * len(rollout)), other)
    assert (
        rollout.select([0]).vocabulary
        == concat_rollouts([rollout, rollout]).vocabulary
        == rollout.vocabulary
    )


@pytest.mark.parametrize("i", [8, 99, -1, 1.0, None, "0", True])
def test_a_completion_that_is_not_there_is_named(trace, i):
    with pytest.raises(OpdlabError, match=r"no completion .*; it has 8\. Use a number from 0 to 7"):
        trace.sample(i)


@pytest.mark.parametrize(
    "change",
    [
        lambda meta: [meta],
        lambda meta: "text",
        lambda meta: None,
        lambda meta: {},
        lambda meta: {**meta, "texts": None},
        lambda meta: {**meta, "texts": meta["texts"][:2]},
        lambda meta: {**meta, "vocab": []},
        lambda meta: {**meta, "vocab": {"1": "a"}},
        lambda meta: {**meta, "policies": "student"},
        lambda meta: {k: v for k, v in meta.items() if k != "finish"},
        lambda meta: {**meta, "prompts": [1] * 8},
    ],
)
def test_metadata_that_describe_something_else_are_damage(trace, tmp_path, change):
    path = replace(trace, meta=change(trace.meta)).save(tmp_path / "t.parquet")
    with pytest.raises(DamagedFile, match=r"is not an opdlab trace \(its? "):
        Trace.load(path)


@pytest.mark.parametrize("path", [None, 3, ["t.parquet"]])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(OpdlabError, match="Give the path of a file"):
        Trace.load(path)


WRONG = {
    "returns nothing": (lambda rows: None, "NoneType"),
    "one number": (lambda rows: reverse_kl(rows.student, rows.teacher).sum(), r"shape \[\]"),
    "constant": (lambda rows: rows.teacher[:, 0], "constant"),
    "softmax over tokens": (
        lambda rows: reverse_kl(rows.student, rows.teacher).softmax(0),
        "other rows",
    ),
    "batch mean": (lambda rows: rows.logp - rows.logp.mean(), "other rows"),
    "in place": (
        lambda rows: reverse_kl(rows.student, rows.teacher.clamp_(min=-3)),
        r"rows\.teacher in place",
    ),
    "not finite": (lambda rows: rows.logp / 0, "not finite|inf at row 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_if_refuses_what_training_refuses(trace, name):
    loss, said = WRONG[name]
    with pytest.raises((BadLoss, NonFinite), match=said):
        what_if(trace, loss)


def test_what_if_takes_a_method_and_nothing_that_is_none(trace):
    method = what_if(trace, opdlab.OPD())
    assert (
        method.column("loss").tolist()
        == what_if(trace, lambda rows: reverse_kl(rows.student, rows.teacher))
        .column("loss")
        .tolist()
    )
    assert what_if(trace, opdlab.OPD).column("loss").tolist() == method.column("loss").tolist()
    assert what_if(trace, reverse_kl).column("loss").tolist() == method.column("loss").tolist()
    for loss in (None, "reverse_kl", 3):
        with pytest.raises(InvalidValue, match="what_if got"):
            what_if(trace, loss)


@pytest.mark.parametrize(
    "windows",
    [3, "text", [1, 2], [{"student": "abc", "teacher": [10**9, -1, "a"]}], {"a": 1}, [{"x": 1}]],
)
def test_plain_notes_are_kept_under_the_method_and_not_read(rollout, student, windows, tmp_path):
    planned = plan_of(rollout, student, notes={"windows": windows})
    trace = record_trace(rollout, {"student": student}, {}, planned=planned)
    again = Trace.load(trace.save(tmp_path / "t.parquet"))
    assert again.meta["notes"] == {"Noting": {"windows": windows}}
    assert again.note(Windows) is None


def test_a_prompt_in_parts_shows_its_text(rollout, student):
    parts = (
        {
            "role": "user",
            "content": [{"type": "text", "text": "add 2 "}, {"type": "text", "text": "and 3"}],
        },
    )
    trace = record_trace(
        replace(rollout, prompts=(Prompt(messages=parts),) * len(rollout)), {"student": student}, {}
    )
    assert trace.meta["prompts"] == ["add 2 and 3"] * len(rollout)


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def test_a_trace_gives_its_rollout_back(student, teacher, prompts, tmp_path):
    """Also of chats, whose last message alone is among the prompts that pictures show."""
    chat = Prompt(
        messages=({"role": "system", "content": "say"}, {"role": "user", "content": "ben has 2"}),
        hint=[{"role": "user", "content": "total 4"}],
        answer="4",
        id="chat",
    )
    rollout = student.sample([*prompts, chat], n=2, max_new_tokens=6, seed=1)
    graders = {"teacher+hint": teacher.seeing()}
    recorded = score(rollout, student, teacher, **graders)
    trace = Trace.load(recorded.save(tmp_path / "trace.parquet"))
    again = rollout_from_trace(trace)
    assert again.completions() == rollout.completions()
    for name in ("finish", "texts", "writer", "n", "vocabulary"):
        assert getattr(again, name) == getattr(rollout, name), name
    bare = [replace(one, answer=None) for one in rollout.prompts]  # answers are not kept
    assert list(again.prompts) == bare
    scored = score(again, student, teacher, **graders)
    for name in ("student_logp", "teacher_logp", "teacher+hint_logp"):
        np.testing.assert_array_equal(scored.column(name), trace.column(name))
    assert len(trace.meta["rollout"]["prompts"]) == len(prompts) + 1  # each once
    one = rollout_from_trace(trace.sample(3))
    assert one.completions() == [rollout.completions()[3]]
    assert one.prompts == (bare[3],)
    given = rollout_from_trace(trace, rollout.prompts)
    assert given.prompts[-1].answer == "4"


def test_a_rollout_of_several_turns_comes_back_with_them(rollout, student):
    learn, turn = rollout.mask.clone(), torch.zeros_like(rollout.ids)
    learn[:, 1], turn[:, 2:] = False, 1
    turned = replace(rollout, learn=learn & rollout.mask, turn=turn * rollout.mask)
    again = rollout_from_trace(score(turned, student))
    assert torch.equal(again.learn, turned.learn)
    assert torch.equal(again.turn, turned.turn)


@pytest.mark.parametrize(
    "described", [None, [1], {"prompts": [{}], "of": [0]}, {"prompts": [], "of": "ab"}]
)
def test_a_trace_without_its_prompts_asks_for_them(trace, described, prompts):
    bare = Trace(trace.table, {**trace.meta, "rollout": described})
    with pytest.raises(OpdlabError):
        rollout_from_trace(bare)
    with pytest.raises(OpdlabError, match=r"8 texts for 4 prompts"):
        rollout_from_trace(trace, prompts)


def test_the_tools_of_a_chat_come_back(student):
    prompt = Prompt(messages=({"role": "user", "content": "ben"},), tools=[TOOL])
    rollout = rollout_from_texts(student, [Prompt("ben")], ["ana"])
    trace = record_trace(replace(rollout, prompts=(prompt,)), {"student": student}, {})
    assert rollout_from_trace(trace).prompts == (prompt,)


def test_prompts_that_json_cannot_hold_are_not_kept(student):
    odd = Prompt(messages=({"role": "user", "content": "ben", "seen": {1, 2}},))
    trace = record_trace(rollout_from_texts(student, [odd], ["ana"]), {"student": student}, {})
    with pytest.raises(OpdlabError, match=r"does not keep its prompts.*Give prompts="):
        rollout_from_trace(trace)
