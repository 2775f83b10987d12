"""The flags that describe a run on the command line, and how they go over a config file.

This module imports nothing heavy, so that `opdlab --help` is quick.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opdlab.training.config import Config

DEFAULT_FOLDER = "runs"


@dataclass(frozen=True)
class Flags:
    """Name the parts of a run; each flag goes over the same key of the config file.

    Attributes:
        student: A shipped model (student, novice, teacher, scribe), small (SmolLM2), a folder or a
            Hub name.
        teacher: Likewise.
        teacher_url: An OpenAI-compatible server that teaches, such as http://127.0.0.1:8000/v1. Its
            key is read from OPDLAB_API_KEY.
        teacher_model: The model's name on that server.
        task: market, market-secret, market-tools, rule, gym:NAME or a JSONL file.
        method: A method by name, such as opd, opd-plus, topd or grpo; or FILE.py:NAME, a loss or
            method of your own, whose code is run.
        verify: How the answers of a JSONL file are judged: answer, exact, contains or json; or
            FILE.py:NAME, a function of your own, whose code is run.
        out: The run's folder.
        set: Any other keys, as settings.lr=1e-3 settings.steps=100 method.divergence=forward_kl.
    """

    student: str | None = None
    teacher: str | None = None
    teacher_url: str | None = None
    teacher_model: str | None = None
    task: str | None = None
    method: str | None = None
    verify: str | None = None
    out: Path | None = None
    set: tuple[str, ...] = ()


@dataclass(frozen=True)
class WorkFlags:
    """Name the work of a step that `opdlab doctor --plan` sums up.

    Attributes:
        batch: Prompts of a step, over all devices.
        n: Completions of each prompt.
        prompt_tokens: Tokens of a prompt.
        new_tokens: Tokens of a completion.
        lora: Rank of the adapter; 0 trains all weights.
        micro_batch: Completions in one backward pass of a device.
        vllm: Whether vLLM writes, and not the student's own loop.
    """

    batch: int = 64
    n: int = 1
    prompt_tokens: int = 512
    new_tokens: int = 1024
    lora: int = 16
    micro_batch: int = 4
    vllm: bool = False


@dataclass(frozen=True)
class Given:
    """A config with what only a command line may add to it: code.

    Attributes:
        config: The config, file and flags together.
        method: A method of the user's own, or None.
        verify: A verifier of the user's own, or None.
        name: Name of the config: that of its file, or "distill".
    """

    config: Config
    method: Any = None
    verify: Any = None
    name: str = "distill"


def read_given(path: Path | None, flags: Flags) -> Given:
    """Read a config file and lay flags over it.

    Args:
        path: The config file, or None.
        flags: The flags.

    Returns:
        The config, and the user's own functions.

    Raises:
        OpdlabError: The file, a key, a value or a function is not right.
    """
    from opdlab.training.config import merge, parse_assignments, read_config, read_toml

    tables = {} if path is None else read_toml(path)
    method = verify = None
    if flags.method is not None and is_code(flags.method):
        method = load_function(flags.method, "--method")
        tables.pop("method", None)
    elif flags.method is not None:
        tables["method"] = _renamed(tables.get("method"), "name", flags.method)
    _lay_models(tables, flags)
    if flags.task is not None:
        tables["task"] = _task_table(tables.get("task"), flags.task)
    if flags.verify is not None and is_code(flags.verify):
        verify = load_function(flags.verify, "--verify")
    elif flags.verify is not None:
        tables = merge(tables, {"task": {"verify": flags.verify}})
    if flags.out is not None:
        tables = merge(tables, {"run": {"folder": str(flags.out.expanduser().absolute())}})
    # Last, since a flag that names another method or task leaves out the options of the one before.
    tables = merge(tables, parse_assignments(flags.set))
    folder = Path() if path is None else path.expanduser().parent
    config = read_config(tables, folder, "" if path is None else str(path))
    return Given(config, method, verify, "distill" if path is None else path.stem)


def _lay_models(tables: dict[str, Any], flags: Flags) -> None:
    """Lay the models' flags over the tables, in place."""
    if flags.student is not None:
        tables["student"] = {**tables.get("student", {}), "source": _place(flags.student)}
    if flags.teacher is not None:
        before = tables.get("teacher", {})
        kept = {} if "url" in before else before
        tables["teacher"] = {**kept, "source": _place(flags.teacher)}
    server = {"url": flags.teacher_url, "model": flags.teacher_model}
    server = {key: value for key, value in server.items() if value is not None}
    if server:
        before = tables.get("teacher", {})
        kept = before if "url" in before else {"kind": "logprobs"}
        tables["teacher"] = {**kept, **server}


def _task_table(before: dict[str, Any] | None, name: str) -> dict[str, Any]:
    """A task of another kind drops the options of the one before."""
    if not Path(name).is_file():
        return _renamed(before, "name", name)
    kept = before if before is not None and "records" in before else {}
    return {**kept, "records": str(Path(name).absolute())}


def _renamed(before: dict[str, Any] | None, key: str, name: str) -> dict[str, Any]:
    return {**before, key: name} if before and before.get(key) == name else {key: name}


def _place(source: str) -> str:
    """A folder as its absolute path, since the paths of a config start from its own folder."""
    is_path = source.startswith((".", "/", "~")) or (os.sep in source and Path(source).is_dir())
    return str(Path(source).expanduser().absolute()) if is_path else source


def is_code(name: str) -> bool:
    """Tell whether a flag names a function in a file.

    Args:
        name: The flag's value.

    Returns:
        True for FILE.py:NAME.
    """
    return ".py:" in name


def load_function(name: str, flag: str) -> Any:
    """Load a function or class of a Python file, which runs the file.

    Args:
        name: FILE.py:NAME.
        flag: The flag, for errors.

    Returns:
        The object of that name.

    Raises:
        OpdlabError: There is no such file, it fails, or has no such name.
    """
    import importlib.util
    import sys

    from opdlab.errors import OpdlabError

    file, _, attribute = name.rpartition(":")
    path = Path(file).expanduser().absolute()
    if not path.is_file():
        raise OpdlabError(f"{flag} got {name!r}, and there is no file {file}. Give FILE.py:NAME.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # an exit(0) would look like a success
        raise OpdlabError(
            f"{flag} got {name!r}, whose code fails: {type(error).__name__}: {error}. Run the file"
            " by itself first."
        ) from error
    if not hasattr(module, attribute):
        raise OpdlabError(f"{flag} got {name!r}, and {file} defines no {attribute}.")
    return getattr(module, attribute)


def read_pairs(pairs: tuple[str, ...], flag: str) -> dict[str, str]:
    """Read NAME=VALUE pairs.

    Args:
        pairs: The pairs.
        flag: The flag, for errors.

    Returns:
        The values by name.

    Raises:
        OpdlabError: One is no pair.
    """
    from opdlab.errors import OpdlabError

    found = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign or not name:
            raise OpdlabError(f"{flag} got {pair!r}. Give NAME=VALUE.")
        found[name] = value
    return found


def read_number(text: str) -> int | float | bool | str:
    """Read a number, true or false where a text is one.

    Args:
        text: The text.

    Returns:
        The number or truth value, or the text itself.
    """
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)
