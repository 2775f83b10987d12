"""SpanOPD against enumeration: two tokenizers that can be listed, and real ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from plans import plan_values

import opdlab
from opdlab import OPD, Policy, Prompt, SpanOPD, exact
from opdlab.data.alignment import nats_per_byte
from opdlab.data.notes import Alignments
from opdlab.engine.batch import Batch
from opdlab.engine.columns import flatten
from opdlab.engine.passes import gradient
from opdlab.errors import MissingPolicy, OpdlabError, TokenizerMismatch
from opdlab.exact import Letters
from opdlab.models.text_rollouts import rollout_from_texts
from opdlab.tasks import from_records
from opdlab.tasks.market import tokenizers
from opdlab.teachers import TextOnly


@dataclass(frozen=True)
class Pieces(Letters):
    """A tokenizer by a list of pieces: the longest that fits is taken, as WordPiece does.

    `.` ends a text.
    """

    pieces: tuple[str, ...] = ()

    def convert_ids_to_tokens(self, ids):
        return [self.pieces[i] for i in ids]

    def __call__(self, text, **_):
        ids = []
        while text:
            fits = [p for p in self.pieces if p != "." and text.startswith(p)]
            if not fits:
                raise OpdlabError(f"cannot spell {text}")
            ids.append(self.pieces.index(max(fits, key=len)))
            text = text[len(self.pieces[ids[-1]]) :]
        return {"input_ids": ids}


@dataclass(frozen=True, eq=False)
class Model(exact.Table):
    """A table that speaks given pieces."""

    pieces: tuple[str, ...] = ()

    @property
    def tokenizer(self) -> Pieces:
        return Pieces(self.vocab, self.eos, self.pieces)

    @classmethod
    def of(cls, pieces: str, length: int, seed: int) -> Model:
        listed = tuple(pieces.split())
        eos = listed.index(".") if "." in listed else None
        table = exact.Table.random(len(listed), length, seed=seed, eos=eos)
        return cls(table.logits, table.prompts, length, eos, listed)


def judged(teacher: Model, text: str, ended: bool) -> float:
    """log q of a text (and of its end) by a walk through the table: no alignment, no engine."""
    total, begun = 0.0, []
    for i in [*teacher.tokenizer(text)["input_ids"], *([teacher.eos] if ended else [])]:
        total += teacher.logp[0, teacher.start(begun), i].item()
        begun.append(i)
    return total


def sequence_gradient(student: Model, teacher: Model) -> torch.Tensor:
    """d KL(p || q) over whole texts by autograd through the law: sum_y p(y) (log p(y) - log q(text
    of y)).
    """
    leaf = student.logits.clone().requires_grad_()
    model = replace(student, logits=leaf)
    body = exact.everything(student.prompts, student.vocab, student.length, eos=student.eos)
    p = exact.law(model, body)
    q = []
    for ids in body.completions():
        ended = student.eos is not None and ids[-1] == student.eos
        text = "".join(student.pieces[i] for i in ids if i != student.eos)
        q.append(judged(teacher, text, ended))
    (slope,) = torch.autograd.grad(
        (p * (p.log() - torch.tensor(q, dtype=torch.float64))).sum(), leaf
    )
    return slope


# Student's pieces, its length, the teacher's pieces, and whether the text so far decides where its
# spans end.
PAIRS = {
    "one tokenizer": ("a b c", 3, "a b c", True),
    "words and characters": ("a b ab", 3, "a b", True),
    "with an end": ("a ba .", 3, "a b .", True),
    "a teacher that looks ahead": ("a b .", 3, "a b ba .", False),
    "both merge": ("a b ab .", 2, "a b ba bb .", False),
}
pairs = pytest.mark.parametrize("name", PAIRS)


def pair(name: str) -> tuple[Model, Model]:
    ours, length, theirs, _ = PAIRS[name]
    longest = max(map(len, ours.split())) * length + ("." in theirs)
    return Model.of(ours, length, 0), Model.of(theirs, longest, 1)


@pairs
def test_all_is_the_kl_over_texts_whatever_the_tokenizers(name):
    student, teacher = pair(name)
    got = exact.gradient(SpanOPD(credit="all"), {"student": student, "teacher.spans": teacher})
    want = sequence_gradient(student, teacher)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert want.abs().max() > 0.05


@pairs
def test_later_is_the_same_where_the_past_decides_the_spans(name):
    student, teacher = pair(name)
    got = exact.gradient(SpanOPD(credit="later"), {"student": student, "teacher.spans": teacher})
    off = (got - sequence_gradient(student, teacher)).abs().max()
    assert (off < 1e-12) == PAIRS[name][3]


def test_span_is_the_kl_of_spans_with_the_way_there_held_fixed():
    """A teacher of pairs and a student of single letters: two spans of two tokens; prefixes are
    weighted by a fixed law.
    """
    student, teacher = Model.of("a b", 4, 2), Model.of("aa ab ba bb", 2, 3)
    got = exact.gradient(SpanOPD(), {"student": student, "teacher.spans": teacher})
    leaf = student.logits.clone().requires_grad_()
    logp, q, total = leaf.log_softmax(-1)[0], teacher.logp[0], 0.0
    for first in [[]] + [[i, j] for i in range(2) for j in range(2)]:
        way = (
            sum((logp[student.start(first[:t]), i] for t, i in enumerate(first)), torch.tensor(0.0))
            .detach()
            .exp()
        )
        theirs = q[teacher.start([2 * first[0] + first[1]] if first else [])]
        for i in range(2):
            for j in range(2):
                ours = logp[student.start(first), i] + logp[student.start([*first, i]), j]
                total = total + way * ours.exp() * (ours - theirs[2 * i + j])
    (want,) = torch.autograd.grad(total, leaf)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert (got - sequence_gradient(student, teacher)).abs().max() > 1e-3, (
        "it is not the sequence's gradient"
    )


def test_unusual_spellings_only_shift_the_teacher_by_a_constant():
    """What the teacher gives to `a b` where it would write `ab` changes nothing: the law over texts
    is renormalized.
    """
    student, teacher = Model.of("a b", 2, 0), Model.of("a b ab", 2, 1)
    body = exact.everything(student.prompts, 2, 2)
    q = torch.tensor(
        [judged(teacher, text, False) for text in body.texts], dtype=torch.float64
    ).exp()
    assert q.sum() < 0.95
    leaf = student.logits.clone().requires_grad_()
    p = exact.law(replace(student, logits=leaf), body)
    (want,) = torch.autograd.grad((p * (p / (q / q.sum())).log()).sum(), leaf)
    torch.testing.assert_close(
        exact.gradient(SpanOPD("all"), {"student": student, "teacher.spans": teacher}),
        want,
        rtol=0,
        atol=1e-12,
    )


# Real tokenizers and models.


@pytest.fixture(scope="module")
def rollout(student, prompts):
    """Texts as both tokenizers write them, with the student's log-probs."""
    body = rollout_from_texts(student, prompts, ["4 7 + 3 8 = 8 5", "total 4", "9 ; 9", "has"])
    logp = student.log_probs(body).gather(-1, body.ids[body.mask][:, None])[:, 0]
    return replace(body, logp=torch.zeros(body.ids.shape).masked_scatter(body.mask, logp))


