"""Tables: what they write and how they are read, against plain products."""

from __future__ import annotations

import itertools

import pytest
import torch

from opdlab import Prompt, exact
from opdlab.engine.batch import Batch
from opdlab.errors import OpdlabError
from opdlab.losses.divergences import entropy


def peaked(
    vocab: int, length: int, chosen: dict[tuple[int, ...], int], eos: int | None = None
) -> exact.Table:
    """A table that surely writes `chosen[prefix]` after each prefix."""
    table = exact.Table.random(vocab, length, scale=0, eos=eos)
    logits = table.logits.clone()
    for prefix, token in chosen.items():
        logits[0, table.start(prefix), token] = 100.0
    return exact.Table(logits, table.prompts, length, eos)


def test_starts_are_numbered_one_by_one():
    table = exact.Table.random(3, 4)
    prefixes = [p for t in range(4) for p in itertools.product(range(3), repeat=t)]
    assert (
        [table.start(p) for p in prefixes] == list(range(table.logits.shape[1])) == list(range(40))
    )


def test_everything_is_all_there_is():
    asked = (Prompt("x"), Prompt("y"))
    rollout = exact.everything(asked, 3, 2)
    want = [list(body) for body in itertools.product(range(3), repeat=2)]
    assert rollout.completions() == want * 2
    assert rollout.n == 9
    assert [p.text for p in rollout.prompts] == ["x"] * 9 + ["y"] * 9
    assert rollout.texts[:4] == ("aa", "ab", "ac", "ba")
    assert set(rollout.finish) == {"length"}
    assert rollout.logp.abs().max() == 0


def test_with_an_end_token_texts_differ_in_length():
    rollout = exact.everything((Prompt("x"),), 3, 3, eos=1)
    bodies = {tuple(body) for body in rollout.completions()}
    every = itertools.product(range(3), repeat=3)
    assert bodies == {body[: body.index(1) + 1] if 1 in body else body for body in every}
    assert len(bodies) == len(rollout) == 1 + 2 * 1 + 4 * 3
    for body, finish, text in zip(
        rollout.completions(), rollout.finish, rollout.texts, strict=True
    ):
        assert finish == ("stop" if body[-1] == 1 else "length")
        assert text == "".join("a.c"[i] for i in body if i != 1)


@pytest.mark.parametrize("eos", [None, 0])
def test_a_batch_reads_the_row_of_each_prefix(eos):
    table = exact.Table.random(3, 3, 2, seed=4, eos=eos)
    rollout = exact.everything(table.prompts, 3, 3, eos=eos, by=table)
    batch = Batch(rollout, {"student": table})
    got = batch.map(lambda rows: {"all": rows.student, "own": rows.logp})
    assert got["all"].dtype == torch.float64
    x = [table.prompts.index(p) for p in rollout.prompts]
    for b, body in enumerate(rollout.completions()):
        for t in range(len(body)):
            want = table.logits[x[b], table.start(body[:t])].log_softmax(-1)
            torch.testing.assert_close(got["all"][b, t], want)
            assert got["own"][b, t].item() == pytest.approx(want[body[t]].item(), abs=1e-12)
            assert rollout.entropy[b, t].item() == pytest.approx(entropy(want).item(), abs=1e-12)
    torch.testing.assert_close(rollout.logp, got["own"])


def test_samples_are_as_frequent_as_the_law_says():
    """6 000 draws a prompt, of nine texts: all within 4.5 standard errors, decided in advance."""
    table, n = exact.Table.random(3, 2, 2, seed=1), 6_000
    rollout = table.sample(table.prompts, n, seed=5)
    want = exact.law(table, exact.everything(table.prompts, 3, 2)).view(2, 9)
    got = torch.stack(
        [(rollout.ids @ torch.tensor([3, 1]) == i).view(2, n).double().mean(1) for i in range(9)], 1
    )
    assert ((got - want).abs() <= 4.5 * (want * (1 - want) / n).sqrt()).all()


