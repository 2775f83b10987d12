"""OmniOPD against enumeration, closed forms and the fourteen properties of its reconstruction."""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plans import plan_values
from rapidfuzz.distance import Levenshtein

import opdlab
from opdlab import OPD, OmniOPD, Policy, Prompt, exact
from opdlab.data.notes import Chunks
from opdlab.engine.batch import Batch
from opdlab.engine.columns import flatten
from opdlab.engine.passes import compute, gradient
from opdlab.errors import MissingPolicy, OpdlabError
from opdlab.methods.omniopd import posterior, select_chunks
from opdlab.methods.similarity import edit, rouge1
from opdlab.models.text_rollouts import rollout_from_texts
from opdlab.tasks import Task, from_records
from opdlab.tasks.market import tokenizers
from opdlab.teachers import TextOnly

SMALL = {"chunks": 2, "continuations": 3, "length": 3, "match_length": True}
texts = st.text(alphabet="ab c\n", max_size=10)


class Says:
    """A teacher by the book: gives the texts it was made with, and remembers what it was asked."""

    def __init__(self, *says: str) -> None:
        self.says, self.asked = list(says), []

    def write(self, prompts, n=1, *, prefixes=None, max_new_tokens=64, temperature=1.0, seed=0):
        self.asked += [
            (prompt, prefix, n, max_new_tokens)
            for prompt, prefix in zip(prompts, prefixes, strict=True)
        ]
        return [list(self.says) for _ in prompts]


