"""Policies: one next-token distribution each, many of them on one set of weights.

A `Policy` is shared `Weights` seen through an adapter (a LoRA, or none) and, optionally, a context
that only it sees (a hint, a rule, examples). Student, teacher, reference, hinted student, snapshot:
all are policies, and switching between those that share weights moves no memory.
"""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opdlab.data.prompt import Prompt, expect_prompts, name_of, own_hint, read_hint
from opdlab.data.rollout import Rollout
from opdlab.data.sampling_config import SamplingConfig
from opdlab.data.tokens import completion_texts
from opdlab.errors import ContextTooLong, EmptyPrompts, InvalidValue
from opdlab.models import adapters
from opdlab.models.fingerprints import adapter_digest
from opdlab.models.forward import last_hidden
from opdlab.models.generation import Generator, read_prefixes
from opdlab.models.graded import States
from opdlab.models.head import Head
from opdlab.models.loading import load_model, load_tokenizer
from opdlab.models.templates import check_template_options, encode_prompts
from opdlab.models.vocabulary import check_written_with, fingerprint
from opdlab.models.weights import Weights
from opdlab.support.expect import expect, shortened
from opdlab.support.validation import Count, Text, Unchecked, validate_arguments

PROMPTS_AT_ONCE = 4096  # prompts that are tokenized at once
TOKENS_PER_PASS = 16_384  # padded tokens that a scoring pass holds at once


class Active(Enum):
    """The adapter that a model has in force when a policy is made of it."""

    ACTIVE = "the active one"


class _Adapter:
    """Which adapter a policy looks through.

    Live views share one object, so a training run moves them together.
    """

    def __init__(self, name: str | None = None) -> None:
        self.name = name

    def own(self, weights: Weights, name: str) -> None:
        """Look through `name` from now on; once the last view is gone, it is taken off the weights."""
        self.name = name
        end = weakref.finalize(self, weights.drop_adapter, name, weights.config_of(name))
        end.atexit = False


_LIVE: weakref.WeakSet[Policy] = weakref.WeakSet()


def live_policies(model: PreTrainedModel) -> list[Policy]:
    """All policies in use that look at `model`."""
    return [policy for policy in list(_LIVE) if policy.weights.model is model]


