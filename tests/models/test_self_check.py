"""Families with caches, batches or embeddings of their own: right numbers, or refused at once."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BertConfig,
    BertGenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    SiglipVisionConfig,
)

from opdlab import Policy, Prompt
from opdlab.errors import ContextTooLong, InvalidValue, TokenizerMismatch, UnsupportedModel
from opdlab.models.abilities import PLAIN, Abilities
from opdlab.models.forward import last_hidden
from opdlab.models.head import Head
from opdlab.models.self_check import find_abilities

RULE = "say sum " + "4 7 1 2 " * 6  # more tokens than a shared prefix needs
ASKED = [
    Prompt(RULE + "ana has 4 7 apples"),
    Prompt(RULE + "ben"),
    Prompt(RULE + "cleo has 2 pears sells 1 9 . total ?"),
]
HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}


def plain_log_probs(policy: Policy, rollout) -> torch.Tensor:
    """Log-probs `[tokens, V]` of one pass per text, without padding or cache."""
    rows = []
    for start, body in zip(policy.encode_all(rollout.prompts), rollout.completions(), strict=True):
        with torch.no_grad():
            logits = policy.weights.model(torch.tensor([start + body]), use_cache=False).logits[
                0, len(start) - 1 : -1
            ]
        rows.append(logits[:, : policy.weights.vocab_size].log_softmax(-1))
    return torch.cat(rows)


def assert_right(policy: Policy) -> None:
    rollout = policy.sample(ASKED, n=2, max_new_tokens=6, seed=3)
    want = plain_log_probs(policy, rollout)
    torch.testing.assert_close(policy.log_probs(rollout), want, rtol=1e-3, atol=1e-3)
    own = want.gather(-1, rollout.ids[rollout.mask][:, None])[:, 0]
    torch.testing.assert_close(rollout.logp[rollout.mask], own, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["qwen3_5_text", "lfm2", "llama"])
def test_all_shortcuts_are_kept_where_they_are_right(family, make_policy):
    config = {
        "qwen3_5_text": HYBRID,
        "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy = make_policy(3, family=family, **config.get(family, {}))
    # Layers that do not only append have no keys and values that a prompt's texts could share.
    assert policy.weights.abilities == Abilities(splits_cache=family == "llama")
    assert_right(policy)


def test_positions_that_are_read_from_the_cache_are_not_recorded(make_model):
    """BART's decoder takes them from the length of the cache, which a recording would hold fast."""
    sizes = {"d_model": 32, "decoder_ffn_dim": 64, "decoder_layers": 2, "init_std": 0.4}
    model = make_model(40, family="bart", **sizes, decoder_attention_heads=4, forced_eos_token_id=1)
    abilities = find_abilities(model.eval(), Head.of(model, 40))
    assert abilities.caches
    assert not abilities.splits_cache


def test_a_recurrent_state_cannot_be_padded_on_the_left_nor_entered_with_several_tokens(
    make_policy,
):
    with pytest.warns(
        UserWarning,
        match=(
            r"^MambaForCausalLM: prompts of different length are sampled in separate batches, .*;"
            r" the "
            r"beginning that several prompts share is run again .*\. The numbers are right, it"
            r" takes longer\.$"
        ),
    ):
        policy = make_policy(3, family="mamba", state_size=8)
    assert policy.weights.abilities == Abilities(
        pads_left=False, shares_prefix=False, splits_cache=False
    )
    assert_right(policy)


def test_a_cache_that_a_family_ignores_is_not_used(make_policy):
    with pytest.warns(
        UserWarning, match="each new token is sampled by running the whole text again"
    ):
        policy = make_policy(3, family="openai-gpt", n_embd=32, n_layer=2, n_head=4, n_positions=64)
    assert policy.weights.abilities == Abilities(
        pads_left=False, caches=False, shares_prefix=False, splits_cache=False
    )
    assert_right(policy)


class Mixing(LlamaForCausalLM):
    """The rows of a batch see each other, as through experts of limited capacity."""

    def __init__(self, config):
        super().__init__(config)
        self.model.register_forward_hook(self.mix)

    @staticmethod
    def mix(module, args, output):
        output.last_hidden_state = output.last_hidden_state + output.last_hidden_state.mean(
            0, keepdim=True
        )


def test_rows_that_see_each_other_run_one_at_a_time(words):
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.4,
    )
    with pytest.warns(UserWarning, match=r"^Mixing: texts are run one at a time"):
        policy = Policy.of(Mixing(config), words, eos=[1])
    assert policy.weights.abilities == PLAIN
    assert_right(policy)


@pytest.mark.parametrize(
    "abilities", [PLAIN, Abilities(pads=False), Abilities(shares_prefix=False)]
)
def test_states_and_gradients_do_not_depend_on_the_shortcuts_taken(abilities, make_model):
    model = make_model(40)
    starts, bodies = [[3, 4, 5], [6], [7, 8, 9], [3]], [[1, 2], [4, 4, 4, 4], [], [5]]
    found = []
    for taken in (Abilities(), abilities):
        states = last_hidden(model, starts, bodies, taken)
        found.append(
            [
                states,
                *torch.autograd.grad(states.square().sum(), list(model.model.layers.parameters())),
            ]
        )
    assert found[0][0].shape == (7, 32)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "qwen3_moe"])
