"""The sampler against Hugging Face's, exact distributions, and a fresh scoring pass."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch.utils._python_dispatch import TorchDispatchMode

from opdlab import Policy, Prompt
from opdlab.data.rollout import concat_rollouts
from opdlab.data.sampling_config import SamplingConfig
from opdlab.data.written_text import WrittenText
from opdlab.errors import InvalidValue, OpdlabError
from opdlab.losses.divergences import entropy
from opdlab.models import continuation, sampling
from opdlab.models.abilities import Abilities
from opdlab.models.drawing import Drawn, draw
from opdlab.models.sampled_texts import TextsInProgress
from opdlab.models.sampling import SamplingLoop
from opdlab.models.text_rollouts import rollout_from_texts

FAMILIES = {
    "llama": {},
    "qwen3": {},
    "gemma2": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8, "sliding_window": 6},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
}


def generate(policy: Policy, prompts: list[Prompt], tokens: int) -> list[list[int]]:
    """Hugging Face's greedy completions of a left-padded batch, cut after the first EOS."""
    starts = policy.encode_all(prompts)
    width = max(map(len, starts))
    ids = torch.tensor([[0] * (width - len(s)) + s for s in starts])
    mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in starts])
    out = policy.weights.model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=tokens,
        eos_token_id=sorted(policy.weights.eos),
        pad_token_id=0,
    )[:, width:]
    rows = []
    for row in out.tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in policy.weights.eos), len(row))
        rows.append(row[:end])
    return rows


def stopping(policy: Policy, prompts: list[Prompt]) -> Policy:
    """The policy with EOS ids that it really says, at different lengths."""
    bodies = generate(Policy.of(policy.weights.model, policy.tokenizer, eos=[]), prompts, 12)
    return Policy.of(policy.weights.model, policy.tokenizer, eos=[1, bodies[0][3], bodies[1][6]])


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_hugging_face(family, make_policy, prompts):
    policy = stopping(make_policy(4, family=family, **FAMILIES[family]), prompts)
    rollout = policy.sample(prompts, temperature=0, max_new_tokens=12)
    assert rollout.completions() == generate(policy, prompts, 12)
    assert len(set(rollout.lengths.tolist())) > 1


def test_greedy_with_samples_repeats_itself(student, prompts):
    many = student.sample(prompts, n=3, temperature=0, max_new_tokens=6)
    assert many.ids.view(4, 3, -1).eq(many.ids.view(4, 3, -1)[:, :1]).all()
    assert many.prompts == tuple(p for p in prompts for _ in range(3))


@pytest.mark.parametrize("temperature", [0, 1])
def test_numbers_equal_a_fresh_scoring_pass(student, prompts, temperature):
    rollout = student.sample(prompts, n=3, max_new_tokens=16, seed=5, temperature=temperature)
    scores = student.log_probs(rollout)
    own = scores.gather(-1, rollout.ids[rollout.mask][:, None])[:, 0]
    torch.testing.assert_close(rollout.logp[rollout.mask], own, rtol=0, atol=1e-4)
    torch.testing.assert_close(rollout.entropy[rollout.mask], entropy(scores), rtol=0, atol=1e-4)
    assert (rollout.logp[~rollout.mask] == 0).all()
    assert (rollout.entropy[~rollout.mask] == 0).all()
    assert (rollout.ids[~rollout.mask] == 0).all()


def probability_of(observed: list[int], expected: list[float]) -> float:
    """Pearson's test: how probable counts are that lie as far from the expected ones."""
    scale = sum(observed) / sum(expected)  # 1 but for rounding
    return float(chisquare(observed, [scale * count for count in expected]).pvalue)