class Policy:
    """A next-token distribution:

    `weights` through an adapter and, optionally, a `context` that only it sees.
    """

    def __init__(
        self,
        weights: Weights,
        context: Callable[[Prompt], Prompt] | None = None,
        adapter: _Adapter | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(weights, Weights):
            raise InvalidValue(
                f"Policy got a {type(weights).__name__}. Use Policy.load(path) or Policy.of(model,"
                " tokenizer)."
            )
        self.weights, self.context, self._adapter = weights, context, adapter or _Adapter()
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        _LIVE.add(self)

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str],
        *,
        dtype: torch.dtype | str | None = None,
        device: str | torch.device | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        eos: int | Sequence[int] | None = None,
        context_length: int | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Policy:
        """Load a causal language model from a folder or the Hub.

        Args:
            source: A folder or a name on the Hub. The folder of an adapter (a checkpoint of opdlab
                is one) loads its base model and looks through the adapter.
            dtype: torch.float32, torch.bfloat16 or torch.float64, or its name; bfloat16 on a GPU
                and float32 on a CPU by default. float16 is refused.
            device: "cpu", "cuda", "cuda:1", …; the GPU if there is one by default.
            tokenizer: In place of the one in the folder.
            eos: Ids of the tokens that end a text, in place of the model's own.
            context_length: Tokens that a prompt and its completion may have together, if fewer than
                the model allows.
            chat_template_kwargs: Arguments for the tokenizer's chat template, as
                `{"enable_thinking": False}`; see `with_template`.

        Raises:
            InvalidValue: There is no such model, device or dtype.
            UnsupportedModel: The model's numbers would not be right.
            TokenizerMismatch: The tokenizer has tokens that the model lacks.
        """
        model = load_model(source, dtype, device)
        weights = Weights(
            model, tokenizer or load_tokenizer(source), eos, str(source), context_length
        )
        return cls._through_active(
            weights, check_template_options(weights.tokenizer, chat_template_kwargs or {})
        )

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        eos: int | Sequence[int] | None = None,
        context_length: int | None = None,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        adapter: str | Active | None = Active.ACTIVE,
    ) -> Policy:
        """Make a policy of a model that is already in memory; its parameters are frozen until
        something trains it.

        The model may carry LoRA adapters: loaded (`model.load_adapter`, `from_pretrained` on an
        adapter's folder) or as a `PeftModel`. The policy looks through the one that is active, so a
        second stage of training has three ways:

            Policy.of(model, tokenizer)                  trains that adapter on
            Policy.of(model, tokenizer).merged()         folds it into a copy of the weights; a new LoRA stacks on it
            Policy.of(model, tokenizer, adapter=None)    starts from the bare model

        Args:
            model: A causal language model of transformers, or a `PeftModel` around one. Adapters of
                other kinds than LoRA are refused, and so are several that are active at once.
            tokenizer: Its tokenizer.
            eos: Ids of the tokens that end a text, in place of the model's own.
            context_length: Tokens that a prompt and its completion may have together, if fewer than
                the model allows.
            chat_template_kwargs: Arguments for the tokenizer's chat template, as
                `{"enable_thinking": False}`; see `with_template`.
            adapter: Name of the adapter to look through, or None for the bare model; the active one
                by default.

        Raises:
            InvalidValue: The model, its precision, its output head or one of its adapters is none
                that opdlab computes.
            UnsupportedModel: The model's numbers would not be right.
            TokenizerMismatch: The tokenizer has tokens that the model lacks.
        """
        weights = Weights(
            model,
            tokenizer,
            eos,
            getattr(getattr(model, "config", None), "_name_or_path", ""),
            context_length,
        )
        options = check_template_options(weights.tokenizer, chat_template_kwargs or {})
        if adapter is Active.ACTIVE:
            return cls._through_active(weights, options)
        if adapter is not None and not isinstance(adapter, str):
            raise InvalidValue(
                f"Policy.of got adapter={shortened(adapter)}. Use the name of an adapter, or None"
                " for the bare model."
            )
        weights.check_adapter(adapter)
        return cls(weights, adapter=_Adapter(adapter), chat_template_kwargs=options)

    @classmethod
    def _through_active(cls, weights: Weights, chat_template_kwargs: Mapping[str, Any]) -> Policy:
        weights.check_adapter(weights.active)
        return cls(
            weights, adapter=_Adapter(weights.active), chat_template_kwargs=chat_template_kwargs
        )

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.weights.tokenizer

    @property
    def adapter(self) -> str | None:
        """Name of the adapter in use; None is the bare model."""
        return self._adapter.name

    def seeing(
        self, context: str | Callable[[Prompt], Prompt] | Sequence[Mapping[str, Any]] | None = None
    ) -> Policy:
        """This policy with privileged information: each prompt's own hint, one text for all, or any
        rewriting of prompts.

        A text lands in the system message of a chat, in the user's turn where the template has no
        system role; chat messages land before those of the prompt.

        It stays live: when training moves this policy, the seeing one moves too. For a still one:
        `.frozen().seeing()`.
        """
        if context is None:
            return self._view(context=own_hint)
        if callable(context):
            return self._view(context=context)
        text = read_hint(context) if isinstance(context, (str, list, tuple)) else None
        if text is None:
            raise InvalidValue(
                f"seeing got {shortened(context)}. Give a text, chat messages or a function of"
                " prompts; nothing stands for each prompt's own hint."
            )
        return self._view(context=lambda prompt: prompt.with_context(text))

    def with_template(self, **chat_template_kwargs: Any) -> Policy:
        """This policy with more arguments for its chat template, as
        `policy.with_template(enable_thinking=False)`.

        Those that it has already stay, unless they are given again. What transformers reads itself
        is allowed too: `tools`, `documents`, `add_generation_prompt`, `continue_final_message` (for
        chats that end with the beginning of an answer), `sanitize_control_tokens` (special tokens
        that a message spells are read letter by letter).

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
        """This policy as it is now, for good.

        Costs no memory before training, a copy of the adapter after.
        """
        if self.adapter is None:
            return self._view(adapter=_Adapter())
        return self._on_copy_of(self.adapter)

    def _on_copy_of(self, adapter: str) -> Policy:
        still = self._view(adapter=_Adapter())
        still._adapter.own(self.weights, self.weights.clone_adapter(adapter))
        return still

    def copied(self) -> Policy:
        """This policy on weights of its own, with its adapter and no other: what full training
        needs, since it moves shared ones.
        """
        return self._view(weights=self._copied_weights(), adapter=_Adapter(self.adapter))

    def merged(self) -> Policy:
        """This policy on weights of its own into which its adapter is folded, so that a new LoRA
        stacks on it.

        The sums are rounded to the model's precision: exact to float32 rounding in float32, about
        three digits in bfloat16. Costs the memory of one more model. Embeddings and head that were
        tied get matrices of their own if the adapter changes either.
        """
        fresh = self._copied_weights()
        adapters.fold(fresh.model, self.adapter)
        return self._view(weights=self._weights_around(fresh.model), adapter=_Adapter())

    def _copied_weights(self) -> Weights:
        with self.weights.using(self.adapter) as model:
            twin = copy.deepcopy(model)
        fresh = self._weights_around(twin)
        for name in fresh.adapters:
            if name != self.adapter:
                fresh.delete_adapter(name)
        return fresh

    def _weights_around(self, model: PreTrainedModel) -> Weights:
        old = self.weights
        return Weights(model, old.tokenizer, tuple(old.eos), old.source, old.own_context_length)

    def adapt(self, rank: int = 16, **options: Any) -> Policy:
        """Give this policy a trainable LoRA (in place, so live views follow); returns itself.

        Args:
            rank: Of the LoRA's matrices.
            options: `alpha`, `targets`, `seed` and further fields of `peft.LoraConfig`; see
                `Weights.add_lora`.

        Raises:
            InvalidValue: The policy looks through an adapter that was trained, or the options make
                no LoRA for this model.
        """
        # An adapter that changes nothing yet can be replaced: a notebook's cell that is run twice
        # loses nothing.
        if self.adapter is not None and adapter_digest(self.weights, self.adapter) is not None:
            raise InvalidValue(
                f"adapt would put a new LoRA in the place of the adapter {self.adapter!r}, which"
                " this policy looks through. Train that one on as it is, or stack a new one on it:"
                " policy.merged().adapt(…)."
            )
        replaced, self._adapter.name = self.adapter, self.weights.add_lora(rank=rank, **options)
        if replaced is not None:
            self.weights.drop_adapter(replaced, self.weights.config_of(replaced))
        return self

    @property
    def head(self) -> Head:
        """The output head as this policy's adapter leaves it."""
        return self.weights.head_of(self.adapter)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of the prompt as this policy sees it: with its context, through the chat
        template where it is a chat.
        """
        (prompt,) = expect_prompts([prompt], "encode")
        return encode_prompts(
            self.tokenizer, [self._in_context(prompt)], self.chat_template_kwargs, self.weights.eos
        )[0]

    def encode_all(
        self, prompts: Sequence[Prompt], room: int = 0, begun: Sequence[int] | None = None
    ) -> list[list[int]]:
        """`encode` for many, and check that each of them fits.

        Args:
            prompts: A single prompt counts as a list of one.
            room: How many new tokens must fit behind each prompt.
            begun: How many tokens are written already behind each prompt; none by default.

        Raises:
            EmptyPrompts: There are no prompts, or one has no tokens.
            ContextTooLong: A prompt with all that comes behind it does not fit the model's context.
        """
        prompts = expect_prompts(prompts, "encode_all")
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
                    f"Prompt {name_of(prompt, number)} has {len(row)} tokens and {more + room} more"
                    f" are to come, but {self.name}'s context is {limit}. Shorten the"
                    f" prompt{hinted}{advice}."
                )
        return rows

    def encode_unchecked(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """`encode` for many, however long they are; raises EmptyPrompts where one has no tokens."""
        seen = [self._in_context(prompt) for prompt in prompts]
        rows = encode_prompts(self.tokenizer, seen, self.chat_template_kwargs, self.weights.eos)
        for number, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            if not row:
                raise EmptyPrompts(
                    f"Prompt {name_of(prompt, number)} has no tokens to go on from. Give it some"
                    " text."
                )
        return rows

    def _in_context(self, prompt: Prompt) -> Prompt:
        if self.context is None:
            return prompt
        seen = self.context(prompt)
        if not isinstance(seen, Prompt):
            raise InvalidValue(
                f"The context of {self} made {shortened(seen)} of a prompt. Let it return an"
                " opdlab.Prompt."
            )
        return seen

    @property
    def name(self) -> str:
        """How errors name the model."""
        return self.weights.source or type(self.weights.model).__name__

    @validate_arguments
    def sample(
        self,
        prompts: Unchecked[Sequence[Prompt]],
        n: Count = 1,
        *,
        prefixes: Unchecked[Sequence[Sequence[int]] | None] = None,
        batch_size: Count | None = None,
        writer: Text = "student",
        **options: Unchecked[Any],
    ) -> Rollout:
        """Write `n` completions of each prompt: row `i * n + j` is sample `j` of prompt `i`.

        Args:
            prompts: A single prompt counts as a list of one.
            n: Completions of each prompt.
            prefixes: Token ids already written after each prompt, to be continued; they are not
                part of the result.
            batch_size: Prompts held in memory at once; all by default. Changes memory and not the
                texts.
            writer: Who writes, for the trace.
            options: Fields of `SamplingConfig`: `max_new_tokens`, `temperature`, `top_p`, `top_k`,
                `min_p`, `stop`, `seed`.

        Raises:
            InvalidValue: An option is not what it must be.
            EmptyPrompts: There are no prompts.
            ContextTooLong: A prompt with its completion does not fit the model's context.
        """
        prompts = expect_prompts(prompts, "sample")
        config = SamplingConfig.of("sample", options)
        begun = (
            None
            if prefixes is None
            else read_prefixes(prefixes, len(prompts), self.weights.vocab_size)
        )
        lengths_begun = None if begun is None else [len(prefix) for prefix in begun]
        starts = self.encode_all(prompts, config.max_new_tokens, lengths_begun)
        if begun is not None:
            starts = [start + prefix for start, prefix in zip(starts, begun, strict=True)]
        seeded = torch.Generator().manual_seed(config.seed)
        uniform = torch.rand(
            len(starts), n, config.max_new_tokens, generator=seeded, dtype=torch.float64
        )
        size = batch_size or len(starts)
        parts = []
        with torch.no_grad(), self.weights.using(self.adapter):
            generator = Generator(self.weights, self.head, config)
            for i in range(0, len(starts), size):
                parts.append(
                    generator.write(starts[i : i + size], n, uniform[i : i + size].flatten(0, 1))
                )
        columns = zip(*(part.tensors() for part in parts), strict=True)
        ids, logp, entropy, lengths, stopped = (torch.cat(column) for column in columns)
        width = max(1, int(lengths.max()))
        bodies = [row[:length] for row, length in zip(ids.tolist(), lengths.tolist(), strict=True)]
        return Rollout(
            prompts=tuple(prompt for prompt in prompts for _ in range(n)),
            ids=ids[:, :width],
            lengths=lengths,
            logp=logp[:, :width],
            entropy=entropy[:, :width],
            finish=tuple("stop" if is_stopped else "length" for is_stopped in stopped.tolist()),
            texts=tuple(completion_texts(self.tokenizer, bodies, self.weights.eos)),
            writer=(writer,) * len(bodies),
            n=n,
            vocabulary=fingerprint(self.tokenizer),
        )

    def grade(self, rollout: Rollout) -> States:
        """Run the backbone over a rollout: hidden states of its tokens with this policy's head."""
        check_written_with(self.tokenizer, self.weights.vocab_size, rollout, self.name)
        return States(self.hidden(rollout), self.head)

    def hidden(self, rollout: Rollout) -> Tensor:
        """The backbone's last hidden state where each completion token is predicted: `[tokens, H]`,
        rows in order.

        `rollout.mask` puts them back into `[B, T]`. The prompt is rendered as this policy sees it,
        so a longer hint moves nothing. Carries a gradient when grad mode is on and the policy
        trains.
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
                f"A prompt with its completion has {longest} tokens (prompt"
                f" {name_of(rollout.prompts[worst], worst)}, {len(starts[worst])} and"
                f" {len(bodies[worst])}), but the context of {self.name} is {limit}. Shorten"
                f" {shorten} or sample fewer tokens."
            )
        rows = max(1, len(bodies) if torch.is_grad_enabled() else TOKENS_PER_PASS // longest)
        with self.weights.using(self.adapter) as model:
            parts = [
                last_hidden(
                    model, starts[i : i + rows], bodies[i : i + rows], self.weights.abilities
                )
                for i in range(0, len(bodies), rows)
            ]
        return torch.cat(parts)

    def log_probs(self, rollout: Rollout) -> Tensor:
        """Full log-probs `[tokens, V]` in float32.

        For looking at: training never makes them (see `rows.py`).
        """
        with torch.no_grad(), self.weights.using(self.adapter):
            return self.head(self.hidden(rollout)).log_softmax(-1)

    def __repr__(self) -> str:
        looks = [
            f"adapter {self.adapter!r}" if self.adapter else "no adapter",
            *(["sees a context"] if self.context else []),
        ]
        looks += [
            f"template with {name}={shortened(value)}"
            for name, value in self.chat_template_kwargs.items()
        ]
        return (
            f"Policy({self.weights.source or type(self.weights.model).__name__}:"
            f" {', '.join(looks)})"
        )


def sample(policy: Policy, prompts: Sequence[Prompt], n: int = 1, **options: Any) -> Rollout:
    """Write `n` completions of each prompt: `policy.sample(prompts, n, …)`."""
    return expect(policy, Policy, "sample", "policy").sample(prompts, n, **options)


def find_too_long(
    policy: Policy, prompts: Sequence[Prompt], behind: Sequence[int]
) -> dict[int, int]:
    """Find the prompts that do not fit a policy's context with `behind` more tokens; returns their
    lengths by number.
    """
    limit = policy.weights.context_length
    too_long = {}
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
        rows = policy.encode_unchecked(prompts[start : start + PROMPTS_AT_ONCE])
        for number, row in enumerate(rows, start):
            if limit is not None and len(row) + behind[number] > limit:
                too_long[number] = len(row)
    return too_long
