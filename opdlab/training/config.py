"""The config file of a run: TOML in tables, each read into a dataclass and checked key by key.

    [student]            a model: source and what `Policy.load` takes
    [teacher]            likewise, or kind = "logprobs" or "text" with the url of a server;
                         or several of these as [teacher.members.NAME], with a route
    [policies.NAME]      models that replace a name in the method's needs, such as reference
    [task]               name = "market", "rule", "gym:NAME", …, or records = "file.jsonl"
    [method]             name = "opd" and the options of the method
    [sampler]            kind = "vllm" or "vllm-server", with its options
    [settings]           fields of `Settings`
    [run]                folder, trackers, and what `opdlab distill` writes

A config is data: it holds no code and no keys, and reading one loads no model. Paths in it are
relative to the file. `opdlab.training.configured` makes a run of it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

import tomli_w

from opdlab.engine.needs import did_you_mean
from opdlab.errors import InvalidValue, OpdlabError
from opdlab.methods.by_name import allows_none
from opdlab.models.routed import Mixture
from opdlab.support.expect import shortened
from opdlab.support.validation import (
    Addresses,
    Amount,
    Count,
    CountOrZero,
    Flag,
    Positive,
    Text,
    validate,
)
from opdlab.training.settings import Settings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_Table = TypeVar("_Table")
SECRETS = ("token", "api_key", "key", "password", "hf_token")
BEFORE_PATHS = ("./", "../", "/", "~", ".\\", "..\\")


@dataclass(frozen=True)
class ModelTable:
    """A model of `[student]`, `[teacher]` or `[policies.NAME]`.

    Attributes:
        source: A shipped model (student, novice, teacher, scribe), small (SmolLM2), a folder or a
            name on the Hub.
        kind: "local"; or, for a teacher whose tokens may differ, "text" for one that only writes,
            and "bytes" for one that is read by bytes (`opdlab.teachers.ByteTeacher`).
        context: A text or chat messages that only this model sees.
        hint: Whether the model sees each prompt's own hint.
        revision: As `Policy.load` takes it, and so are all that follow.
        dtype: The precision of the weights.
        device: The device.
        device_map: Devices of the parts of the model.
        attn_implementation: The attention of transformers to use.
        quantization: "4bit", "8bit", or the fields of a quantization config.
        adapter: Path or name of a PEFT adapter to look through.
        chat_template: Another chat template.
        chat_template_kwargs: Arguments for the chat template.
        tokenizer: Path or name of another tokenizer.
        eos: Ids of the tokens that end a text.
        context_length: Tokens that a prompt and its completion may have together.
        gguf_file: The GGUF file in the folder or repository.
    """

    source: Text
    kind: Literal["local", "text", "bytes"] = "local"
    context: str | list[Any] | None = None
    hint: Flag = False
    revision: Text | None = None
    dtype: Text | None = None
    device: Text | None = None
    device_map: str | dict[str, Any] | None = None
    attn_implementation: Text | None = None
    quantization: str | dict[str, Any] | None = None
    adapter: Text | None = None
    chat_template: Text | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tokenizer: Text | None = None
    eos: int | list[int] | None = None
    context_length: Count | None = None
    gguf_file: Text | None = None

    @property
    def loading(self) -> dict[str, Any]:
        """What `Policy.load` takes beside the source, without what is left at its default."""
        others = ("source", "kind", "context", "hint")
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {k: v for k, v in values.items() if k not in others and v is not None}


@dataclass(frozen=True)
class ServerTable:
    """A teacher on a server with the interface of OpenAI's; its key is in OPDLAB_API_KEY.

    Attributes:
        kind: "logprobs" for a teacher that grades tokens, "text" for one that only writes.
        url: The address, with its /v1, or a list of addresses of servers of the same model.
        model: The model's name there; by default the one that answers.
        k: Log-probs to ask for at each token; of kind "logprobs" alone.
        continue_by: See `opdlab.teachers.TextServer`, and so for all that follow.
        extra: Further fields of every request.
        cache: The file in which answers are kept.
        budget: Limits of what may be spent, fields of `opdlab.teachers.Budget`.
        timeout: Seconds to wait for an answer.
        retries: Times to ask again after an error that may pass.
        concurrency: Requests at once.
        key_env: Another environment variable that holds the key.
    """

    kind: Literal["logprobs", "text"]
    url: Addresses
    model: Text | None = None
    k: Count | None = None
    continue_by: Text | None = None
    extra: dict[str, Any] | None = None
    cache: Text | None = None
    budget: dict[str, Any] | None = None
    timeout: Positive | None = None
    retries: CountOrZero | None = None
    concurrency: Count | None = None
    key_env: Text | None = None


@dataclass(frozen=True)
class ManyTable:
    """Several teachers: `[teacher]` with a table `[teacher.members.NAME]` for each.

    Attributes:
        members: A model or a server for each name.
        route: The column of the task that names a prompt's teacher, or weights for all prompts.
        mixture: How several teachers of one prompt are mixed.
    """

    members: dict[str, ModelTable | ServerTable]
    route: str | dict[str, float] = "teacher"
    mixture: Mixture = "arithmetic"


@dataclass(frozen=True)
class TaskTable:
    """The source of the prompts.

    Attributes:
        name: market, market-secret, market-tools, rule or gym:NAME; beside `records`, the name of
            the task.
        records: A JSONL file.
        test: Number or share of the records to hold out.
        verify: How answers are judged: a name of `opdlab.tasks.verifiers.VERIFIERS`.
        max_new_tokens: Length limit of an answer.
        keep: Columns of the records that become the prompts' metadata.
        turns: Which of a chat's turns of the assistant are its answer; see `from_records`.
        options: Further arguments of a named task: `hint` and `wrong` of the market, the
            configuration of a task of reasoning-gym.
    """

    name: Text | None = None
    records: Text | None = None
    test: int | float | None = None
    verify: Text | None = None
    max_new_tokens: Count | None = None
    keep: str | list[str] | None = None
    turns: Literal["last", "reply", "all"] | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunTable:
    """Where a run is kept, and what `opdlab distill` writes beside its checkpoints.

    Attributes:
        folder: The run's folder.
        trackers: Names of Accelerate's trackers, such as tensorboard, trackio or wandb.
        trace_every: Steps between two traces; 0 traces the student before and after training only.
            With `settings.trace_k`, the step's own texts are traced too, with the losses that moved
            the student.
        trace_prompts: Held-out prompts in a trace.
        eval_prompts: Held-out prompts of the evaluations before and after; 0 for none.
        eval_samples: Samples for each of them, besides the greedy answer.
        eval_teacher: Whether the teacher is evaluated too; by default, if it is local.
        refresh: Seconds between two states of the run board's page.
    """

    folder: Text | None = None
    trackers: str | list[str] | None = None
    trace_every: CountOrZero = 0
    trace_prompts: Count = 4
    eval_prompts: CountOrZero = 200
    eval_samples: CountOrZero = 0
    eval_teacher: Flag | None = None
    refresh: Amount = 5.0


@dataclass(frozen=True)
class NamedOptions:
    """A name with options that belong to it: `[method]` and `[sampler]`.

    Attributes:
        name: The name.
        options: The other keys of the table.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Config:
    """A run as its config file describes it; all paths are absolute.

    Attributes:
        student: The model that learns.
        teacher: The teacher, or None for methods that need none.
        policies: Replacements of names in the method's needs.
        task: The task; None for the task of the shipped models.
        method: The method; None for OPD.
        sampler: The sampler; None for the built-in one.
        settings: Fields of `Settings` that the file gives.
        run: The folder and what is written there.
    """

    student: ModelTable
    teacher: ModelTable | ServerTable | ManyTable | None = None
    policies: Mapping[str, ModelTable | ServerTable | ManyTable] = field(default_factory=dict)
    task: TaskTable | None = None
    method: NamedOptions | None = None
    sampler: NamedOptions | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    run: RunTable = field(default_factory=RunTable)


