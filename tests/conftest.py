"""Tiny real models and tokenizers that all tests share: random weights, sharp distributions, built
in milliseconds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from opdlab import Policy, Prompt
from opdlab.tasks.market import tokenizers as market

if TYPE_CHECKING:
    from imitation_hub.connection import Connection

settings.register_profile("opdlab", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("opdlab")
torch.set_num_threads(
    1
)  # tiny tensors: waking a second thread costs more than the work, 30-fold on a busy machine

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}{% if"
    " add_generation_prompt %}[assistant]{% endif %}"
)


def letters(
    pieces: str = "a b c d e f", template: str = TEMPLATE, pad: str = "[pad]"
) -> PreTrainedTokenizerFast:
    """One token a letter, nine ids for the default pieces besides the roles: small enough to
    enumerate.
    """
    vocab = ["[pad]", "[eos]", "[unk]", "[system]", "[user]", "[assistant]", *pieces.split()]
    tokenizer = Tokenizer(
        models.WordLevel({piece: i for i, piece in enumerate(vocab)}, unk_token="[unk]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        eos_token="[eos]",
        unk_token="[unk]",
        chat_template=template,
    )


def byte_level() -> PreTrainedTokenizerFast:
    """A byte-level BPE, as of GPT-2 and Qwen, with merges learned from a few lines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
    )
    tokenizer.train_from_iterator(
        ["the quick brown fox 🙂🙂 jumps", "the lazy dog 世界世界 naïve"], trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>"
    )


def tiny_model(
    vocab: int,
    seed: int = 0,
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    **config: object,
):
    """A random model with two layers of width 32; wide initial weights make its distributions far
    from uniform.
    """
    kind = CONFIG_MAPPING[family]
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.4,
        "tie_word_embeddings": False,
    }
    special = {"vocab_size": vocab, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            kind(**{**sizes, **special, **config}), attn_implementation="eager"
        )
    return model.to(dtype)


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Factory of `letters` tokenizers."""
    return letters


@pytest.fixture(scope="session")
def words() -> PreTrainedTokenizerFast:
    """The market's word tokenizer."""
    return market.words()


@pytest.fixture(scope="session")
def bytes_bpe() -> PreTrainedTokenizerFast:
    return byte_level()


@pytest.fixture(scope="session")
def make_model() -> Callable[..., torch.nn.Module]:
    """Factory of `tiny_model`s."""
    return tiny_model


@pytest.fixture(scope="session")
def make_policy(words) -> Callable[..., Policy]:
    """Factory of policies on fresh tiny models:

    `make_policy(seed, tokenizer=…, eos=…, vocab=…, dtype=…, **config)`.
    """

    def make(
        seed: int = 0, tokenizer=None, eos=None, vocab: int | None = None, **options
    ) -> Policy:
        tokenizer = tokenizer or words
        return Policy.of(tiny_model(vocab or len(tokenizer), seed, **options), tokenizer, eos)

    return make


@pytest.fixture(scope="session")
def student(make_policy) -> Policy:
    """A shared policy that no test may train or adapt."""
    return make_policy(0)


@pytest.fixture(scope="session")
def teacher(make_policy) -> Policy:
    """Another one, with the same tokens."""
    return make_policy(1)


@pytest.fixture(scope="session")
def prompts() -> list[Prompt]:
    """Plain texts of different widths and a chat, all with hints of different lengths."""
    return [
        Prompt("ana has 4 7 apples", hint="9", id="a"),
        Prompt("ben", hint="total 4 7 2 1", id="b"),
        Prompt(
            messages=({"role": "user", "content": "cleo has 2 pears buys 3"},),
            hint="say sum",
            id="c",
        ),
        Prompt("dan has 1 2 eggs sells 3 . total and receipt ?", hint="lot", id="d"),
    ]


@pytest.fixture
def perturb() -> Callable[[Policy, int], None]:
    """Move a policy's adapter as training would."""

    def move(policy: Policy, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        state = policy.weights.adapter_state(policy.adapter)
        policy.weights.set_adapter_state(
            policy.adapter,
            {k: v + 0.3 * torch.randn(v.shape, generator=generator) for k, v in state.items()},
        )

    return move


@pytest.fixture(scope="session")
def running_hub(tmp_path_factory) -> Iterator[Connection]:
    """The imitation of the Hub, started once."""
    from imitation_hub import connection, tokenizer_files

    try:
        tokenizer_files.fetch_all()
    except tokenizer_files.NotFetched as missing:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(missing))
    with connection.running_hub(tmp_path_factory.mktemp("hub")) as running:
        yield running


@pytest.fixture
def hub(running_hub, monkeypatch) -> Connection:
    """The imitation of the Hub in place of the real one, for this process and its commands.

    `hub.hub.requests` are those of the test. What other tests downloaded lies in the cache.
    """
    from imitation_hub import connection

    running_hub.hub.requests.clear()
    connection.connect(running_hub, monkeypatch)
    return running_hub


@pytest.fixture
def empty_hub(hub, tmp_path, monkeypatch) -> Connection:
    """The same with an empty cache and no stored token."""
    from imitation_hub import connection

    fresh = replace(hub, home=tmp_path / "home")
    connection.connect(fresh, monkeypatch)
    return fresh