def test_the_first_token_follows_the_models_distribution(student):
    rollout = student.sample([Prompt("ana has")], n=6000, max_new_tokens=1, seed=11)
    p = student.log_probs(rollout.select([0]))[0].double().exp()
    seen = torch.bincount(rollout.ids[:, 0], minlength=70)
    often = p * 6000 > 5
    observed, expected = (
        [*seen[often].tolist(), int(seen[~often].sum())],
        [*(p[often] * 6000).tolist(), float(p[~often].sum() * 6000)],
    )
    # Fixed seed; the band was set beforehand.
    assert probability_of(observed, expected) > 1e-3


def test_later_tokens_follow_the_models_distribution(make_policy, make_tokenizer):
    """All samples of two tokens from twelve: the pairs, too."""
    policy = make_policy(0, make_tokenizer(), initializer_range=0.25)
    rollout = policy.sample([Prompt("a b c")], n=8000, max_new_tokens=2, seed=1)
    pairs = {tuple(body): i for i, body in enumerate(rollout.completions())}
    p = {pair: rollout.logp[i].sum().exp().item() for pair, i in pairs.items()}
    counts = dict.fromkeys(pairs, 0)
    for body in rollout.completions():
        counts[tuple(body)] += 1
    often = [pair for pair in pairs if p[pair] * 8000 > 5]
    rest = 1 - sum(p[pair] for pair in often)
    observed, expected = [counts[q] for q in often], [p[q] * 8000 for q in often]
    assert probability_of([*observed, 8000 - sum(observed)], [*expected, rest * 8000]) > 1e-3


def filtered(p: list[float], config: SamplingConfig) -> list[float]:
    """The distribution that a config draws from, by definition: first top_k, top_p, then min_p."""
    order = sorted(range(len(p)), key=lambda i: -p[i])
    if config.top_k:
        order = order[: config.top_k]
    whole, mass, kept = sum(p[i] for i in order), 0.0, []
    for i in order:  # the fewest that hold top_p of what top_k left
        if mass / whole >= config.top_p:
            break
        mass += p[i]
        kept.append(i)
    kept = [i for i in kept if p[i] >= config.min_p * max(p)]
    rest = sum(p[i] for i in kept)
    return [p[i] / rest if i in kept else 0.0 for i in range(len(p))]


@given(
    seed=st.integers(0, 10**6),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    top_p=st.sampled_from([0.3, 0.8, 1.0]),
    top_k=st.sampled_from([0, 1, 3, 20]),
    min_p=st.sampled_from([0.0, 0.05, 0.4]),
)
def test_draw_inverts_the_cumulative_distribution(seed, temperature, top_p, top_k, min_p):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(1, 9, generator=generator, dtype=torch.float64)
    uniform = torch.linspace(0, 1, 101, dtype=torch.float64)[:-1]
    config = SamplingConfig(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    p = filtered((logits[0] / temperature).softmax(-1).tolist(), config)
    cumulative = torch.tensor(p, dtype=torch.float64).cumsum(0)
    want = [int((cumulative <= x + 1e-15).sum()) for x in uniform]
    token, logp, own = draw(logits.expand(100, 9), uniform, config)
    assert token.tolist() == want
    # Log-probs and entropies are those at temperature 1, whatever the sampler's filters.
    torch.testing.assert_close(logp, logits[0].log_softmax(-1)[token])
    torch.testing.assert_close(own, entropy(logits.log_softmax(-1)).expand(100))


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_k": 9}, [0.4, 0.3, 0.2, 0.1]),
        ({"min_p": 0.5}, [4 / 9, 3 / 9, 2 / 9, 0]),  # 0.2 is half of 0.4, and kept
        ({"min_p": 0.6}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_k": 3, "top_p": 0.5}, [4 / 7, 3 / 7, 0, 0]),  # 0.4 of 0.9 is less than a half
        ({"top_p": 0.95, "min_p": 0.3}, [4 / 9, 3 / 9, 2 / 9, 0]),
    ],
)
def test_filters_keep_the_tokens_of_their_definition(options, kept):
    """Four tokens by hand: the shares of 2520 equal steps are the distribution itself."""
    p = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    uniform = (torch.arange(2520, dtype=torch.float64) + 0.5) / 2520
    token, _, _ = draw(p.log().expand(2520, 4), uniform, SamplingConfig(**options))
    shares = torch.bincount(token, minlength=4) / 2520
    torch.testing.assert_close(shares, torch.tensor(kept, dtype=torch.float32))
    assert filtered(p.tolist(), SamplingConfig(**options)) == pytest.approx(kept)


