"""Branches: probabilities, scores and KLs are those of grading the same texts by hand."""

from __future__ import annotations

import json
import os

import pytest
import torch

import opdlab as opd
from opdlab.data.branches import Tree, load_trees, save_trees
from opdlab.diagnose import branch
from opdlab.errors import DamagedFile, InvalidValue
from opdlab.viz import Branches


@pytest.fixture(scope="module")
def world():
    student, teacher, task = opd.load("market")
    rollout = student.sample(task.prompts(3, seed=1), seed=1)
    return student, teacher, task, rollout


@pytest.fixture(scope="module")
def tree(world) -> Tree:
    student, teacher, task, rollout = world
    return branch(rollout, student, teacher, 2, 15, task=task, n=2, tokens=[3], quiet=True)


def test_the_branches_are_the_tokens_that_were_wanted(world, tree):
    student, teacher, _, rollout = world
    one = rollout.select([2])
    p = {"student": student.log_probs(one)[15].exp(), "teacher": teacher.log_probs(one)[15].exp()}
    ids = rollout.completions()[2]
    assert tree.token_ids == ids[:15]
    wanted = [ids[15], int(p["teacher"].argmax()), 3]
    assert [one.token_id for one in tree.branches] == list(dict.fromkeys(wanted))
    assert tree.branches[0].by == "student"
    for found in tree.branches:
        for name in p:
            assert found.p[name] == pytest.approx(float(p[name][found.token_id]), rel=1e-5)


def test_texts_are_scored_and_graded_as_whole_completions(world, tree):
    student, teacher, task, rollout = world
    before = b"".join(opd.score(rollout, student, teacher).sample(2).tokens()[:15]).decode()
    for found in tree.branches[:2]:
        for text in found.texts["teacher"]:
            words = before + found.token + text.text
            whole = opd.rollout_from_texts(
                student, [rollout.prompts[2]], [words.removesuffix("<eos>")]
            )
            assert task.scores(whole.prompts, whole.texts) == [text.score]
            kl = opd.score(whole, student, teacher).column("teacher_reverse_kl")
            assert len(kl) == 16 + text.tokens
            assert text.kl == pytest.approx(float(kl[16:].mean()), abs=1e-5)
    assert found.mean("teacher", "score") in (0.0, 0.5, 1.0)


def test_the_same_seed_writes_the_same_tree(world, tree):
    student, teacher, task, rollout = world
    again = branch(rollout, student, teacher, 2, 15, task=task, n=2, tokens=[3], quiet=True)
    assert again == tree
    greedy = branch(rollout, student, teacher, 2, 15, n=2, temperature=0, quiet=True)
    texts = greedy.branches[0].texts["student"]
    assert texts[0] == texts[1]
    assert texts[0].score is None


def test_a_forced_end_leaves_nothing_to_write(world):
    student, teacher, _, rollout = world
    end = sorted(student.weights.eos)[0]
    grown = branch(rollout, student, teacher, 0, 4, tokens=[end], n=3, quiet=True)
    (text,) = grown.branches[-1].texts["teacher"]
    assert (text.text, text.tokens, text.kl) == ("", 0, None)


def test_what_is_not_there_is_refused(world):
    student, teacher, _, rollout = world
    for options in ({"sample": 9}, {"position": 99}, {"tokens": [10**6]}, {"n": 0}, {"task": 3}):
        given = {"sample": 0, "position": 0, **options}
        with pytest.raises(InvalidValue):
            branch(rollout, student, teacher, quiet=True, **given)


def test_trees_stay_in_a_file_and_are_drawn_without_a_model(world, tree, tmp_path, monkeypatch):
    student, teacher, _, rollout = world
    trace = opd.score(rollout, student, teacher)
    path = save_trees([tree], tmp_path / "trees.json")
    assert load_trees(path) == [tree]
    assert os.listdir(tmp_path) == ["trees.json"]
    monkeypatch.setattr(torch.nn.Module, "__call__", None)  # no model may run
    view = Branches(trace, path, sample=2)
    assert view.trees == {15: tree}
    assert len(view.table) == 2 * len(tree.branches)
    assert Branches(trace, path, sample=2).data()["trees"] == view.data()["trees"]


@pytest.mark.parametrize(
    "text", ["", "[]", '{"format": 1}', '{"format": 1, "trees": [{}]}', "[" * 99999]
)
def test_a_damaged_file_is_said(tmp_path, text):
    (tmp_path / "t.json").write_text(text, encoding="utf-8")
    with pytest.raises(DamagedFile, match="no file of trees"):
        load_trees(tmp_path / "t.json")


def test_a_tree_of_another_text_is_refused(world, tree):
    student, teacher, _, rollout = world
    trace = opd.score(rollout, student, teacher)
    stored = json.loads(json.dumps(tree.token_ids))
    other = Tree(2, 15, [*stored[:-1], stored[-1] + 1], tree.branches)
    with pytest.raises(InvalidValue, match="another text"):
        Branches(trace, [other], sample=2)
    with pytest.raises(InvalidValue):
        save_trees([3], "t.json")


def test_a_live_view_grows_trees(world):
    student, teacher, task, rollout = world
    trace = opd.score(rollout, student, teacher)
    policies = {"student": student, "teacher": teacher}
    view = Branches(trace, policies=policies, rollout=rollout, task=task, n=1)
    found = view.answer({"row": 2})
    assert found["row"] == 2
    assert set(view.trees) == {2}
    assert {one["name"] for one in found["branches"][0]["writers"]} == {"student", "teacher"}
    with pytest.raises(opd.OpdlabError, match="tokens 0 to"):
        view.answer({"row": 999})
