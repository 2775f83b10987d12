"""Read, sample and grade with policies: next-token distributions, many on one set of weights.

A `Policy` is shared `Weights` seen through an adapter (a LoRA, or none) and, optionally, a context
that only it sees (a hint, a rule, examples). Student, teacher, reference, hinted student, snapshot:
all are policies, and switching between those that share weights moves no memory.
"""

from __future__ import annotations

import copy
import os
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opdlab.data.conversation import Environment
from opdlab.data.prompt import Prompt, expect_prompts, name_of, own_hint, read_hint
from opdlab.data.rollout import Rollout
from opdlab.data.sampling_config import SamplingConfig, SamplingOptions
from opdlab.data.tokens import completion_texts
from opdlab.errors import EmptyPrompts, InvalidValue
from opdlab.models import sharing
from opdlab.models.context_limit import ContextLimit
from opdlab.models.conversations import converse
from opdlab.models.encoding import encode_prompts
from opdlab.models.fingerprints import vocabulary_digest
from opdlab.models.forward import last_hidden
from opdlab.models.graded import States
from opdlab.models.head import Head
from opdlab.models.hub import from_cache_if_unreachable
from opdlab.models.load_options import LoadOptions
from opdlab.models.loading import find
from opdlab.models.micro_batches import Limits, arrange, in_order, pass_cost
from opdlab.models.origin import Origin, Told, remember_loading
from opdlab.models.places import read_places
from opdlab.models.quantization import describe_quantization
from opdlab.models.sampled_texts import SampledTexts
from opdlab.models.sampling import SamplingLoop, read_prefixes
from opdlab.models.templates import check_template_options
from opdlab.models.vocabulary import check_readable, check_written_with
from opdlab.models.weights import AdapterInUse, Weights
from opdlab.support.expect import expect, shortened
from opdlab.support.validation import Count, Text, Unchecked, validate_arguments

if TYPE_CHECKING:
    from typing import Unpack

PROMPTS_AT_ONCE = 4096  # prompts that are tokenized at once
TOKENS_PER_PASS = 16_384  # padded tokens that a scoring pass holds at once
CPU_TOKENS_PER_PASS = 2048  # the same on a CPU, where more of them make no product faster


class Active(Enum):
    """The adapter that a model has in force when a policy is made of it."""

    ACTIVE = "the active one"


_LIVE: weakref.WeakSet[Policy] = weakref.WeakSet()


def live_policies(model: PreTrainedModel) -> list[Policy]:
    """List all policies in use that look at `model`.

    Args:
        model: A transformers model, without PEFT's wrapper.

    Returns:
        The policies, in no order.
    """
    return [policy for policy in list(_LIVE) if policy.weights.model is model]


