"""Unpack GGUF files, once, into a folder that transformers and PEFT read.

transformers can read a GGUF file, but it takes a minute, and the result can neither be saved nor
trained. So the weights are put into a plain float32 model, which is saved beside its tokenizer in
opdlab's cache: `$OPDLAB_CACHE/gguf`, by default `~/.cache/opdlab/gguf`. A folder there is named by
the SHA-256 of the file and by the versions that unpacked it, so that a new version unpacks anew.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import transformers
from filelock import FileLock
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.hub import cached_file

from opdlab.errors import InvalidValue
from opdlab.support.progress import Progress

FORMAT = 1  # of the folders; a change of what is written there makes new ones
NOTE = "opdlab_gguf.json"  # says where a folder's weights are from; written last
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)


def find(source: str, name: str | None, revision: str | None, token: str | None) -> Path | None:
    """Find the GGUF file that a source means.

    Args:
        source: A GGUF file, a folder, or a name on the Hub.
        name: The file's name in the folder or repository; None to look for it.
        revision: Branch, tag or commit on the Hub.
        token: For private repositories.

    Returns:
        The file on this machine; None where the source means no GGUF file.

    Raises:
        InvalidValue: The file is not there, is one part of several, or there is a choice.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if name is not None:
            raise InvalidValue(
                f"Policy.load got gguf_file={name!r} for {source!r}, which is a file itself. Leave"
                " gguf_file out."
            )
        if path.suffix.lower() != ".gguf":
            raise InvalidValue(
                f"Policy.load got the file {source!r}. Use the folder of a model, a GGUF file"
                " (….gguf), or a name on the Hub."
            )
        return _whole(path)
    if path.is_dir():
        return _find_in_folder(path, name)
    if name is None:
        return None
    return _whole(_fetch(source, name, revision, token))


def _find_in_folder(folder: Path, name: str | None) -> Path | None:
    if name is not None:
        file = folder / name
        if not file.is_file():
            there = ", ".join(sorted(one.name for one in folder.glob("*.gguf"))) or "none"
            raise InvalidValue(
                f"Policy.load got gguf_file={name!r}, which is not in {str(folder)!r}; there are"
                f" {there}."
            )
        return _whole(file)
    files = sorted(one for one in folder.iterdir() if one.suffix.lower() == ".gguf")
    if not files or (folder / "config.json").exists():
        return None
    if len(files) > 1:
        names = ", ".join(one.name for one in files)
        raise InvalidValue(
            f"{str(folder)!r} has several GGUF files: {names}. Choose one:"
            f" Policy.load(…, gguf_file={files[0].name!r})."
        )
    return _whole(files[0])


def _whole(file: Path) -> Path:
    if _PART.search(file.name):
        raise InvalidValue(
            f"{file.name} is one part of a GGUF file that was split. Join the parts with"
            " llama-gguf-split --merge, and load the whole file."
        )
    return file


def _fetch(source: str, name: str, revision: str | None, token: str | None) -> Path:
    try:
        found = cached_file(source, name, revision=revision, token=token)
    except (OSError, ValueError, HfHubHTTPError) as error:
        said = next((line for line in str(error).splitlines() if line.strip()), "")
        if token:
            said = said.replace(token, "***")
        raise InvalidValue(
            f"{name!r} cannot be fetched from {source!r}: {said[:200]} Give the name of a"
            " repository on the Hub and of a file in it, or a file on this machine."
        ) from None
    return Path(str(found))


def cache_folder() -> Path:
    """Find the folder for unpacked models.

    Returns:
        `$OPDLAB_CACHE/gguf`, or `opdlab/gguf` in the user's folder for caches.
    """
    chosen = os.environ.get("OPDLAB_CACHE")
    if chosen:
        return Path(chosen).expanduser() / "gguf"
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(caches).expanduser() / "opdlab" / "gguf"


