"""A local model with its log-probs taken away: what it writes, and that nothing else can be had
from it.
"""

from __future__ import annotations

import types

import pytest
import torch

import opdlab as opd
from opdlab import Policy, Prompt, errors
from opdlab.data.seeds import seed_of
from opdlab.methods import OPD, SequenceKD
from opdlab.tasks.market import model
from opdlab.teachers import TextOnly, text_only


@pytest.fixture(scope="module")
def scribe() -> Policy:
    return model("scribe")


@pytest.fixture(scope="module")
def market() -> opd.Task:
    return opd.tasks.market()


INWARD = (
    "__dict__",
    "__slots__",
    "__closure__",
    "__defaults__",
    "__kwdefaults__",
    "__self__",
    "__func__",
    "__wrapped__",
    "__weakref__",
)


def leak(start: object) -> object:
    """The first model, tensor or policy that attributes, slots, closures, defaults and containers
    lead to, or None.

    Left out are the globals of functions and classes, which lead to everything in a process.
    """
    seen: dict[int, object] = {}
    todo = [start]
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(
            one, (type, types.ModuleType, types.BuiltinFunctionType, str, bytes, int, float)
        ):
            continue
        if isinstance(one, (Policy, torch.Tensor, torch.nn.Module, opd.Rollout)) or type(
            one
        ).__name__ in ("Weights", "Head"):
            return one
        seen[id(one)] = one  # kept, so that no id is used twice
        todo += [
            getattr(one, name, None)
            for name in (*dir(one), *INWARD)
            if name in INWARD or not name.startswith("__")
        ]
        if isinstance(one, dict):
            todo += [*one, *one.values()]
        elif isinstance(one, (list, tuple, set, frozenset)):
            todo += one
        elif isinstance(one, types.CellType):
            todo.append(one.cell_contents)
    return None


class Holder:
    __slots__ = ("inner",)

    def __init__(self, inner: object) -> None:
        self.inner = inner


def test_nothing_in_reach_leads_to_log_probs(scribe, market):
    bare = TextOnly(scribe)
    texts = bare.write(market.prompts(2), 2, max_new_tokens=4)
    for start in (bare, texts, bare.write, bare.check):
        assert leak(start) is None
    for hiding in (
        scribe,
        lambda: scribe,
        lambda x=scribe: x,
        Holder([{"a": Holder(scribe)}]),
        scribe.sample,
    ):
        assert leak(hiding) is not None, "the walk finds what there is"
    assert all(
        not hasattr(bare, name)
        for name in ("grade", "hidden", "log_probs", "weights", "policy", "__dict__")
    )


def test_it_writes_what_the_policy_samples(scribe, market):
    prompts = market.prompts(3)
    want = scribe.sample(prompts, 2, max_new_tokens=40, seed=5).texts
    got = TextOnly(scribe).write(prompts, 2, max_new_tokens=40, seed=5)
    assert [text for row in got for text in row] == list(want)
    assert TextOnly(scribe).write(prompts, 2, max_new_tokens=40, seed=6) != got


@pytest.mark.parametrize("name", ["scribe", "teacher"])
def test_it_goes_on_from_half_of_its_own_greedy_text(name, market):
    """One tokenizer of characters and one of words, whose decoder drops a first space."""
    bare, prompts = TextOnly(model(name)), market.prompts(4)
    whole = [row[0] for row in bare.write(prompts, max_new_tokens=50, temperature=0)]
    cuts = [text.rindex(" ", 0, len(text) // 2 + 1) for text in whole]
    begun = [text[:cut] for text, cut in zip(whole, cuts, strict=True)]
    rest = bare.write(prompts, prefixes=begun, max_new_tokens=50, temperature=0)
    assert [start + row[0] for start, row in zip(begun, rest, strict=True)] == whole
    assert all(row[0].startswith(" ") for row in rest)


def test_a_written_special_token_is_text(scribe):
    prompt = Prompt(
        messages=({"role": "user", "content": "ana has 4 7 apples buys 3 8 sells 1 9 . total ?"},)
    )
    ids = text_only._encode_plain(scribe, "4 7<eos> +")
    assert scribe.tokenizer.eos_token_id not in ids
    assert TextOnly(scribe).write([prompt], prefixes=["4 7<eos> +"], max_new_tokens=4) != [[""]]


def test_batches_change_memory_and_not_the_texts(scribe, market, monkeypatch):
    prompts = market.prompts(5)
    want = TextOnly(scribe).write(prompts, 2, prefixes=["4"] * 5, max_new_tokens=12, seed=1)
    monkeypatch.setattr(text_only, "ROWS_AT_ONCE", 4)
    assert TextOnly(scribe).write(prompts, 2, prefixes=["4"] * 5, max_new_tokens=12, seed=1) == want


def test_bad_questions_are_errors(scribe, market):
    bare = TextOnly(scribe)
    with pytest.raises(
        errors.OpdlabError,
        match=r"write got n=0 and 2 prefixes for 2 prompts\. Use n of 1 or more and one each\.",
    ):
        bare.write(market.prompts(2), 0)
    with pytest.raises(errors.OpdlabError, match="write got n=1 and 0 prefixes for 2 prompts"):
        bare.write(market.prompts(2), prefixes=[])
    with pytest.raises(errors.EmptyPrompts):
        bare.write([])
    with pytest.raises(errors.ContextTooLong):
        bare.write(market.prompts(1), prefixes=["4 " * 200])
    with pytest.raises(errors.ContextTooLong):
        bare.check(scribe, market.prompts(1), 1000)


def test_it_teaches_by_text_and_by_text_alone(scribe, market):
    student = model("student")
    run = opd.distill(
        student, TextOnly(scribe), market, method=SequenceKD(), batch=4, steps=2, quiet=True
    )
    step = next(run)
    want = TextOnly(scribe).write(step.rollout.prompts, max_new_tokens=24, seed=seed_of(0, 0, 2))
    assert step.rollout.writer == ("teacher",) * 4
    assert list(step.rollout.texts) == [row[0] for row in want]
    with pytest.raises(
        errors.MissingPolicy,
        match=r"'teacher' must grade tokens, but TextOnly only writes\..*OmniOPD, SequenceKD",
    ):
        opd.distill(model("student"), TextOnly(scribe), market, method=OPD())
    with pytest.raises(errors.MissingPolicy, match="only writes"):
        opd.distill(model("student"), TextOnly(scribe), market, method=OPD(estimator="sampled"))


def test_a_text_that_was_cut_is_left_open(scribe, market):
    """As a local teacher's: an end behind it would teach the student to stop there."""
    student = model("student")
    options = {"method": SequenceKD(), "batch": 8, "steps": 1, "quiet": True}
    for length, finish in ((6, {"length"}), (48, {"stop"})):
        local, by_text = (
            next(opd.distill(student, teacher, market, max_new_tokens=length, **options)).rollout
            for teacher in (model("teacher"), TextOnly(model("teacher")))
        )
        assert set(by_text.finish) == finish
        assert by_text.finish == local.finish
        assert by_text.completions() == local.completions()
