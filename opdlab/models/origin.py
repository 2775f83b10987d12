"""Remember how a policy was loaded, so that a config file can say it again."""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from opdlab.data.prompt import Prompt

_Load = TypeVar("_Load", bound=Callable[..., Any])
# Arguments that say nothing about the policy: a key, and a way to save memory.
_BESIDE = ("token", "prefer_shared", "chat_template_kwargs")


@dataclass(frozen=True)
class Told:
    """A context that is one text, or some chat messages, for all prompts.

    Attributes:
        text: The text, or a `ChatHint` of messages.
    """

    text: str

    def __call__(self, prompt: Prompt) -> Prompt:
        """Put the text before a prompt."""
        return prompt.with_context(self.text)


@dataclass(frozen=True, eq=False)
class Origin:
    """What `Policy.load` was called with, and what came of it.

    Attributes:
        source: The folder, as an absolute path, or the name on the Hub.
        options: The other arguments that were not left at their defaults.
        weights: The weights that were loaded, as a weak reference.
        adapter: Fingerprint of the adapter that was loaded; None for none.
        version: How often the weights had been written to by then.
    """

    source: str
    options: Mapping[str, Any]
    weights: weakref.ref[Any]
    adapter: str | None
    version: int

    def find_change(self, policy: Any) -> str:
        """Say what has changed since the policy was loaded.

        Args:
            policy: The policy, or a view of it.

        Returns:
            A few words; "" if nothing has.
        """
        weights: Any = policy.weights
        if id(self.weights()) != id(weights):
            return "it is on other weights than were loaded (a merged or copied model)"
        if version_of(weights.model) != self.version:
            return "its weights have changed since they were loaded"
        if weights.adapter_digest(policy.adapter) != self.adapter:
            return "it looks through another adapter than was loaded"
        return ""


def remember_loading(load: _Load) -> _Load:
    """Let a loading class method write down what it was called with.

    Args:
        load: A function of a class and a source, with options by name, which returns a policy.

    Returns:
        The function; its policies get an `origin`.
    """

    @functools.wraps(load)
    def remembering(kind: Any, source: Any, **options: Any) -> Any:
        policy = load(kind, source, **options)
        kept = {k: v for k, v in options.items() if k not in _BESIDE and v is not None}
        weights = policy.weights
        policy.origin = Origin(
            _as_place(source),
            {key: _as_plain(value) for key, value in kept.items()},
            weakref.ref(weights),
            weights.adapter_digest(policy.adapter),
            version_of(weights.model),
        )
        return policy

    return remembering  # type: ignore[return-value]


def version_of(model: nn.Module) -> int:
    """Count how often the model's own parameters have been written to, adapters left out.

    Args:
        model: The model.

    Returns:
        A number that grows with every change in place.
    """
    return sum(value._version for name, value in model.named_parameters() if "lora_" not in name)


def _as_place(source: Any) -> str:
    path = Path(source).expanduser()
    return os.path.abspath(path) if path.exists() else str(source)


def _as_plain(value: Any) -> Any:
    """A value as a config file holds it, where it can."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, torch.device):
        return str(value)
    return _as_place(value) if isinstance(value, os.PathLike) else value
