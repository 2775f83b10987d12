"""The models and the data set that the imitation of the Hub serves.

A model is made when it is first asked for, and its weights follow from its seed alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from .tokenizer_files import folder_of

STUDENT, TEACHER = "Qwen/Qwen3-0.6B", "Qwen/Qwen3-4B"  # the pair of the gpu profile
ADAPTER, OWN_CODE, SUMS = "someone/qwen3-0.6b-lora", "someone/own-code", "someone/sums"
EARLIER = "before-update"  # a revision of the student with other weights

SHARED = 4.0  # see `_let_texts_end`

TINY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


@dataclass(frozen=True)
class Family:
    """What the real models of one family have in common.

    Attributes:
        model_type: As transformers names it.
        tokenizer: A key of `tokenizer_files.DIGESTS`.
        config: Fields of the configuration in which the real models differ from the defaults.
        generation: Fields of `generation_config.json`.
    """

    model_type: str
    tokenizer: str
    config: Mapping[str, Any]
    generation: Mapping[str, Any]


QWEN3 = Family(
    "qwen3",
    "qwen3",
    {
        "vocab_size": 151_936,
        "max_position_embeddings": 40_960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000},
        "tie_word_embeddings": True,
        "bos_token_id": 151_643,
        "eos_token_id": 151_645,
    },
    {
        "bos_token_id": 151_643,
        "eos_token_id": [151_645, 151_643],
        "pad_token_id": 151_643,
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
    },
)
GEMMA3 = Family(
    "gemma3_text",
    "gemma3",
    {
        "vocab_size": 262_144,
        "max_position_embeddings": 32_768,
        "query_pre_attn_scalar": 8,
        "sliding_window": 512,
        "layer_types": ["sliding_attention", "full_attention"],
        "bos_token_id": 2,
        "eos_token_id": [1, 106],
        "pad_token_id": 0,
    },
    {
        "bos_token_id": 2,
        "eos_token_id": [1, 106],
        "pad_token_id": 0,
        "do_sample": True,
        "top_k": 64,
        "top_p": 0.95,
    },
)
LLAMA3 = Family(
    "llama",
    "llama3_1",
    {
        "vocab_size": 128_256,
        "max_position_embeddings": 131_072,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "bos_token_id": 128_000,
        "eos_token_id": [128_001, 128_008, 128_009],
    },
    {
        "bos_token_id": 128_000,
        "eos_token_id": [128_001, 128_008, 128_009],
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
    },
)
DEEPSEEK_V3 = Family(
    "deepseek_v3",
    "deepseek_v3",
    {
        "vocab_size": 129_280,
        "max_position_embeddings": 163_840,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 16,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
    {
        "bos_token_id": 0,
        "eos_token_id": 1,
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.95,
    },
)


@dataclass(frozen=True)
class Repository:
    """A repository of the Hub.

    Attributes:
        build: Writes the files of a revision into an empty folder.
        revisions: Names of its branches, the default one first.
        kind: "model" or "dataset".
        is_gated: Whether only those may read it who were granted access.
    """

    build: Callable[[Path, str], None]
    revisions: tuple[str, ...] = ("main",)
    kind: str = "model"
    is_gated: bool = False


def write_model(
    folder: Path,
    revision: str,
    *,
    family: Family,
    seed: int,
    ends: float,
    shard_size: str = "5GB",
    **sizes: int,
) -> None:
    """Write a tiny random model with the files that the real one has.

    Args:
        folder: An empty folder.
        revision: Another revision than main has other weights.
        family: The family of the real model.
        seed: Seed of the weights.
        ends: Weight of the token that ends a text, such that texts have some ten tokens.
        shard_size: Largest size of a file with weights.
        sizes: Fields of the configuration in place of `TINY`.
    """
    config = CONFIG_MAPPING[family.model_type](**{**TINY, **family.config, **sizes})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.architectures, config.dtype = [type(model).__name__], torch.bfloat16
    config.save_pretrained(folder)
    tied = model.all_tied_weights_keys if config.tie_word_embeddings else {}
    shapes = {name: value for name, value in model.state_dict().items() if name not in tied}
    generator = torch.Generator().manual_seed(seed + (0 if revision == "main" else 1000))
    # The public function also writes the index of several files, as the Hub has it.
    weights = {name: _random_weight(name, like, generator) for name, like in shapes.items()}
    _let_texts_end(weights, family.generation["eos_token_id"], ends)
    save_torch_state_dict(
        weights,
        folder,
        max_shard_size=shard_size,
        metadata={"format": "pt"},
    )
    write_json(folder / "generation_config.json", dict(family.generation))
    for file in folder_of(family.tokenizer).iterdir():
        shutil.copy(file, folder)
    (folder / "README.md").write_text(
        "---\nlicense: apache-2.0\nlibrary_name: transformers\n---\nA tiny random model.\n", "utf-8"
    )


def _random_weight(name: str, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw a weight: matrices wide enough that no distribution is near uniform, norms near one."""
    noise = torch.randn(like.shape, generator=generator)
    is_matrix = like.ndim > 1
    centre = 0.0 if is_matrix or "bias" in name else 1.0
    return (centre + (0.4 if is_matrix else 0.05) * noise).to(like.dtype)