def unpack(file: Path, quiet: bool = False) -> Path:
    """Unpack a GGUF file into a folder with float32 weights and a tokenizer, unless it is there.

    Two processes may do it at once: one works, the other waits.

    Args:
        file: The file.
        quiet: Whether to show no progress.

    Returns:
        The folder, which `from_pretrained` reads.

    Raises:
        InvalidValue: The file cannot be read, its family is none that transformers unpacks, or the
            package gguf is missing.
    """
    version = _version_of_gguf()
    checksum = _sha256(file)
    key = hashlib.sha256(
        json.dumps([checksum, transformers.__version__, version, FORMAT]).encode()
    ).hexdigest()[:12]
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).strip("-.")[:60] or "model"
    folder = cache_folder() / f"{stem}-{key}"
    if not (folder / NOTE).exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(str(folder.parent / f".{key}.lock")):
            if not (folder / NOTE).exists():
                _write(file, folder, {"file": file.name, "sha256": checksum}, quiet)
    return folder


def origin(folder: str | os.PathLike[str]) -> dict[str, str] | None:
    """Say which GGUF file a folder was unpacked from.

    Args:
        folder: Any folder or name.

    Returns:
        `file` and `sha256`; None for a folder that `unpack` did not write.
    """
    try:
        note = json.loads((Path(folder) / NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return {"file": str(note.get("file", "")), "sha256": str(note.get("sha256", ""))}


def _version_of_gguf() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("gguf")
    except PackageNotFoundError:
        raise InvalidValue(
            "GGUF files are read by the package gguf, which is not installed. Install it: pip"
            " install 'opdlab[small]'."
        ) from None


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        whole = hashlib.sha256()
        while piece := opened.read(1 << 22):
            whole.update(piece)
    return whole.hexdigest()


def _write(file: Path, folder: Path, note: dict[str, str], quiet: bool) -> None:
    """Unpack into a folder beside the final one, and rename it when it is complete."""
    shutil.rmtree(folder, ignore_errors=True)  # one without its note is not complete
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    line = Progress(3, f"unpacking {file.name}, once", unit="part", quiet=quiet, leave=False)
    try:
        with _fast_reader(), _quiet():
            line.update(0, now="weights")
            model = _read(file, AutoModelForCausalLM.from_pretrained, dtype=torch.float32)
            line.update(1, now="tokenizer")
            tokenizer = _read(file, AutoTokenizer.from_pretrained)
            line.update(2, now="saving")
            _plain(model).save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        (partial / NOTE).write_text(json.dumps(note), encoding="utf-8")
        partial.chmod(0o755)  # temporary folders are for their owner alone
        partial.rename(folder)
        line.update(3, now=f"kept in {folder.parent}")
    finally:
        line.close()
        shutil.rmtree(partial, ignore_errors=True)


def _read(file: Path, load: Callable[..., Any], **options: Any) -> Any:
    try:
        return load(str(file.parent), gguf_file=file.name, **options)
    except Exception as error:  # a parser of foreign bytes may fail in any way
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise InvalidValue(
            f"{str(file)!r} cannot be unpacked: {said}. Give a GGUF file of a causal language model"
            " that transformers knows, or the original model in its place."
        ) from error


def _plain(packed: Any) -> Any:
    """Make a plain model of a GGUF model's tensors, since transformers saves no GGUF model."""
    config = packed.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return type(packed).from_pretrained(None, config=config, state_dict=packed.state_dict())


@contextlib.contextmanager
def _fast_reader() -> Iterator[None]:
    """Let transformers parse the file once and not three times.

    It also makes a table of names for every module. Together that is 8 of 17 s for SmolLM2.
    """
    import gguf

    class Reader(gguf.GGUFReader):
        """Looks at the mapped file through a plain array, since slices of a map take 3 s longer."""

        data: Any

        def _get(self, *arguments: Any, **options: Any) -> Any:
            self.data = np.asarray(self.data)
            return super()._get(*arguments, **options)

    names = functools.cache(gguf.get_tensor_name_map)
    with patch.multiple(gguf, GGUFReader=functools.cache(Reader), get_tensor_name_map=names):
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the bars that transformers draws while it reads and writes."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