def test_tokens_without_probability_are_never_drawn():
    logits = torch.tensor([[-math.inf, 1.0, 0.0, -math.inf]]).expand(3, 4)
    # The last is the largest number that torch.rand gives.
    edges = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, edges, SamplingConfig())[0].tolist() == [1, 1, 2]
    assert draw(logits, edges, SamplingConfig(top_p=0.5))[0].tolist() == [1, 1, 1]
    assert draw(logits, edges, SamplingConfig(temperature=0.7))[0].tolist() == [1, 1, 2]
    assert draw(logits, edges, SamplingConfig())[2].isfinite().all()


def test_numbers_at_huge_logits():
    token, logp, own = draw(
        torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, -1e4]]),
        torch.tensor([0.3, 0.7]),
        SamplingConfig(),
    )
    assert token.tolist() == [0, 1]
    torch.testing.assert_close(logp, torch.tensor([0.0, math.log(0.5)]))
    torch.testing.assert_close(own, torch.tensor([0.0, math.log(2)]), atol=2e-3, rtol=0)


def test_a_sure_tokens_log_prob_is_exact_beside_large_logits():
    """Logits of some thousands are rounded to 1e-4; their differences are not."""
    logits = torch.tensor([[4000.0, 3990.0, 0.0]])
    _, logp, _ = draw(logits, torch.tensor([0.1]), SamplingConfig())
    assert logp.item() == pytest.approx(-math.log1p(math.exp(-10)), rel=1e-3)


def test_the_nucleus_holds_in_the_loop(student):
    rollout = student.sample([Prompt("ana has")], n=300, max_new_tokens=4, top_p=0.6, seed=2)
    ordered, ids = student.log_probs(rollout).exp().sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered  # mass that stands before each token
    place = (ids == rollout.ids[rollout.mask][:, None]).int().argmax(-1)
    assert (before.gather(-1, place[:, None]) < 0.6 + 1e-4).all()
    assert place.max() > 0


@pytest.mark.parametrize("options", [{"top_k": 2}, {"min_p": 0.5}])
def test_top_k_and_min_p_hold_in_the_loop(student, options):
    rollout = student.sample([Prompt("ana has")], n=300, max_new_tokens=4, seed=2, **options)
    p = student.log_probs(rollout).exp()
    drawn = p.gather(-1, rollout.ids[rollout.mask][:, None])
    place = (p > drawn).sum(-1)
    if "top_k" in options:
        assert place.max() == 1
    else:
        assert (drawn[:, 0] >= 0.5 * p.amax(-1) - 1e-4).all()
        assert place.max() > 0
    assert len(set(map(tuple, rollout.completions()))) > 1


# The same seed, the same text.


def test_text_does_not_depend_on_the_batch(make_policy, prompts):
    policy = stopping(make_policy(4), prompts)
    whole = policy.sample(prompts, n=2, max_new_tokens=20, seed=9)
    assert len(set(whole.lengths.tolist())) > 3  # rows were dropped on the way
    for size in (1, 3):
        parts = policy.sample(prompts, n=2, max_new_tokens=20, seed=9, batch_size=size)
        assert parts.completions() == whole.completions()
        torch.testing.assert_close(parts.logp, whole.logp, rtol=0, atol=1e-4)
    assert (
        policy.sample(prompts[:2], n=2, max_new_tokens=20, seed=9).completions()
        == whole.completions()[:4]
    )
    assert (
        policy.sample(prompts, n=2, max_new_tokens=20, seed=10).completions() != whole.completions()
    )


