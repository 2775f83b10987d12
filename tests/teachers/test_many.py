"""Several teachers: each grades its own rows, as it would alone; the report; the refusals."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import opdlab as opd
from opdlab import MultiTeacher, TopK, exact
from opdlab.engine.batch import Batch
from opdlab.errors import (
    InvalidValue,
    MissingPolicy,
    OpdlabError,
    PartialDistribution,
    UnknownOption,
)
from opdlab.losses import DIVERGENCES
from opdlab.models.graded import TopLogprobs
from opdlab.tasks.market import model
from opdlab.teachers import LogprobServer, TextOnly

NAMES = ("maths", "style")
SIZES = {"batch": 4, "seed": 3, "quiet": True, "max_new_tokens": 12}


def prompts(n: int = 4) -> list[opd.Prompt]:
    """Problems with a subject, by turns."""
    drawn = opd.tasks.market().prompts(n, seed=1)
    return [replace(p, metadata={"subject": NAMES[i % 2]}) for i, p in enumerate(drawn)]


def task(n: int = 12) -> opd.Task:
    return opd.tasks.from_records(
        prompts(n), test=0, verify=opd.tasks.market().verify, max_new_tokens=12
    )


def trio() -> tuple[opd.Policy, opd.Policy, opd.Policy]:
    return model("student"), model("teacher"), model("novice")


class Counted:
    """A teacher that remembers which prompts it graded."""

    def __init__(self, policy: opd.Policy) -> None:
        self.policy, self.asked = policy, []

    def grade(self, rollout: opd.Rollout):
        self.asked += [prompt.metadata["subject"] for prompt in rollout.prompts]
        return self.policy.grade(rollout)


def tables(seed: int = 0) -> dict[str, exact.Table]:
    names = ("student", "maths", "style")
    return {name: exact.Table.random(4, 2, 2, seed=seed + i) for i, name in enumerate(names)}


def test_each_row_is_graded_by_its_teacher_alone():
    student, teacher, novice = trio()
    maths, style = Counted(teacher), Counted(novice)
    both = MultiTeacher({"maths": maths, "style": style}, route="subject")
    rollout = student.sample(prompts(), n=2, max_new_tokens=8, seed=0)
    got = both.grade(rollout)
    assert (maths.asked, style.asked) == (["maths"] * 4, ["style"] * 4)
    alone = {"maths": teacher.grade(rollout).logp(), "style": novice.grade(rollout).logp()}
    row = torch.arange(len(rollout)).repeat_interleave(rollout.lengths)
    for i, logp in enumerate(got.logp()):
        want = alone[NAMES[int(row[i]) // 2 % 2]][i]
        torch.testing.assert_close(logp, want, rtol=1e-4, atol=1e-5)
    index = torch.tensor([5, 0, 3])
    torch.testing.assert_close(got.part(index).logp(), got.logp()[index])
    torch.testing.assert_close(got.part(slice(2, 9)).logp(), got.logp()[2:9])


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_gradient_is_that_of_each_teacher_on_its_prompts(name):
    """Exact tables: prompt 0 has the one teacher, prompt 1 the other."""
    policies = tables()
    by_number = {id(prompt): NAMES[i] for i, prompt in enumerate(policies["student"].prompts)}
    many = MultiTeacher({n: policies[n] for n in NAMES}, route=lambda p: by_number[id(p)])
    got = exact.gradient(opd.OPD(name), {"student": policies["student"], "teacher": many})
    for i, teacher in enumerate(NAMES):
        alone = {"student": policies["student"], "teacher": policies[teacher]}
        want = exact.gradient(opd.OPD(name), alone)
        torch.testing.assert_close(got[i], want[i], rtol=1e-6, atol=1e-9)
        assert want[i].norm() > 1e-3


@pytest.mark.parametrize(
    ("mixture", "divergence"), [("arithmetic", "forward_kl"), ("geometric", "reverse_kl")]
)
def test_a_mixture_has_the_gradient_of_the_weighted_divergences(mixture, divergence):
    policies, weights = tables(5), {"maths": 0.6, "style": 0.2}
    many = MultiTeacher({n: policies[n] for n in NAMES}, route=weights, mixture=mixture)
    method = opd.OPD(divergence)
    got = exact.gradient(method, {"student": policies["student"], "teacher": many})
    alone = [
        exact.gradient(method, {"student": policies["student"], "teacher": policies[name]})
        for name in NAMES
    ]
    torch.testing.assert_close(got, 0.75 * alone[0] + 0.25 * alone[1], rtol=1e-5, atol=1e-7)


def test_mixtures_are_distributions():
    student, teacher, novice = trio()
    rollout = student.sample(prompts(2), max_new_tokens=6, seed=0)
    one, two = teacher.log_probs(rollout), novice.log_probs(rollout)
    for mixture, want in {
        "arithmetic": (0.3 * one.exp() + 0.7 * two.exp()).log(),
        "geometric": (0.3 * one + 0.7 * two).log_softmax(-1),
    }.items():
        route = {"maths": 3, "style": 7}
        many = MultiTeacher({"maths": teacher, "style": novice}, route=route, mixture=mixture)
        torch.testing.assert_close(many.grade(rollout).logp(), want, rtol=1e-4, atol=1e-5)
    sole = MultiTeacher({"maths": teacher, "style": novice}, route={"maths": 2, "style": 0})
    assert torch.equal(sole.grade(rollout).logp(), one)


def test_a_run_reports_each_teacher():
    student, teacher, novice = trio()
    many = MultiTeacher({"maths": teacher, "style": novice}, route="subject")
    run = opd.distill(student, many, task(), steps=2, **SIZES).train()
    history = run.history
    assert (history["maths/rows"] + history["style/rows"] == 4).all()
    kl = history["maths/reverse_kl"] * history["maths/tokens"]
    kl = (kl + history["style/reverse_kl"] * history["style/tokens"]) / history["tokens"]
    assert kl.tolist() == pytest.approx(history["reverse_kl"].tolist(), rel=1e-5)
    report = many.report(history)
    assert report.index.tolist() == ["maths", "style"]
    assert report["rows"].sum() == 8
    assert (report["grade_s"] > 0).all()
    assert (report["paid"] == 0).all()
    assert report["reward"].between(0, 1).all()
    assert many.report(history, last=1)["rows"].sum() == 4


def test_adapters_on_one_base_teach():
    """Two adapters beside the student's own, on one set of weights."""
    student = model("student")
    members = {}
    for seed, name in enumerate(NAMES):
        members[name] = student.frozen().adapt(4, seed=seed)
        for value in members[name].weights.adapter_state(str(members[name].adapter)).values():
            torch.nn.init.normal_(value, std=0.1, generator=torch.Generator().manual_seed(seed))
    many = MultiTeacher(members, route="subject")
    rollout = student.sample(prompts(2), max_new_tokens=6, seed=0)
    before = many.grade(rollout).logp()
    run = opd.distill(student, many, task(), steps=2, lr=1e-2, **SIZES).train()
    assert torch.equal(many.grade(rollout).logp(), before)  # teachers stay
    assert run.history["loss"].gt(0.01).all()
    assert len({policy.weights for policy in (student, *members.values())}) == 1


