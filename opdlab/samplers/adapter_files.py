"""Adapters on disk for an engine to read: complete or absent, each in a folder of its own."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors.torch import save_file

from opdlab.errors import InvalidValue
from opdlab.models.policy import Policy

_PEFT = "base_model.model."  # the prefix under which PEFT stores adapters
# Fields of an adapter that vLLM does not compute, with the values that ask for nothing.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
}


class AdapterFiles:
    """A folder that gets one adapter after another, and keeps the latest.

    Args:
        folder: The folder to write into; a temporary one by default.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self._is_own = folder is None
        if folder is None:
            self.folder = Path(tempfile.mkdtemp(prefix="opdlab-adapters-"))
        else:
            self.folder = Path(folder).expanduser().resolve()
            self.folder.mkdir(parents=True, exist_ok=True)
        self._written: list[Path] = []

    def write(self, student: Policy, name: str) -> Path:
        """Write the student's adapter as it is now.

        Args:
            student: A policy with an adapter.
            name: The name of the adapter's folder, used for no other.

        Returns:
            The folder, in PEFT's format.
        """
        weights, adapter = student.weights, str(student.adapter)
        final, partial = self.folder / name, self.folder / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        state = weights.adapter_state(adapter)
        save_file(
            {_PEFT + key: value.detach().cpu().contiguous() for key, value in state.items()},
            partial / "adapter_model.safetensors",
        )
        weights.config_of(adapter).save_pretrained(str(partial))
        partial.rename(final)
        self._written.append(final)
        return final

    def keep_only(self, folder: Path | None) -> None:
        """Delete all adapters that were written but one.

        Args:
            folder: The one to keep; None for none.
        """
        for one in self._written:
            if one != folder:
                shutil.rmtree(one, ignore_errors=True)
        self._written = [one for one in self._written if one == folder]

    def close(self) -> None:
        """Delete what was written, and the folder if it was a temporary one."""
        self.keep_only(None)
        if self._is_own:
            shutil.rmtree(self.folder, ignore_errors=True)


def check_adapter(config: LoraConfig) -> None:
    """Refuse an adapter that vLLM would compute otherwise than the trainer.

    Args:
        config: The adapter's configuration.

    Raises:
        InvalidValue: vLLM does not know one of its fields.
    """
    for name, plain in _PLAIN.items():
        value = getattr(config, name, None)
        if value not in plain:
            raise InvalidValue(
                f"vLLM runs no adapter with {name}={value!r}, so it would sample from another"
                " student than the one that trains. Use a plain LoRA, or leave sampler= out."
            )