def planned(
    method: OmniOPD, student: Policy, rollout, teacher, reference: Policy | None = None
) -> tuple[Batch, dict[str, torch.Tensor]]:
    batch = Batch(
        rollout,
        {"student": student, "teacher.text": teacher, "reference": reference or student.frozen()},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return batch, plan_values(method, batch)


def run_loss(
    method: OmniOPD,
    batch: Batch,
    columns: dict[str, torch.Tensor],
    weight: torch.Tensor | None = None,
):
    flat = {name: flatten(batch, name, column) for name, column in columns.items()}
    states = {name: batch.states(name) for name in batch.distributions}
    return gradient(
        method.loss,
        states,
        batch.token,
        torch.ones(batch.rollout.tokens) if weight is None else weight,
        flat,
    )


@pytest.fixture(scope="module")
def rollout(student, prompts):
    return student.sample(prompts, n=2, max_new_tokens=12, seed=5)


# 1. Similarities.


@given(a=texts, b=texts)
def test_similarities_are_similarities(a, b):
    for phi in (edit, rouge1):
        assert phi(a, a) == 1
        assert phi(a, b) == phi(b, a)
        assert 0 <= phi(a, b) <= 1
    assert edit(a, b) == 1 - Levenshtein.distance(a, b) / max(len(a), len(b), 1)


def test_similarities_by_hand():
    assert edit("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert rouge1("the cat sat the", "the dog the the") == pytest.approx(2 * 2 / 8)
    for phi in (edit, rouge1):
        assert (phi("", ""), phi("", "b"), phi("b", "")) == (1, 0, 0)


# 2. and 3. The posterior.


@given(k=st.floats(0, 10), prior=st.floats(1e-6, 1), alpha=st.floats(0, 50))
def test_posterior_is_a_convex_combination_in_its_bounds(k, prior, alpha):
    n = 10
    weight = posterior(k, n, torch.tensor(prior, dtype=torch.float64).log(), alpha).item()
    assert (
        alpha * prior / (n + alpha) - 1e-12 <= weight <= (n + alpha * prior) / (n + alpha) + 1e-12
    )
    assert weight == pytest.approx(
        n / (n + alpha) * (k / n) + alpha / (n + alpha) * prior, abs=1e-9
    )


def test_posterior_by_hand_and_its_limits():
    prior = torch.tensor(0.4, dtype=torch.float64).log()
    assert posterior(3.5, 10, prior, 1.0).item() == pytest.approx(3.9 / 11)
    assert posterior(3.5, 10, prior, 0.0).item() == pytest.approx(0.35)
    assert posterior(3.5, 10, prior, 1e12).item() == pytest.approx(0.4)


def test_the_prior_is_the_geometric_mean_and_does_not_underflow():
    logp = torch.tensor([0.5, 0.2, 0.9], dtype=torch.float64).log()
    assert posterior(0.0, 1, logp.mean(), 1.0).item() == pytest.approx(
        (0.5 * 0.2 * 0.9) ** (1 / 3) / 2
    )
    deep = torch.full((200,), -9.0)
    assert deep.exp().prod() == 0
    assert posterior(0.0, 1, deep.mean(), 1.0).item() == pytest.approx(math.exp(-9) / 2, rel=1e-4)


# 4. and 5. The weight carries no gradient.


def test_the_weight_is_detached():
    leaf = torch.tensor([-1.0, -2.0], requires_grad=True)
    assert not posterior(3.0, 5, leaf.mean(), 1.0).requires_grad


@pytest.mark.parametrize("alpha", [0.0, 1.0, 7.0])
def test_the_audited_gradient_is_that_of_a_constant_weight(alpha, student, rollout):
    batch, columns = planned(
        OmniOPD(**SMALL, alpha=alpha, beta=0.0), student, rollout, Says(" 4 7", " total", "x")
    )
    got = run_loss(OmniOPD(beta=0.0), batch, columns)
    weight, token = flatten(batch, "weight", columns["weight"]), batch.token
    want = gradient(lambda rows: -rows.logp, {"student": batch.states("student")}, token, weight)
    torch.testing.assert_close(got.gradient, want.gradient, rtol=1e-5, atol=1e-7)
    assert got.gradient.abs().max() > 1e-3


def test_a_chunk_that_nobody_confirms_goes_silent_without_a_prior(student, rollout):
    """k = 0: no gradient at alpha = 0, some at alpha > 0."""
    for alpha in (0.0, 1.0):
        method = OmniOPD(**SMALL, alpha=alpha, beta=0.0, similarity=lambda a, b: 0.0)
        batch, columns = planned(method, student, rollout, Says("a", "b", "c"))
        assert (columns["weight"].max() > 0) == (alpha > 0)
        assert (run_loss(method, batch, columns).gradient.abs().max() > 0) == (alpha > 0)


# 6. Selection.


@given(st.lists(st.integers(0, 6), max_size=25), st.integers(1, 6), st.integers(1, 5))
def test_selection(values, chunk, limit):
    entropy = torch.tensor(values, dtype=torch.float32)
    chosen = select_chunks(entropy, chunk, limit)
    room = len(values) - chunk + 1
    assert chosen == sorted(set(chosen))
    assert len(chosen) <= limit
    assert all(b - a >= chunk for a, b in itertools.pairwise(chosen))
    assert all(0 <= t < room for t in chosen)
    if room < 1:
        assert chosen == []
        return
    first = values.index(max(values[:room]))  # the earliest of equal ones
    assert first in chosen
    assert select_chunks(entropy, chunk, 1) == [first]
    free = [t for t in range(room) if all(abs(t - u) >= chunk for u in chosen)]
    assert len(chosen) == limit or not free, "another one would fit"


def test_selection_by_hand():
    entropy = torch.tensor([0.1, 0.9, 0.8, 0.2, 0.7, 0.95])
    assert select_chunks(entropy, 2, 2) == [1, 4]  # 5 has no room, 2 overlaps 1
    assert select_chunks(entropy, 2, 1) == [1]
    assert select_chunks(entropy, 7, 3) == []
    assert select_chunks(torch.tensor([-math.inf, 1.0, -math.inf, -math.inf]), 1, 4) == [1]


def test_random_places_are_seeded_and_move_with_the_step(student, rollout):
    starts = lambda seed, step: [
        (a.sample, a.start)
        for a in OmniOPD(**SMALL, select="random", seed=seed).schedule(
            Batch(rollout, {"student": student}, step=step)
        )
    ]
    assert starts(0, 0) == starts(0, 0)
    assert len({str(starts(seed, step)) for seed in (0, 1) for step in (0, 1)}) == 4


# 7. Entropy rows.


def test_chunks_start_at_the_peaks_of_the_distribution_that_emits_the_token(student, rollout):
    logp = student.log_probs(rollout)
    entropy = torch.zeros(rollout.ids.shape)
    entropy[rollout.mask] = -(logp.exp() * logp).sum(-1)
    torch.testing.assert_close(entropy, rollout.entropy, rtol=1e-3, atol=1e-3)  # the sampler's own
    found = OmniOPD(chunks=1, length=2).schedule(Batch(rollout, {"student": student}))
    for audit in found:
        length = rollout.lengths[audit.sample] - 1
        assert audit.start == int(entropy[audit.sample, :length].argmax())
    assert len({a.start for a in found}) > 2


def test_one_row_of_logits_moves_one_entropy():
    table = exact.Table.random(4, 3, seed=2)
    body = exact.everything(table.prompts, 4, 3).select([27])
    flat = lambda t: Batch(body, {"student": t}).signals["student_entropy"][0]
    base = flat(exact.Table(torch.zeros_like(table.logits), table.prompts, 3))
    torch.testing.assert_close(base, torch.full((3,), math.log(4), dtype=torch.float64))
    ids = body.ids[0].tolist()
    for t in range(3):
        nudge = torch.zeros_like(table.logits)
        nudge[0, table.start(ids[:t]), 0] = 1.0
        moved = (flat(table.add(nudge)) - flat(table)).abs() > 1e-9
        assert moved.tolist() == [i == t for i in range(3)]


# 8. Partition.


def test_every_token_is_audited_or_anchored(student, teacher, rollout):
    method = OmniOPD(**SMALL, beta=0.5)
    batch, columns = planned(method, student, rollout, Says(" 4", " 7", " x"), reference=teacher)
    audited = columns["audited"]
    assert not audited[~rollout.mask].any()
    spans = {
        (a["sample"], t)
        for a in batch.notes["chunks"].chunks
        for t in range(a["start"], a["start"] + a["length"])
    }
    assert {tuple(at) for at in audited.nonzero().tolist()} == spans
    assert 0 < len(spans) < rollout.tokens
    loss = batch.spread(run_loss(method, batch, columns).loss)
    kl = batch.map(lambda rows: opdlab.losses.forward_kl(rows.student, rows.reference))
    logp = batch.signals["student_logp"]
    want = torch.where(audited > 0, -columns["weight"] * logp, 0.5 * kl) * rollout.mask
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-5)


def test_a_completion_shorter_than_a_chunk_is_all_anchor(student, teacher, rollout):
    method, silent = OmniOPD(length=13), Says()
    batch, columns = planned(method, student, rollout, silent, reference=teacher)
    assert silent.asked == []
    assert not columns["audited"].any()
    assert batch.notes["chunks"].chunks == []
    want = (
        0.1
        * batch.map(lambda rows: opdlab.losses.forward_kl(rows.student, rows.reference))[
            rollout.mask
        ]
    )
    torch.testing.assert_close(run_loss(method, batch, columns).loss, want, rtol=1e-4, atol=1e-6)


# 9. The anchor.


def test_the_anchor_holds_to_the_reference_and_looks_from_it():
    """KL(reference || student): zero with its gradient at the reference, and not the KL the other
    way round.
    """
    sure = exact.Table(torch.tensor([[[3.0, 0.0, -1.0]]], dtype=torch.float64), (Prompt("x"),), 1)
    flat = exact.Table(torch.tensor([[[0.0, 0.5, 0.0]]], dtype=torch.float64), (Prompt("x"),), 1)
    body = exact.everything(sure.prompts, 3, 1).select([0])

    def anchor(student, reference) -> tuple[float, torch.Tensor]:
        policies = {"student": student, "teacher.text": Says(), "reference": reference}
        columns = {name: torch.zeros(1, 1) for name in ("audited", "weight")}
        batch = Batch(body, policies)
        result = run_loss(OmniOPD(beta=1.0), batch, columns)
        return result.loss.item(), result.gradient

    value, slope = anchor(sure, sure)
    assert value == pytest.approx(0, abs=1e-12)
    assert slope.abs().max() < 1e-12
    p, q = sure.logp.flatten().exp(), flat.logp.flatten().exp()
    assert anchor(flat, sure)[0] == pytest.approx((p * (p / q).log()).sum().item())
    assert anchor(sure, flat)[0] == pytest.approx((q * (q / p).log()).sum().item())
    assert anchor(flat, sure)[0] != pytest.approx(anchor(sure, flat)[0], rel=0.05)


# 10. Leakage.


def test_the_teacher_reads_what_stands_before_the_chunk_and_no_more(student, rollout):
    teacher = Says("a", "b", "c")
    batch, _ = planned(OmniOPD(**SMALL), student, rollout, teacher)
    audits = batch.notes["chunks"].chunks
    assert len(teacher.asked) == len(audits) > 8
    for (prompt, prefix, n, _), audit in zip(teacher.asked, audits, strict=True):
        body = rollout.completions()[audit["sample"]]
        assert prompt is rollout.prompts[audit["sample"]]
        assert n == 3
        assert prefix == student.tokenizer.decode(body[: audit["start"]], skip_special_tokens=True)
        whole = student.tokenizer.decode(body[: audit["start"] + 3], skip_special_tokens=True)
        assert prefix + audit["text"] == whole
        assert audit["length"] == 3


def test_prefixes_end_at_whole_characters(make_policy, bytes_bpe):
    student = make_policy(0, bytes_bpe)
    body = rollout_from_texts(student, [Prompt("the fox")], ["a👩b👩c naïve世"])
    pieces = [bytes_bpe.convert_ids_to_tokens(i) for i in body.completions()[0]]
    assert len(pieces) > len("a👩b👩c naïve世")
    teacher = Says("a")
    batch, _ = planned(OmniOPD(chunks=20, continuations=1, length=1), student, body, teacher)
    for _, prefix, _, _ in teacher.asked:
        assert "a👩b👩c naïve世".startswith(prefix)
        assert "�" not in prefix
    assert all("�" not in a["text"] for a in batch.notes["chunks"].chunks)
    assert len(teacher.asked) < len(pieces), "some tokens start inside a character"


# 11. Invariance.


def test_only_the_similarities_count(student, teacher, rollout):
    """Other texts with the same similarities, in another order, by another tokenizer: the same
    loss.
    """
    a, b, c = (
        planned(
            OmniOPD(**SMALL, similarity=lambda ours, theirs: len(theirs) / 10),
            student,
            rollout,
            Says(*says),
        )[1]
        for says in (("a", "bbb", "cc"), ("世é", "z", "y🙂y"), ("zz", "a", "fox"))
    )
    for name in a:
        assert torch.equal(a[name], b[name])
        assert torch.equal(a[name], c[name])


@given(st.permutations([0.1, 0.7, 0.3, 0.2, 0.6]))
def test_the_order_of_the_continuations_does_not_count(student, rollout, order):
    """Exactly: the sum is rounded once."""
    audits = []
    for values in (order, sorted(order)):
        table = dict(zip("abcde", values, strict=True))
        method = replace(
            OmniOPD(**SMALL),
            continuations=5,
            similarity=lambda ours, theirs, table=table: table[theirs],
        )
        audits.append(
            planned(method, student, rollout.select([0]), Says(*"abcde"))[0].notes["chunks"].chunks
        )
    assert [a["weight"] for a in audits[0]] == [a["weight"] for a in audits[1]]


# 12. What the update really is.


def combinations(teacher: exact.Table, prefixes: int, n: int, length: int):
    """All ways in which a table may continue `n` times from each row `s < prefixes`, with their
    probability.
    """
    rollout = exact.everything(teacher.prompts, teacher.vocab, length)
    law = exact.law(teacher, rollout)
    for some in itertools.product(range(len(law)), repeat=n):
        yield [rollout.texts[i] for i in some], math.prod(law[i].item() for i in some)


@pytest.mark.parametrize(("n", "alpha"), [(1, 0.0), (1, 4.0), (2, 1.0)])
def test_the_expected_update_by_enumeration(n, alpha):
    """-E[update] = N/(N+a) grad E_y mu(y) + a/(N+a) grad sum_y p(y)^(1+1/C) / (1+1/C), mu the mean
    similarity (V=3, C=2).
    """
    student, teacher = exact.Table.random(3, 2, seed=0), exact.Table.random(3, 2, seed=1)
    method = OmniOPD(chunks=1, continuations=n, length=2, alpha=alpha, beta=0.3)
    got = torch.zeros_like(student.logits)
    for says, chance in combinations(teacher, 1, n, 2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got += chance * exact.gradient(
                method, {"student": student, "teacher.text": Says(*says), "reference": teacher}
            )
    body = exact.everything(student.prompts, 3, 2)
    chances = exact.law(teacher, body)
    mu = torch.tensor(
        [
            sum(edit(a, b) * q.item() for b, q in zip(body.texts, chances, strict=True))
            for a in body.texts
        ]
    )
    leaf = student.logits.clone().requires_grad_()
    p = exact.law(replace(student, logits=leaf), body)
    objective = n / (n + alpha) * (p * mu).sum() + alpha / (n + alpha) * (
        p ** (1 + 1 / 2)
    ).sum() / (1 + 1 / 2)
    (want,) = torch.autograd.grad(-objective, leaf)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)
    assert want.abs().max() > 1e-2


def test_the_whole_loss_by_enumeration():
    """Three tokens, a chunk of two where the entropy peaks, the anchor on the third: against a
    plain sum over everything.
    """
    student, reference = exact.Table.random(3, 3, seed=3), exact.Table.random(3, 3, seed=5)
    method = OmniOPD(chunks=1, continuations=2, length=2, alpha=1.5, beta=0.4)
    says = Says("ab", "cb")
    got = exact.gradient(method, {"student": student, "teacher.text": says, "reference": reference})
    body, law = (
        exact.everything(student.prompts, 3, 3),
        exact.law(student, exact.everything(student.prompts, 3, 3)),
    )
    leaf = student.logits.clone().requires_grad_()
    logp, ref = leaf.log_softmax(-1)[0], reference.logp[0]
    total, starts = 0.0, []
    for ids, chance in zip(body.ids.tolist(), law.tolist(), strict=True):
        rows = [student.start(ids[:t]) for t in range(3)]
        peak = [-(logp[s].exp() * logp[s]).sum().item() for s in rows[:2]]
        start = int(peak[1] > peak[0])
        starts.append(start)
        own = [logp[s, i] for s, i in zip(rows, ids, strict=True)]
        chunk = "".join("abc"[i] for i in ids[start : start + 2])
        k = edit(chunk, "ab") + edit(chunk, "cb")
        prior = math.exp(sum(x.item() for x in own[start : start + 2]) / 2)
        free = rows[2] if start == 0 else rows[0]
        kl = (ref[free].exp() * (ref[free] - logp[free])).sum()
        total = total + chance * (-(k + 1.5 * prior) / 3.5 * sum(own[start : start + 2]) + 0.4 * kl)
    (want,) = torch.autograd.grad(total, leaf)
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=1e-12)
    assert set(starts) == {0, 1}


