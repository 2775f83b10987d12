"""Check the split of a hinted teacher's lead against the exact tabular world, closed forms, and
real policies by hand.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from opdlab import DOPD, Policy, Prompt, exact, load, tasks
from opdlab.diagnose import information_floor, privilege
from opdlab.diagnose.privilege import SHOWN, Privilege, split_gap
from opdlab.diagnose.tables import to_html
from opdlab.engine.rows import Rows
from opdlab.errors import MissingHint, MissingPolicy
from opdlab.losses.divergences import forward_kl
from opdlab.methods import dopd
from opdlab.teachers import TextOnly

WORLD = exact.privilege.World(vocab=5, error=0.2)  # its probabilities are multiples of 1/20
NAMES = ("student", "teacher", "teacher+hint", "student+hint")


@pytest.fixture(scope="module")
def batch() -> tuple[Rows, torch.Tensor, tuple[float, float]]:
    """Tokens of the world, each as often as it is likely: their types, and the thresholds that DOPD
    would route by.
    """
    kind, hint, token = WORLD.tokens(20)
    rows = Rows({name: WORLD.logp(name)[kind, hint] for name in NAMES}, token)
    pair = [rows.logp_of(name) for name in ("teacher+hint", "student+hint")]
    return rows, kind, dopd.thresholds(*pair, torch.ones(len(token), dtype=torch.bool))


def by_type(values: torch.Tensor, kind: torch.Tensor) -> dict[str, float]:
    return {name: float(values[kind == i].mean()) for i, name in enumerate(exact.privilege.TYPES)}


def test_every_part_is_the_worlds_own_exact_mean(batch):
    rows, kind, limits = batch
    got, want = split_gap(rows, limits, DOPD()), WORLD.split()
    pairs = {
        "gap": want.gap,
        "capability_told": want.capability_with_hint,
        "information_student": want.information_of_student,
        "information_teacher": want.information_of_teacher,
        "capability_bare": want.capability_without_hint,
        "interaction": want.interaction,
        "capability": want.capability,
        "information": want.information,
    }
    for name, value in pairs.items():
        assert by_type(got[name], kind) == pytest.approx(WORLD.mean(value), abs=1e-9), name


def test_both_telescopes_and_the_shapley_split_add_up_to_the_gap(batch):
    rows, _, limits = batch
    got = split_gap(rows, limits, DOPD())
    for parts in (
        ("capability_told", "information_student"),
        ("information_teacher", "capability_bare"),
        ("capability", "information"),
    ):
        torch.testing.assert_close(got[parts[0]] + got[parts[1]], got["gap"], rtol=0, atol=1e-9)
    torch.testing.assert_close(
        got["interaction"],
        got["information_teacher"] - got["information_student"],
        rtol=0,
        atol=1e-9,
    )


def test_the_reverse_kl_splits_over_whole_distributions(batch):
    """KL(S_x || T_xp) = KL(S_x || S_xp) + E log S_xp / T_xp, and each is the mean over y of its
    sampled part.
    """
    rows, kind, limits = batch
    got = split_gap(rows, limits, DOPD())
    torch.testing.assert_close(
        got["reverse_kl_information"] + got["reverse_kl_capability"],
        got["reverse_kl"],
        rtol=0,
        atol=1e-9,
    )
    assert by_type(got["reverse_kl"], kind) == pytest.approx(by_type(-got["gap"], kind), abs=1e-9)
    assert by_type(got["reverse_kl_capability"], kind) == pytest.approx(
        by_type(-got["capability_told"], kind), abs=1e-9
    )


def test_what_each_type_of_token_shows(batch):
    rows, kind, limits = batch
    got = {
        name: by_type(value.double(), kind)
        for name, value in split_gap(rows, limits, DOPD()).items()
    }
    assert got["information"]["C"] == pytest.approx(0, abs=1e-9)
    assert got["capability"]["C"] == pytest.approx(got["gap"]["C"])
    assert got["capability"]["I"] == pytest.approx(0, abs=1e-9)
    assert got["information"]["I"] == pytest.approx(got["gap"]["I"])
    assert abs(got["interaction"]["B"]) > 0.5
    assert (
        max(
            abs(got[name]["X"])
            for name in ("gap", "capability", "information", "reverse_kl", "floor")
        )
        < 1e-9
    )
    assert got["floor"]["I"] == pytest.approx(
        exact.privilege.floor(WORLD.vocab, WORLD.error).forward_kl
    )
    assert got["forward_kl"]["I"] == pytest.approx(
        got["floor"]["I"]
    )  # the uniform student is at the floor
    assert got["floor"]["C"] == pytest.approx(0, abs=1e-9)


def test_the_teachers_weight_is_the_mean_weight_of_its_routes(batch):
    """Exact over y for every prefix: on a batch that holds each y as often as it is likely, both
    means agree.
    """
    rows, kind, limits = batch
    for method in (DOPD(), DOPD(light=0.25), DOPD(hs="teacher")):
        got = split_gap(rows, limits, method)
        sampled = torch.zeros(len(kind), dtype=torch.float64)
        for regime, weight in {0: method.light, 2: 1.0, 3: float(method.hs == "teacher")}.items():
            sampled[got["route"] == regime] = weight
        assert by_type(got["teacher_weight"], kind) == pytest.approx(
            by_type(sampled, kind), abs=1e-9
        )
    routes = dopd.route(
        rows.logp_of("teacher+hint"),
        rows.logp_of("student+hint"),
        torch.ones(len(kind), dtype=torch.bool),
    )
    assert torch.equal(got["route"], routes)


@pytest.fixture(scope="module")
def pair(make_policy, words) -> tuple[Policy, Policy]:
    return make_policy(3, words), make_policy(4, words)


def test_on_real_policies_every_number_is_that_of_full_log_probs(pair, prompts):
    student, teacher = pair
    rollout = student.sample(prompts, 2, max_new_tokens=5, seed=2)
    result = privilege(student, teacher, rollout=rollout)
    four = {
        "student": student,
        "teacher": teacher,
        "teacher+hint": teacher.seeing(),
        "student+hint": student.seeing(),
    }
    logp = {name: policy.log_probs(rollout) for name, policy in four.items()}
    own = {
        name: value.gather(-1, rollout.ids[rollout.mask][:, None])[:, 0]
        for name, value in logp.items()
    }
    tokens = result.tokens
    np.testing.assert_allclose(tokens["gap"], own["teacher+hint"] - own["student"], atol=1e-5)
    np.testing.assert_allclose(
        tokens["capability_told"] + tokens["information_student"], tokens["gap"], atol=1e-5
    )
    np.testing.assert_allclose(
        tokens["capability_bare"] + tokens["information_teacher"], tokens["gap"], atol=1e-5
    )
    np.testing.assert_allclose(
        tokens["floor"], forward_kl(logp["teacher"], logp["teacher+hint"]), atol=1e-5
    )
    np.testing.assert_allclose(
        tokens["reverse_kl_information"] + tokens["reverse_kl_capability"],
        tokens["reverse_kl"],
        atol=1e-5,
    )
    assert result.table.loc["all", "gap"] == pytest.approx(tokens["gap"].mean())
    assert result.table.loc["all", ["LH", "LL", "HT", "HS"]].sum() == pytest.approx(1)


def test_without_information_nothing_is_information(pair, prompts):
    """A hint that changes no prompt: the four policies are two, and the whole gap is capability."""
    student, teacher = pair
    result = privilege(student, teacher, hint=lambda prompt: prompt, prompts=prompts)
    assert result.tokens[["information", "interaction", "floor"]].abs().max().max() < 1e-6
    np.testing.assert_allclose(result.tokens["capability"], result.tokens["gap"], atol=1e-6)


def test_a_self_teacher_has_no_capability_to_give(pair, prompts):
    student = pair[0]
    result = privilege(student, student.frozen(), prompts=prompts)
    assert result.tokens[["capability", "interaction"]].abs().max().max() < 1e-5
    assert result.tokens["information"].abs().max() > 0.1


def test_what_the_teacher_already_sees_is_the_hint(pair, prompts):
    student, teacher = pair
    rollout = student.sample(prompts, max_new_tokens=4, seed=0)
    implied = privilege(student, teacher.seeing("say sum"), rollout=rollout)
    given = privilege(student, teacher, hint="say sum", rollout=rollout)
    np.testing.assert_array_equal(implied.tokens["gap"], given.tokens["gap"])
    np.testing.assert_array_equal(
        implied.tokens["capability_bare"], given.tokens["capability_bare"]
    )


def test_controls_try_another_prompts_hint_and_none(pair):
    student, teacher = pair
    prompts = [
        Prompt(text, hint=hint)
        for text, hint in (
            ("ana has 4", "x ana 4"),
            ("ben", "x ben 7 2"),
            ("dan has 1 2 eggs", "x 3"),
        )
    ]
    assert len({tuple(teacher.seeing(p.hint).encode(prompts[0])) for p in prompts}) == 3
    rollout = student.sample(prompts, max_new_tokens=4, seed=0)
    result = privilege(student, teacher, rollout=rollout)
    kinds = result.controls.xs("all", level="type")
    assert kinds.index.tolist() == ["own", "another's", "none"]
    assert kinds.loc["none", ["student_moves", "teacher_moves"]].tolist() == [0, 0]
    assert kinds.loc["none", "gap"] == pytest.approx(
        result.tokens["capability_bare"].mean(), abs=1e-6
    )
    assert kinds.loc["own", "gap"] == pytest.approx(result.tokens["gap"].mean(), abs=1e-6)
    hints = [p.hint for p in prompts]
    swapped = replace(
        rollout,
        prompts=tuple(
            replace(p, hint=h) for p, h in zip(prompts, hints[1:] + hints[:1], strict=True)
        ),
    )
    own = rollout.ids[rollout.mask][:, None]
    elsewhere = teacher.seeing().log_probs(swapped).gather(-1, own) - student.log_probs(
        rollout
    ).gather(-1, own)
    assert kinds.loc["another's", "gap"] == pytest.approx(elsewhere.mean().item(), abs=1e-5)
    constant = privilege(student, teacher, hint="say sum", rollout=rollout).controls.xs(
        "all", level="type"
    )
    assert constant.index.tolist() == ["own", "none"]  # a text for all has no other


@pytest.mark.parametrize(
    ("own", "others", "reading"),
    [
        ([0.02, 0.02], [1.12, 1.6], "another prompt's by 1.120: it did not need its hint, and"),
        ([0.6, 2.0], [0.7, 2.1], "another prompt's by 0.700: it repeats its hint, right or wrong."),
        ([0.6, 2.0], [0.1, 0.3], "another prompt's by 0.100: it uses a hint where it fits"),
        ([0.001, 0.0], [0.002, 0.0], "another prompt's by 0.002: hints hardly move it."),
        # One type follows wrong hints, and the mean over all tokens does not say so.
        ([1.0, 0.0], [1.0, 0.8], "another prompt's by 0.800 (tokens of type copy): it did not"),
    ],
)
def test_the_sentence_reads_the_control(own, others, reading):
    kinds = ["all", "copy"]
    index = pd.MultiIndex.from_product(
        [kinds, ["own", "another's", "none"]], names=["type", "hint"]
    )
    moves = [value for pair in zip(own, others, [0.0, 0.0], strict=True) for value in pair]
    tokens = pd.DataFrame(0.0, index=[0], columns=[*SHOWN])
    found = Privilege(tokens, pd.DataFrame({"teacher_moves": moves}, index=index), 0.0)
    assert reading in found.sentence
    without = Privilege(tokens, found.controls.drop("another's", level="hint"), 0.0)
    for nothing in (without, Privilege(tokens, pd.DataFrame(), 0.0)):
        assert "Its own hint" not in nothing.sentence


def test_a_teacher_that_follows_wrong_hints_is_named():
    """The teacher of the plain market knows the answer, and leaves it where a hint says so."""
    found = privilege(*load("market"), prompts=4)
    moves = found.controls["teacher_moves"]["all"]
    assert moves["own"] < 0.1
    assert moves["another's"] > 0.5
    assert "It grades for copying" in found.sentence


def test_a_student_that_reads_hints_is_reported_as_a_leak(pair, prompts):
    student, teacher = pair
    assert privilege(student, teacher, prompts=prompts, controls=False).leak == 0
    leaky = privilege(student.seeing(), teacher, prompts=prompts, controls=False)
    assert leaky.leak == 1
    assert "LEAK: for 100% of the prompts the deployed student reads the hint" in str(leaky)
    ruled = privilege(
        student.seeing("say sum"), teacher, prompts=prompts, controls=False
    )  # a rule for all is no leak
    assert ruled.leak == 0


def test_the_information_floor_is_the_mutual_information(pair, prompts):
    student, teacher = pair
    rollout, hints = student.sample(prompts, max_new_tokens=3, seed=5), ["1", "2 3", "sum", "eggs"]
    logp = torch.stack(
        [teacher.seeing(hint).log_probs(rollout) for hint in hints], 1
    ).double()  # [tokens, hints, V]
    got = information_floor(teacher, rollout, hints)
    np.testing.assert_allclose(got, exact.privilege.information(logp), atol=1e-5)
    assert (got > 0).all()
    assert (got < math.log(4)).all()
    mean = logp.exp().mean(1).log()
    nobody = student.log_probs(
        rollout
    ).double()  # E_p KL(T_p || S) = I + KL(mean || S): nobody gets under the floor
    told = forward_kl(nobody[:, None], logp).mean(1)
    np.testing.assert_allclose(told, torch.tensor(got) + forward_kl(nobody, mean), atol=1e-5)
    assert information_floor(teacher, rollout, ["1", "1"]) == pytest.approx(0, abs=1e-6)
    with pytest.raises(MissingHint, match="got 1 hints"):
        information_floor(teacher, rollout, ["1"])


def test_a_student_under_the_floor_has_memorised_hints(pair, prompts):
    """No student without the hint can be there, unless it knows the hints of these prompts: here,
    since it is told them.
    """
    student, teacher = pair
    honest = privilege(student, teacher, prompts=prompts, controls=False)
    assert "under that floor" not in str(honest)
    knowing = privilege(
        teacher.seeing(),
        teacher,
        hint=lambda prompt: prompt.with_context(prompt.hint or ""),
        prompts=prompts,
        controls=False,
    )
    assert knowing.tokens["forward_kl"].mean() < knowing.tokens["floor"].mean()
    assert "it is under that floor: a sign of memorised hints" in str(knowing)


def test_types_of_the_market_come_from_the_task(student, teacher):
    task = tasks.market(secret=True)
    rollout = student.sample(task.prompts(2), max_new_tokens=4)
    result = privilege(student, teacher, task, rollout=rollout, controls=False)
    assert result.tokens["type"].tolist() == [
        name for row in task.token_types(rollout, student.tokenizer) for name in row
    ]
    assert result.table.index[0] == "all"
    assert "interaction" in result._repr_html_()
    assert repr(result).startswith("Privilege(gap ")


def test_missing_hints_and_teachers_that_take_none_are_errors(pair):
    student, teacher = pair
    with pytest.raises(MissingHint, match="has no hint"):
        privilege(student, teacher, prompts=[Prompt("ana has 2", id="bare")])
    with pytest.raises(MissingPolicy, match="TextOnly takes none"):
        privilege(student, TextOnly(teacher), prompts=[Prompt("ana", hint="1")])


def test_numbers_are_shown_without_powers_of_ten():
    shown = to_html("<b>", pd.DataFrame({"a": [-8.9e-6, 0.01234, 12345.6, float("nan"), -2.5]}))
    assert shown.startswith("<p>&lt;b&gt;</p>")
    assert re.findall(r"<td>(.*?)</td>", shown) == ["0", "0.0123", "12,346", "NaN", "-2.5"]