def test_samples_of_a_prompt_are_rows_of_their_own(student, prompts):
    grouped = student.sample(prompts[:2], n=3, max_new_tokens=8, seed=4)
    single = student.sample(
        [p for p in prompts[:2] for _ in range(3)], n=1, max_new_tokens=8, seed=4
    )
    assert grouped.completions() == single.completions()
    assert (grouped.n, single.n) == (3, 1)
    assert len(set(map(tuple, grouped.completions()))) > 1


def test_rows_that_end_early_change_no_other_row(make_policy, prompts):
    """With the same draws, texts are the same up to their stop."""
    free = make_policy(4)
    stops = stopping(free, prompts)
    free = Policy.of(free.weights.model, free.tokenizer, eos=[])
    long, short = (p.sample(prompts, n=4, max_new_tokens=20, seed=1) for p in (free, stops))
    assert set(long.finish) == {"length"}
    assert set(short.finish) == {"length", "stop"}
    for whole, part in zip(long.completions(), short.completions(), strict=True):
        assert whole[: len(part)] == part


# Ends.


def test_every_eos_stops_and_is_counted(make_policy, prompts):
    policy = stopping(make_policy(4), prompts)
    rollout = policy.sample(prompts, n=16, max_new_tokens=12, seed=3)
    last = set()
    for body, finish in zip(rollout.completions(), rollout.finish, strict=True):
        assert not policy.weights.eos & set(body[:-1])
        assert (finish == "stop") == (body[-1] in policy.weights.eos)
        assert finish == "stop" or len(body) == 12
        last.add(body[-1])
    assert len(policy.weights.eos & last) >= 2
    bodies = [
        body[:-1] if end == "stop" else body
        for body, end in zip(rollout.completions(), rollout.finish, strict=True)
    ]
    # The end alone is left out, other special tokens stay.
    assert rollout.texts == tuple(policy.tokenizer.batch_decode(bodies))
    assert not any("<eos>" in text for text in rollout.texts)
    assert rollout.tokens == rollout.mask.sum() == sum(map(len, rollout.completions()))


def test_pad_equal_to_eos_is_no_problem(make_policy, prompts, words):
    same = copy.deepcopy(words)
    same.pad_token = same.eos_token
    policy = make_policy(0, same, eos=[1, 0])  # 0 also fills the tensors
    rollout = policy.sample(prompts, n=8, max_new_tokens=8, seed=3)
    assert rollout.mask.sum(1).tolist() == rollout.lengths.tolist()
    ended = [
        body for body, f in zip(rollout.completions(), rollout.finish, strict=True) if f == "stop"
    ]
    assert ended
    assert all(body[-1] in (0, 1) for body in ended)
    texts = rollout_from_texts(policy, prompts[:2], ["ana has", "ben"])
    assert texts.completions()[1][-1] == 1
    assert texts.mask.tolist() == [[True, True, True], [True, True, False]]


def test_a_cut_completion_says_so(student, prompts):
    rollout = Policy.of(student.weights.model, student.tokenizer, eos=[]).sample(
        prompts, max_new_tokens=3
    )
    assert rollout.finish == ("length",) * 4
    assert rollout.lengths.tolist() == [3] * 4
    assert "4 cut off at the length limit" in repr(rollout)


def test_an_end_at_the_limit_is_an_end(student):
    token = student.sample([Prompt("ana")], temperature=0, max_new_tokens=1).completions()[0]
    policy = Policy.of(student.weights.model, student.tokenizer, eos=token)
    assert policy.sample([Prompt("ana")], temperature=0, max_new_tokens=1).finish == ("stop",)


def first_end(policy: Policy, body: list[int], stops: tuple[str, ...]) -> int:
    """Count the tokens of a completion up to where its text first holds one of `stops`."""
    for length in range(1, len(body) + 1):
        text = policy.tokenizer.decode(body[:length])
        if any(stop in text for stop in stops):
            return length
    return len(body)


