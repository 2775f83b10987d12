"""Policies: one next-token distribution each, many of them on one set of weights.

A `Policy` is shared `Weights` seen through an adapter (a LoRA, or none) and, optionally, a context that only it sees
(a hint, a rule, examples). Student, teacher, reference, hinted student, snapshot: all are policies, and switching
between those that share weights moves no memory. Left out: sampling (`rollout.py`) and losses (`rows.py`).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from opdlab.errors import ContextTooLong, EmptyPrompts, InvalidValue
from opdlab.forward import last_hidden
from opdlab.prompt import Prompt, as_prompts, name_of, own_hint, read_hint
from opdlab.same_tokens import check_same_tokens
from opdlab.templates import check_template_options, encode_prompts
from opdlab.validation import shortened
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

    def __init__(self, weights: Weights, context: Callable[[Prompt], Prompt] | None = None, adapter: _Adapter | None = None,
                 chat_template_kwargs: Mapping[str, Any] | None = None) -> None:  # fmt: skip
        self.weights, self.context, self._adapter = weights, context, adapter or _Adapter()
        self.chat_template_kwargs = dict(chat_template_kwargs or {})

    @classmethod
    def load(cls, source: str | os.PathLike[str], *, dtype: torch.dtype | None = None, device: str | None = None,
             tokenizer: PreTrainedTokenizerBase | None = None, eos: Sequence[int] | None = None,
             chat_template_kwargs: Mapping[str, Any] | None = None) -> Policy:  # fmt: skip
        """A causal language model from a folder or the Hub. bf16 on a GPU and float32 on a CPU unless told otherwise.

        chat_template_kwargs: arguments for the tokenizer's chat template, as `{"enable_thinking": False}`; see `with_template`.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        model.to(torch.device(device))  # type: ignore[arg-type]
        weights = Weights(model, tokenizer or AutoTokenizer.from_pretrained(source), eos, str(source))
        return cls(weights, chat_template_kwargs=check_template_options(weights.tokenizer, chat_template_kwargs or {}))

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, eos: Sequence[int] | None = None,
           chat_template_kwargs: Mapping[str, Any] | None = None) -> Policy:  # fmt: skip
        """A policy on a model that is already in memory; its parameters are frozen until something trains it."""
        weights = Weights(model, tokenizer, eos, getattr(model.config, "_name_or_path", ""))
        return cls(weights, chat_template_kwargs=check_template_options(tokenizer, chat_template_kwargs or {}))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.weights.tokenizer

    @property
    def adapter(self) -> str | None:
        """Name of the adapter in use; None is the bare model."""
        return self._adapter.name

    def seeing(self, context: str | Callable[[Prompt], Prompt] | Sequence[Mapping[str, Any]] | None = None) -> Policy:
        """This policy with privileged information: each prompt's own hint, one text for all, or any rewriting of prompts.

        A text lands in the system message of a chat, in the user's turn where the template has no system role; chat
        messages land before those of the prompt.

        It stays live: when training moves this policy, the seeing one moves too. For a still one: `.frozen().seeing()`.
        """
        if context is None:
            return self._view(context=own_hint)
        if callable(context):
            return self._view(context=context)
        text = read_hint(context) if isinstance(context, (str, list, tuple)) else None
        if text is None:
            raise InvalidValue(
                f"seeing got {shortened(context)}. Give a text, chat messages or a function of prompts; nothing stands for each prompt's "
                "own hint."
            )
        return self._view(context=lambda prompt: prompt.told(text))

    def with_template(self, **chat_template_kwargs: Any) -> Policy:
        """This policy with more arguments for its chat template, as `policy.with_template(enable_thinking=False)`.

        Those that it has already stay, unless they are given again. What transformers reads itself is allowed too:
        `tools`, `documents`, `add_generation_prompt`, `continue_final_message` (for chats that end with the beginning of
        an answer), `sanitize_control_tokens` (special tokens that a message spells are read letter by letter).

        Raises:
            InvalidValue: Neither the template nor transformers reads one of them.
        """
        merged = {**self.chat_template_kwargs, **chat_template_kwargs}
        return self._view(chat_template_kwargs=check_template_options(self.tokenizer, merged))

    def _view(self, **changes: Any) -> Policy:
        """This policy with another context, adapter or weights; everything else stays."""
        parts = {
            "weights": self.weights,
            "context": self.context,
            "adapter": self._adapter,
            "chat_template_kwargs": self.chat_template_kwargs,
        }
        return Policy(**{**parts, **changes})

    def frozen(self) -> Policy:
        """This policy as it is now, for good. Costs no memory before training, a copy of the adapter after."""
        if self.adapter is None:
            return self._view(adapter=_Adapter(None))
        state = {key: value.clone() for key, value in self.weights.adapter_state(self.adapter).items()}
        config = self.weights.model.peft_config[self.adapter]
        name = self.weights.add_lora(rank=config.r, alpha=config.lora_alpha, targets=list(config.target_modules))
        self.weights.set_adapter_state(name, state)
        return self._view(adapter=_Adapter(name))

    def copied(self) -> Policy:
        """This policy on weights of its own: what full training needs, since it moves the shared ones."""
        fresh = Weights(copy.deepcopy(self.weights.model), self.tokenizer, tuple(self.weights.eos), self.weights.source)
        fresh.active = self.weights.active
        fresh.use(None)  # its adapter becomes trainable again when next in force
        return self._view(weights=fresh, adapter=_Adapter(self.adapter))

    def adapt(self, rank: int = 16, **options: Any) -> Policy:
        """Give this policy a trainable LoRA (in place, so live views follow); returns itself. See `Weights.add_lora`."""
        self._adapter.name = self.weights.add_lora(rank=rank, **options)
        return self

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of the prompt as this policy sees it: with its context, through the chat template where it is a chat."""
        (prompt,) = as_prompts([prompt])
        return encode_prompts(self.tokenizer, [self._in_context(prompt)], self.chat_template_kwargs, self.weights.eos)[0]

    def encode_all(self, prompts: Sequence[Prompt], room: int = 0, begun: Sequence[int] | None = None) -> list[list[int]]:
        """`encode` for many, and check that each of them fits.

        Args:
            prompts: A single prompt counts as a list of one.
            room: How many new tokens must fit behind each prompt.
            begun: How many tokens are written already behind each prompt; none by default.

        Raises:
            EmptyPrompts: There are no prompts, or one has no tokens.
            ContextTooLong: A prompt with all that comes behind it does not fit the model's context.
        """
        prompts = as_prompts(prompts)
        if not prompts:
            raise EmptyPrompts("There are no prompts. Give at least one.")
        rows = self.encode_unchecked(prompts)
        written = [0] * len(rows) if begun is None else begun
        limit = self.weights.context_length
        for number, (prompt, row, more) in enumerate(zip(prompts, rows, written, strict=True)):
            if limit is not None and len(row) + more + room > limit:
                left = limit - len(row) - more
                advice = f", or ask for at most {left} new tokens" if left > 0 else ""
                hinted = " or its hint" if self.context is not None else ""
                raise ContextTooLong(
                    f"Prompt {name_of(prompt, number)} has {len(row)} tokens and {more + room} more are to come, but {self.name}'s "
                    f"context is {limit}. Shorten the prompt{hinted}{advice}."
                )
        return rows

    def encode_unchecked(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """`encode` for many, however long they are; raises EmptyPrompts where one has no tokens."""
        seen = [self._in_context(prompt) for prompt in prompts]
        rows = encode_prompts(self.tokenizer, seen, self.chat_template_kwargs, self.weights.eos)
        for number, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            if not row:
                raise EmptyPrompts(f"Prompt {name_of(prompt, number)} has no tokens to go on from. Give it some text.")
        return rows

    def _in_context(self, prompt: Prompt) -> Prompt:
        if self.context is None:
            return prompt
        seen = self.context(prompt)
        if not isinstance(seen, Prompt):
            raise InvalidValue(f"The context of {self} made {shortened(seen)} of a prompt. Let it return an opdlab.Prompt.")
        return seen

    @property
    def name(self) -> str:
        """How errors name the model."""
        return self.weights.source or type(self.weights.model).__name__

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
        lengths = [len(s) + len(b) for s, b in zip(starts, bodies, strict=True)]
        longest = max(lengths)
        limit = self.weights.context_length
        if limit is not None and longest > limit:
            worst = lengths.index(longest)
            shorten = "the hint" if self.context is not None else "the prompt"
            raise ContextTooLong(
                f"A prompt with its completion has {longest} tokens (prompt {name_of(rollout.prompts[worst], worst)}, "
                f"{len(starts[worst])} and {len(bodies[worst])}), but the context of {self.name} is {limit}. "
                f"Shorten {shorten} or sample fewer tokens."
            )
        rows = max(1, len(bodies) if torch.is_grad_enabled() else TOKENS_PER_PASS // longest)
        with self.weights.using(self.adapter) as model:
            parts = [last_hidden(model, starts[i : i + rows], bodies[i : i + rows]) for i in range(0, len(bodies), rows)]
        return torch.cat(parts)

    def log_probs(self, rollout: Rollout) -> Tensor:
        """Full log-probs `[tokens, V]` in float32. For looking at: training never makes them (see `rows.py`)."""
        with torch.no_grad(), self.weights.using(self.adapter):
            return self.weights.head(self.hidden(rollout)).log_softmax(-1)

    def __repr__(self) -> str:
        looks = [f"adapter {self.adapter!r}" if self.adapter else "no adapter", *(["sees a context"] if self.context else [])]
        looks += [f"template with {name}={shortened(value)}" for name, value in self.chat_template_kwargs.items()]
        return f"Policy({self.weights.source or type(self.weights.model).__name__}: {', '.join(looks)})"