@pytest.fixture(scope="module")
def scribe(make_policy) -> Policy:
    return make_policy(1, tokenizers.characters())


def planned(student, teacher, rollout, **options):
    batch = Batch(rollout, {"student": student, "teacher.spans": teacher})
    return batch, plan_values(SpanOPD(**options), batch)


@pytest.mark.parametrize(("credit", "discount"), [("span", 0.0), ("later", 1.0)])
def test_with_one_tokenizer_it_is_sampled_opd(credit, discount, student, teacher, rollout):
    method = SpanOPD(credit=credit)
    gradients = []
    for m, name in (
        (method, "teacher.spans"),
        (OPD(estimator="sampled", discount=discount), "teacher"),
    ):
        batch = Batch(rollout, {"student": student, name: teacher})
        columns = {key: flatten(batch, key, column) for key, column in m.plan(batch).items()}
        states = {key: batch.states(key) for key in batch.distributions}
        gradients.append(
            gradient(m.loss, states, batch.token, torch.ones(rollout.tokens), columns).gradient
        )
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)
    batch, columns = planned(student, teacher, rollout)
    assert batch.notes["alignments"].facts["one_to_one"] == 1.0
    assert columns["one_to_one"][rollout.mask].all()


def test_nats_per_byte_is_that_of_opd_where_both_can_be_measured(student, teacher, rollout):
    trace = opdlab.score(rollout, student, teacher)
    sampled = trace.column("student_logp") - trace.column("teacher_logp")
    batch, _ = planned(student, teacher, rollout)
    want = nats_per_byte(sampled, trace.meta["texts"])
    assert batch.notes["alignments"].facts["nats_per_byte"] == pytest.approx(want, rel=1e-3)
    assert abs(want) > 0.01