@pytest.mark.parametrize("kind", ["words", "bytes"])
def test_a_stop_text_ends_its_completion_and_no_other(kind, make_policy, bytes_bpe):
    """The texts are those without a stop, cut where the stop first occurs, and keep it."""
    policy = make_policy(4, bytes_bpe if kind == "bytes" else None, eos=[])
    prompts = [Prompt("the fox"), Prompt("ana has 4")]
    options = {"n": 6, "max_new_tokens": 20, "seed": 1}
    free = policy.sample(prompts, **options)
    text = free.texts[0].strip("�")
    if kind == "words":
        stops = (" ".join(text.split()[3:5]),)  # a text of several tokens
    else:
        stops = tuple(dict.fromkeys(filter(str.isalnum, text)))[:2]  # parts of tokens
    stopped = policy.sample(prompts, stop=stops, **options)
    ends = [first_end(policy, body, stops) for body in free.completions()]
    assert stopped.completions() == [
        body[:end] for body, end in zip(free.completions(), ends, strict=True)
    ]
    for written, finish in zip(stopped.texts, stopped.finish, strict=True):
        assert (finish == "stop") == any(stop in written for stop in stops)
    assert "stop" in stopped.finish
    assert "length" in stopped.finish or kind == "bytes"


def test_one_stop_text_may_be_given_as_it_is(student):
    options = {"n": 4, "max_new_tokens": 12, "seed": 3}
    word = student.sample([Prompt("ana has")], **options).texts[0].split()[2]
    one = student.sample([Prompt("ana has")], stop=word, **options)
    assert (
        one.completions()
        == student.sample([Prompt("ana has")], stop=(word,), **options).completions()
    )
    assert one.finish[0] == "stop"
    assert one.texts[0].endswith(word)


def test_a_stop_text_in_the_prompt_ends_nothing(student):
    options = {"n": 4, "max_new_tokens": 6, "seed": 3}
    free = student.sample([Prompt("ana has")], **options)
    assert not any("ana has" in text for text in free.texts)
    same = student.sample([Prompt("ana has")], stop="ana has", **options)
    assert same.completions() == free.completions()


# Prefixes.


def test_prefixes_are_continued(student, prompts):
    whole = student.sample(prompts, temperature=0, max_new_tokens=10)
    cuts = [1, 3, 0, 5]
    prefixes = [body[:cut] for body, cut in zip(whole.completions(), cuts, strict=True)]
    rest = student.sample(prompts, temperature=0, max_new_tokens=5, prefixes=prefixes)
    for body, cut, tail in zip(whole.completions(), cuts, rest.completions(), strict=True):
        assert body[cut : cut + 5] == tail


def test_as_many_prefixes_as_prompts(student, prompts):
    with pytest.raises(
        InvalidValue,
        match=r"sample got 1 prefixes for 4 prompts\. Use one list of token ids for each prompt",
    ):
        student.sample(prompts, prefixes=[[6]])


# Rollouts as data.


def test_written_texts(student, prompts):
    rollout = rollout_from_texts(student, prompts[:3], ["total 4 7", "", "sum"], writer="answer")
    assert [student.tokenizer.decode(body) for body in rollout.completions()] == [
        "total 4 7<eos>",
        "<eos>",
        "sum<eos>",
    ]
    assert rollout.texts == ("total 4 7", "", "sum")
    assert rollout.writer == ("answer",) * 3
    assert (rollout.logp == 0).all()


def test_a_cut_text_is_left_open_and_counts_as_cut(student, prompts):
    texts = [WrittenText("total 4 7", "length"), WrittenText("sum", "stop"), "sum"]
    rollout = rollout_from_texts(student, prompts[:3], texts, writer="teacher")
    assert [student.tokenizer.decode(body) for body in rollout.completions()] == [
        "total 4 7",
        "sum<eos>",
        "sum<eos>",
    ]
    assert rollout.finish == ("length", "stop", "stop")
    assert rollout.texts == ("total 4 7", "sum", "sum")


