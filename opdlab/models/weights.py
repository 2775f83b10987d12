"""Hold one model in memory, with its tokenizer, output head and adapters, for many policies."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opdlab.errors import InvalidValue, OpdlabError
from opdlab.models import adapters, gguf_files
from opdlab.models.abilities import warn_about_missing
from opdlab.models.adapters import files as adapter_files
from opdlab.models.adapters.coverage import (
    find_refused_layers,
    find_special_layers,
    find_unused_layers,
    warn_about_unreached_weights,
)
from opdlab.models.adapters.lora_options import make_config
from opdlab.models.fingerprints import adapter_digest
from opdlab.models.head import Head
from opdlab.models.placement import input_device, refuse_copy, refuse_offloaded
from opdlab.models.precision import backbone_autocast
from opdlab.models.quantization import dequantized, is_quantized, set_evaluation
from opdlab.models.requirements import check_model, check_rotary, check_tokenizer
from opdlab.models.self_check import find_abilities
from opdlab.models.vocabulary import check_tokens, find_eos
from opdlab.support.memory import refuse_beyond_memory
from opdlab.support.validation import Count, Seed, validate


class Weights:
    """Hold one model with its tokenizer and its adapters; every `Policy` on it shares them.

    Args:
        model: A causal language model of transformers, or a `PeftModel` around one.
        tokenizer: Its tokenizer.
        eos: Ids of the tokens that end a text, in place of the model's own.
        source: The folder or the name that the model is from, for messages.
        context_length: Tokens that a prompt and its completion may have together, if fewer than
            the model allows.

    Attributes:
        model: The transformers model, in evaluation mode.
        tokenizer: Its tokenizer.
        source: Where it is from.
        own_context_length: The user's limit, or None.
        eos: The tokens that end a text.
        head: The output head of the bare model.
        abilities: The shortcuts that are right for this model.
        origin: What it was loaded from, for `opdlab.models.sharing`; None where nobody knows.

    Raises:
        InvalidValue: The model, its precision, its output head or one of its adapters is none that
            opdlab computes.
        UnsupportedModel: The model's numbers would not be right.
        TokenizerMismatch: The tokenizer has tokens that the model lacks.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        eos: int | Sequence[int] | None = None,
        source: str = "",
        context_length: int | None = None,
    ) -> None:
        check_tokenizer(tokenizer)
        self.model: PreTrainedModel = check_model(adapters.unwrap(model))
        set_evaluation(self.model)
        adapters.check(self.model)
        self.tokenizer, self.source = tokenizer, source
        self.own_context_length = validate(
            "Policy", {"context_length": context_length}, {"context_length": Count | None}
        )["context_length"]
        check_tokens(self.model, tokenizer)
        self.eos = find_eos(self.model, tokenizer, eos)
        self.origin: Any = None
        self._names = itertools.count()
        self._passes = 0  # how many `using` blocks are open
        # Adapters that nobody looks through any more.
        self._dropped: list[tuple[str, LoraConfig]] = []
        # The model's own parameters are frozen until something trains them; adapters are kept in
        # float32.
        present = adapters.names(self.model)
        if present:
            self.model._hf_peft_config_loaded = True
        for name in present:
            adapters.make_float32(self.model, name)
        before = self._find_active()
        self.model.requires_grad_(False)
        with self.using(None):
            self.head = Head.of(self.model, max(tokenizer.get_vocab().values()) + 1)
            check_rotary(self.model, context_length)
            self.abilities = find_abilities(self.model, self.head, self.context_length)
        warn_about_missing(self.abilities, type(self.model).__name__)
        if before is not None:
            adapters.make_trainable(self.model, before)

    @property
    def device(self) -> torch.device:
        """The device that token ids are to be on: that of the embeddings."""
        return input_device(self.model)

    @property
    def embeddings(self) -> Tensor:
        """The matrix of the input embeddings, `[rows, H]`."""
        layer: Any = self.model.get_input_embeddings()
        matrix: Tensor = layer.weight
        return matrix

    @property
    def vocab_size(self) -> int:
        """Number of tokens that the head can say.

        Rows beyond the tokenizer's last id are padding and are cut.
        """
        return self.head.vocab_size

    @property
    def context_length(self) -> int | None:
        """Tokens that a prompt and its completion may have together; None for no limit.

        It is the model's limit, or the user's lower one.
        """
        # Families without positions have no such setting.
        own = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        limits = (self.own_context_length, own)
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def name(self) -> str:
        """The model's name in errors."""
        unpacked = gguf_files.origin(self.source) if self.source else None
        return unpacked["file"] if unpacked else self.source or type(self.model).__name__

    def copy(self, adapter: str | None) -> Weights:
        """Copy the model, with one of its adapters (None: without any).

        Args:
            adapter: Name of the adapter that the copy keeps; None for none.

        Returns:
            Weights of their own, checked anew.
        """
        refuse_copy(self.model, self.name)
        with self.using(adapter) as model:
            copied = copy.deepcopy(model)
        twin = self._around(copied)
        for name in twin.adapters:
            if name != adapter:
                twin.delete_adapter(name)
        return twin

    def fold(self, adapter: str | None) -> Weights:
        """Copy the model and add one of its adapters to the copy's own weights.

        Args:
            adapter: Name of the adapter; None copies the bare model.

        Returns:
            Weights of their own, without adapters.

        Raises:
            InvalidValue: PEFT cannot add this adapter to the weights.
        """
        twin = self._dequantized(adapter) if is_quantized(self.model) else self.copy(adapter)
        adapters.fold(twin.model, adapter)
        return self._around(twin.model)  # checked anew, since its weights are others now

    def _dequantized(self, adapter: str | None) -> Weights:
        """Copy the model with plain weights, on which one of its adapters can be folded."""
        bare = self.copy(None)
        twin = self._around(dequantized(bare.model))
        if adapter is not None:
            adapters.add(twin.model, adapter, adapters.plain_config(self.config_of(adapter)))
            adapters.set_state(twin.model, adapter, self.adapter_state(adapter))
        return twin

    def _around(self, model: PreTrainedModel) -> Weights:
        return Weights(model, self.tokenizer, tuple(self.eos), self.source, self.own_context_length)

    @property
    def active(self) -> str | None:
        """The adapter in force; None is the bare model."""
        return next(iter(adapters.in_force(self.model)), None)

    @property
    def adapters(self) -> list[str]:
        """Names of all adapters on the model."""
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
            left_out = [
                *(options.get("exclude_modules") or []),
                *find_special_layers(self.model),
                *find_refused_layers(self.model),
                *find_unused_layers(self.model),
            ]
            options["exclude_modules"] = left_out or None
        config = make_config(rank, alpha, targets, options)
        self._refuse_too_large(config)
        name = self._add(name, lambda new: self._make(new, config, seed))
        if targets == "all-linear":
            warn_about_unreached_weights(self.model)
        return name

    def add_adapter(self, config: LoraConfig, name: str = "", seed: int = 0) -> str:
        """Make a new adapter as PEFT's configuration describes it.

        Args:
            config: The configuration.
            name: Its name; made up by default.
            seed: Of its initial weights.

        Returns:
            The adapter's name.
        """
        self._refuse_too_large(config)
        return self._add(name, lambda new: self._make(new, config, seed))

    def _refuse_too_large(self, config: LoraConfig) -> None:
        """Refuse a rank at which the adapter of one layer alone cannot fit the memory."""
        sides = [
            layer.in_features + layer.out_features
            for layer in self.model.modules()
            if isinstance(layer, torch.nn.Linear)
        ]
        refuse_beyond_memory(
            f"A LoRA of rank {config.r:,}",
            4.0 * config.r * min(sides, default=0),
            self.device,
            "Ranks of 8 to 128 are common.",
        )

    def load_adapter(self, folder: Path, name: str = "") -> str:
        """Put an adapter from a folder on the model; what is in force stays so.

        Args:
            folder: A local folder with an adapter of PEFT.
            name: Its name; made up by default.

        Returns:
            The adapter's name.

        Raises:
            InvalidValue: It does not fit the model.
        """
        return self._add(name, lambda new: adapter_files.load(self.model, folder, new))

    def write_adapter(self, name: str, folder: Path) -> None:
        """Write an adapter as PEFT reads it: `adapter_model.safetensors`, `adapter_config.json`.

        Args:
            name: The adapter's name.
            folder: The folder to write into, which is made if it is missing. Files of these names
                are replaced; the write is not atomic.
        """
        folder.mkdir(parents=True, exist_ok=True)
        state = self.adapter_state(name)
        adapter_files.write(folder, self.config_of(name), state, self.source or None)

    def clone_adapter(self, source: str) -> str:
        """Make an exact copy of an adapter, settings and tensors.

        Args:
            source: Name of the adapter to copy.

        Returns:
            The copy's name, which is made up.
        """
        return self._add("", lambda new: adapters.clone(self.model, source, new))

    def delete_adapter(self, name: str) -> None:
        """Take an adapter off the model; nothing happens if it is not there.

        Args:
            name: The adapter's name.
        """
        adapters.remove(self.model, name)

    def drop_adapter(self, name: str, config: LoraConfig) -> None:
        """Let an adapter be taken off when the next one is made.

        It is not done at once: the garbage collector calls this at any time, in the middle of a
        pass too.

        Args:
            name: The adapter's name.
            config: Its configuration. If the name belongs to another adapter by then, that stays.
        """
        self._dropped.append((name, config))

    def tidy(self) -> None:
        """Take off the adapters that nobody looks through any more.

        Not during a pass: layers would go away under it.
        """
        while self._dropped and not self._passes:
            name, config = self._dropped.pop()
            if adapters.has_config(self.model, name, config):
                adapters.remove(self.model, name)

    def config_of(self, name: str) -> LoraConfig:
        """Look up the PEFT configuration of an adapter.

        Args:
            name: The adapter's name.

        Returns:
            The configuration itself, and not a copy.
        """
        return adapters.config_of(self.model, name)

    def adapter_state(self, name: str) -> dict[str, Tensor]:
        """Take the adapter's tensors, as PEFT names them. They are not copies.

        Args:
            name: The adapter's name.

        Returns:
            The tensors by name, in the adapter's own memory.
        """
        return adapters.state(self.model, name)

    def adapter_digest(self, name: str | None) -> str | None:
        """Make a fingerprint of what an adapter adds.

        Args:
            name: The adapter's name, or None.

        Returns:
            The fingerprint; None for no adapter, and for one that changes nothing yet.
        """
        return None if name is None else adapter_digest(self.model, self.adapter_state(name))

    def set_adapter_state(self, name: str, state: dict[str, Tensor]) -> None:
        """Copy tensors into an adapter.

        Args:
            name: The adapter's name.
            state: Tensors under the names that `adapter_state` gives.

        Raises:
            InvalidValue: Names or shapes are not those of the adapter.
        """
        adapters.set_state(self.model, name, state)

    def head_of(self, adapter: str | None) -> Head:
        """Find the output head as a policy with this adapter reads it.

        Args:
            adapter: Name of the adapter; None for the bare model.

        Returns:
            The head.
        """
        return self.head if adapter is None else Head.read(self.model, self.vocab_size, adapter)

    def check_adapter(self, name: str | None) -> None:
        """Check that an adapter is there, and that opdlab computes the model's logits under it.

        Args:
            name: The adapter's name; None passes.

        Raises:
            InvalidValue: It is not there, or changes the output head in a way that opdlab does not
                compute.
            UnsupportedModel: The model's logits under it are something else than the head gives.
        """
        if name is None:
            return
        if name not in self.adapters:
            there = ", ".join(map(repr, self.adapters)) or "none"
            raise InvalidValue(
                f"The model has no adapter {name!r}; there are {there}. Use one of them, or None."
            )
        with self.using(name):
            Head.of(self.model, self.vocab_size, name)

    @contextmanager
    def using(self, adapter: str | None) -> Iterator[PreTrainedModel]:
        """Put `adapter` in force (None: the bare model) until the block ends.

        Forward passes in the block compute in the precision of `opdlab.models.precision`.

        Args:
            adapter: Name of the adapter; None for the bare model.

        Yields:
            The model.

        Raises:
            OpdlabError: The adapter is not on the model.
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
        """Put `adapter` in force (None: the bare model) until something else is.

        Args:
            adapter: Name of the adapter; None for the bare model.

        Raises:
            OpdlabError: The adapter is not on the model.
        """
        if adapter is not None and adapter not in self.adapters:
            raise OpdlabError(
                f"The adapter {adapter!r} was taken off the model, and a policy looks through it."
                " Make that policy again."
            )
        if self.model.training:  # somebody's trainer left dropout on
            set_evaluation(self.model)
        adapters.switch(self.model, adapter)

    def _find_active(self) -> str | None:
        active = adapters.in_force(self.model)
        if len(active) > 1:
            raise InvalidValue(
                f"The model goes through {len(active)} adapters at once"
                f" ({', '.join(map(repr, active))}), and a policy looks through one. Choose it with"
                " model.set_adapter(name), or merge them (PEFT's add_weighted_adapter,"
                " merge_and_unload)."
            )
        return next(iter(active), None)

    def _add(self, name: str, make: Callable[[str], None]) -> str:
        """Let `make` put an adapter of that name on the model; what is in force stays so."""
        refuse_offloaded(self.model, self.name)
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

    def _make(self, name: str, config: LoraConfig, seed: int) -> None:
        """Put a new adapter on the model and run it once; it is taken off again if that fails."""
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


class AdapterInUse:
    """The adapter that a policy looks through.

    Live views of the policy share one such object, so a training run moves them together.

    Attributes:
        name: The adapter's name; None is the bare model.
    """

    def __init__(self, name: str | None = None) -> None:
        self.name = name

    def own(self, weights: Weights, name: str) -> None:
        """Look through `name` from now on, and take it off the weights with the last view.

        Args:
            weights: The weights that carry the adapter.
            name: The adapter's name.
        """
        self.name = name
        end = weakref.finalize(self, weights.drop_adapter, name, weights.config_of(name))
        end.atexit = False
