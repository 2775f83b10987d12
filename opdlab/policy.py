"""Policies: one next-token distribution each, many of them on one set of weights.

A `Policy` is shared `Weights` seen through an adapter (a LoRA, or none) and, optionally, a context that only it sees
(a hint, a rule, examples). Student, teacher, reference, hinted student, snapshot: all are policies, and switching
between those that share weights moves no memory. Left out: sampling (`rollout.py`) and losses (`rows.py`).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from opdlab.errors import ContextTooLong, EmptyPrompts
from opdlab.forward import last_hidden
from opdlab.prompt import Prompt, own_hint
from opdlab.same_tokens import check_same_tokens
from opdlab.weights import Weights

if TYPE_CHECKING:
    from opdlab.rollout import Rollout

__all__ = ["TOKENS_PER_PASS", "Policy", "Prompt", "Weights", "check_same_tokens", "own_hint"]

TOKENS_PER_PASS = 16_384  # padded tokens that a scoring pass holds at once


@dataclass(eq=False)
class _Adapter:
    """Which adapter a policy looks through. Live views share one object, so a training run moves them together."""

    name: str | None = None


class Policy:
    """A next-token distribution: `weights` through an adapter and, optionally, a `context` that only it sees."""

    def __init__(self, weights: Weights, context: Callable[[Prompt], Prompt] | None = None,
                 adapter: _Adapter | None = None) -> None:  # fmt: skip
        self.weights, self.context, self._adapter = weights, context, adapter or _Adapter()

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        eos: Sequence[int] | None = None,
        context_length: int | None = None,
    ) -> Policy:
        """A causal language model from a folder or the Hub. bf16 on a GPU and float32 on a CPU unless told otherwise.

        context_length: tokens that a prompt and its completion may have together, if fewer than the model allows.
        Raises UnsupportedModel and TokenizerMismatch for a model whose numbers would not be right.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        model.to(torch.device(device))  # type: ignore[arg-type]
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(source)
        return cls(Weights(model, tokenizer, eos, str(source), context_length))

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        eos: Sequence[int] | None = None,
        context_length: int | None = None,
    ) -> Policy:
        """A policy on a model that is already in memory; its parameters are frozen until something trains it. See `load`."""
        return cls(Weights(model, tokenizer, eos, getattr(model.config, "_name_or_path", ""), context_length))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.weights.tokenizer

    @property
    def adapter(self) -> str | None:
        """Name of the adapter in use; None is the bare model."""
        return self._adapter.name

    def seeing(self, context: str | Callable[[Prompt], Prompt] | None = None) -> Policy:
        """This policy with privileged information: each prompt's own hint, one text for all, or any rewriting of prompts.

        It stays live: when training moves this policy, the seeing one moves too. For a still one: `.frozen().seeing()`.
        """
        if isinstance(context, str):
            text = context
            return Policy(self.weights, lambda prompt: prompt.told(text), self._adapter)
        return Policy(self.weights, context or own_hint, self._adapter)

    def frozen(self) -> Policy:
        """This policy as it is now, for good. Costs no memory before training, a copy of the adapter after."""
        if self.adapter is None:
            return Policy(self.weights, self.context, _Adapter(None))
        state = {key: value.clone() for key, value in self.weights.adapter_state(self.adapter).items()}
        config = self.weights.model.peft_config[self.adapter]
        name = self.weights.add_lora(rank=config.r, alpha=config.lora_alpha, targets=list(config.target_modules))
        self.weights.set_adapter_state(name, state)
        return Policy(self.weights, self.context, _Adapter(name))

    def copied(self) -> Policy:
        """This policy on weights of its own: what full training needs, since it moves the shared ones."""
        old = self.weights
        fresh = Weights(copy.deepcopy(old.model), old.tokenizer, tuple(old.eos), old.source, old.own_context_length)
        fresh.active = self.weights.active
        fresh.use(None)  # its adapter becomes trainable again when next in force
        return Policy(fresh, self.context, _Adapter(self.adapter))

    def adapt(self, rank: int = 16, **options: Any) -> Policy:
        """Give this policy a trainable LoRA (in place, so live views follow); returns itself. See `Weights.add_lora`."""
        self._adapter.name = self.weights.add_lora(rank=rank, **options)
        return self

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of the prompt as this policy sees it: with its context, through the chat template where it is a chat."""
        prompt = self.context(prompt) if self.context else prompt
        if prompt.messages is None:
            return list(self.tokenizer(prompt.text)["input_ids"])
        chat = [dict(message) for message in prompt.messages]
        return list(self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))

    def encode_all(self, prompts: Sequence[Prompt], room: int = 0) -> list[list[int]]:
        """`encode` for many; raises EmptyPrompts for none or a void one, ContextTooLong where `room` more tokens do not fit."""
        if not prompts:
            raise EmptyPrompts("There are no prompts. Give at least one.")
        ids = [self.encode(prompt) for prompt in prompts]
        if void := [i for i, row in enumerate(ids) if not row]:
            raise EmptyPrompts(f"Prompt {prompts[void[0]].id or void[0]!r} has no tokens to go on from. Give it some text.")
        limit = self.weights.context_length
        worst = max(range(len(ids)), key=lambda i: len(ids[i]))
        if limit is not None and len(ids[worst]) + room > limit:
            raise ContextTooLong(
                f"Prompt {prompts[worst].id or worst!r} has {len(ids[worst])} tokens and {room} more are to come, but the model's "
                f"context is {limit}. Shorten the prompt or its hint, or ask for at most {limit - len(ids[worst])} new tokens."
            )
        return ids

    def sample(self, prompts: Sequence[Prompt], n: int = 1, **options: Any) -> Rollout:
        """Write `n` completions a prompt; see `opdlab.rollout.sample` for the options."""
        from opdlab.rollout import sample

        return sample(self, prompts, n, **options)

    def hidden(self, rollout: Rollout) -> Tensor:
        """The backbone's last hidden state where each completion token is predicted: `[tokens, H]`, rows in order.

        `rollout.mask` puts them back into `[B, T]`. The prompt is rendered as this policy sees it, so a longer hint moves
        nothing. Carries a gradient when grad mode is on and the policy trains.
        """
        starts = self.encode_all(rollout.prompts)
        bodies = rollout.completions()
        longest = max(len(s) + len(b) for s, b in zip(starts, bodies, strict=True))
        limit = self.weights.context_length
        if limit is not None and longest > limit:
            raise ContextTooLong(
                f"A prompt with its completion has {longest} tokens, but the context of {self.weights.source or 'the model'} is "
                f"{limit}. Shorten the hint or sample fewer tokens."
            )
        rows = max(1, len(bodies) if torch.is_grad_enabled() else TOKENS_PER_PASS // longest)
        with self.weights.using(self.adapter) as model:
            parts = [
                last_hidden(model, starts[i : i + rows], bodies[i : i + rows], self.weights.abilities) for i in range(0, len(bodies), rows)
            ]
        return torch.cat(parts)

    def log_probs(self, rollout: Rollout) -> Tensor:
        """Full log-probs `[tokens, V]` in float32. For looking at: training never makes them (see `rows.py`)."""
        with torch.no_grad(), self.weights.using(self.adapter):
            return self.weights.head(self.hidden(rollout)).log_softmax(-1)

    def __repr__(self) -> str:
        looks = [f"adapter {self.adapter!r}" if self.adapter else "no adapter", *(["sees a context"] if self.context else [])]
        return f"Policy({self.weights.source or type(self.weights.model).__name__}: {', '.join(looks)})"