def test_a_finished_text_ends_with_a_token_of_the_policys_own_set(make_policy, prompts, words):
    end = words.convert_tokens_to_ids("lot")
    for eos in ([end], [end, words.convert_tokens_to_ids("sum")]):
        policy = make_policy(0, eos=eos)
        assert [
            body[-1]
            for body in rollout_from_texts(policy, prompts[:2], ["total 4 7", ""]).completions()
        ] == [min(eos)] * 2
    assert rollout_from_texts(make_policy(0, eos=[]), prompts[:1], ["total"]).lengths.tolist() == [
        1
    ]


def test_an_answer_to_a_chat_ends_as_the_template_ends_a_turn(make_policy, words):
    """As in Gemma, whose texts end with `<eos>` and whose turns end with `<end_of_turn>`."""
    tokenizer = copy.deepcopy(words)
    tokenizer.chat_template = words.chat_template.replace("{% endfor %}", " lot{% endfor %}")
    end = words.convert_tokens_to_ids("lot")
    policy = make_policy(0, tokenizer, eos=[words.eos_token_id, end])
    chat = Prompt(messages=({"role": "user", "content": "ana has"},))
    assert [
        body[-1]
        for body in rollout_from_texts(policy, [Prompt("ana"), chat], ["sum", "sum"]).completions()
    ] == [words.eos_token_id, end]


def test_a_text_ends_at_the_first_end_that_it_spells(student, prompts):
    assert (
        rollout_from_texts(student, prompts[:1], ["total 4<eos> 7 7"]).completions()
        == rollout_from_texts(student, prompts[:1], ["total 4"]).completions()
    )
    assert rollout_from_texts(
        student, prompts[:1], [WrittenText("total 4<eos>", "length")]
    ).finish == ("stop",)


def test_texts_keep_the_special_tokens_that_a_user_added(make_model, bytes_bpe):
    tokenizer = copy.deepcopy(bytes_bpe)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<answer>", "</answer>"]})
    model, tag = (
        make_model(len(tokenizer), eos_token_id=0),
        tokenizer.convert_tokens_to_ids("<answer>"),
    )
    with torch.no_grad():
        model.get_output_embeddings().weight[tag] *= 6
    policy = Policy.of(model, tokenizer)
    rollout = policy.sample([Prompt("the fox")], n=6, max_new_tokens=12, seed=1)
    wrote = [body.count(tag) for body in rollout.completions()]
    assert max(wrote) > 0
    assert [text.count("<answer>") for text in rollout.texts] == wrote
    again = rollout_from_texts(
        policy,
        rollout.prompts,
        [WrittenText(*pair) for pair in zip(rollout.texts, rollout.finish, strict=True)],
    )
    assert [
        body.count(tag) for body in again.completions()
    ] == wrote  # and are tokens again when they are trained on


def test_a_text_knows_why_it_ends():
    text = WrittenText("a b", "length")
    assert (text, text.finish, text.upper()) == ("a b", "length", "A B")
    assert copy.deepcopy(text).finish == "length"
    with pytest.raises(
        InvalidValue, match=r"WrittenText got finish='abort'\. Use 'stop' or 'length'"
    ):
        WrittenText("a", "abort")


def test_rows_and_joined_are_inverse(student, prompts):
    whole = student.sample(prompts, n=3, max_new_tokens=15, seed=6, writer="teacher")
    again = concat_rollouts([whole.select(range(5)), whole.select([5]), whole.select(range(6, 12))])
    assert again.completions() == whole.completions()
    assert (again.prompts, again.texts, again.finish, again.writer) == (
        whole.prompts,
        whole.texts,
        whole.finish,
        whole.writer,
    )
    torch.testing.assert_close(again.logp, whole.logp[:, : again.ids.shape[1]])
    torch.testing.assert_close(again.entropy, whole.entropy[:, : again.ids.shape[1]])
    back = whole.select([7, 2])
    assert back.completions() == [whole.completions()[7], whole.completions()[2]]
    assert back.ids.shape[1] == max(map(len, back.completions()))


