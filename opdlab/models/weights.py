"""One model in memory with its tokenizer, its output head and its adapters.

Every `Policy` on it shares them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opdlab.errors import InvalidValue, OpdlabError
from opdlab.models import adapters
from opdlab.models.adapter_coverage import (
    incompatible_layers,
    unused_layers,
    warn_about_unreached_weights,
)
from opdlab.models.adapter_options import configuration, special_linear_layers
from opdlab.models.compatibility import check_rotary, find_abilities, warn_about
from opdlab.models.head import Head
from opdlab.models.loading import check_model, check_tokenizer, eos_tokens
from opdlab.models.precision import backbone_autocast
from opdlab.models.vocabulary import check_tokens
from opdlab.support.validation import Count, Seed, validate


class Weights:
    """One model in memory, its tokenizer and its adapters; every `Policy` on it shares them."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        eos: int | Sequence[int] | None = None,
        source: str = "",
        context_length: int | None = None,
    ) -> None:
        check_tokenizer(tokenizer)
        self.model = check_model(adapters.unwrap(model)).eval()
        adapters.check(self.model)
        self.tokenizer, self.source = tokenizer, source
        self.own_context_length = validate(
            "Policy", {"context_length": context_length}, {"context_length": Count | None}
        )["context_length"]
        check_tokens(self.model, tokenizer)
        self.eos = eos_tokens(self.model, tokenizer, eos)
        self._names = itertools.count()
        self._passes = 0  # how many `using` blocks are open
        self._dropped: list[tuple[str, Any]] = []  # adapters that nobody looks through any more
        # The model's own parameters are frozen until something trains them; adapters are kept in
        # float32.
        present = adapters.names(self.model)
        if present:
            self.model._hf_peft_config_loaded = True
        for name in present:
            adapters.make_float32(self.model, name)
        before = self._found()
        self.model.requires_grad_(False)
        with self.using(None):
            self.head = Head.of(self.model, rows=max(tokenizer.get_vocab().values()) + 1)
            check_rotary(self.model, context_length)
            self.abilities = find_abilities(self.model, self.head, self.context_length)
        warn_about(self.model, self.abilities)
        if before is not None:
            adapters.make_trainable(self.model, before)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def vocab_size(self) -> int:
        """Tokens that the head can say: rows beyond the tokenizer's last id are padding and are
        cut.
        """
        return self.head.rows

    @property
    def context_length(self) -> int | None:
        """Tokens that a prompt and its completion may have together: the model's limit, or the
        user's lower one.
        """
        limits = (
            self.own_context_length,
            getattr(self.model.config.get_text_config(), "max_position_embeddings", None),
        )
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def active(self) -> str | None:
        """The adapter in force; None is the bare model."""
        return next(iter(adapters.in_force(self.model)), None)

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters on the model."""
        return adapters.names(self.model)

    def add_lora(
        self,
        name: str = "",
        rank: int = 16,
        alpha: float | None = None,
        targets: str | list[str] = "all-linear",
        seed: int = 0,
        **options: Any,
    ) -> str:
        """Make a new adapter through PEFT, in float32; it starts as the identity.

        Args:
            name: Its name; made up by default.
            rank: Rank of the matrices.
            alpha: The update is scaled by `alpha / rank`; twice the rank by default.
            targets: "all-linear" (all linear layers but the head, the routers of some mixtures of
                experts, and parts that text does not enter, as image encoders), names of layers, or
                a regular expression over them.
            seed: Of its initial weights.
            options: Other fields of `peft.LoraConfig`, as `use_dora=True`, `use_rslora=True`,
                `modules_to_save=["lm_head"]`, `rank_pattern={…}`.

        Returns:
            The adapter's name.

        Raises:
            InvalidValue: An option is unknown or cannot be honoured, or the model cannot take this
                adapter.
        """
        validate("adapt", {"seed": seed}, {"seed": Seed})
        if targets == "all-linear" and not isinstance(options.get("exclude_modules"), str):
            special = [
                *special_linear_layers(self.model),
                *incompatible_layers(self.model),
                *unused_layers(self.model),
            ]
            options["exclude_modules"] = [*(options.get("exclude_modules") or []), *special] or None
        config = configuration(rank, alpha, targets, options)
        name = self._add(name, lambda new: self._make(new, config, seed))
        if targets == "all-linear":
            warn_about_unreached_weights(self.model)
        return name

    def add_adapter(self, config: LoraConfig, name: str = "", seed: int = 0) -> str:
        """Make a new adapter as PEFT's `config` describes it; its random entries follow `seed`.

        Returns its name.
        """
        return self._add(name, lambda new: self._make(new, config, seed))

    def clone_adapter(self, source: str) -> str:
        """Make an exact copy of an adapter, settings and tensors; returns its name."""
        return self._add("", lambda new: adapters.clone(self.model, source, new))

    def delete_adapter(self, name: str) -> None:
        """Take an adapter off the model."""
        adapters.remove(self.model, name)

    def drop_adapter(self, name: str, config: Any) -> None:
        """Let an adapter be taken off when the next one is made, unless its name then belongs to
        another one.

        Not at once: the garbage collector calls this at any time, in the middle of a pass too.
        """
        self._dropped.append((name, config))

    def tidy(self) -> None:
        """Take off the adapters that nobody looks through any more.

        Not during a pass: layers would go away under it.
        """
        while self._dropped and not self._passes:
            name, config = self._dropped.pop()
            if getattr(self.model, "peft_config", {}).get(name) is config:
                adapters.remove(self.model, name)

    def config_of(self, name: str) -> Any:
        """The PEFT configuration of an adapter."""
        return adapters.config_of(self.model, name)

    def adapter_state(self, name: str) -> dict[str, Tensor]:
        """The adapter's tensors, as PEFT names them. Not copies."""
        return adapters.state(self.model, name)

    def set_adapter_state(self, name: str, state: dict[str, Tensor]) -> None:
        """Copy tensors into an adapter.

        Raises InvalidValue where names or shapes are not its own.
        """
        adapters.set_state(self.model, name, state)

    def head_of(self, adapter: str | None) -> Head:
        """The output head as a policy with this adapter reads it."""
        return self.head if adapter is None else Head.read(self.model, self.head.rows, adapter)

    def check_adapter(self, name: str | None) -> None:
        """See that an adapter is there and that the engine computes the model's own logits under
        it.

        Raises:
            InvalidValue: It is not there, or changes the output head in a way that opdlab does not
                compute.
        """
        if name is None:
            return
        if name not in self.adapters:
            there = ", ".join(map(repr, self.adapters)) or "none"
            raise InvalidValue(
                f"The model has no adapter {name!r}; there are {there}. Use one of them, or None."
            )
        with self.using(name):
            Head.of(self.model, self.head.rows, name)

    @contextmanager
    def using(self, adapter: str | None) -> Iterator[PreTrainedModel]:
        """The model with `adapter` in force (None: bare); what was in force before comes back
        afterwards.

        Forward passes in the block compute in the precision of `opdlab.models.precision`.
        """
        before = self.active
        self._passes += 1
        self.use(adapter)
        try:
            with backbone_autocast(self.device):
                yield self.model
        finally:
            self.use(before)
            self._passes -= 1

    def use(self, adapter: str | None) -> None:
        """Put `adapter` in force (None: the bare model) until something else is."""
        if adapter is not None and adapter not in self.adapters:
            raise OpdlabError(
                f"The adapter {adapter!r} was taken off the model, and a policy looks through it."
                " Make that policy again."
            )
        if self.model.training:  # somebody's trainer left dropout on
            self.model.eval()
        adapters.switch(self.model, adapter)

    def _found(self) -> str | None:
        active = adapters.in_force(self.model)
        if len(active) > 1:
            raise InvalidValue(
                f"The model goes through {len(active)} adapters at once"
                f" ({', '.join(map(repr, active))}), and a policy looks through one. Choose it with"
                " model.set_adapter(name), or merge them (PEFT's add_weighted_adapter,"
                " merge_and_unload)."
            )
        return next(iter(active), None)

    def _add(self, name: str, make: Any) -> str:
        self.tidy()
        if name and name in self.adapters:
            raise InvalidValue(f"The model has an adapter {name!r} already. Use another name.")
        if not name:
            name = next(f"lora{i}" for i in self._names if f"lora{i}" not in self.adapters)
        before = self.active
        try:
            make(name)
        finally:
            self.use(before)
        return name

    def _make(self, name: str, config: Any, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapters.add(self.model, name, config)
        try:
            self.check_adapter(name)
        except InvalidValue:
            adapters.remove(self.model, name)
            raise
        except Exception as error:  # a layer that returns no single tensor, say
            adapters.remove(self.model, name)
            raise InvalidValue(
                f"{type(self.model).__name__} does not run with this LoRA ({type(error).__name__}:"
                f" {error}). Leave the layer out of targets, or use targets='all-linear'."
            ) from error