def test_the_weight_concentrates():
    """Var <= N / (4 (N + a)^2), and the mean is the shrunken one, over 300 seeds."""
    student, teacher = exact.Table.random(3, 2, seed=0), exact.Table.random(3, 2, seed=1)
    n, alpha = 5, 1.0
    body = exact.everything(student.prompts, 3, 2).select([4])
    body = student.own(body)
    weights = []
    for seed in range(300):
        method = OmniOPD(chunks=1, continuations=n, length=2, alpha=alpha, seed=seed)
        weights.append(
            planned(method, student, body, teacher, reference=student)[1]["weight"][0, 0].item()
        )
    every = exact.everything(teacher.prompts, 3, 2)
    law = exact.law(teacher, every).tolist()
    mu = sum(q * edit(body.texts[0], text) for q, text in zip(law, every.texts, strict=True))
    prior = math.exp(body.logp.sum().item() / 2)
    spread = torch.tensor(weights).var().item()
    assert spread <= n / (4 * (n + alpha) ** 2)
    assert spread > 1e-4
    mean = (n * mu + alpha * prior) / (n + alpha)
    assert sum(weights) / 300 == pytest.approx(mean, abs=4 * math.sqrt(spread / 300))


# 13. One normaliser for both terms.


def tiny_task(prompts) -> Task:
    return from_records(
        [{"text": p.text, "id": p.id} for p in prompts if p.text], test=0, max_new_tokens=8
    )