def test_an_empty_completion_is_handled(make_model, make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    policy = Policy.of(make_model(12), tokenizer, eos=[])
    rollout = rollout_from_texts(
        policy, [Prompt("a b"), Prompt("c"), Prompt("d")], ["a", "", "b c"]
    )
    assert rollout.lengths.tolist() == [1, 0, 2]
    assert policy.log_probs(rollout).shape == (3, 12)
    torch.testing.assert_close(policy.log_probs(rollout)[1:], policy.log_probs(rollout.select([2])))
    nothing = rollout_from_texts(policy, [Prompt("a b")], [""])
    assert nothing.ids.dtype == torch.long
    assert nothing.mask.tolist() == [[False]]
    assert policy.log_probs(nothing).shape == (0, 12)
    assert concat_rollouts([rollout, nothing]).select([1, 3]).completions() == [[], []]


# Bad input.


@pytest.mark.parametrize(
    "bad", [{"max_new_tokens": 0}, {"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}]
)
def test_bad_settings_are_refused(student, bad):
    with pytest.raises(OpdlabError, match=rf"sample got {next(iter(bad))}=.*Use "):
        student.sample([Prompt("ana")], **bad)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The loop as it runs on a GPU: in place, with a look at the ends from time to time."""
    monkeypatch.setattr(sampling, "can_replay", lambda model: True)
    monkeypatch.setattr(sampling, "TOKENS_PER_LOOK", 3)
    monkeypatch.setattr(continuation, "ROOM", 4)


@pytest.mark.parametrize(
    "options",
    [
        {"n": 3},
        {"n": 1, "temperature": 0.0},
        {"n": 2, "temperature": 0.7, "top_p": 0.8, "top_k": 9, "min_p": 0.02},
        {"n": 2, "min_new_tokens": 4},
        {"n": 2, "stop": "ana"},
    ],
)
def test_the_loop_of_a_gpu_writes_the_same_texts(options, make_policy, prompts, request):
    policy = make_policy(0, eos=list(range(3, 20)))  # texts end all the time
    options = {"max_new_tokens": 15, "seed": 4, **options}
    want = policy.sample(prompts, **options)
    request.getfixturevalue("as_on_a_gpu")
    got = policy.sample(prompts, **options)
    assert len(want.lengths.unique()) > 2
    for name in ("ids", "mask", "lengths"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    assert got.finish == want.finish
    torch.testing.assert_close(got.logp, want.logp, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.entropy, want.entropy, rtol=1e-4, atol=1e-4)


class CountWaits(TorchDispatchMode):
    """Count the operations for which a processor waits for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select", "unique"):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5, "top_p": 0.9, "top_k": 5}])
def test_the_loop_of_a_gpu_does_not_wait_for_each_token(
    options, make_policy, prompts, as_on_a_gpu, monkeypatch
):
    monkeypatch.setattr(sampling, "TOKENS_PER_LOOK", 8)
    # On a GPU `draw` asks no question; here it may, once per token (see there).
    policy, waits = make_policy(0, eos=[]), []
    for tokens in (17, 33):
        with CountWaits() as count:
            policy.sample(prompts[:1], 2, max_new_tokens=tokens, **options)
        waits.append(len(count.names) - tokens)
    assert waits[1] - waits[0] <= 2 * 3  # two looks more, of three questions at most


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("way", ["cache", "gpu", "no cache"])
def test_a_full_text_does_not_leave_the_context(way, n, make_policy, request, monkeypatch):
    """It stays in the batch for a while, beside texts with more room; positions end at 24."""
    if way == "gpu":
        request.getfixturevalue("as_on_a_gpu")
    policy = make_policy(
        0,
        eos=[],
        family="gpt2",
        **{**FAMILIES["gpt2"], "n_positions": 24},
        max_position_embeddings=24,
    )
    if way == "no cache":
        monkeypatch.setattr(policy.weights, "abilities", Abilities(caches=False))
    loop = SamplingLoop(policy.weights, policy.head, SamplingConfig(max_new_tokens=20))
    starts = [[5] * 20, *([7, i, 9, 4] for i in range(4))]
    room = torch.tensor([4, 20, 20, 20, 20]).repeat_interleave(n)
    uniform = torch.rand(5 * n, 20, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        texts = loop.write(starts, n, uniform, room)
        assert texts.lengths.tolist() == room.tolist()
        alone = loop.write(starts[:1], n, uniform[:n, :4])
    assert torch.equal(texts.ids[:n, :4], alone.ids)


def test_a_text_that_has_ended_breaks_nothing():
    texts = TextsInProgress(torch.rand(2, 3), [1], None, torch.device("cpu"))
    one = torch.ones(2)
    texts.put(Drawn(torch.tensor([1, 5]), one, one))
    texts.end(torch.tensor([True, False]))
    broken = torch.tensor([math.nan, 1.0])
    texts.put(Drawn(torch.tensor([0, 5]), broken, broken))
    assert not texts.is_broken
    assert texts.finish().entropy.tolist() == [[1, 0, 0], [1, 1, 0]]
    texts.put(Drawn(torch.tensor([0, 5]), broken, broken.flip(0)))
    assert texts.is_broken


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_broken_logits_raise_also_where_nobody_looks_at_each_token(
    number, make_policy, as_on_a_gpu
):
    policy = make_policy(0)
    with torch.no_grad():
        policy.weights.head.weight[3, 3] = number
    with pytest.raises(OpdlabError, match=r"logits hold NaN or infinity.*learning rate"):
        policy.sample([Prompt("ana has")], max_new_tokens=7)


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0, 0.5, 1])
def test_logits_that_are_no_distribution_raise(make_policy, number, temperature):
    policy = make_policy(0)
    with torch.no_grad():
        policy.weights.head.weight[3, 3] = number
    with pytest.raises(OpdlabError, match=r"logits hold NaN or infinity.*learning rate"):
        policy.sample([Prompt("ana has")], temperature=temperature)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_no_text_ends_before_its_least_length(make_policy, prompts, temperature):
    policy = make_policy(0, eos=list(range(3, 60)))  # most tokens end a text
    options = {"max_new_tokens": 12, "temperature": temperature, "seed": 2}
    n = 1 if temperature == 0 else 8
    free = policy.sample(prompts, n, **options)
    held = policy.sample(prompts, n, min_new_tokens=5, **options)
    assert int(free.lengths.min()) < 5
    assert int(held.lengths.min()) >= 5
    first = held.ids[:, :4]
    assert not torch.isin(first, torch.tensor(sorted(policy.weights.eos))).any()
    # The log-probs are those of the policy itself, not of the restricted draw.
    full = policy.log_probs(held).gather(-1, held.ids[held.mask][:, None])[:, 0]
    torch.testing.assert_close(held.logp[held.mask], full, atol=1e-4, rtol=1e-4)


def test_a_least_length_passes_over_stop_texts_and_is_no_longer_on_policy(make_policy, prompts):
    policy = make_policy(0)
    texts = policy.sample(prompts, 1, max_new_tokens=10, seed=1).texts
    stop = texts[0].split()[1]
    options = {"max_new_tokens": 10, "seed": 1, "stop": stop}
    assert len(policy.sample(prompts[:1], 1, **options).texts[0].split()) < 4
    held = policy.sample(prompts[:1], 1, min_new_tokens=10, **options)
    assert held.lengths.tolist() == [10]
    assert not SamplingConfig(min_new_tokens=1).is_on_policy
    with pytest.raises(InvalidValue, match="min_new_tokens=9 and max_new_tokens=8"):
        policy.sample(prompts, 1, max_new_tokens=8, min_new_tokens=9)