def _let_texts_end(weights: dict[str, torch.Tensor], eos: int | list[int], more: float) -> None:
    """Give the token that ends a text so much weight that texts end after some ten tokens.

    The first number of every hidden state is large and much the same: all embeddings begin with it,
    and no layer writes to it. The logit of the ending token reads it.
    """
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight *= 0.25
            weight[..., 0, :] = 0
    embeddings = weights["model.embed_tokens.weight"]
    embeddings[:, 0] = SHARED
    head = weights.get("lm_head.weight", embeddings)
    ends = eos if isinstance(eos, int) else eos[-1]
    head[ends, 0] = SHARED + more


def write_adapter(folder: Path, revision: str, *, base: str, seed: int) -> None:
    """Write a LoRA adapter as PEFT saves it, of a tiny model of the Qwen3 family.

    Args:
        folder: An empty folder.
        revision: Not used; there is one.
        base: Name of the model that it adapts.
        seed: Seed of the weights.
    """
    LoraConfig(
        base_model_name_or_path=base, task_type="CAUSAL_LM", r=4, lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
    ).save_pretrained(folder)  # fmt: skip
    hidden, head, heads = TINY["hidden_size"], TINY["head_dim"], TINY["num_attention_heads"]
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(TINY["num_hidden_layers"]):
        for module, width in (("q_proj", heads * head), ("v_proj", head)):
            place = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{place}.lora_A.weight"] = torch.randn(4, hidden, generator=generator)
            tensors[f"{place}.lora_B.weight"] = torch.randn(width, 4, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def write_own_code(folder: Path, revision: str) -> None:
    """Write a model whose architecture is Python code in its own repository."""
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    write_json(folder / "config.json", {"model_type": "own", "auto_map": own})
    (folder / "own.py").write_text("raise SystemExit('this code must never run')\n", "utf-8")
    for file in folder_of("qwen3").iterdir():
        shutil.copy(file, folder)


def write_sums(folder: Path, revision: str) -> None:
    """Write a data set of questions with answers, in two splits."""
    for split, first in (("train", 2), ("test", 50)):
        rows = [
            {"question": f"What is {a} + {b}?", "answer": str(a + b)}
            for a in range(first, first + 8)
            for b in range(1, 5)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, "utf-8")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nSums.\n", "utf-8")


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file as the Hub's repositories have it."""
    file.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _model(
    family: Family,
    seed: int,
    ends: float,
    *,
    revisions: tuple[str, ...] = ("main",),
    is_gated: bool = False,
    **options: Any,
) -> Repository:
    return Repository(
        partial(write_model, family=family, seed=seed, ends=ends, **options),
        revisions,
        is_gated=is_gated,
    )


REPOSITORIES: dict[str, Repository] = {
    STUDENT: _model(QWEN3, 1, 4.3, revisions=("main", EARLIER)),
    TEACHER: _model(QWEN3, 2, 10.9, shard_size="4MB", hidden_size=32, num_hidden_layers=3),
    "Qwen/Qwen3-8B": _model(QWEN3, 3, 10.9, hidden_size=32, num_hidden_layers=3),
    "google/gemma-3-270m-it": _model(GEMMA3, 3, 2.8, is_gated=True),
    "google/gemma-3-1b-it": _model(GEMMA3, 4, 2.8, is_gated=True),
    "meta-llama/Llama-3.2-1B-Instruct": _model(
        LLAMA3, 5, 4.3, is_gated=True, tie_word_embeddings=True
    ),
    "meta-llama/Llama-3.1-8B-Instruct": _model(LLAMA3, 6, 0.7, is_gated=True),
    "deepseek-ai/DeepSeek-V3": _model(DEEPSEEK_V3, 7, 0.9),
    "deepseek-ai/DeepSeek-V3-0324": _model(DEEPSEEK_V3, 8, 3.5),
    ADAPTER: Repository(partial(write_adapter, base=STUDENT, seed=9)),
    OWN_CODE: Repository(write_own_code),
    SUMS: Repository(write_sums, kind="dataset"),
}