def test_hinted_views_read_the_hints_of_their_own_prompts_alone():
    student, teacher, novice = trio()
    asked = [p if p.metadata["subject"] == "maths" else replace(p, hint=None) for p in prompts(8)]
    told = opd.tasks.from_records(asked, test=0, max_new_tokens=8)
    many = MultiTeacher({"maths": teacher.seeing(), "style": novice}, route="subject")
    next(opd.distill(student, many, told, steps=1, **SIZES))
    wrong = MultiTeacher({"maths": novice, "style": teacher.seeing()}, route="subject")
    with pytest.raises(opd.errors.MissingHint, match=r"Teacher 'style': Prompt .* has no hint"):
        opd.distill(model("student"), wrong, told, steps=1, **SIZES)
    hinted = MultiTeacher({"maths": teacher, "style": novice}, route="subject")
    method = opd.method(needs=("teacher+hint",))(
        lambda rows: opd.losses.reverse_kl(rows.student, rows["teacher+hint"])
    )
    run = opd.distill(model("student"), hinted, task(), method=method, steps=1, **SIZES)
    next(run)
    assert run.history["maths/rows"][0] == 2


def test_each_prompts_teacher_writes():
    student, teacher, novice = trio()
    many = MultiTeacher({"maths": teacher, "style": TextOnly(novice)}, route="subject")
    asked = prompts()
    texts = many.write(asked, 2, max_new_tokens=8, temperature=0.0)
    for i, prompt in enumerate(asked):
        author = TextOnly(teacher if i % 2 == 0 else novice)
        assert texts[i] == author.write([prompt], 2, max_new_tokens=8, temperature=0.0)[0]
    run = opd.distill(student, many, task(), method=opd.SequenceKD(), steps=1, **SIZES)
    assert next(run).rollout.writer == ("teacher",) * 4
    seeded = [many.write(asked, 1, max_new_tokens=8, seed=4)]
    halves = [asked[:2], asked[2:]]
    places = [[0, 1], [2, 3]]
    parts = [
        many.write(h, 1, max_new_tokens=8, seed=4, places=p)
        for h, p in zip(halves, places, strict=True)
    ]
    assert [*parts[0], *parts[1]] == seeded[0]  # as several processes ask


