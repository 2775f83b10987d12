"""The options of `Policy.load`, and which of them cannot stand together."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from opdlab.errors import InvalidValue
from opdlab.models.quantization import check_quantization
from opdlab.support.expect import shortened
from opdlab.support.validation import validate

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float64": torch.float64,
}
SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")  # device maps that Accelerate makes
# Packages behind attention implementations that transformers does not bring.
_ATTENTION_PACKAGES = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
}

PathOrName = str | os.PathLike[str]


@dataclass(frozen=True)
class LoadOptions:
    """Say how a model is loaded: the keyword arguments of `Policy.load`, all but `prefer_shared`.

    Attributes:
        revision: Branch, tag or commit on the Hub.
        dtype: torch.float32, torch.bfloat16 or torch.float64, or its name.
        device: "cpu", "cuda", "cuda:1", …
        device_map: Several devices, as Accelerate spreads models: "auto", or a dict by module.
        attn_implementation: "sdpa", "eager", "flash_attention_2", …
        quantization: "4bit", "8bit", or a quantisation config of transformers.
        adapter: Folder of a PEFT adapter, or its name on the Hub.
        chat_template: A Jinja template, or the path of a file with one.
        chat_template_kwargs: Arguments for the chat template.
        tokenizer: A tokenizer, or the folder or name of one.
        token: For private models on the Hub. It is shown and stored nowhere.
        eos: Ids of the tokens that end a text.
        context_length: Tokens that a prompt and its completion may have together.
        gguf_file: Name of a GGUF file in the folder or repository.

    Raises:
        InvalidValue: A value cannot be right, or two of them cannot stand together.
    """

    revision: str | None = None
    dtype: torch.dtype | str | None = None
    device: str | torch.device | None = None
    device_map: str | Mapping[str, Any] | None = None
    attn_implementation: str | None = None
    quantization: Any = None
    adapter: PathOrName | None = None
    chat_template: PathOrName | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    tokenizer: PreTrainedTokenizerBase | PathOrName | None = None
    token: str | None = field(default=None, repr=False)
    eos: int | Sequence[int] | None = None
    context_length: int | None = None
    gguf_file: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.token, str | bool | None):
            # Said without the value, which may be a secret in a wrong wrapping.
            raise InvalidValue(
                f"Policy.load got a {type(self.token).__name__} as token. Use a text, or None for"
                " the one that is saved on this machine."
            )
        texts = {
            name: getattr(self, name) for name in ("revision", "attn_implementation", "gguf_file")
        }
        for name, value in texts.items():
            if value is not None and (not isinstance(value, str) or not value.strip()):
                raise InvalidValue(
                    f"Policy.load got {name}={shortened(value)}. Use a text, or None."
                )
        if self.context_length is not None:
            validate("Policy", {"context_length": self.context_length}, {"context_length": int})
        read_dtype(self.dtype)
        read_device(self.device)
        check_device_map(self.device_map)
        self._check_together()
        _check_attention(self.attn_implementation)
        _check_path("adapter", self.adapter, "the folder of a PEFT adapter, or its name on the Hub")
        read_chat_template(self.chat_template)

    def _check_together(self) -> None:
        if self.device is not None and self.device_map is not None:
            raise InvalidValue(
                f"Policy.load got device={str(self.device)!r} and"
                f" device_map={shortened(self.device_map)}. Use device for a model on one device,"
                " or device_map to spread it over several."
            )
        if self.quantization is not None:
            check_quantization(self.quantization)
            if read_dtype(self.dtype) is torch.float64:
                raise InvalidValue(
                    "Policy.load got quantization with dtype=float64, in which quantised layers do"
                    " not compute. Use float32 or bfloat16."
                )
            if self.gguf_file is not None:
                raise InvalidValue(GGUF_AND_QUANTIZATION)
        given = self.chat_template_kwargs
        if (
            self.chat_template is not None
            and isinstance(given, Mapping)
            and "chat_template" in given
        ):
            raise InvalidValue(
                "Policy.load got chat_template twice: as an argument, and in chat_template_kwargs."
                " Use one of them."
            )

    def place(self) -> torch.device:
        """Choose the device of a model that is not spread.

        Returns:
            The user's device; by default the GPU if there is one.
        """
        return read_device(self.device)

    def kind(self) -> torch.dtype:
        """Choose the dtype of the weights.

        Returns:
            The user's dtype. By default bfloat16 on a GPU that computes in it, else float32: CPUs
            multiply float32 faster.
        """
        given = read_dtype(self.dtype)
        return given or default_dtype(self._main_device())

    def _main_device(self) -> torch.device:
        if self.device_map is None:
            return self.place()
        if isinstance(self.device_map, Mapping):
            types = {_type_of(place) for place in self.device_map.values()}
            return torch.device("cuda" if "cuda" in types else "cpu")
        if self.device_map in SPREADS:
            return read_device(None)
        return torch.device(self.device_map)


GGUF_AND_QUANTIZATION = (
    "Policy.load got quantization for a GGUF file, whose weights are quantised already and are"
    " unpacked once. Leave quantization out, or load the original model."
)


def default_dtype(device: torch.device) -> torch.dtype:
    """Choose the dtype that a device computes fastest in without losing training.

    Args:
        device: The device of the model.

    Returns:
        torch.bfloat16 on GPUs that have it in hardware, else torch.float32.
    """
    is_fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if is_fast else torch.float32


def read_dtype(dtype: Any) -> torch.dtype | None:
    """Read a torch.dtype, its name, or None.

    Args:
        dtype: As the user gave it: torch.float32, torch.bfloat16, torch.float64, a name, or None.

    Returns:
        The dtype; None for None.

    Raises:
        InvalidValue: opdlab does not compute in it.
    """
    if dtype is None:
        return None
    known = DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if known in DTYPES.values():
        return known
    if known is torch.float16 or (
        isinstance(dtype, str) and dtype.removeprefix("torch.") in ("float16", "fp16", "half")
    ):
        raise InvalidValue(
            f"Policy.load got dtype={shortened(dtype)}: float16 overflows in training without a"
            " scaler, which opdlab has not. Use torch.bfloat16, or torch.float32 where the GPU has"
            " no bfloat16."
        )
    raise InvalidValue(
        f"Policy.load got dtype={shortened(dtype)}. Use torch.float32, torch.bfloat16 or"
        " torch.float64, or their names."
    )


def read_device(device: Any) -> torch.device:
    """Read the name of a device that is there; by default a GPU, or the CPU without one.

    Of several processes on a machine each gets a GPU of its own by default, the one that Accelerate
    gives it too.

    Args:
        device: As the user gave it: a torch.device, a name such as "cuda:1", or None.

    Returns:
        The device.

    Raises:
        InvalidValue: There is no such device.
    """
    if device is None:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        process = os.environ.get("LOCAL_RANK")  # set by torchrun, accelerate launch and Ray
        if process is None:
            return torch.device("cuda")
        return torch.device("cuda", int(process) % torch.cuda.device_count())
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidValue(
            f"Policy.load got device={shortened(device)}. Use 'cpu', 'cuda' or 'cuda:1'."
        ) from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise InvalidValue(
            f"Policy.load got device={str(place)!r}, but PyTorch sees no GPU here. Use"
            " device='cpu', or leave it out."
        )
    if (
        place.type == "cuda"
        and place.index is not None
        and place.index >= torch.cuda.device_count()
    ):
        raise InvalidValue(
            f"Policy.load got device={str(place)!r}, but there are {torch.cuda.device_count()}"
            " GPUs, counted from 0."
        )
    if place.type not in ("cuda", "cpu", "mps", "xpu") or (
        place.type == "mps" and not torch.backends.mps.is_available()
    ):
        raise InvalidValue(
            f"Policy.load got device={str(place)!r}, on which no model can run here. Use 'cpu' or"
            " 'cuda'."
        )
    return place


def check_device_map(device_map: Any) -> None:
    """Check a device map before anything is loaded.

    Args:
        device_map: As the user gave it: None, a word of Accelerate's, a device, or a dict.

    Raises:
        InvalidValue: It is something else, or names a device that is not there.
    """
    if device_map is None or device_map in SPREADS:
        return
    if isinstance(device_map, Mapping) and device_map:
        for module, place in device_map.items():
            if not isinstance(module, str):
                break
            if place != "disk":
                _check_place(place)
        else:
            return
    elif isinstance(device_map, (str, torch.device)):
        _check_place(device_map)
        return
    raise InvalidValue(
        f"Policy.load got device_map={shortened(device_map)}. Use 'auto', or a dict of devices by"
        " module, as {'': 'cpu'}; a module may also be on 'disk'."
    )


def _check_place(place: Any) -> None:
    if isinstance(place, bool) or not isinstance(place, (int, str, torch.device)):
        raise InvalidValue(
            f"Policy.load got {shortened(place)} as a device in device_map. Use 'cpu', 'disk',"
            " 'cuda:0' or the number of a GPU."
        )
    try:
        read_device(torch.device("cuda", place) if isinstance(place, int) else place)
    except InvalidValue as error:
        raise InvalidValue(str(error).replace("device=", "in device_map the device ", 1)) from None


def _type_of(place: Any) -> str:
    if isinstance(place, int):
        return "cuda"
    return "cpu" if place == "disk" else torch.device(place).type


def _check_attention(name: str | None) -> None:
    module, package = _ATTENTION_PACKAGES.get(name or "", ("", ""))
    if module and find_spec(module) is None:
        raise InvalidValue(
            f"Policy.load got attn_implementation={name!r}, which needs the package {package}."
            f" Install it (pip install {package}; it needs a GPU), or use 'sdpa'."
        )


def _check_path(name: str, value: Any, words: str) -> None:
    if value is None:
        return
    if not isinstance(value, (str, os.PathLike)) or not str(value).strip() or "\0" in str(value):
        raise InvalidValue(f"Policy.load got {name}={shortened(value)}. Use {words}.")


def read_chat_template(given: Any) -> str | None:
    """Read a chat template, or the file that holds one.

    Args:
        given: A Jinja template (a text with `{{` or `{%`), the path of a file, or None.

    Returns:
        The template; None for None.

    Raises:
        InvalidValue: It is neither.
    """
    if given is None:
        return None
    _check_path("chat_template", given, "a Jinja template, or the path of a file with one")
    text: str = os.fspath(given)
    if isinstance(given, str) and ("{{" in text or "{%" in text):
        return text
    try:
        return Path(text).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InvalidValue(
            f"Policy.load got chat_template={shortened(given)}, which is neither a Jinja template"
            " (it has no {{ or {%) nor a file that can be read. Use one of them."
        ) from error
