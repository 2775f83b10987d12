"""One model in memory with its tokenizer, its output head and its adapters. Every `Policy` on it shares them."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opdlab.compatibility import check_rotary, find_abilities, warn_about
from opdlab.head import Head
from opdlab.validation import Count, validate
from opdlab.vocabulary import check_eos, check_tokens, vocabulary_rows


class Weights:
    """One model in memory, its tokenizer and its adapters; every `Policy` on it shares them."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        eos: Sequence[int] | None = None,
        source: str = "",
        context_length: int | None = None,
    ) -> None:
        self.model, self.tokenizer, self.source = model.eval(), tokenizer, source
        model.requires_grad_(False)
        self.active: str | None = None  # adapter in force; None is the bare model
        self.own_context_length = validate("Policy", {"context_length": context_length}, {"context_length": Count | None})["context_length"]
        check_tokens(model, tokenizer)
        check_eos(model, eos or ())
        self.eos = frozenset(eos) if eos is not None else _eos(model, tokenizer)
        self.head = Head.of(model, rows=max(tokenizer.get_vocab().values()) + 1)
        check_rotary(model, context_length)
        self.abilities = find_abilities(model, self.head, self.context_length)
        warn_about(model, self.abilities)
        self._names = itertools.count()

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def vocab_size(self) -> int:
        """Tokens that the head can say: rows beyond the tokenizer's last id are padding and are cut."""
        return self.head.rows

    @property
    def context_length(self) -> int | None:
        """Tokens that a prompt and its completion may have together: the model's limit, or the user's lower one."""
        limits = (self.own_context_length, getattr(self.model.config.get_text_config(), "max_position_embeddings", None))
        return min((limit for limit in limits if limit is not None), default=None)

    def add_lora(self, name: str = "", rank: int = 16, alpha: int | None = None,
                 targets: str | list[str] = "all-linear", seed: int = 0) -> str:  # fmt: skip
        """A new adapter on all linear layers but the head, through PEFT; starts as the identity. Returns its name."""
        config = LoraConfig(r=rank, lora_alpha=2 * rank if alpha is None else alpha, target_modules=targets,
                            task_type="CAUSAL_LM")  # fmt: skip
        return self.add_adapter(config, name, seed)

    def add_adapter(self, config: PeftConfig, name: str = "", seed: int = 0) -> str:
        """A new adapter as PEFT's `config` describes it; its random entries follow `seed`. Returns its name."""
        name = name or f"lora{next(self._names)}"
        before = self.active
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are the point here
            torch.manual_seed(seed)
            self.model.add_adapter(config, adapter_name=name)
        self.active = name
        self.use(before)
        return name

    def adapter_state(self, name: str) -> dict[str, Tensor]:
        """The adapter's tensors, as PEFT names them. Not copies."""
        return get_peft_model_state_dict(self.model, adapter_name=name, save_embedding_layers=False)  # "auto" asks the Hub each time

    def set_adapter_state(self, name: str, state: dict[str, Tensor]) -> None:
        set_peft_model_state_dict(self.model, dict(state), adapter_name=name)

    @contextmanager
    def using(self, adapter: str | None) -> Iterator[PreTrainedModel]:
        """The model with `adapter` in force (None: bare); what was in force before comes back afterwards."""
        before = self.active
        self.use(adapter)
        try:
            yield self.model
        finally:
            self.use(before)

    def use(self, adapter: str | None) -> None:
        """Put `adapter` in force (None: the bare model) until something else is."""
        if adapter == self.active:
            return
        if adapter is None:
            self.model.disable_adapters()
        else:
            self.model.set_adapter(adapter)
            self.model.enable_adapters()
        self.active = adapter


def _eos(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    ids = getattr(model.generation_config, "eos_token_id", None)
    ids = [ids] if isinstance(ids, int) else list(ids or [])
    ids = [id for id in ids if 0 <= id < vocabulary_rows(model)]  # a default of the family that this model cannot write
    return frozenset([*ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])])