def test_a_server_among_local_teachers(wire):
    """All grades are reduced to the k tokens that the server gives; tokens are paid."""
    _, _, url = wire
    student, _, novice = trio()
    served = LogprobServer(url, k=6, cache=None, quiet=True)
    many = MultiTeacher({"maths": served, "style": novice}, route="subject")
    method = opd.OPD("forward_kl", top_k=TopK(6, by="teacher"))
    run = opd.distill(student, many, task(), method=method, steps=2, **SIZES)
    step = next(run)
    graded = step.planned.batch.states("teacher").logp()
    assert isinstance(graded, TopLogprobs)
    rows = torch.arange(4).repeat_interleave(step.rollout.lengths)
    names = [prompt.metadata["subject"] for prompt in step.rollout.prompts]
    local = {"maths": model("teacher"), "style": novice}
    for i in range(len(graded.token)):
        whole = local[names[rows[i]]].log_probs(step.rollout)[i]
        want = whole.topk(6).values
        torch.testing.assert_close(graded.top[i], want, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(graded.sampled[i], whole[graded.token[i]], rtol=1e-3, atol=1e-3)
    run.train()
    report = many.report(run.history)
    assert report["paid"]["maths"] == served.text.service.budget.spent.tokens
    assert report["paid"]["style"] == 0
    assert set(run.history.columns) >= {"maths/reverse_kl", "style/paid"}
    with pytest.raises(PartialDistribution, match="likeliest of"):
        opd.distill(model("student"), many, task(), method=opd.OPD(), steps=1, **SIZES)
    with pytest.raises(MissingPolicy, match=r"mixes several teachers .* 'maths' gives"):
        MultiTeacher({"maths": served, "style": novice}, route={"maths": 1, "style": 1})


def test_what_does_not_fit_is_refused():
    student, teacher, novice = trio()
    both = {"maths": teacher, "style": novice}
    with pytest.raises(InvalidValue, match="two teachers or more"):
        MultiTeacher({"maths": teacher})
    with pytest.raises(InvalidValue, match="teacher named 'a b'"):
        MultiTeacher({"a b": teacher, "c": novice})
    with pytest.raises(InvalidValue, match="another MultiTeacher"):
        MultiTeacher({"a": MultiTeacher(both), "b": novice})
    with pytest.raises(InvalidValue, match="arithmetic or geometric"):
        MultiTeacher(both, mixture="mean")
    with pytest.raises(InvalidValue, match="route=3"):
        MultiTeacher(both, route=3)
    for weights in ({"maths": -1}, {"maths": 0}, {"maths": math.nan}, {"other": 1}, {}):
        with pytest.raises(InvalidValue, match="numbers of at least 0"):
            MultiTeacher(both, route=weights)
    with pytest.raises(InvalidValue, match="has teacher = None, and the teachers are maths, style"):
        opd.distill(student, MultiTeacher(both), task(), steps=1, **SIZES)
    with pytest.raises(InvalidValue, match="has the route 'Maths'"):
        opd.distill(student, MultiTeacher(both, lambda p: "Maths"), task(), steps=1, **SIZES)
    scribe = {"maths": teacher, "style": model("scribe")}
    with pytest.raises(opd.errors.TokenizerMismatch, match=r"Teacher 'style': The style's token"):
        opd.distill(student, MultiTeacher(scribe, "subject"), task(), steps=1, **SIZES)
    silent = {"maths": teacher, "style": TextOnly(novice)}
    with pytest.raises(MissingPolicy, match=r"Teacher 'style': .*only writes"):
        opd.distill(student, MultiTeacher(silent, "subject"), task(), steps=1, **SIZES)
    shared = MultiTeacher(both, route={"maths": 1, "style": 1})
    with pytest.raises(MissingPolicy, match="one text has one author"):
        shared.write(prompts(2), max_new_tokens=2)


def test_teachers_of_other_tokens_read_their_own_prompts_by_spans():
    student, teacher, _ = trio()
    scribe = model("scribe")
    many = MultiTeacher({"maths": teacher, "style": scribe}, route="subject").by_bytes()
    rollout = student.sample(prompts(4), max_new_tokens=12, seed=2)
    method = opd.SpanOPD()

    def plan(one, rows):
        batch = Batch(rollout.select(rows), {"student": student, "teacher.spans": one})
        return method.plan(batch)["advantage"].values

    whole = plan(many, range(4))
    for single, rows in ((teacher, [0, 2]), (scribe, [1, 3])):
        assert [p.metadata["subject"] for p in rollout.select(rows).prompts] == [
            {id(teacher): "maths", id(scribe): "style"}[id(single)]
        ] * 2
        alone = plan(single, rows)
        torch.testing.assert_close(whole[rows][:, : alone.shape[1]], alone)
    assert (whole != 0).any(1).all()
    given = MultiTeacher({"maths": teacher, "style": scribe}, route="subject")
    run = opd.distill(student, given, task(), method=opd.SpanOPD(), steps=1, **SIZES).train()
    report = given.report(run.history)
    assert (report["rows"] > 0).all()
    assert (report["grade_s"] > 0).all()
    mixed = MultiTeacher({"maths": teacher, "style": scribe}, {"maths": 1, "style": 1})
    with pytest.raises(MissingPolicy, match="no span whose probabilities could be mixed"):
        opd.distill(student, mixed, task(), method=opd.SpanOPD(), steps=1, **SIZES)
    half = MultiTeacher(
        {"maths": teacher, "style": scribe}, lambda prompt: {"maths": 0.5, "style": 0.5}
    )
    with pytest.raises(MissingPolicy, match="no span whose probabilities could be mixed"):
        opd.distill(student, half, task(), method=opd.SpanOPD(), steps=1, **SIZES)


def test_a_route_that_changes_its_mind_is_refused():
    student, teacher, novice = trio()
    both = {"maths": teacher, "style": novice}
    turn = iter(range(10_000))
    counts = MultiTeacher(both, lambda prompt: ["maths", "style"][next(turn) % 2])
    with pytest.raises(InvalidValue, match=r"other teachers than before: (maths|style) 1 and"):
        opd.distill(student, counts, task(), steps=1, **SIZES)
    now = {"name": "maths"}
    later = MultiTeacher(both, lambda prompt: now["name"])
    run = opd.distill(student, later, task(), steps=1, **SIZES)
    now["name"] = "style"
    with pytest.raises(InvalidValue, match="without randomness or a counter"):
        next(run)


def test_unknown_arguments_are_refused_in_words():
    with pytest.raises(UnknownOption, match=r"MultiTeacher: got an unexpected keyword .*weights"):
        MultiTeacher({}, weights=(1, 2))


def test_a_failing_teacher_is_named():
    class Broken:
        def grade(self, rollout):
            raise OpdlabError("out of order")

    student, teacher, _ = trio()
    many = MultiTeacher({"maths": teacher, "style": Broken()}, route="subject")
    run = opd.distill(student, many, task(), steps=1, **SIZES)
    with pytest.raises(OpdlabError, match=r"Teacher 'style': out of order"):
        next(run)


def test_a_run_that_goes_on_must_have_the_same_teachers(tmp_path):
    student, teacher, novice = trio()
    both = {"maths": teacher, "style": novice}
    options = {"steps": 2, "save": tmp_path, "save_every": 1, **SIZES}
    opd.distill(student, MultiTeacher(both, "subject"), task(), **options).train()
    for other in (
        MultiTeacher({"maths": novice, "style": teacher}, "subject"),
        MultiTeacher(both, {"maths": 1, "style": 1}),
        teacher,
    ):
        with pytest.raises(OpdlabError, match="teacher"):
            opd.resume(tmp_path, model("student"), other, task(), quiet=True)
    run = opd.resume(tmp_path, model("student"), MultiTeacher(both, "subject"), task(), quiet=True)
    assert run.done == 2
    assert run.teacher.report(run.history)["rows"].sum() == 8
