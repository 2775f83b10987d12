"""Answers about traces: the numbers are those of the table, and JSON can hold all of them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from viz.traces import NASTY, byte_pieces, made, several

from opdlab.errors import InvalidValue, OpdlabError, UnknownColumn
from opdlab.viz import questions

WORDS = [word.encode() for word in NASTY]


@pytest.fixture(scope="module")
def trace():
    n = len(WORDS)
    return several(made(WORDS, plan={"odd": np.arange(n) % 2}), made(WORDS, seed=1)).with_columns(
        strange=[np.nan, np.inf, -np.inf, 0.5] * (2 * n // 4),
        type=["even" if i % 2 == 0 else "odd" for i in range(2 * n)],
    )


def plain(answer):
    """The answer as a program reads it: strict JSON, the same as before."""
    read = json.loads(json.dumps(answer, allow_nan=False))
    assert read == answer
    assert read["schema"] == questions.SCHEMA
    return read


def test_describe_tells_every_channel(trace):
    said = plain(questions.describe(trace))
    assert said["tokens"] == len(trace)
    assert [one["tokens"] for one in said["completions"]] == [len(WORDS)] * 2
    by_key = {one["key"]: one for one in said["channels"]}
    kl = trace.column("teacher_reverse_kl")
    assert by_key["reverse_kl"]["mean"] == pytest.approx(kl.mean())
    assert by_key["reverse_kl"]["most"] == kl.max()
    assert by_key["type"]["counts"] == {"even": len(WORDS), "odd": len(WORDS)}
    strange = by_key["strange"]
    assert (strange["mean"], strange["least"], strange["most"]) == (0.5, "-inf", "inf")
    assert strange["missing"] == len(trace) // 4


def test_worst_is_the_largest_size_with_its_text_and_share(trace):
    said = plain(questions.worst(trace, "log_ratio", n=4, context=2))
    ratio = trace.column("teacher_logp") - trace.column("student_logp")
    order = np.argsort(-np.abs(ratio), kind="stable")[:4]
    assert [one["values"]["log_ratio"] for one in said["tokens"]] == ratio[order].tolist()
    assert said["share"] == pytest.approx(np.abs(ratio[order]).sum() / np.abs(ratio).sum())
    for one, row in zip(said["tokens"], order, strict=True):
        at = row % len(WORDS)
        assert (one["sample"], one["position"]) == (row // len(WORDS), at)
        assert one["token"].encode() == WORDS[at]
        assert one["before"].encode() == b"".join(WORDS[max(0, at - 2) : at])
        assert one["after"].encode() == b"".join(WORDS[at + 1 : at + 3])
    assert questions.worst(trace)["by"] == "log_ratio"
    strange = questions.worst(trace, "strange", n=1)["tokens"][0]
    assert strange["values"]["strange"] == "inf"


def test_where_counts_what_holds(trace):
    said = plain(questions.where(trace, ["reverse_kl > 1.5", "type != odd"], n=3))
    kl = trace.column("teacher_reverse_kl")
    chosen = (kl > 1.5) & (np.arange(len(trace)) % 2 == 0)
    assert 0 < said["count"] == chosen.sum() < len(trace)
    assert said["share_of"]["reverse_kl"] == pytest.approx(kl[chosen].sum() / kl.sum())
    rows = np.flatnonzero(chosen)[:3]
    assert [one["position"] for one in said["tokens"]] == (rows % len(WORDS)).tolist()
    assert questions.where(trace, ["sample=1", "position<=2"])["count"] == 3
    assert questions.where(trace, ["token = the"])["count"] == 2  # " the", once in each completion
    assert questions.where(trace, ["strange = inf"])["count"] == len(trace) // 4
    assert questions.where(trace, ["strange > 9", "strange < -9"])["tokens"] == []


def test_compare_goes_token_by_token_where_the_tokens_are_the_same(trace):
    kl = trace.column("teacher_reverse_kl").copy()
    kl[[3, 30]] += [1.0, -2.0]
    moved = trace.with_columns(teacher_reverse_kl=kl)
    said = plain(questions.compare(trace, moved, by="reverse_kl", n=2))
    assert said["same_tokens"] is True
    assert [one["change"] for one in said["tokens"]] == pytest.approx([-2.0, 1.0])
    mean = next(one for one in said["means"] if one["key"] == "reverse_kl")
    assert mean["second"] - mean["first"] == pytest.approx(-1.0 / len(trace))
    other = plain(questions.compare(trace, made(WORDS), by="reverse_kl"))
    assert (other["same_tokens"], other["tokens"]) == (False, [])


def test_pieces_of_characters_and_empty_traces():
    cut = made(byte_pieces("日本🙂"))
    assert plain(questions.worst(cut))["tokens"]
    empty = made([])
    assert plain(questions.where(empty, ["reverse_kl > 0"]))["count"] == 0
    assert plain(questions.describe(empty))["tokens"] == 0
    assert plain(questions.worst(empty))["tokens"] == []


@pytest.mark.parametrize(
    ("condition", "error"),
    [
        ("", InvalidValue),
        ("reverse_kl", InvalidValue),
        ("reverse_kl > many", InvalidValue),
        ("reverse_kl > nan", InvalidValue),
        ("type > odd", InvalidValue),
        ("nothing > 1", UnknownColumn),
        (3, InvalidValue),
    ],
)
def test_a_condition_that_cannot_be_read_is_refused(trace, condition, error):
    with pytest.raises(error):
        questions.where(trace, [condition])


def test_wrong_channels_and_objects_are_refused(trace):
    with pytest.raises(UnknownColumn, match="of numbers"):
        questions.worst(trace, "type")
    for ask in (questions.describe, questions.worst):
        with pytest.raises(OpdlabError, match=r"Trace\.load"):
            ask("trace.parquet")