class Policy:
    """A next-token distribution: weights seen through an adapter and, optionally, a context.

    Make one with `Policy.load` or `Policy.of`. A subclass that reads prompts in another way
    overrides `encode_unchecked`, through which all reading goes.

    Args:
        weights: The model with its tokenizer and adapters.
        context: Rewrites each prompt as this policy alone sees it; None for no context.
        adapter: The adapter to look through, shared with live views; none by default.
        chat_template_kwargs: Arguments for the tokenizer's chat template.

    Attributes:
        weights: The shared model with its tokenizer and adapters.
        context: The function that rewrites prompts, or None.
        chat_template_kwargs: Arguments for the chat template, by name.
        origin: How `load` made it; None for a policy that was made in another way.
    """

    origin: Origin | None = None

    def __init_subclass__(cls) -> None:
        if "encode" in vars(cls):
            raise InvalidValue(
                f"{cls.__name__} overrides Policy.encode, which sampling and grading do not call."
                " Override encode_unchecked(prompts), which encode goes through too."
            )

    def __init__(
        self,
        weights: Weights,
        context: Callable[[Prompt], Prompt] | None = None,
        adapter: AdapterInUse | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(weights, Weights):
            raise InvalidValue(
                f"Policy got a {type(weights).__name__}. Use Policy.load(path) or Policy.of(model,"
                " tokenizer)."
            )
        self.weights, self.context, self._adapter = weights, context, adapter or AdapterInUse()
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        _LIVE.add(self)

    @classmethod
    @remember_loading
    @from_cache_if_unreachable
    def load(
        cls,
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        dtype: torch.dtype | str | None = None,
        device: str | torch.device | None = None,
        device_map: str | Mapping[str, Any] | None = None,
        attn_implementation: str | None = None,
        quantization: Any = None,
        adapter: str | os.PathLike[str] | None = None,
        chat_template: str | os.PathLike[str] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tokenizer: PreTrainedTokenizerBase | str | os.PathLike[str] | None = None,
        token: str | None = None,
        eos: int | Sequence[int] | None = None,
        context_length: int | None = None,
        prefer_shared: Policy | None = None,
        gguf_file: str | None = None,
    ) -> Policy:
        """Load a causal language model from a folder, a GGUF file or the Hub.

        Args:
            source: A folder, a GGUF file, or a name on the Hub. The folder or name of a PEFT
                adapter (a checkpoint of opdlab is one) loads the base model that it names, and
                looks through the adapter.
            revision: Branch, tag or commit on the Hub; of the base model, where the source is the
                folder of an adapter.
            dtype: torch.float32, torch.bfloat16 or torch.float64, or its name; bfloat16 on a GPU
                that has it and float32 elsewhere by default. float16 is refused.
            device: "cpu", "cuda", "cuda:1", …; the GPU if there is one by default.
            device_map: In place of `device`, spreads the model with Accelerate: "auto", or a dict
                of devices by module. Offloaded weights ("cpu" beside a GPU, "disk") can teach, but
                not be trained.
            attn_implementation: "sdpa", "eager", "flash_attention_2", …; what transformers chooses
                by default.
            quantization: "4bit" (NF4, as in QLoRA) or "8bit" with bitsandbytes, or a quantisation
                config of transformers. A LoRA trains on it.
            adapter: Folder of a PEFT adapter to look through, or its name on the Hub.
            chat_template: A Jinja template, or the path of a file with one, in place of the
                tokenizer's.
            chat_template_kwargs: Arguments for the chat template, as `{"enable_thinking": False}`;
                see `with_template`.
            tokenizer: In place of the one in the folder: a tokenizer, or the folder or name of one.
            token: For private models on the Hub; by default the one that is saved on this machine.
            eos: Ids of the tokens that end a text, in place of the model's own.
            context_length: Tokens that a prompt and its completion may have together, if fewer than
                the model allows.
            prefer_shared: A policy. If it is on the same base model, so is the new one, and the
                weights are in memory once; if not, a warning says why.
            gguf_file: Name of a GGUF file in the folder or repository.

        Returns:
            The policy, which looks through the adapter if there is one.

        Raises:
            InvalidValue: There is no such model, an option cannot be right, or two of them cannot
                stand together.
            UnsupportedModel: The model's numbers would not be right.
            TokenizerMismatch: The tokenizer has tokens that the model lacks.
        """
        options = LoadOptions(
            revision=revision,
            dtype=dtype,
            device=device,
            device_map=device_map,
            attn_implementation=attn_implementation,
            quantization=quantization,
            adapter=adapter,
            chat_template=chat_template,
            chat_template_kwargs=chat_template_kwargs,
            tokenizer=tokenizer,
            token=token,
            eos=eos,
            context_length=context_length,
            gguf_file=gguf_file,
        )
        if prefer_shared is not None:
            expect(prefer_shared, Policy, "Policy.load", "prefer_shared")
        place = find(source, options)
        if prefer_shared is not None:
            found = sharing.share(prefer_shared.weights, place, options)
            if isinstance(found, sharing.Shared):
                return cls._on_shared(prefer_shared.weights, found)
            warnings.warn(
                f"{place.base} is loaded beside {prefer_shared!r} and does not share its weights:"
                f" {found}.",
                stacklevel=2,
            )
        weights = sharing.load_weights(place, options)
        return cls._through_active(
            weights, check_template_options(weights.tokenizer, chat_template_kwargs or {})
        )

    @classmethod
    def _on_shared(cls, weights: Weights, found: sharing.Shared) -> Policy:
        options = check_template_options(weights.tokenizer, found.chat_template_kwargs)
        adapter = AdapterInUse()
        if found.adapter is not None:
            weights.check_adapter(found.adapter)
            adapter.own(weights, found.adapter)
        return cls(weights, adapter=adapter, chat_template_kwargs=options)

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
        """Make a policy of a model that is already in memory.

        The model's parameters are frozen until something trains it. It may carry LoRA adapters:
        loaded (`model.load_adapter`, `from_pretrained` on an adapter's folder) or as a `PeftModel`.
        The policy looks through the one that is active, so a second stage of training has three
        ways:

            Policy.of(model, tokenizer)                  trains that adapter on
            Policy.of(model, tokenizer).merged()         folds it into a copy of the weights
            Policy.of(model, tokenizer, adapter=None)    starts from the bare model

        A new LoRA stacks on a merged one.

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

        Returns:
            The policy. It shares the model's memory.

        Raises:
            InvalidValue: The model, its precision, its output head or one of its adapters is none
                that opdlab computes.
            UnsupportedModel: The model's numbers would not be right.
            TokenizerMismatch: The tokenizer has tokens that the model lacks.
        """
        # Of whatever the user passed, before it is checked: its name where it has one.
        source = getattr(getattr(model, "config", None), "_name_or_path", "")
        weights = Weights(model, tokenizer, eos, source, context_length)
        options = check_template_options(weights.tokenizer, chat_template_kwargs or {})
        if adapter is Active.ACTIVE:
            return cls._through_active(weights, options)
        if adapter is not None and not isinstance(adapter, str):
            raise InvalidValue(
                f"Policy.of got adapter={shortened(adapter)}. Use the name of an adapter, or None"
                " for the bare model."
            )
        weights.check_adapter(adapter)
        return cls(weights, adapter=AdapterInUse(adapter), chat_template_kwargs=options)

    @classmethod
    def _through_active(cls, weights: Weights, chat_template_kwargs: Mapping[str, Any]) -> Policy:
        weights.check_adapter(weights.active)
        return cls(
            weights, adapter=AdapterInUse(weights.active), chat_template_kwargs=chat_template_kwargs
        )

    # Its parts.

    @property
    def name(self) -> str:
        """The model's name in errors."""
        return self.weights.name

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the weights."""
        return self.weights.tokenizer

    @property
    def adapter(self) -> str | None:
        """Name of the adapter in use; None is the bare model."""
        return self._adapter.name

    @property
    def head(self) -> Head:
        """The output head as this policy's adapter leaves it."""
        return self.weights.head_of(self.adapter)

    @property
    def limit(self) -> ContextLimit:
        """Tokens that a prompt and its completion may have together."""
        return ContextLimit(self.weights.context_length, self.name, self.context is not None)

    # Other policies made of this one, and training.

    def seeing(
        self, context: str | Callable[[Prompt], Prompt] | Sequence[Mapping[str, Any]] | None = None
    ) -> Policy:
        """Make a view of this policy that sees privileged information.

        The view stays live: when training moves this policy, the view moves too. For a still one:
        `.frozen().seeing()`.

        Args:
            context: One text or some chat messages for all prompts, or a function that rewrites
                prompts; each prompt's own hint by default. A text lands in the system message of a
                chat, in the user's turn where the template has no system role; chat messages land
                before those of the prompt.

        Returns:
            A view on the same weights and adapter, with this context in place of an earlier one.

        Raises:
            InvalidValue: It is something else.
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
        return self._view(context=Told(text))

    def with_template(self, **chat_template_kwargs: Any) -> Policy:
        """Make a view with more arguments for the chat template.

            policy.with_template(enable_thinking=False)

        Arguments that the policy has already stay, unless they are given again. Those that
        transformers reads itself are allowed too: `tools`, `documents`, `add_generation_prompt`,
        `continue_final_message` (for chats that end with the beginning of an answer),
        `sanitize_control_tokens` (special tokens that a message spells are read letter by letter).

        Args:
            chat_template_kwargs: Arguments by name.

        Returns:
            A view on the same weights and adapter.

        Raises:
            InvalidValue: Neither the template nor transformers reads one of them.
        """
        merged = {**self.chat_template_kwargs, **chat_template_kwargs}
        return self._view(chat_template_kwargs=check_template_options(self.tokenizer, merged))

    def without_context(self) -> Policy:
        """Make a view of this policy that sees the plain prompts.

        Returns:
            A view on the same weights and adapter.
        """
        return self._view(context=None)

    def without_adapter(self) -> Policy:
        """Make a policy of the bare model, with the same context and template arguments.

        Returns:
            A policy on the same weights.
        """
        return self._view(_adapter=AdapterInUse())

    def _view(self, **changes: Any) -> Policy:
        """Make a copy with other attributes: context, adapter, weights or template arguments."""
        view = copy.copy(self)  # of the same class, which may read prompts in its own way
        for name, value in changes.items():
            setattr(view, name, value)
        _LIVE.add(view)
        return view

    def frozen(self) -> Policy:
        """Make a policy that stays as this one is now.

        It costs no memory if this policy has no adapter, and a copy of the adapter if it has one. A
        run that trains all weights (`lora=None`) moves it to a copy of the model first.

        Returns:
            A policy on the same weights, with the same context and template arguments.
        """
        still = self.without_adapter()
        if self.adapter is not None:
            still._adapter.own(self.weights, self.weights.clone_adapter(self.adapter))
        return still

    def copied(self) -> Policy:
        """Put this policy on weights of its own, with its adapter and no other.

        Full training needs this, since it moves weights that other policies may share.

        Returns:
            A policy with the same context, on a copy of the model.
        """
        weights = self.weights.copy(self.adapter)
        return self._view(weights=weights, _adapter=AdapterInUse(self.adapter))

    def merged(self) -> Policy:
        """Put this policy on weights of its own, with its adapter folded into them.

        A new LoRA then stacks on it. The sums are rounded to the model's precision: exact to
        float32 rounding in float32, about three digits in bfloat16. It costs the memory of one more
        model. Embeddings and head that were tied get one matrix each if the adapter changes either.

        Returns:
            A policy with the same context, on a copy of the model, without an adapter.
        """
        return self._view(weights=self.weights.fold(self.adapter), _adapter=AdapterInUse())

    def adapt(self, rank: int = 16, **options: Any) -> Policy:
        """Give this policy a trainable LoRA (in place, so live views follow); returns itself.

        Args:
            rank: Rank of the LoRA's matrices.
            options: `alpha`, `targets`, `seed` and further fields of `peft.LoraConfig`; see
                `Weights.add_lora`.

        Returns:
            The policy itself.

        Raises:
            InvalidValue: The policy looks through an adapter that was trained, or the options make
                no LoRA for this model.
        """
        # An adapter that changes nothing yet can be replaced: a notebook's cell that is run twice
        # loses nothing.
        if self.weights.adapter_digest(self.adapter) is not None:
            raise InvalidValue(
                f"adapt would put a new LoRA in the place of the adapter {self.adapter!r}, which"
                " this policy looks through. Train that one on as it is, or stack a new one on it:"
                " policy.merged().adapt(…)."
            )
        replaced, self._adapter.name = self.adapter, self.weights.add_lora(rank=rank, **options)
        if replaced is not None:
            self.weights.drop_adapter(replaced, self.weights.config_of(replaced))
        return self

    # Reading prompts.

    def encode(self, prompt: Prompt) -> list[int]:
        """Encode a prompt as this policy sees it, with its context and its chat template.

        Args:
            prompt: The prompt.

        Returns:
            Its token ids, not checked against the context length.

        Raises:
            EmptyPrompts: It has no tokens.
        """
        return self.encode_unchecked(expect_prompts([prompt], "encode"))[0]

    def encode_all(
        self, prompts: Sequence[Prompt], room: int = 0, begun: Sequence[int] | None = None
    ) -> list[list[int]]:
        """Encode many prompts, and check that each of them fits.

        Args:
            prompts: A single prompt counts as a list of one.
            room: How many new tokens must fit behind each prompt.
            begun: How many tokens are written already behind each prompt; none by default.

        Returns:
            Token ids of each prompt, without padding.

        Raises:
            EmptyPrompts: There are no prompts, or one has no tokens.
            ContextTooLong: A prompt with all that comes behind it does not fit the model's context.
        """
        prompts = expect_prompts(prompts, "encode_all")
        if not prompts:
            raise EmptyPrompts("There are no prompts. Give at least one.")
        rows = self.encode_unchecked(prompts)
        written = [0] * len(rows) if begun is None else begun
        self.limit.check_prompts(prompts, rows, written, room)
        return rows

    def encode_unchecked(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Encode many prompts, however long they are.

        Args:
            prompts: The prompts.

        Returns:
            Token ids of each prompt, without padding.

        Raises:
            EmptyPrompts: One has no tokens.
            TokenizerMismatch: One has a token that the model lacks.
        """
        seen = [self._in_context(prompt) for prompt in prompts]
        rows = encode_prompts(self.tokenizer, seen, self.chat_template_kwargs, self.weights.eos)
        for number, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            if not row:
                raise EmptyPrompts(
                    f"Prompt {name_of(prompt, number)} has no tokens to go on from. Give it some"
                    " text."
                )
            check_readable(self.tokenizer, self.weights.vocab_size, row, name_of(prompt, number))
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

    # Sampling and grading.

    @validate_arguments
    def sample(
        self,
        prompts: Unchecked[Sequence[Prompt]],
        n: Count = 1,
        *,
        prefixes: Unchecked[Sequence[Sequence[int]] | None] = None,
        batch_size: Count | None = None,
        writer: Text = "student",
        places: Unchecked[Sequence[int] | None] = None,
        environment: Unchecked[Environment | None] = None,
        **options: Unpack[SamplingOptions],
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
            places: Where each prompt stands in a batch that several processes share, from 0. The
                texts are those that one process would write for the whole batch.
            environment: Replies between the policy's turns, as `opdlab.tasks.Tools(function)`.
                `max_new_tokens` then limits the whole conversation after the prompt.
            options: Fields of `SamplingConfig`: `max_new_tokens`, `temperature`, `top_p`, `top_k`,
                `min_p`, `stop`, `seed`, `min_new_tokens`.

        Returns:
            The completions with their log-probs and entropies at temperature 1, in nats.

        Raises:
            InvalidValue: An option is not what it must be.
            EmptyPrompts: There are no prompts.
            ContextTooLong: A prompt with its completion does not fit the model's context.
        """
        prompts = expect_prompts(prompts, "sample")
        config = SamplingConfig.of(
            "sample",
            options,
            beside=("n", "prefixes", "batch_size", "writer", "places", "environment"),
        )
        places = read_places(places, len(prompts))
        if environment is not None:
            if prefixes is not None:
                raise InvalidValue(
                    "sample got prefixes= and environment=. Put the beginning of a conversation"
                    " into the prompt's messages, or leave one of them out."
                )
            return converse(
                self,
                prompts,
                n,
                environment,
                config,
                batch_size=batch_size,
                writer=writer,
                places=places,
            )
        starts = self.starts(prompts, config.max_new_tokens, prefixes)
        with torch.no_grad(), self.weights.using(self.adapter):
            loop = SamplingLoop(self.weights, self.head, config)
            written = loop.run(starts, n, batch_size, places)
        return self.make_rollout(prompts, n, written, writer)

    def starts(
        self,
        prompts: Sequence[Prompt],
        room: int,
        prefixes: Sequence[Sequence[int]] | None = None,
    ) -> list[list[int]]:
        """Encode the prompts with what is written already behind them, for a sampler to go on from.

        Args:
            prompts: The prompts.
            room: How many new tokens must fit behind each prompt.
            prefixes: Token ids already written after each prompt; none by default.

        Returns:
            Token ids for each prompt, without padding.

        Raises:
            InvalidValue: The prefixes are no token ids, or not one list for each prompt.
            EmptyPrompts: There are no prompts.
            ContextTooLong: A prompt with all that comes behind it does not fit the model's context.
        """
        if prefixes is None:
            return self.encode_all(prompts, room)
        begun = read_prefixes(prefixes, len(prompts), self.weights.vocab_size)
        starts = self.encode_all(prompts, room, [*map(len, begun)])
        return [start + prefix for start, prefix in zip(starts, begun, strict=True)]

    def make_rollout(
        self, prompts: Sequence[Prompt], n: int, written: SampledTexts, writer: str
    ) -> Rollout:
        """Make a rollout of texts in this policy's tokens.

        Args:
            prompts: The prompts.
            n: Texts of each prompt; text `j` of prompt `i` is row `i * n + j`.
            written: The texts.
            writer: Who wrote them, for the trace.

        Returns:
            The texts as completions of their prompts.
        """
        lengths = written.lengths.tolist()
        bodies = [row[:length] for row, length in zip(written.ids.tolist(), lengths, strict=True)]
        width = max(1, *lengths)
        return Rollout(
            prompts=tuple(prompt for prompt in prompts for _ in range(n)),
            ids=written.ids[:, :width],
            lengths=written.lengths,
            logp=written.logp[:, :width],
            entropy=written.entropy[:, :width],
            finish=tuple("stop" if stopped else "length" for stopped in written.stopped.tolist()),
            texts=tuple(completion_texts(self.tokenizer, bodies, self.weights.eos)),
            writer=(writer,) * len(bodies),
            n=n,
            vocabulary=vocabulary_digest(self.tokenizer),
        )

    def grade(self, rollout: Rollout) -> States:
        """Grade a rollout with the hidden states of its tokens and this policy's head.

        Args:
            rollout: `B` completions in this policy's tokens.

        Returns:
            The states of `rollout.tokens` tokens, rows in order, without padding.

        Raises:
            TokenizerMismatch: The rollout's ids are not of this policy's tokenizer.
            ContextTooLong: A prompt with its completion does not fit the model's context.
        """
        check_written_with(self.tokenizer, self.weights.vocab_size, rollout, self.name)
        return States(self.hidden(rollout), self.head, rollout.ids.device)

    def hidden(self, rollout: Rollout) -> Tensor:
        """Run the backbone over a rollout.

        Each prompt is rendered as this policy sees it, so a longer hint moves nothing. The states
        carry a gradient when grad mode is on and the policy trains.

        Args:
            rollout: `B` completions in this policy's tokens.

        Returns:
            The last hidden state where each completion token is predicted, `[tokens, H]`, rows in
            order. `rollout.mask` puts them back into `[B, T]`.

        Raises:
            ContextTooLong: A prompt with its completion does not fit the model's context.
        """
        starts = self.encode_all(rollout.prompts)
        bodies = rollout.completions()
        self.limit.check_completions(rollout.prompts, starts, bodies)
        abilities = self.weights.abilities
        # A gradient needs all rows in one pass.
        passes = [list(range(len(bodies)))] if torch.is_grad_enabled() else []
        passes = passes or self._scoring_passes(starts, bodies)
        parts: list[Tensor] = []
        with self.weights.using(self.adapter) as model:
            for rows in passes:
                few_starts, few = [starts[i] for i in rows], [bodies[i] for i in rows]
                parts.append(last_hidden(model, few_starts, few, abilities))
        return in_order(parts, passes, [*map(len, bodies)])

    def _scoring_passes(self, starts: list[list[int]], bodies: list[list[int]]) -> list[list[int]]:
        """Choose the rows of each pass without gradient."""
        device = self.weights.device.type
        limits = Limits(
            tokens=min(
                TOKENS_PER_PASS, CPU_TOKENS_PER_PASS if device == "cpu" else TOKENS_PER_PASS
            ),
            rows=None,
            cost=pass_cost(device),
            shares=self.weights.abilities.shares_prefix,
        )
        lengths = [len(start) + len(body) for start, body in zip(starts, bodies, strict=True)]
        return arrange(starts, lengths, limits)

    @validate_arguments
    def log_probs(self, rollout: Rollout) -> Tensor:
        """Compute full log-probs `[tokens, V]` in float32, for looking at.

        Training never makes them; see `opdlab.engine.rows`.

        Args:
            rollout: `B` completions in this policy's tokens.

        Returns:
            Log-probs in nats, rows in order, without gradient.

        Raises:
            ContextTooLong: A prompt with its completion does not fit the model's context.
        """
        with torch.no_grad(), self.weights.using(self.adapter):
            return self.head(self.hidden(rollout)).log_softmax(-1).to(rollout.ids.device)

    def __repr__(self) -> str:
        how = describe_quantization(self.weights.model)
        looks = [
            *([how] if how else []),
            f"adapter {self.adapter!r}" if self.adapter else "no adapter",
            *(["sees a context"] if self.context else []),
        ]
        looks += [
            f"template with {name}={shortened(value)}"
            for name, value in self.chat_template_kwargs.items()
        ]
        return f"Policy({self.name}: {', '.join(looks)})"


def sample(policy: Policy, prompts: Sequence[Prompt], n: int = 1, **options: Any) -> Rollout:
    """Write `n` completions of each prompt: `policy.sample(prompts, n, …)`.

    Args:
        policy: The policy that writes.
        prompts: A single prompt counts as a list of one.
        n: Completions of each prompt.
        options: Further arguments of `Policy.sample`.

    Returns:
        The completions; see `Policy.sample`.

    Raises:
        InvalidValue: `policy` is no `Policy`, or an option is not what it must be.
    """
    return expect(policy, Policy, "sample", "policy").sample(prompts, n, **options)


def find_too_long(
    policy: Policy, prompts: Sequence[Prompt], behind: Sequence[int]
) -> dict[int, int]:
    """Find the prompts that do not fit a policy's context.

    Args:
        policy: The policy that reads them.
        prompts: The prompts.
        behind: How many tokens come behind each.

    Returns:
        The lengths of those that are too long, by number.
    """
    limit, too_long = policy.limit, {}
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
        rows = policy.encode_unchecked(prompts[start : start + PROMPTS_AT_ONCE])
        for number, row in enumerate(rows, start):
            if not limit.allows(len(row) + behind[number]):
                too_long[number] = len(row)
    return too_long


def as_policy(value: object) -> Policy | None:
    """Return a value as a local policy, with weights and a tokenizer in this process.

    Args:
        value: A policy, a server, or anything else.

    Returns:
        The value itself if it is a `Policy`, else None.
    """
    return value if isinstance(value, Policy) else None
