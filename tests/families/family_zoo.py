"""Tiny random models of some hundred families, as data: what differs from `SIZES` for each.

A size in `SIZES` is used where a family's configuration has a field of that name.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "initializer_range": 0.4,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "sliding_window": 8,
    "ffn_hidden_size": 64,
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "zero_expert_num": 2,
    "moe_latent_size": 16,
    # latent and sparse attention
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 64,
    # recurrent layers
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_headdim": 8,
    "n_mamba_heads": 2,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "state_size": 8,
    "expand": 2,
    # others
    "dim_model_base": 16,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 70,
    "num_kv_shared_layers": 0,
}

MIXED = {"layer_types": ["linear_attention", "full_attention"]}
ALL_HEADS = {"num_key_value_heads": 4}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 16,
    }
}
BERT = {"is_decoder": True}
DECODER = {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "d_model": 32}

# name in the table: (model type, what differs). The table is in this order.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    # attention
    **{
        name: (name, {})
        for name in (
            "llama",
            "mistral",
            "qwen2",
            "qwen3",
            "gemma",
            "gemma2",
            "gemma3_text",
            "gemma3n_text",
            "gemma4_text",
            "phi",
            "phi3",
            "gpt2",
            "gpt_bigcode",
            "gpt_neox",
            "gpt_neox_japanese",
            "opt",
            "xglm",
            "biogpt",
            "bloom",
            "mpt",
            "falcon",
            "persimmon",
            "stablelm",
            "starcoder2",
            "nemotron",
            "cohere",
            "cohere2",
            "granite",
            "granite_swa",
            "olmo",
            "olmo2",
            "olmo3",
            "glm",
            "glm4",
            "ernie4_5",
            "exaone4",
            "hunyuan_v1_dense",
            "hyperclovax",
            "seed_oss",
            "smollm3",
            "apertus",
            "arcee",
            "helium",
            "jais2",
            "ministral",
            "ministral3",
            "nanochat",
            "vaultgemma",
            "cwm",
            "diffllama",
            "doge",
            "bitnet",
            "flint",
            "internlm3",
            "beam",
            "ctrl",
            "openai-gpt",
            "moshi",
        )
    },
    "hrm_text": ("hrm_text", {"initializer_range": 0.1}),  # its loops multiply rounding
    "gptj": ("gptj", {"rotary_dim": 8}),
    "codegen": ("codegen", {"rotary_dim": 8}),
    "gpt_neo": (
        "gpt_neo",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    ),
    "minicpm3": ("minicpm3", ALL_HEADS),
    "youtu": ("youtu", ALL_HEADS),
    "llama-dynamic-ntk": ("llama", {**DYNAMIC, "max_position_embeddings": 16}),
    "phi3-longrope": ("phi3", {**LONGROPE, "original_max_position_embeddings": 16}),
    "modernbert-decoder": ("modernbert-decoder", {}),
    "bert": ("bert", BERT),
    "bert-generation": ("bert-generation", {}),
    "roberta": ("roberta", BERT),
    "bart": ("bart", DECODER),
    # mixtures of experts
    **{
        name: (name, {})
        for name in (
            "mixtral",
            "qwen2_moe",
            "qwen3_moe",
            "olmoe",
            "flex_olmo",
            "phimoe",
            "granitemoe",
            "granitemoeshared",
            "gpt_oss",
            "minimax_m2",
            "glm4_moe",
            "ernie4_5_moe",
            "hunyuan_v1_moe",
            "exaone_moe",
            "dots1",
            "afmoe",
            "solar_open",
            "mellum",
            "jetmoe",
            "cohere2_moe",
            "llama4_text",
            "laguna",
            "hy_v3",
            "mimo_v2_flash",
            "aria_text",
        )
    },
    "deepseek_v2": ("deepseek_v2", ALL_HEADS),
    "deepseek_v3": ("deepseek_v3", ALL_HEADS),
    "deepseek_v32": ("deepseek_v32", ALL_HEADS),
    "deepseek_v4": ("deepseek_v4", {}),
    "glm4_moe_lite": ("glm4_moe_lite", ALL_HEADS),
    "glm_moe_dsa": ("glm_moe_dsa", ALL_HEADS),
    "longcat_flash": ("longcat_flash", ALL_HEADS),
    "dbrx": (
        "dbrx",
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 256,
            "ffn_config": {"ffn_hidden_size": 16},
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        },
    ),
    # recurrent layers, alone and beside attention
    "mamba": ("mamba", {}),
    "mamba2": ("mamba2", {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8}),
    "falcon_mamba": ("falcon_mamba", {}),
    "falcon_h1": ("falcon_h1", {"mamba_d_ssm": 64, "lm_head_multiplier": 0.5}),
    "jamba": (
        "jamba",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
        },
    ),
    "bamba": ("bamba", {"attn_layer_indices": [1]}),
    "zamba": ("zamba", {"num_hidden_layers": 3, "layer_types": ["mamba", "hybrid", "mamba"]}),
    "zamba2": (
        "zamba2",
        {
            "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "hybrid", "mamba"],
            "num_mem_blocks": 1,
            "mamba_ngroups": 1,
        },
    ),
    "nemotron_h": ("nemotron_h", {}),
    "granitemoehybrid": ("granitemoehybrid", {"layer_types": ["mamba", "attention"]}),
    "recurrent_gemma": ("recurrent_gemma", {"num_hidden_layers": 3}),
    "lfm2": (
        "lfm2",
        {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8, "block_ff_dim": 64},
    ),
    "lfm2_moe": ("lfm2_moe", {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "lfm3": ("lfm3", {"layer_types": ["conv", "full_attention"]}),
    "qwen3_next": ("qwen3_next", MIXED),
    "qwen3_5_text": ("qwen3_5_text", MIXED),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", MIXED),
    "olmo_hybrid": ("olmo_hybrid", {}),
    "kimi_linear": ("kimi_linear", {**MIXED, **ALL_HEADS}),
    "bailing_hybrid": ("bailing_hybrid", {**MIXED, **ALL_HEADS}),
    "minimax": ("minimax", {}),
    "zaya": ("zaya", {"num_experts_per_tok": 1}),
    "inkling2_text": ("inkling2_text", {}),
    "rwkv": ("rwkv", {}),
    "xlstm": ("xlstm", {"num_heads": 4}),
}

# One or two of each kind, for every run of the tests.
REPRESENTATIVE = (
    "llama",
    "qwen3",
    "gemma3_text",
    "gpt2",
    "falcon",
    "deepseek_v3",
    "mixtral",
    "qwen3_5_text",
    "lfm2",
    "granitemoehybrid",
    "jamba",
    "mamba",
    "recurrent_gemma",
    "openai-gpt",
    "llama-dynamic-ntk",
    "bert",
)


def build(name: str, vocab: int, seed: int = 0) -> PreTrainedModel:
    """A random model of a family, in float32 on the CPU."""
    kind, differences = FAMILIES[name]
    config = CONFIG_MAPPING[kind]
    known = {field.name for field in dataclasses.fields(config)} | set(config.attribute_map)
    sizes = {key: value for key, value in {**SIZES, "vocab_size": vocab}.items() if key in known}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config(**{**sizes, **differences})).float().eval()