def test_both_terms_are_divided_by_one_number(make_policy, prompts):
    """The run's loss is the plain sum over the tokens, over their number."""
    student, scribe = make_policy(0), make_policy(1)
    run = opdlab.distill(
        student,
        scribe,
        tiny_task(prompts),
        method=OmniOPD(**SMALL),
        steps=1,
        batch=3,
        n=2,
        quiet=True,
    )
    step = next(run)
    assert step.metrics["loss"] == pytest.approx(
        step.columns["loss"].double().sum().item() / step.rollout.tokens, rel=1e-5
    )


def test_padding_and_repeats_change_nothing(student, rollout):
    method = OmniOPD(**SMALL)
    one = rollout.select([0, 1, 2])
    wide = replace(
        one,
        **{k: torch.nn.functional.pad(getattr(one, k), (0, 7)) for k in ("ids", "logp", "entropy")},
        learn=None,
        turn=None,
    )
    twice = rollout.select([0, 1, 2, 0, 1, 2])
    losses = []
    for body in (one, wide, twice):
        batch, columns = planned(method, student, body, Says("4", "7 4", " 8 "))
        result = run_loss(method, batch, columns, torch.full((body.tokens,), 1 / body.tokens))
        losses.append((result.loss.sum() / body.tokens).item())
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)