def test_nothing_to_learn_from_oneself(student, rollout):
    _, columns = planned(student, student.frozen(), rollout)
    assert columns["advantage"].abs().max() < 1e-4


def test_words_and_characters(student, scribe):
    """Every span against the scribe's own log-probs of that text, and its end."""
    text = "4 7 + 3 8 = 8 5"
    body = rollout_from_texts(student, [Prompt("ana has")], [text])
    batch, columns = planned(student, scribe, body)
    own = rollout_from_texts(scribe, [Prompt("ana has")], [text])
    logp = scribe.log_probs(own).gather(-1, own.ids[0][:, None])[:, 0]
    assert own.ids[0].tolist()[-1] == scribe.tokenizer.eos_token_id
    cuts = [range(1), *[range(i, i + 2) for i in range(1, 15, 2)], range(15, 16)]
    q = torch.stack([logp[list(cut)].sum() for cut in cuts])
    p = batch.signals["student_logp"][0]
    torch.testing.assert_close(columns["span_kl"][0], p - q, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(columns["advantage"][0], q - p, rtol=1e-4, atol=1e-4)
    assert columns["span"][0].tolist() == list(range(9))
    assert columns["one_to_one"][0].tolist() == [1.0] + [0.0] * 7 + [1.0]
    note = batch.notes["alignments"].alignments[0]
    assert "".join(note["teacher"]) == text
    assert note["spans"][:2] == [[0, 1, 0, 1], [1, 2, 1, 3]]
    assert len(note["kl"]) == 9
    summary = batch.notes["alignments"].facts
    assert summary["one_to_one"] == pytest.approx(1 / 15)
    assert summary["left_out"] == 0
    assert summary["nats_per_byte"] == pytest.approx((p - q).sum().item() / 15, rel=1e-4)
    assert summary["nats_per_byte"] == pytest.approx(
        nats_per_byte(columns["span_kl"].flatten().tolist(), [text]), rel=1e-4
    )


def test_characters_and_words(student, scribe):
    """The other way round a span has several of the student's tokens: they share its nats, and each
    answers for all of them.
    """
    text = "4 7 + 3"
    body = rollout_from_texts(scribe, [Prompt("ana has")], [text])
    batch, columns = planned(scribe, student, body)
    own = rollout_from_texts(student, [Prompt("ana has")], [text])
    q = student.log_probs(own).gather(-1, own.ids[0][:, None])[:, 0]
    p = batch.signals["student_logp"][0]
    gap = (
        torch.stack(
            [
                p[list(cut)].sum()
                for cut in [range(1), *[range(i, i + 2) for i in range(1, 7, 2)], range(7, 8)]
            ]
        )
        - q
    )
    parts = torch.tensor([1, 2, 2, 2, 1])
    torch.testing.assert_close(
        columns["span_kl"][0], (gap / parts).repeat_interleave(parts), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        columns["advantage"][0], -gap.repeat_interleave(parts), rtol=1e-4, atol=1e-4
    )
    assert columns["span_kl"].sum().item() == pytest.approx((p.sum() - q.sum()).item(), rel=1e-4)
    assert columns["one_to_one"][0].tolist() == [1, 0, 0, 0, 0, 0, 0, 1]


def test_a_text_that_was_cut_off_has_no_end(student, scribe):
    body = replace(rollout_from_texts(student, [Prompt("ana")], ["4 7 +"]), finish=("length",))
    short = replace(
        body,
        ids=body.ids[:, :3],
        lengths=body.lengths - 1,
        logp=body.logp[:, :3],
        entropy=body.entropy[:, :3],
        learn=None,
        turn=None,
    )
    batch, columns = planned(student, scribe, short)
    assert len(batch.notes["alignments"].alignments[0]["kl"]) == 3
    assert columns["span"][0].tolist() == [0, 1, 2]


def test_any_of_the_teachers_ends_will_do(student, make_policy):
    one, two = (
        make_policy(1, tokenizers.characters()),
        make_policy(1, tokenizers.characters(), eos=[1, 9]),
    )
    body = rollout_from_texts(student, [Prompt("ana has")], ["4 7"])
    own = rollout_from_texts(one, [Prompt("ana has")], ["4 7"])
    end = one.log_probs(own)[-1]
    gaps = [planned(student, t, body)[1]["span_kl"][0, -1].item() for t in (one, two)]
    assert gaps[0] - gaps[1] == pytest.approx(
        (torch.logsumexp(end[[1, 9]], 0) - end[1]).item(), rel=1e-3
    )


def test_what_the_teacher_cannot_spell_is_left_out(make_policy, bytes_bpe, scribe):
    student = make_policy(0, bytes_bpe)
    body = rollout_from_texts(student, [Prompt("the")] * 3, ["a fox", "a 世 fox", ""])
    batch, columns = planned(student, scribe, body)
    assert batch.notes["alignments"].facts["left_out"] == 1
    assert (columns["span"][1] == -1).all()
    assert not columns["advantage"][1].any()
    assert (columns["span"][0, : len(batch.rollout.completions()[0])] >= 0).all()
    assert columns["span"][2, 0] == 0, "an empty text has an end"
    with pytest.raises(
        OpdlabError, match=r"Step 1: the teacher's tokenizer spells none of the 1 completions .*世"
    ):
        planned(student, scribe, body.select([1]))


def test_a_special_token_amid_the_text_leaves_it_out(student, scribe):
    body = rollout_from_texts(student, [Prompt("ana"), Prompt("ana")], ["4 7 +", "4 7 +"])
    ids = body.ids.clone()
    ids[1, 1] = student.tokenizer.convert_tokens_to_ids("<user>")
    batch, columns = planned(student, scribe, replace(body, ids=ids))
    assert batch.notes["alignments"].facts["left_out"] == 1
    assert not columns["advantage"][1].any()
    assert columns["advantage"][0].all()


def test_invalid_bytes_are_left_out(make_policy, bytes_bpe):
    student, teacher = make_policy(0, bytes_bpe), make_policy(1, bytes_bpe)
    whole = rollout_from_texts(student, [Prompt("the")] * 2, ["é", "é"])
    ids = whole.ids.clone()
    ids[1, 0] = bytes_bpe.convert_tokens_to_ids("©")  # the byte A9, which starts no character
    batch, columns = planned(student, teacher, replace(whole, ids=ids))
    assert batch.notes["alignments"].facts["left_out"] == 1
    assert not columns["advantage"][1].any()


def test_it_trains_across_tokenizers_where_opd_refuses(make_policy, prompts):
    task = from_records(
        [{"text": p.text, "id": p.id} for p in prompts if p.text], test=0, max_new_tokens=6
    )
    student, scribe = make_policy(0), make_policy(1, tokenizers.characters())
    with pytest.raises(TokenizerMismatch):
        opdlab.distill(make_policy(0), scribe, task, method=OPD(), quiet=True)
    run = opdlab.distill(student, scribe, task, method=SpanOPD(), steps=2, batch=3, n=2, quiet=True)
    step = next(run)
    trace = step.trace()
    assert {"span", "one_to_one", "advantage", "span_kl"} <= set(trace.table.column_names)
    aligned = sorted(set(trace.column("sample")[trace.column("span") >= 0].tolist()))
    assert aligned
    texts = [trace.meta["texts"][i] for i in aligned]
    noted = trace.note(Alignments).facts
    assert noted["nats_per_byte"] == pytest.approx(
        nats_per_byte(trace.column("span_kl"), texts), rel=1e-3
    )
    assert noted["left_out"] == len(step.rollout) - len(aligned)


def test_a_teacher_without_tokens_is_refused(student, rollout, scribe):
    with pytest.raises(MissingPolicy, match=r"TextOnly has no tokenizer here\. Load the teacher"):
        planned(student, TextOnly(scribe), rollout)


def test_unknown_credit_is_refused():
    with pytest.raises(ValueError, match="Use span, later or all"):
        SpanOPD(credit="sum")