def test_rounding_raises_no_alarm(dtype, family, make_model):
    small = (
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        if family == "qwen3_moe"
        else {}
    )
    for seed in range(3):
        model = make_model(70, seed=seed, family=family, dtype=dtype, **small).eval()
        found = find_abilities(model, Head.of(model, 70))
        splits = family != "gemma2"  # which has sliding windows
        if family == "qwen3_moe" and dtype == torch.bfloat16:
            # Attention in parts rounds elsewhere, which sends a token to another expert at one of
            # these seeds. The prompt is then kept for each text.
            splits = found.splits_cache
        assert found == Abilities(splits_cache=splits)


def test_a_model_that_sees_later_tokens_is_refused(words):
    model = AutoModelForCausalLM.from_config(
        BertGenerationConfig(
            vocab_size=len(words),
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            initializer_range=0.4,
        )
    )
    with pytest.raises(
        UnsupportedModel,
        match=(
            r"^BertGenerationDecoder is not causal: a token's distribution changes with the tokens"
        ),
    ):
        Policy.of(model, words, eos=[1])


def test_another_head_is_refused_by_name(words):
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        is_decoder=True,
        initializer_range=0.4,
    )
    with pytest.raises(
        UnsupportedModel,
        match=r"^BertLMHeadModel computes its logits in a way that opdlab does not know",
    ):
        Policy.of(AutoModelForCausalLM.from_config(config), words, eos=[1])


ROTARY = {
    "dynamic": {
        "max_position_embeddings": 12,
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    },
    "longrope": {
        "max_position_embeddings": 256,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "original_max_position_embeddings": 12,
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
        },
    },
}


@pytest.mark.parametrize("kind", ROTARY)
def test_a_rotary_embedding_that_changes_with_length_needs_a_limit(kind, make_model, words):
    model = make_model(len(words), **ROTARY[kind])
    with pytest.raises(
        UnsupportedModel,
        match=rf"rows of more than 12 tokens \(rope_type '{kind}'\).*context_length=12",
    ):
        Policy.of(model, words)
    with pytest.raises(UnsupportedModel):
        Policy.of(model, words, context_length=13)
    policy = Policy.of(model, words, context_length=12)
    short = [Prompt("ana has 4 7"), Prompt("ben")]
    rollout = policy.sample(short, n=2, max_new_tokens=6, seed=1)
    torch.testing.assert_close(
        policy.log_probs(rollout), plain_log_probs(policy, rollout), rtol=1e-4, atol=1e-4
    )
    with pytest.raises(ContextTooLong):
        policy.sample(short, max_new_tokens=10)
    with pytest.raises(ContextTooLong):
        policy.copied().sample(short, max_new_tokens=10)


def test_tokens_that_the_model_lacks_are_named(make_model, make_tokenizer):
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    with pytest.raises(
        TokenizerMismatch,
        match=r"LlamaForCausalLM lacks: '<think>' \(12\), '</think>' \(13\)\. .*_embeddings\(14\)",
    ):
        Policy.of(model, tokenizer)
    model.resize_token_embeddings(14)
    assert Policy.of(model, tokenizer).weights.vocab_size == 14


@pytest.mark.parametrize(
    ("eos", "words"),
    [
        ([99], "eos=[99], but LlamaForCausalLM has tokens from 0 to 11"),
        ([1, 12], "eos=[1, 12], but"),
        ([-1], "eos=-1. Use a whole number of at least 0"),
    ],
)
def test_eos_ids_are_ids_of_the_model(eos, words, make_model, make_tokenizer):
    with pytest.raises(InvalidValue, match=re.escape(words)):
        Policy.of(make_model(12), make_tokenizer(), eos=eos)


EXPERTS = {
    "num_experts": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}


TOLD = (
    r"^The LoRA does not reach \d\d% of GptOssForCausalLM's weights, .*:"
    r" mlp\.experts\.gate_up_proj, .*lora=None"
)


def test_fused_experts_without_an_adapter_are_told(make_policy):
    policy = make_policy(0, family="gpt_oss", **EXPERTS)
    with pytest.warns(UserWarning, match=TOLD):
        policy.adapt(rank=2)


REACHED = {
    "llama": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "qwen3_5_text": HYBRID,
    "mamba": {"state_size": 8},
    "mixtral": EXPERTS,
}


@pytest.mark.parametrize("family", REACHED)
def test_a_lora_that_reaches_the_model_is_no_news(family, make_policy):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mamba")
        policy = make_policy(0, family=family, **REACHED[family])
        warnings.filterwarnings("error", "The LoRA")
        policy.adapt(rank=2)


def test_an_image_encoder_gets_no_adapter_and_the_text_does(words):
    text = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.4,
    )
    sees = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    policy = Policy.of(
        AutoModelForImageTextToText.from_config(LlavaConfig(text_config=text, vision_config=sees)),
        words,
        eos=[1],
    )
    assert_right(policy)
    names = policy.weights.adapter_state(policy.adapt(rank=2).adapter)
    assert len(names) == 2 * 7  # the matrices of one layer's attention and MLP
    assert all("language_model" in name for name in names)


def test_layers_that_a_family_reads_without_calling_them_get_no_adapter(make_policy):
    with pytest.warns(UserWarning, match="Mamba"):
        policy = make_policy(0, family="mamba", state_size=8)
    names = policy.weights.adapter_state(policy.adapt(rank=2).adapter)
    assert any("in_proj" in name for name in names)
    assert not any("out_proj" in name for name in names)