def test_samples_carry_their_log_probs():
    table = exact.Table.random(4, 3, 2, seed=2, eos=3)
    rollout = table.sample(table.prompts, 20, seed=1)
    torch.testing.assert_close(rollout.logp.sum(1).exp(), exact.law(table, rollout))
    assert {"stop", "length"} == set(rollout.finish)
    again = table.sample(table.prompts, 20, seed=1)
    assert torch.equal(rollout.ids, again.ids)
    assert not torch.equal(rollout.ids, table.sample(table.prompts, 20, seed=2).ids)


def test_samples_go_on_from_prefixes():
    table = peaked(3, 4, {(): 0, (2,): 1, (2, 1): 1, (2, 1, 1): 0, (0, 2): 2, (0, 2, 2): 1})
    asked = table.prompts * 2
    rollout = table.sample(asked, 2, prefixes=[[2], [0, 2]], max_new_tokens=3)
    assert (
        rollout.completions() == [[1, 1, 0]] * 2 + [[2, 1]] * 2
    )  # the second one meets the end of the table
    assert rollout.logp.abs().max() < 1e-9
    assert rollout.logp.shape == rollout.ids.shape
    one = table.sample(asked, prefixes=[[2], [0, 2]], max_new_tokens=1)
    assert one.completions() == [[1], [2]]
    soft = exact.Table.random(3, 3, seed=1)
    rollout = soft.sample(soft.prompts * 2, prefixes=[[1], [2, 0]], seed=3)
    for b, start in enumerate([[1], [2, 0]]):
        for t, token in enumerate(rollout.completions()[b]):
            row = soft.logp[0, soft.start(start + rollout.completions()[b][:t])]
            assert rollout.logp[b, t].item() == pytest.approx(row[token].item())


def test_temperature_zero_takes_the_likeliest():
    table = exact.Table.random(5, 2, seed=3)
    first = int(table.logits[0, 0].argmax())
    assert table.sample(table.prompts, temperature=0).completions() == [
        [first, int(table.logits[0, 1 + first].argmax())]
    ]


def test_it_writes_texts_as_a_stranger_would():
    table = peaked(3, 3, {(): 1, (1,): 0, (1, 0): 2, (2,): 2, (2, 2): 2}, eos=2)
    assert table.write(table.prompts, 2) == [["ba", "ba"]]
    assert table.write(table.prompts, prefixes=["b"]) == [["a"]]


def test_letters_read_what_they_wrote():
    letters = exact.Letters(4, 2)
    assert letters.decode([0, 3, 2]) == "ad."
    assert letters.batch_decode([[0, 3, 2], [2]], skip_special_tokens=True) == ["ad", ""]
    assert letters("ad.")["input_ids"] == [0, 3, 2]
    assert letters.get_vocab() == {"a": 0, "b": 1, ".": 2, "d": 3}
    with pytest.raises(OpdlabError, match=r"4 tokens cannot read 'z'\. Write with a b \. d"):
        letters("az")


@pytest.mark.parametrize(
    "logits",
    [
        torch.zeros(1, 4, 3, dtype=torch.float64),
        torch.zeros(1, 5, 3),
        torch.zeros(2, 4, 3, dtype=torch.float64),
    ],
)
def test_a_table_of_the_wrong_size_is_refused(logits):
    with pytest.raises(
        OpdlabError, match=r"logits are \[\d, \d, 3\] in .*Give float64 .* here \[1, 13, 3\]"
    ):
        exact.Table(logits, (Prompt("x"),), 3)


def test_a_strange_prompt_is_refused():
    table = exact.Table.random()
    with pytest.raises(OpdlabError, match=r"no row for prompt 'what'\. Use the prompts"):
        table.sample([Prompt("what")])


def test_too_much_is_not_listed():
    with pytest.raises(OpdlabError, match=r"make 2000000 completions; at most 200000.*Use fewer"):
        exact.everything((Prompt("x"), Prompt("y")), 10, 6)