TABLES = ("student", "teacher", "policies", "task", "method", "sampler", "settings", "run")


def read_toml(source: str | os.PathLike[str]) -> dict[str, Any]:
    """Read TOML from a file.

    Args:
        source: The file's path.

    Returns:
        Its tables.

    Raises:
        OpdlabError: It cannot be read, or is no TOML. The message names the line.
    """
    path = Path(source).expanduser()
    try:
        return parse_toml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or "it is no UTF-8 text"
        raise OpdlabError(
            f"The config {shortened(str(path))} cannot be read: {reason}. Give the path of a TOML"
            " file."
        ) from None


def parse_toml(text: str, where: str = "the config") -> dict[str, Any]:
    """Parse TOML.

    Args:
        text: The text.
        where: Its name, for errors.

    Returns:
        Its tables.

    Raises:
        OpdlabError: It is no TOML. The message names the line.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise OpdlabError(f"{where} is no TOML: {error}. Texts stand in quotes there.") from None


def read_config(
    tables: Mapping[str, Any], folder: str | os.PathLike[str] = ".", where: str = ""
) -> Config:
    """Check tables key by key.

    Args:
        tables: The content of a config file.
        folder: The folder that relative paths start from.
        where: Name of the config, for errors.

    Returns:
        The config, with absolute paths.

    Raises:
        InvalidValue: A table or a key is unknown, or a value cannot be right. The message names
            the table and the key.
        OpdlabError: There is no student.
    """
    where = f"{where}: " if where else ""
    base = Path(folder).expanduser().resolve()
    for name, table in tables.items():
        if name not in TABLES:
            raise InvalidValue(
                f"{where}There is no table [{name}]. {did_you_mean(name, TABLES)}There are"
                f" {', '.join(TABLES)}."
            )
        if not isinstance(table, Mapping):
            raise InvalidValue(f"{where}{name} is {shortened(table)}. Make it a table: [{name}].")
        _refuse_secrets(table, f"{where}[{name}]")
    if "student" not in tables:
        raise OpdlabError(
            f"{where}There is no student. Give the model that learns: [student] with source, or"
            " --student."
        )
    policies = tables.get("policies", {})
    for name, table in policies.items():
        if not isinstance(table, Mapping):
            raise InvalidValue(
                f"{where}[policies] has {name} = {shortened(table)}. Make it a table:"
                f" [policies.{name}]."
            )
    return Config(
        student=_read_student(tables["student"], f"{where}[student]", base),
        teacher=_read_teacher(tables["teacher"], f"{where}[teacher]", base)
        if "teacher" in tables
        else None,
        policies={
            name: _read_teacher(table, f"{where}[policies.{name}]", base)
            for name, table in policies.items()
        },
        task=_read_task(tables["task"], f"{where}[task]", base) if "task" in tables else None,
        method=_read_named(tables, "method", "name", where),
        sampler=_read_sampler(tables, where, base),
        settings=_read_settings(tables.get("settings", {}), f"{where}[settings]"),
        run=_read_run(tables.get("run", {}), f"{where}[run]", base),
    )


def write_toml(config: Config) -> str:
    """Write a config as TOML.

    Args:
        config: The config.

    Returns:
        The text, which `read_config` reads as the same config.
    """
    tables: dict[str, Any] = {"student": _plain_table(config.student)}
    if config.teacher is not None:
        tables["teacher"] = _plain_table(config.teacher)
    if config.policies:
        tables["policies"] = {name: _plain_table(one) for name, one in config.policies.items()}
    if config.task is not None:
        task = _plain_table(config.task)
        options = task.pop("options", {})
        tables["task"] = {**task, **options}
    if config.method is not None:
        tables["method"] = {"name": config.method.name, **config.method.options}
    if config.sampler is not None:
        tables["sampler"] = {"kind": config.sampler.name, **config.sampler.options}
    if config.settings:
        tables["settings"] = dict(config.settings)
    if run := _plain_table(config.run):
        tables["run"] = run
    return tomli_w.dumps(_without_none(tables))


def _plain_table(table: Any) -> dict[str, Any]:
    """The fields of a table that are not at their defaults, by name."""
    found = {}
    for one in fields(table):
        value = getattr(table, one.name)
        if isinstance(table, ManyTable) and one.name == "members":
            value = {name: _plain_table(member) for name, member in value.items()}
        default = one.default_factory() if one.default_factory is not MISSING else one.default
        if value is not None and value != default:
            found[one.name] = value
    return found


def _without_none(value: Any) -> Any:
    """The same for TOML, which has no None: False stands for it (see `_read_settings`)."""
    if isinstance(value, Mapping):
        return {str(key): _without_none(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_none(one) for one in value]
    return False if value is None else value


def _refuse_secrets(table: Mapping[str, Any], where: str) -> None:
    for key, value in table.items():
        if key.lower() in SECRETS:
            raise InvalidValue(
                f"{where} has {key}, and a config holds no keys: files are copied and shared. Put a"
                " server's key into the environment variable OPDLAB_API_KEY, and the Hub's into"
                " HF_TOKEN."
            )
        if isinstance(value, Mapping):
            _refuse_secrets(value, f"{where[:-1]}.{key}]")


def _read_table(kind: type[_Table], where: str, given: Mapping[str, Any]) -> _Table:
    """Read a table into its dataclass."""
    known = {one.name: one for one in fields(kind)}  # type: ignore[arg-type]  # a dataclass
    for key in given:
        if key not in known:
            raise InvalidValue(
                f"{where} has no key {key!r}. {did_you_mean(key, known)}There are"
                f" {', '.join(known)}."
            )
    hints = get_type_hints(kind, include_extras=True)
    for name, one in known.items():
        if name not in given and one.default is MISSING and one.default_factory is MISSING:
            raise InvalidValue(f"{where} has no {name}. Give it: {name} = …")
    return kind(**validate(where, given, hints))


def _read_student(table: Mapping[str, Any], where: str, base: Path) -> ModelTable:
    model = _read_model(table, where, base)
    if model.kind != "local":
        raise InvalidValue(f"{where} has kind={model.kind!r}, and a student is local.")
    return model


def _read_teacher(
    table: Mapping[str, Any], where: str, base: Path
) -> ModelTable | ServerTable | ManyTable:
    """Read a model, a server where there is a url, or several where there are members."""
    if "members" in table:
        return _read_many(table, where, base)
    if "url" not in table:
        if table.get("kind") == "logprobs":
            raise InvalidValue(f"{where} has kind='logprobs' without a url. Give the server's url.")
        return _read_model(table, where, base)
    if "source" in table:
        raise InvalidValue(
            f"{where} has a source and a url. Give the source of a local model, or the url of a"
            " server."
        )
    server = _read_table(ServerTable, where, table)
    cache = None if server.cache is None else _as_path(server.cache, base)
    return _replace(server, cache=cache)


def _read_many(table: Mapping[str, Any], where: str, base: Path) -> ManyTable:
    members = table["members"]
    if not isinstance(members, Mapping) or not all(
        isinstance(one, Mapping) and "members" not in one for one in members.values()
    ):
        raise InvalidValue(
            f"{where} has members = {shortened(members)}. Make each of them a table of a model or a"
            f" server: {where[:-1]}.members.NAME]."
        )
    read = {
        name: _read_teacher(one, f"{where[:-1]}.members.{name}]", base)
        for name, one in members.items()
    }
    many = _read_table(ManyTable, where, {**table, "members": {}})
    return _replace(many, members=read)


def _read_model(table: Mapping[str, Any], where: str, base: Path) -> ModelTable:
    model = _read_table(ModelTable, where, table)
    if model.context is not None and model.hint:
        raise InvalidValue(
            f"{where} has a context and hint = true, and a model sees one of them. Leave one out."
        )
    places = {
        name: _as_place(value, base)
        for name in ("source", "adapter", "tokenizer")
        if (value := getattr(model, name)) is not None
    }
    return _replace(model, **places)


def _read_task(table: Mapping[str, Any], where: str, base: Path) -> TaskTable:
    if (table.get("name") is None) == (table.get("records") is None) and "records" not in table:
        raise InvalidValue(
            f"{where} has neither name nor records. Give name = 'market', 'rule' or 'gym:NAME', or"
            " records = a JSONL file."
        )
    if "records" not in table:  # a named task: what is no key of ours is an option of the task
        named = {key: value for key, value in table.items() if key in ("name", "options")}
        rest = {key: value for key, value in table.items() if key not in named}
        task = _read_table(TaskTable, where, named)
        return _replace(task, options={**task.options, **rest})
    if table.get("options"):
        raise InvalidValue(f"{where} has options, which records do not take. Leave them out.")
    known = {key: value for key, value in table.items() if key != "options"}
    task = _read_table(TaskTable, where, known)
    return _replace(task, records=_as_path(str(task.records), base))


def _read_named(tables: Mapping[str, Any], table: str, key: str, where: str) -> NamedOptions | None:
    if table not in tables:
        return None
    options = dict(tables[table])
    name = options.pop(key, None)
    if not isinstance(name, str):
        raise InvalidValue(f"{where}[{table}] has no {key}. Give it as a text: {key} = '…'.")
    return NamedOptions(name, options)


def _read_sampler(tables: Mapping[str, Any], where: str, base: Path) -> NamedOptions | None:
    sampler = _read_named(tables, "sampler", "kind", where)
    if sampler is None:
        return None
    options = dict(sampler.options)
    if isinstance(place := options.get("base"), str):  # the model that vLLM loads
        options["base"] = _as_place(place, base)
    if isinstance(folder := options.get("adapter_folder"), str):
        options["adapter_folder"] = _as_path(folder, base)
    return NamedOptions(sampler.name, options)


def _read_settings(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check settings by name and value; False stands for None where that is allowed."""
    hints = get_type_hints(Settings, include_extras=True)
    known = [one.name for one in fields(Settings)]
    for key in table:
        if key not in known:
            raise InvalidValue(
                f"{where} has no key {key!r}. {did_you_mean(key, known)}There are"
                f" {', '.join(known)}."
            )
    given = {
        key: None if value is False and allows_none(hints[key]) else value
        for key, value in table.items()
    }
    return validate(where, given, hints)


