"""Policies: scores against manual passes, many on one set of weights, errors for bad input."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from opdlab import Policy, Prompt
from opdlab.data.rollout import Rollout
from opdlab.errors import (
    ContextTooLong,
    EmptyPrompts,
    InvalidValue,
    MissingHint,
    TokenizerMismatch,
)
from opdlab.models.forward import last_hidden
from opdlab.models.recomputation import recompute_layers
from opdlab.models.same_tokens import check_same_tokens
from opdlab.models.text_rollouts import rollout_from_texts

FAMILIES = {
    "llama": {},
    "qwen3": {},
    "gemma2": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8, "sliding_window": 6},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.5},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
}


def naive(model, starts: list[list[int]], bodies: list[list[int]], vocab: int) -> torch.Tensor:
    """Log-probs `[tokens, V]` of one unpadded forward pass a completion."""
    out = []
    for start, body in zip(starts, bodies, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([start + body])).logits[0, len(start) - 1 : -1, :vocab]
        out.append(logits.log_softmax(-1))
    return torch.cat(out)


def left_padded(
    model, starts: list[list[int]], bodies: list[list[int]], vocab: int
) -> torch.Tensor:
    """The same from one left-padded batch with an attention mask, as Hugging Face generates."""
    rows = [s + b for s, b in zip(starts, bodies, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    with torch.no_grad():
        logits = (
            model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
            .logits[..., :vocab]
            .log_softmax(-1)
        )
    return torch.cat([row[width - len(b) - 1 : -1] for row, b in zip(logits, bodies, strict=True)])


@pytest.fixture(scope="module")
def rollout(student, prompts) -> Rollout:
    return student.sample(prompts, n=2, max_new_tokens=9, seed=3)


@pytest.fixture
def fresh(make_policy) -> Policy:
    """A policy that a test may train."""
    return make_policy(2)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_whatever_the_padding(family, make_policy, prompts):
    policy = make_policy(3, family=family, **FAMILIES[family])
    rollout = policy.sample(prompts, n=2, max_new_tokens=9)
    starts, bodies = policy.encode_all(rollout.prompts), rollout.completions()
    assert len({len(s) for s in starts}) == 4
    model, vocab = policy.weights.model, policy.weights.vocab_size
    got = policy.log_probs(rollout)
    assert got.dtype == torch.float32
    close(got, naive(model, starts, bodies, vocab))
    close(got, left_padded(model, starts, bodies, vocab))


def test_scores_do_not_depend_on_the_rest_of_the_batch(student, rollout, monkeypatch):
    whole = student.log_probs(rollout)
    alone = torch.cat([student.log_probs(rollout.select([i])) for i in range(len(rollout))])
    close(whole, alone)
    monkeypatch.setattr("opdlab.models.policy.TOKENS_PER_PASS", 50)  # several passes
    close(student.log_probs(rollout), whole)
    with torch.no_grad():
        assert torch.equal(
            student.hidden(rollout.select([5])),
            student.hidden(rollout.select([5, 5]))[: rollout.lengths[5]],
        )


def test_hidden_carries_a_gradient_when_the_policy_trains(fresh, rollout):
    assert not fresh.hidden(rollout).requires_grad
    fresh.adapt(4)
    assert fresh.hidden(rollout).requires_grad
    with torch.no_grad():
        assert not fresh.hidden(rollout).requires_grad


# Contexts.


def test_a_context_that_changes_nothing_changes_no_number(student, rollout):
    assert torch.equal(
        student.seeing(lambda prompt: prompt).log_probs(rollout), student.log_probs(rollout)
    )


def test_hints_of_different_lengths_move_no_completion(student, rollout):
    seeing = student.seeing()
    starts = [student.encode(p.with_context(p.hint)) for p in rollout.prompts]
    assert (
        len({len(s) - len(student.encode(p)) for s, p in zip(starts, rollout.prompts, strict=True)})
        == 3
    )
    want = naive(student.weights.model, starts, rollout.completions(), student.weights.vocab_size)
    close(seeing.log_probs(rollout), want)
    assert (seeing.log_probs(rollout) - student.log_probs(rollout)).abs().max() > 0.1


def test_one_context_for_all(student, rollout):
    starts = [student.encode(p.with_context("say sum")) for p in rollout.prompts]
    close(
        student.seeing("say sum").log_probs(rollout),
        naive(student.weights.model, starts, rollout.completions(), 70),
    )


def test_where_a_context_stands(student):
    assert Prompt("b").with_context("a") == Prompt("a\nb")
    user = {"role": "user", "content": "q"}
    assert Prompt(messages=(user,)).with_context("a").messages == (
        {"role": "system", "content": "a"},
        user,
    )
    both = Prompt(messages=({"role": "system", "content": "s"}, user), id="i", answer="4")
    assert both.with_context("a") == replace(
        both, messages=({"role": "system", "content": "s\na"}, user)
    )
    assert (
        student.tokenizer.decode(
            student.encode(Prompt(messages=({"role": "user", "content": "ana has"},)))
        )
        == "<user> ana has<assistant>"
    )


def test_a_rollout_never_holds_a_hint(student, prompts):
    rollout = student.seeing().sample(prompts, max_new_tokens=2)
    assert rollout.prompts == tuple(prompts)


# Many policies on one set of weights.


def test_the_bare_model_stays_while_its_adapter_trains(fresh, rollout, perturb):
    reference = fresh.frozen()
    before = fresh.log_probs(rollout)
    fresh.adapt(4)
    assert torch.equal(fresh.log_probs(rollout), before)  # a new LoRA is the identity
    perturb(fresh)
    assert (fresh.log_probs(rollout) - before).abs().max() > 0.1
    assert torch.equal(reference.log_probs(rollout), before)


def test_seeing_follows_training_and_frozen_does_not(fresh, rollout, perturb):
    live, still_bare = fresh.seeing(), fresh.frozen().seeing()
    before = live.log_probs(rollout)
    fresh.adapt(4)
    perturb(fresh, 1)
    told = replace(rollout, prompts=tuple(p.with_context(p.hint) for p in rollout.prompts))
    close(live.log_probs(rollout), fresh.log_probs(told))
    assert torch.equal(still_bare.log_probs(rollout), before)
    snapshot, hinted = fresh.frozen(), fresh.seeing().frozen()
    then, then_hinted = fresh.log_probs(rollout), live.log_probs(rollout)
    assert torch.equal(snapshot.log_probs(rollout), then)
    perturb(fresh, 2)
    assert (fresh.log_probs(rollout) - then).abs().max() > 0.1
    assert torch.equal(snapshot.log_probs(rollout), then)
    assert torch.equal(hinted.log_probs(rollout), then_hinted)
    close(live.log_probs(rollout), fresh.log_probs(told))


def test_using_restores_what_was_in_force(fresh):
    fresh.adapt(4)
    weights, name = fresh.weights, fresh.adapter
    other = fresh.frozen().adapter
    weights.use(name)
    with weights.using(None), weights.using(other):
        assert weights.active == other
    assert weights.active == name

    def fail():
        with weights.using(other), weights.using(None):
            raise RuntimeError("a cell was interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        fail()
    assert weights.active == name


def test_a_policy_made_while_another_is_in_force_changes_nothing(fresh, rollout, perturb):
    fresh.adapt(4)
    perturb(fresh)
    want = fresh.log_probs(rollout)
    with fresh.weights.using(fresh.adapter) as model:
        fresh.frozen()
        assert fresh.weights.active == fresh.adapter
        close(naive(model, fresh.encode_all(rollout.prompts), rollout.completions(), 70), want)


def test_switching_keeps_the_students_adapter_trainable(fresh, rollout):
    fresh.adapt(4)
    fresh.weights.use(fresh.adapter)
    trainable = lambda: {
        name for name, p in fresh.weights.model.named_parameters() if p.requires_grad
    }
    before = trainable()
    assert before
    assert all(f".{fresh.adapter}." in name for name in before)
    snapshot, bare = fresh.frozen(), Policy(fresh.weights)
    for policy in (snapshot, bare, fresh.seeing()):
        policy.log_probs(rollout)
        policy.sample(rollout.prompts[:1], max_new_tokens=2)
        assert trainable() == before
    hidden = fresh.hidden(rollout)
    snapshot.log_probs(rollout)  # another policy looks between forward and backward
    hidden.sum().backward()
    got = [p.grad for name, p in fresh.weights.model.named_parameters() if name in before]
    assert all(g is not None for g in got)
    assert any(g.norm() > 0 for g in got)
    assert all(
        p.grad is None for name, p in fresh.weights.model.named_parameters() if name not in before
    )


def test_copied_has_weights_of_its_own(fresh, rollout, perturb):
    fresh.adapt(4)
    perturb(fresh)
    fresh.weights.use(fresh.adapter)
    before, twin = fresh.log_probs(rollout), fresh.copied()
    assert torch.equal(twin.log_probs(rollout), before)
    with torch.no_grad():
        for p in fresh.weights.model.parameters():
            p.mul_(1.5)
    assert torch.equal(twin.log_probs(rollout), before)
    assert (fresh.log_probs(rollout) - before).abs().max() > 0.1
    assert twin.weights.eos == fresh.weights.eos
    assert twin.hidden(rollout).requires_grad  # and can be trained on


def test_adapters_start_from_their_seed(make_policy):
    a, b, c = (
        make_policy(0).adapt(4, seed=seed).weights.adapter_state("lora0") for seed in (0, 0, 1)
    )
    same = [torch.equal(a[k], b[k]) for k in a]
    assert all(same)
    assert not all(torch.equal(a[k], c[k]) for k in a)


# Vocabularies and tokenizers.


def test_padding_rows_of_the_head_are_cut(make_policy, student, rollout):
    padded = make_policy(1, vocab=96)
    assert padded.weights.vocab_size == len(padded.tokenizer) == 70
    check_same_tokens(student, padded)
    got = padded.log_probs(rollout)
    assert got.shape == student.log_probs(rollout).shape
    close(
        got,
        naive(padded.weights.model, padded.encode_all(rollout.prompts), rollout.completions(), 70),
    )
    close(got.exp().sum(-1), torch.ones(rollout.tokens))
    assert (
        max(
            i
            for row in padded.sample(rollout.prompts, n=4, max_new_tokens=8).completions()
            for i in row
        )
        < 70
    )


def test_a_vocabulary_with_holes_keeps_its_last_token(make_model, make_tokenizer):
    tokenizer = make_tokenizer()
    # Ids 11 to 14 are nobody's.
    state = tokenizer.backend_tokenizer.to_str().replace('"f":11', '"f":15')
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(state)
    assert (tokenizer.encode("f"), len(tokenizer)) == ([15], 12)
    assert Policy.of(make_model(20), tokenizer).weights.vocab_size == 16


def swapped(tokenizer, a: int, b: int):
    """The same pieces and size, two ids exchanged."""
    state = tokenizer.backend_tokenizer.to_str()
    one, two = (re.escape(f'"{tokenizer.convert_ids_to_tokens(i)}":{i}') for i in (a, b))
    pieces = [tokenizer.convert_ids_to_tokens(i) for i in (a, b)]
    state = re.sub(one, f'"{pieces[0]}":{b}', re.sub(two, f'"{pieces[1]}":{a}', state))
    other = copy.deepcopy(tokenizer)
    other._tokenizer = type(tokenizer.backend_tokenizer).from_str(state)
    return other


def test_another_tokenizer_of_the_same_size_is_refused(make_policy, student, words):
    other = swapped(words, 20, 31)
    assert len(other) == len(words)
    first, second = words.convert_ids_to_tokens([20, 31])
    with pytest.raises(
        TokenizerMismatch,
        match=(
            f"The judge's tokenizer differs.*id 20 is '{second}' there and '{first}' here.*same"
            " family"
        ),
    ):
        check_same_tokens(student, make_policy(1, other), "judge")


def test_other_eos_sets_are_refused(make_policy, student):
    with pytest.raises(
        TokenizerMismatch,
        match=(
            r"The teacher stops at tokens 1 '<eos>', 3 '<user>', the student at 1"
            r" '<eos>'.*eos=\[…\]"
        ),
    ):
        check_same_tokens(student, make_policy(1, eos=[1, 3]))


def test_other_templates_are_refused(make_policy, student, words):
    other = copy.deepcopy(words)
    other.chat_template = words.chat_template.replace("<assistant>", "<assistant>= ")
    with pytest.raises(
        TokenizerMismatch,
        match=(
            r"chat template differs.*from character \d+ on: '= ' there, '' here.*tokenizer=student"
        ),
    ):
        check_same_tokens(student, make_policy(1, other))


def test_the_same_tokens_are_accepted(student, teacher, fresh):
    check_same_tokens(student, teacher)
    check_same_tokens(fresh, fresh.seeing())


def test_eos_is_the_union_of_what_model_and_tokenizer_say(make_model, words):
    model = make_model(70)
    model.generation_config.eos_token_id = [7, 9]
    assert Policy.of(model, words).weights.eos == {1, 7, 9}
    assert Policy.of(model, words, eos=[4]).weights.eos == {4}


def test_loads_from_a_folder(make_model, words, tmp_path, rollout):
    model = make_model(70, 5)
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    loaded = Policy.load(tmp_path, device="cpu")
    close(loaded.log_probs(rollout), Policy.of(model, words).log_probs(rollout))
    check_same_tokens(loaded, Policy.of(model, words))
    assert (
        Policy.load(tmp_path, device="cpu", dtype=torch.bfloat16).log_probs(rollout).dtype
        == torch.float32
    )


# Bad input.


def test_no_prompts_are_refused(student):
    with pytest.raises(EmptyPrompts, match=r"no prompts\. Give at least one"):
        student.sample([])


def test_a_prompt_without_tokens_is_refused(student, prompts):
    """Nothing stands before its first token, so nothing can predict it."""
    with pytest.raises(EmptyPrompts, match="Prompt 'empty' has no tokens"):
        student.sample([*prompts, Prompt("", id="empty")])
    with pytest.raises(EmptyPrompts, match="Prompt 'empty' has no tokens"):
        student.log_probs(
            rollout_from_texts(student, [Prompt("ana"), Prompt("", id="empty")], ["has", "has"])
        )


def test_a_long_prompt_is_refused_before_any_compute(make_policy):
    policy = make_policy(0, max_position_embeddings=16)
    long = Prompt("ana" + " ana" * 11, id="long")
    with pytest.raises(
        ContextTooLong,
        match=r"Prompt 'long' has 12 tokens and 5 more.*context is 16.*at most 4 new tokens",
    ):
        policy.sample([Prompt("ana"), long], max_new_tokens=5)
    assert len(policy.sample([long], max_new_tokens=4)) == 1
    with pytest.raises(ContextTooLong, match="has 12 tokens and 5 more"):
        policy.sample([long], max_new_tokens=2, prefixes=[[6, 7, 8]])


def test_a_long_hint_is_refused_when_scoring(make_policy):
    policy = make_policy(0, max_position_embeddings=16)
    rollout = policy.sample([Prompt("ana has")], max_new_tokens=8)
    with pytest.raises(
        ContextTooLong,
        match=r"A prompt with its completion has \d+ tokens.*is 16\. Shorten the hint",
    ):
        policy.seeing("buys " * 10).log_probs(rollout)


def test_a_missing_hint_is_named(student):
    with pytest.raises(MissingHint, match=r"Prompt 'p7' has no hint.*hint=.*policy\.seeing\('…'\)"):
        student.seeing().sample([Prompt("ana", id="p7")])


@pytest.mark.parametrize(
    "both", [{}, {"text": "a", "messages": ({"role": "user", "content": "a"},)}]
)
def test_a_prompt_is_a_text_or_a_chat(both):
    with pytest.raises(ValueError, match="either text= or messages="):
        Prompt(**both)


@contextmanager
def counting_tokens(policy: Policy) -> Iterator[list[int]]:
    """The tokens of each pass through the backbone."""
    seen: list[int] = []
    watch = policy.weights.model.get_input_embeddings().register_forward_hook(
        lambda module, ids, out: seen.append(ids[0].numel())
    )
    yield seen
    watch.remove()


def without_sharing(policy: Policy) -> Policy:
    """The same policy, which runs what its prompts share for each of them."""
    policy.weights.abilities = replace(policy.weights.abilities, shares_prefix=False)
    return policy


SHARED = "ana has 4 7 apples buys 3 8 sells 1 9 . total ? " * 3


def test_a_shared_beginning_is_run_once_and_changes_no_number(make_policy):
    policy = make_policy().seeing(SHARED)
    asked = [Prompt(text=text) for text in ("ben has 1 2", "cleo", "dan has 3 4 5 6 nuts")]
    rollout = policy.sample(asked, n=2, max_new_tokens=6)
    with torch.no_grad(), counting_tokens(policy) as once:
        shared = policy.hidden(rollout)
    without_sharing(policy)
    with torch.no_grad(), counting_tokens(policy) as whole:
        apart = policy.hidden(rollout)
    torch.testing.assert_close(shared, apart, rtol=1e-4, atol=1e-5)
    assert sum(once) < 0.5 * sum(whole)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3"])
def test_the_gradient_flows_back_through_a_shared_beginning(make_policy, family):
    asked = [Prompt(text=text) for text in ("ben has 1 2", "cleo", "dan has 3 4 5 6 nuts")]
    found, tokens = [], []
    for change in (lambda policy: policy, without_sharing):
        policy = change(make_policy(family=family))
        seeing = policy.seeing(SHARED)
        rollout = seeing.sample(asked, n=2, max_new_tokens=6, seed=3)
        weights = dict(policy.weights.model.base_model.named_parameters())
        for weight in weights.values():
            weight.requires_grad_()
        with torch.enable_grad(), counting_tokens(policy) as seen:
            hidden = seeing.hidden(rollout)
            loss = (hidden * torch.arange(hidden.numel()).view_as(hidden).cos()).sum()
        found.append(torch.autograd.grad(loss, list(weights.values())))
        tokens.append(sum(seen))
    for shared, apart in zip(*found, strict=True):
        torch.testing.assert_close(shared, apart, rtol=1e-3, atol=1e-3 * float(apart.abs().max()))
    assert tokens[0] < 0.5 * tokens[1]


LONG = [
    "ana has 4 7 apples buys 3 8 sells 1 9 . " * 3 + "total ?",
    "ben has 1 2 pears buys 3 sells 2 4 . ana has 3 . " * 2 + "total ?",
    "cleo has 2 pears . " * 5,
]


def run_both_ways(make_policy, family, *, n, checkpointing, context=None):
    """States, gradients and tokens run of a rollout, with and without sharing."""
    found, tokens = [], []
    for change in (lambda policy: policy, without_sharing):
        policy = change(make_policy(family=family, **FAMILIES.get(family, {})))
        seeing = policy.seeing(context) if context else policy
        rollout = seeing.sample([Prompt(text) for text in LONG], n=n, max_new_tokens=6, seed=3)
        policy.weights.model.double()
        weights = list(policy.weights.model.base_model.parameters())
        for weight in weights:
            weight.requires_grad_()
        with (
            torch.enable_grad(),
            counting_tokens(policy) as seen,
            recompute_layers(policy.weights.model, checkpointing),
        ):
            hidden = seeing.hidden(rollout)
        loss = (hidden * torch.arange(hidden.numel()).view_as(hidden).cos()).sum()
        found.append([hidden.detach(), *torch.autograd.grad(loss, weights)])
        with torch.no_grad():
            found[-1].append(seeing.hidden(rollout))
        tokens.append(sum(seen))
    return found, tokens


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gemma2", "qwen3"])
def test_samples_of_different_prompts_share_their_own_prompt(make_policy, family, checkpointing):
    found, tokens = run_both_ways(make_policy, family, n=4, checkpointing=checkpointing)
    for shared, apart in zip(*found, strict=True):
        torch.testing.assert_close(shared, apart, rtol=1e-5, atol=1e-5 * float(apart.abs().max()))
    assert tokens[0] < 0.6 * tokens[1]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_rule_and_the_prompts_behind_it_are_each_run_once(make_policy, checkpointing):
    found, tokens = run_both_ways(
        make_policy, "llama", n=3, checkpointing=checkpointing, context=SHARED
    )
    for shared, apart in zip(*found, strict=True):
        torch.testing.assert_close(shared, apart, rtol=1e-5, atol=1e-5 * float(apart.abs().max()))
    assert tokens[0] < 0.4 * tokens[1]


def test_samples_of_a_prompt_run_it_once(make_policy):
    policy = make_policy()
    rollout = policy.sample([Prompt(text) for text in LONG[:2]], n=8, max_new_tokens=6, seed=3)
    starts = policy.encode_all(rollout.prompts)
    room = min(map(len, starts)) - 1
    width = max(len(s) + len(b) for s, b in zip(starts, rollout.completions(), strict=True))
    with torch.enable_grad(), counting_tokens(policy) as seen:
        policy.hidden(rollout)
    assert seen == [2 * room, 16 * (width - room)]


@pytest.mark.parametrize(("completion", "is_shared"), [(8, True), (400, False)])
def test_a_prompt_is_run_again_where_the_mask_would_be_larger(make_model, completion, is_shared):
    model = make_model(40)
    seen: list[int] = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, ids, out: seen.append(ids[0].numel())
    )
    with torch.no_grad():
        last_hidden(model, [[3] * 50] * 2, [[4] * completion] * 2)
    assert seen == ([49, 2 * (completion + 1)] if is_shared else [2 * (completion + 50)])


def test_a_graph_that_is_never_run_backward_is_freed(make_policy):
    policy = make_policy().seeing(SHARED)
    rollout = policy.sample([Prompt("cleo"), Prompt("ben")], n=2, max_new_tokens=4)
    model = policy.weights.model
    model.get_input_embeddings().weight.requires_grad_()
    kept: list[weakref.ref[torch.Tensor]] = []
    watch = model.get_input_embeddings().register_forward_hook(
        lambda module, ids, out: kept.append(weakref.ref(out))
    )
    with recompute_layers(model), torch.enable_grad():
        hidden = policy.hidden(rollout)
    watch.remove()
    assert len(kept) == 2
    gc.disable()
    del hidden
    alive = [ref() is not None for ref in kept]
    gc.enable()
    assert alive == [False, False]


@pytest.mark.parametrize("way", ["of opdlab", "of transformers"])
def test_layers_that_run_again_change_no_gradient_of_a_shared_beginning(make_policy, way):
    policy = make_policy()
    model, seeing = policy.weights.model, policy.seeing(SHARED)
    rollout = seeing.sample([Prompt("cleo"), Prompt("ben")], max_new_tokens=4)
    weight = model.get_input_embeddings().weight.requires_grad_()
    found = []
    for enabled in (False, True):
        if enabled and way == "of transformers":
            model.train()
            model.gradient_checkpointing_enable()
        with recompute_layers(model, enabled and way == "of opdlab"), torch.enable_grad():
            hidden = seeing.hidden(rollout)
        found.append(torch.autograd.grad(hidden.square().sum(), weight)[0])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_sampling_runs_a_shared_beginning_once(make_policy):
    policy = make_policy().seeing(SHARED)
    asked = [Prompt(text=text) for text in ("ben has 1 2", "cleo has 3 4")]
    with counting_tokens(policy) as once:
        shared = policy.sample(asked, n=2, max_new_tokens=3, seed=1)
    without_sharing(policy)
    with counting_tokens(policy) as whole:
        apart = policy.sample(asked, n=2, max_new_tokens=3, seed=1)
    assert shared.texts == apart.texts
    torch.testing.assert_close(shared.logp, apart.logp, rtol=1e-4, atol=1e-5)
    assert sum(once) < 0.7 * sum(whole)


# Subclasses.


class Shortened(Policy):
    """Reads prompts without their last token."""

    def encode_unchecked(self, prompts):
        return [row[:-1] for row in super().encode_unchecked(prompts)]


def test_a_subclass_reads_prompts_in_its_own_way_everywhere(student, prompts):
    short = Shortened(student.weights)
    prompts = [prompt for prompt in prompts if prompt.id != "b"]  # which has one token
    want = [row[:-1] for row in student.encode_all(prompts)]
    assert short.encode_all(prompts) == want
    assert [short.encode(prompt) for prompt in prompts] == want
    rollout = short.sample(prompts, max_new_tokens=4, seed=1)
    own = short.log_probs(rollout).gather(-1, rollout.ids[rollout.mask][:, None])[:, 0]
    torch.testing.assert_close(rollout.logp[rollout.mask], own, rtol=0, atol=1e-4)
    assert short.seeing("ana").encode(prompts[0]) == student.seeing("ana").encode(prompts[0])[:-1]


@pytest.mark.parametrize(
    "view", [Policy.seeing, Policy.frozen, Policy.without_context, Policy.without_adapter]
)
def test_views_keep_the_class_of_their_policy(student, view):
    assert type(view(Shortened(student.weights))) is Shortened


def test_an_encode_that_nothing_calls_is_refused():
    with pytest.raises(
        InvalidValue, match=r"Odd overrides Policy\.encode.*Override encode_unchecked\(prompts\)"
    ):

        class Odd(Policy):
            def encode(self, prompt):
                return [1]


def test_a_policy_can_be_looked_at_without_context_and_adapter(make_policy, prompts):
    policy = make_policy(0).adapt(rank=2)
    hinted = policy.seeing("total")
    plain = hinted.without_context()
    assert plain.encode(prompts[0]) == policy.encode(prompts[0]) != hinted.encode(prompts[0])
    assert plain.adapter == policy.adapter
    bare = hinted.without_adapter()
    assert bare.adapter is None
    assert bare.encode(prompts[0]) == hinted.encode(prompts[0])
