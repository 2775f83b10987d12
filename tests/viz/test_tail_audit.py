"""The tail audit without a browser: masses and coarse KLs against full distributions, and what it
says.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from viz.traces import made

import opdlab
from opdlab.errors import OpdlabError, UnknownColumn
from opdlab.losses.divergences import TopK, reverse_kl
from opdlab.models.policy import sample
from opdlab.viz import TailAudit, payload

WORDS = [f"t{i}".encode() for i in range(12)]


def full(trace, name):
    """All of a made trace's distribution: top is as wide as the vocabulary."""
    out = np.full((len(trace), len(trace.meta["vocab"])), -np.inf)
    support, top = trace.column("support"), trace.column(f"{name}_top")
    for i, row in enumerate(support):
        out[i, row[row >= 0]] = top[i, row >= 0]
    return torch.tensor(out)


@pytest.mark.parametrize("by", ["student", "teacher"])
def test_coarse_kls_are_those_of_the_losses(by):
    wide, narrow = made(WORDS, top=100), made(WORDS, top=4)
    audit, logp = (
        TailAudit(narrow, by=by),
        {name: full(wide, name) for name in ("student", "teacher")},
    )
    assert audit.width == 4
    for k in (1, 2, 4):
        for tail in ("bucket", "renormalize"):
            rule = TopK(k, by=by, tail=tail)
            ids = rule.support(logp[by])
            wanted = reverse_kl(
                rule.coarse(logp["student"], ids), rule.coarse(logp["teacher"], ids)
            ).numpy()
            found = audit.curve.loc[k, "bucket" if tail == "bucket" else "renormalized"]
            assert found == pytest.approx(wanted.mean(), abs=1e-9), (k, tail)
        mass = logp["teacher"].gather(-1, ids).exp().sum(-1).numpy()
        assert audit.curve.loc[k, "rival_mass"] == pytest.approx(mass.mean())
        audit.k = k
        np.testing.assert_allclose(audit.df["rival_mass"], mass)
    np.testing.assert_allclose(audit.df["exact"], narrow.column("teacher_reverse_kl"))


def test_more_tokens_read_more_and_never_more_than_there_is(student, teacher, prompts):
    trace = opdlab.score(sample(student, prompts, seed=0, max_new_tokens=8), student, teacher, k=6)
    curve = TailAudit(trace).curve
    assert (np.diff(curve["bucket"]) >= -1e-6).all()
    assert (curve["bucket"] <= curve["exact"] + 1e-6).all()
    assert curve.loc[1, "renormalized"] == pytest.approx(0, abs=1e-9)
    assert (np.diff(curve["student_mass"]) > 0).all()


def test_it_begins_where_most_is_missed_else_where_most_is_to_be_seen():
    trace = made(WORDS, top=4)
    missed = TailAudit(trace, k=1)
    assert missed.selected == missed.df["missed"].argmax()
    wide = made(WORDS, top=100)
    seen = TailAudit(wide)
    assert seen.df["missed"].max() < 1e-6
    assert seen.selected == wide.column("teacher_reverse_kl").argmax() > 0


def test_the_page_has_each_tokens_numbers_for_each_k():
    audit = TailAudit(made(WORDS, top=4), k=2)
    sent = payload.unpack(payload.pack(audit.data()))
    assert list(sent["ks"]) == [1, 2, 3, 4]
    for step, k in enumerate(sent["ks"]):
        audit.k = k
        np.testing.assert_allclose(
            sent["missed"].reshape(4, -1)[step], audit.df["missed"], atol=2e-3
        )
        np.testing.assert_allclose(
            sent["student"].reshape(4, -1)[step], 100 * audit.df["student_mass"], atol=0.06
        )
    long = TailAudit(made([f"t{i % 40}".encode() for i in range(3000)], top=8), k=3)
    assert long.data()["ks"] == [1, 3, 6, 8]


def test_text_says_what_is_missed():
    audit = TailAudit(made(WORDS, top=4), k=1, title="One")
    row = audit.curve.loc[1]
    words = (
        f"The student's top 1 cover {100 * row.student_mass:.1f} % of the student and"
        f" {100 * row.rival_mass:.1f} % of teacher"
    )
    assert words in repr(audit)
    assert words in audit.static().replace("&#x27;", "'")
    assert repr(audit).startswith(
        "TailAudit: One: share of the KL that the top k read, k = 1 … 4\n"
    )


def test_what_cannot_be_audited_is_named():
    with pytest.raises(OpdlabError, match="kept no top tokens, so nothing is known of tails"):
        TailAudit(made(WORDS, top=0))
    with pytest.raises(OpdlabError, match="kept the 3 likeliest tokens, not 9"):
        TailAudit(made(WORDS), k=9)
    with pytest.raises(OpdlabError, match="student alone, so there is no KL to miss"):
        TailAudit(made(WORDS, ("student",)))
    with pytest.raises(UnknownColumn, match="no policy 'other'"):
        TailAudit(made(WORDS), by="other")