# 14. Wrong numbers of continuations, greedy teachers, bad similarities.


@pytest.mark.parametrize("says", [("a",), ("a", "b"), ("a", "b", "c", "d"), ()])
def test_n_texts_or_an_error_and_nothing_is_trained(says, make_policy, prompts):
    student = make_policy(0)
    run = opdlab.distill(
        student,
        Says(*says),
        tiny_task(prompts),
        method=OmniOPD(**SMALL),
        steps=2,
        batch=3,
        quiet=True,
    )
    before = {k: v.clone() for k, v in student.weights.adapter_state(student.adapter).items()}
    with pytest.raises(
        OpdlabError,
        match=(
            rf"Step 1: the teacher gave {len(says)} texts, not 3 for each of .* Nothing was trained"
        ),
    ):
        next(run)
    assert run.done == 0
    assert run.optimizer.state == {}
    after = student.weights.adapter_state(student.adapter)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_teacher_that_skips_a_chunk_is_an_error(student, rollout):
    class Skips(Says):
        def write(self, *args, **options):
            return super().write(*args, **options)[:-1]

    with pytest.raises(OpdlabError, match="no answer to some chunks, not 3 for each of"):
        planned(OmniOPD(**SMALL), student, rollout, Skips("a", "b", "c"))


def warned(teacher, student, rollout, **options) -> list[str]:
    batch = Batch(rollout, {"student": student, "teacher.text": teacher, "reference": student})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        OmniOPD(**{**SMALL, **options}).plan(batch)
    return [str(w.message) for w in caught]


