"""Policies: one next-token distribution each, many of them on one set of weights.

A `Policy` is shared `Weights` seen through an adapter (a LoRA, or none) and, optionally, a context that only it sees
(a hint, a rule, examples). Student, teacher, reference, hinted student, snapshot: all are policies, and switching
between those that share weights moves no memory. Left out: sampling (`rollout.py`) and losses (`rows.py`).
"""

from __future__ import annotations

import copy
import itertools
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from opdlab.errors import ContextTooLong, EmptyPrompts, MissingHint, TokenizerMismatch
from opdlab.head import Head

if TYPE_CHECKING:
    from opdlab.rollout import Rollout

TOKENS_PER_PASS = 16_384  # padded tokens that a scoring pass holds at once


@dataclass(frozen=True)
class Prompt:
    """What a policy is asked. Give `text` (plain) or `messages` (chat, rendered by the tokenizer's own template).

    `answer` is a reference completion for tasks that have one, `hint` is privileged information that only policies made
    with `.seeing()` ever read, `id` names the prompt in traces.
    """

    text: str | None = None
    messages: tuple[dict[str, str], ...] | None = None
    answer: str | None = None
    hint: str | None = None
    id: str = ""

    def __post_init__(self) -> None:
        if (self.text is None) == (self.messages is None):
            raise ValueError("A Prompt needs either text= or messages=, and not both.")

    def told(self, context: str) -> Prompt:
        """The same prompt with `context` before it: in the system message of a chat, on a line of its own in a text."""
        if self.messages is None:
            return replace(self, text=f"{context}\n{self.text}")
        first = self.messages[0]
        if first["role"] == "system":
            first = {"role": "system", "content": f"{first['content']}\n{context}"}
            return replace(self, messages=(first, *self.messages[1:]))
        return replace(self, messages=({"role": "system", "content": context}, *self.messages))


def own_hint(prompt: Prompt) -> Prompt:
    """The prompt told its own hint; raises MissingHint where it has none."""
    if prompt.hint is None:
        raise MissingHint(
            f"Prompt {prompt.id or (prompt.text or prompt.messages)!r} has no hint, but this policy reads hints. "
            "Give the prompts a hint=, or name one context for all: policy.seeing('…')."
        )
    return prompt.told(prompt.hint)


