"""`transformers serve`, started as a user starts it, on the shipped scribe: another tokenizer,
another handwriting, only texts.
"""

from __future__ import annotations

import json

import pytest

import opdlab as opd
from opdlab.methods import OmniOPD, SequenceKD
from opdlab.tasks.market import data, model
from opdlab.teachers import LogprobServer, TextOnly, TextServer
from opdlab.teachers.greeting import SAMPLE

TASK = opd.tasks.market()
PROMPTS = TASK.prompts(3)
HALF = ["7 3 + 2 6 =", "6 8 -", "8 4 - 4 3 ="]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One for all tests, so that what was asked is not asked again."""
    return tmp_path_factory.mktemp("cache") / "c.sqlite"


@pytest.fixture
def teacher(scribe_url, cache) -> TextServer:
    one = TextServer(scribe_url, cache=cache, quiet=True)
    one.check(model("student"), PROMPTS, 24)
    return one


def test_it_is_met_as_it_is(teacher):
    """It names itself with a revision that it does not know when asked for it, gives one text
    whatever n says, and is greedy unless told otherwise.
    """
    assert teacher.model == str(data() / "scribe")
    assert teacher._names == (str(data() / "scribe") + "@main",)
    assert not teacher._several
    assert teacher.extra == SAMPLE
    assert json.loads(SAMPLE["generation_config"])["do_sample"] is True


def test_greedy_texts_are_those_of_the_local_model(teacher):
    local = TextOnly(model("scribe"))
    for prefixes in (None, HALF):
        options = {"prefixes": prefixes, "max_new_tokens": 60, "temperature": 0.0}
        assert teacher.write(PROMPTS, **options) == local.write(PROMPTS, **options)
    assert teacher.way == "completion"


def test_exactly_n_samples_and_not_n_copies(teacher):
    """At temperature 1 the scribe has two handwritings; at 4 it rambles."""
    texts = teacher.write(PROMPTS, 3, max_new_tokens=6, temperature=4.0)
    assert [len(row) for row in texts] == [3, 3, 3]
    assert len({text for row in texts for text in row}) >= 8


def test_it_gives_no_log_probs_and_the_error_says_what_works(scribe_url):
    one = LogprobServer(scribe_url, cache=None, quiet=True)
    with pytest.raises(
        opd.errors.TeacherError,
        match=(
            r"gives no log-probs of a prompt that can be used\..*as a TextServer .*OmniOPD,"
            r" SequenceKD"
        ),
    ):
        one.check(model("student"), PROMPTS, 24)


def test_sequence_distillation_from_it(teacher):
    run = opd.distill(
        model("student"),
        teacher,
        TASK,
        method=SequenceKD(),
        batch=3,
        steps=2,
        max_new_tokens=12,
        quiet=True,
    )
    assert [step.rollout.writer for step in run] == [("teacher",) * 3] * 2
    assert run.history["loss"].notna().all()


def test_omniopd_from_it(teacher):
    """Two steps over HTTP; every chunk has its texts, and they go on from the student's."""
    method = OmniOPD(length=2, chunks=2, continuations=2, similarity="rouge1", match_length=True)
    run = opd.distill(
        model("student"), teacher, TASK, method=method, batch=3, steps=2, quiet=True, seed=1
    )
    before = {name: p.detach().clone() for name, p in run.parameters.items()}
    chunks = [chunk for step in run for chunk in step.notes["chunks"]["chunks"]]
    assert len(chunks) >= 8
    assert all(len(chunk["continuations"]) == 2 for chunk in chunks)
    assert max(score for chunk in chunks for score in chunk["similarity"]) == 1.0
    assert any(not p.equal(before[name]) for name, p in run.parameters.items())