def test_a_greedy_teacher_is_named(student, rollout):
    assert any(
        "a greedy teacher says the same N times" in said
        for said in warned(Says("4", "4", "4"), student, rollout, temperature=0)
    )
    assert any(
        "Is the teacher greedy?" in said
        for said in warned(Says(" 4 7", " 4 7", " 4 7"), student, rollout)
    )
    exactly = {"similarity": lambda a, b: float(a == b)}
    assert any(
        "No chunk of" in said for said in warned(Says("4", "4", "4"), student, rollout, **exactly)
    )
    assert warned(Says(" 4 7 apples", " 7 . total", " has"), student, rollout) == []


def test_a_similarity_outside_its_range_is_refused(student, rollout):
    for value in (1.5, -0.1, math.nan):
        with pytest.raises(OpdlabError, match=r"came out as .*Return a number from 0"):
            planned(
                OmniOPD(**SMALL, similarity=lambda a, b, value=value: value),
                student,
                rollout,
                Says("a", "b", "c"),
            )


# How long the teacher's texts are.


@pytest.mark.parametrize(
    ("finish", "matched", "keeps"),
    [
        ("length", True, "4 7 + 3 8 = 8 9"),
        ("stop", True, "4 7 + 3 8 = 8 9 ; 8"),
        ("length", False, "4 7 + 3 8 = 8 9 ; 8"),
    ],
)
def test_match_length_cuts_to_the_chunk_but_not_where_the_text_ends(
    finish, matched, keeps, student, prompts
):
    body = replace(
        rollout_from_texts(student, prompts[:1], ["4 7 + 3 8 = 8 5"]), finish=(finish,)
    )  # eight tokens and the end
    teacher = Says("4 7 + 3 8 = 8 9 ; 8")
    batch, _ = planned(
        OmniOPD(continuations=1, length=9, match_length=matched), student, body, teacher
    )
    (audit,) = batch.notes["chunks"].chunks
    assert (audit["start"], audit["text"], audit["continuations"]) == (
        0,
        "4 7 + 3 8 = 8 5",
        [keeps],
    )
    assert audit["similarity"] == [edit("4 7 + 3 8 = 8 5", keeps)]
    assert teacher.asked[0][3] == (16 if matched else 9), (
        "as many tokens as bytes, and one for the end"
    )