class Weights:
    """One model in memory, its tokenizer and its adapters; every `Policy` on it shares them."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, eos: Sequence[int] | None = None,
                 source: str = "") -> None:  # fmt: skip
        self.model, self.tokenizer, self.source = model.eval(), tokenizer, source
        model.requires_grad_(False)
        self.active: str | None = None  # adapter in force; None is the bare model
        self.eos = frozenset(eos) if eos is not None else _eos(model, tokenizer)
        self.head = Head.of(model, rows=max(tokenizer.get_vocab().values()) + 1)
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
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def add_lora(self, name: str = "", rank: int = 16, alpha: int | None = None,
                 targets: str | list[str] = "all-linear", seed: int = 0) -> str:  # fmt: skip
        """A new adapter on all linear layers but the head, through PEFT; starts as the identity. Returns its name."""
        name = name or f"lora{next(self._names)}"
        config = LoraConfig(r=rank, lora_alpha=2 * rank if alpha is None else alpha, target_modules=targets,
                            task_type="CAUSAL_LM")  # fmt: skip
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
    def load(cls, source: str | os.PathLike[str], *, dtype: torch.dtype | None = None, device: str | None = None,
             tokenizer: PreTrainedTokenizerBase | None = None, eos: Sequence[int] | None = None) -> Policy:  # fmt: skip
        """A causal language model from a folder or the Hub. bf16 on a GPU and float32 on a CPU unless told otherwise."""
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        model.to(torch.device(device))  # type: ignore[arg-type]
        return cls(Weights(model, tokenizer or AutoTokenizer.from_pretrained(source), eos, str(source)))

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, eos: Sequence[int] | None = None) -> Policy:
        """A policy on a model that is already in memory; its parameters are frozen until something trains it."""
        return cls(Weights(model, tokenizer, eos, getattr(model.config, "_name_or_path", "")))

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
        fresh = Weights(copy.deepcopy(self.weights.model), self.tokenizer, tuple(self.weights.eos), self.weights.source)
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
            parts = [_last_hidden(model, starts[i : i + rows], bodies[i : i + rows]) for i in range(0, len(bodies), rows)]
        return torch.cat(parts)

    def log_probs(self, rollout: Rollout) -> Tensor:
        """Full log-probs `[tokens, V]` in float32. For looking at: training never makes them (see `rows.py`)."""
        with torch.no_grad(), self.weights.using(self.adapter):
            return self.weights.head(self.hidden(rollout)).log_softmax(-1)

    def __repr__(self) -> str:
        looks = [f"adapter {self.adapter!r}" if self.adapter else "no adapter", *(["sees a context"] if self.context else [])]
        return f"Policy({self.weights.source or type(self.weights.model).__name__}: {', '.join(looks)})"


def _last_hidden(model: PreTrainedModel, starts: list[list[int]], bodies: list[list[int]]) -> Tensor:
    """Right-padded, so that under causal attention padding cannot touch a real token and no mask is needed.

    Without a gradient, what all prompts begin with (a rule, examples, a system message) is run once and not once a row.
    """
    shared = 0 if torch.is_grad_enabled() else _shared(starts)
    ids = [start[shared:] + body for start, body in zip(starts, bodies, strict=True)]
    width = max(map(len, ids))
    batch = torch.tensor([row + [0] * (width - len(row)) for row in ids], device=model.device)
    position = torch.arange(shared, shared + width, device=model.device)[None]
    cache = None
    if shared:
        cache = DynamicCache(config=model.config)
        model.base_model(input_ids=torch.tensor([starts[0][:shared]], device=model.device), past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(ids))
    states = model.base_model(input_ids=batch, position_ids=position, past_key_values=cache, use_cache=cache is not None).last_hidden_state
    ends = [i * width + len(start) - shared - 1 for i, start in enumerate(starts)]
    where = [end + t for end, body in zip(ends, bodies, strict=True) for t in range(len(body))]
    return states.flatten(0, 1)[torch.tensor(where, device=states.device, dtype=torch.long)]


def _shared(starts: list[list[int]]) -> int:
    """How many tokens all prompts begin with, leaving one of each; 0 where that would not pay for another pass."""
    room = min(map(len, starts)) - 1
    tokens = next((i for i, column in enumerate(zip(*starts, strict=False)) if len(set(column)) > 1), room + 1)
    tokens = min(tokens, room)
    return tokens if tokens >= 16 and len(starts) > 1 else 0


def _eos(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    ids = getattr(model.generation_config, "eos_token_id", None)
    ids = [ids] if isinstance(ids, int) else list(ids or [])
    return frozenset([*ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])])


def check_same_tokens(student: Policy, teacher: Policy, name: str = "teacher") -> None:
    """Raise TokenizerMismatch unless both speak the same tokens; the message shows the first difference.

    Compares id -> string over the whole vocabulary, EOS sets and a rendered chat. Padding rows of the head do not matter.
    """
    if student.weights is teacher.weights:
        return
    ours, theirs = student.tokenizer, teacher.tokenizer
    mine, other = ({i: piece for piece, i in t.get_vocab().items()} for t in (ours, theirs))
    for i in sorted(mine.keys() | other.keys()):
        if mine.get(i) != other.get(i):
            raise TokenizerMismatch(
                f"The {name}'s tokenizer differs from the student's: id {i} is {other.get(i)!r} there and {mine.get(i)!r} here. "
                "A token-level loss would compare unrelated tokens. Use a teacher of the same family, or one that only writes."
            )
    if student.weights.eos != teacher.weights.eos:
        raise TokenizerMismatch(
            f"The {name} stops at tokens {_named(theirs, teacher.weights.eos)}, the student at {_named(ours, student.weights.eos)}: "
            "trained like this, lengths run away. Load one of them with the other's set: Policy.load(…, eos=[…])."
        )
    _check_same_template(ours, theirs, name)


def _check_same_template(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, name: str) -> None:
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    texts = [t.apply_chat_template(probe, tokenize=False, add_generation_prompt=True) if t.chat_template else "" for t in (ours, theirs)]
    if texts[0] != texts[1]:
        at = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
        raise TokenizerMismatch(
            f"The {name}'s chat template differs from the student's from character {at} on: {texts[1][at : at + 40]!r} there, "
            f"{texts[0][at : at + 40]!r} here. Load the {name} with tokenizer=student.tokenizer to score the student's form."
        )


def _named(tokenizer: PreTrainedTokenizerBase, ids: frozenset[int]) -> str:
    return ", ".join(f"{i} {tokenizer.convert_ids_to_tokens(i)!r}" for i in sorted(ids)) or "none"