def _read_run(table: Mapping[str, Any], where: str, base: Path) -> RunTable:
    run = _read_table(RunTable, where, table)
    folder = None if run.folder is None else _as_path(run.folder, base)
    return _replace(run, folder=folder)


def _as_path(path: str, base: Path) -> str:
    return str(base / Path(path).expanduser())


def _as_place(place: str, base: Path) -> str:
    """The folder that a model's source names, if it is one; a name of the Hub stays as it is."""
    if place.startswith(BEFORE_PATHS):
        return os.path.normpath(_as_path(place, base))
    is_folder = "/" in place and (base / place).is_dir()
    return str(base / place) if is_folder else place


def _replace(table: _Table, **changes: Any) -> _Table:
    from dataclasses import replace

    return replace(table, **changes)  # type: ignore[type-var]  # a dataclass


def merge(tables: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Lay tables over others, key by key.

    Args:
        tables: The tables of a file.
        over: Tables whose keys win.

    Returns:
        The tables together.
    """
    merged = dict(tables)
    for name, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = merge(merged[name], value) if both else value
    return merged


def parse_assignments(words: Sequence[str]) -> dict[str, Any]:
    """Read `TABLE.KEY=VALUE`, as `--set` takes them.

    Args:
        words: Assignments; the value is TOML, or a text without quotes.

    Returns:
        The tables that they make.

    Raises:
        InvalidValue: A word has another form.
    """
    tables: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        table, *keys = [part.strip() for part in name.split(".")]
        if not equals or not keys or not all((table, *keys)):
            raise InvalidValue(f"--set got {word!r}. Use TABLE.KEY=VALUE, as settings.lr=1e-3.")
        try:
            read = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            read = value.strip()
        for key in reversed(keys):
            read = {key: read}
        tables = merge(tables, {table: read})
    return tables