def test_teacher_tokens_are_what_is_asked_for(student, rollout):
    teacher = Says("a", "b", "c")
    planned(OmniOPD(**SMALL, teacher_tokens=5), student, rollout, teacher)
    assert {asked[3] for asked in teacher.asked} == {5}


# Teachers and the rest of opdlab.


def test_a_text_only_teacher_is_refused_by_opd_which_names_omniopd(make_policy, prompts):
    scribe = TextOnly(make_policy(1, tokenizers.characters()))
    with pytest.raises(
        MissingPolicy, match=r"'teacher' must grade tokens, but TextOnly only writes\..*OmniOPD"
    ):
        opdlab.distill(make_policy(0), scribe, tiny_task(prompts), method=OPD(), quiet=True)


def test_text_only_equals_the_open_teacher(make_policy, prompts):
    """Another tokenizer, the same seeds: the open model is only ever read, so both runs are the
    same to the last bit.
    """
    ends = []
    for wrap in (lambda policy: policy, TextOnly):
        student, scribe = make_policy(0), make_policy(1, tokenizers.characters())
        run = opdlab.distill(
            student,
            wrap(scribe),
            tiny_task(prompts),
            method=OmniOPD(**SMALL),
            steps=2,
            batch=3,
            quiet=True,
        )
        steps = list(run)
        assert steps[-1].plan["audited"].any()
        ends.append(
            (
                student.weights.adapter_state(student.adapter),
                [s.notes["chunks"]["chunks"] for s in steps],
            )
        )
    assert ends[0][1] == ends[1][1]
    assert all(torch.equal(ends[0][0][k], ends[1][0][k]) for k in ends[0][0])


def test_a_trace_keeps_the_audits(make_policy, prompts, tmp_path):
    run = opdlab.distill(
        make_policy(0),
        make_policy(1),
        tiny_task(prompts),
        method=OmniOPD(**SMALL),
        steps=1,
        batch=3,
        quiet=True,
    )
    next(run).trace().save(tmp_path / "t.parquet")
    trace = opdlab.Trace.load(tmp_path / "t.parquet")
    audits = trace.note(Chunks).chunks
    assert set(audits[0]) == {
        "sample",
        "start",
        "length",
        "text",
        "continuations",
        "similarity",
        "prior",
        "weight",
    }
    audited, weight, similarity = (
        trace.column(name) for name in ("audited", "weight", "similarity")
    )
    assert audited.sum() == 3 * len(audits)
    first = audits[0]
    row = (trace.column("sample") == first["sample"]) & (trace.column("position") == first["start"])
    assert weight[row] == pytest.approx(first["weight"], rel=1e-6)
    assert similarity[row] == pytest.approx(sum(first["similarity"]) / 3, rel=1e-6)
    assert first["weight"] == pytest.approx((sum(first["similarity"]) + first["prior"]) / 4)


def test_a_resumed_run_repeats_the_uninterrupted_one(make_policy, prompts, tmp_path):
    """Places, seeds and questions follow from the step; the settings of the method come back from
    the checkpoint.
    """
    method = OmniOPD(**SMALL, select="random", similarity="rouge1")
    options = {"method": method, "steps": 3, "batch": 2, "quiet": True}
    whole = opdlab.distill(
        make_policy(0), TextOnly(make_policy(1)), tiny_task(prompts), **options
    ).train()
    part = opdlab.distill(
        make_policy(0), TextOnly(make_policy(1)), tiny_task(prompts), save=tmp_path, **options
    )
    next(part), next(part)
    part.save()
    again = opdlab.resume(
        tmp_path, make_policy(0), TextOnly(make_policy(1)), tiny_task(prompts), quiet=True
    )
    assert again.method == method
    next(again)
    states = [run.student.weights.adapter_state(run.student.adapter) for run in (whole, again)]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_weights_are_recomputed_from_the_current_student(make_policy, perturb, rollout):
    """A prior read off the rollout would not move with the student."""
    student = make_policy(0).adapt(4)
    before = planned(OmniOPD(**SMALL), student, rollout, Says("a", "b", "c"))[0]
    perturb(student)
    after = planned(OmniOPD(**SMALL), student, rollout, Says("a", "b", "c"))[0]
    own = compute(lambda rows: rows.logp, {"student": after.states("student")}, after.token)
    audit = after.notes["chunks"].chunks[0]
    chunk = after.spread(own)[audit["sample"], audit["start"] : audit["start"] + 3]
    assert audit["prior"] == pytest.approx(chunk.mean().exp().item(), rel=1e-5)
    assert audit["prior"] != pytest.approx(before.notes["chunks"].chunks[0]["prior"], rel=1e-3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"chunks": 0},
        {"continuations": 0},
        {"length": 0},
        {"teacher_tokens": 0},
        {"alpha": -1},
        {"beta": -0.1},
        {"temperature": -1},
    ],
)
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(ValueError, match=r"is not possible\. Use at least one of each size"):
        OmniOPD(**wrong)


def test_unknown_choices_are_refused():
    for wrong in ({"similarity": "bleu"}, {"select": "first"}):
        with pytest.raises(ValueError, match="Use edit, rouge1 or a function of two texts"):
            OmniOPD(**wrong)
