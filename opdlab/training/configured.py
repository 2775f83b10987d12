"""Make a run of a config: load its models and its task, then distil, or take the run up again.

from_config → read_config → load_parts → distill or resume
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from opdlab import samplers
from opdlab.engine.needs import did_you_mean
from opdlab.errors import InvalidValue, OpdlabError
from opdlab.methods import Method
from opdlab.methods.by_name import make_method
from opdlab.models.policy import Policy
from opdlab.tasks import Task
from opdlab.tasks.by_name import (
    SMALL,
    default_task,
    fit_threads,
    load_model,
    load_records,
    load_task,
)
from opdlab.tasks.profiles import rule_and_examples
from opdlab.teachers import Budget, ByteTeacher, LogprobServer, MultiTeacher, TextOnly, TextServer
from opdlab.training import checkpoint, run_folder, run_identity
from opdlab.training.config import (
    Config,
    ManyTable,
    ModelTable,
    NamedOptions,
    ServerTable,
    parse_toml,
    read_config,
    read_toml,
)
from opdlab.training.resuming import FREE, resume
from opdlab.training.run import Run, distill
from opdlab.training.settings import Settings, make_settings


@dataclass(frozen=True, eq=False)
class Parts:
    """What a run is made of.

    Attributes:
        student: The policy that learns.
        teacher: The teacher, or None.
        task: The task.
        method: The method, or None for OPD.
        policies: Replacements of names in the method's needs.
    """

    student: Policy
    teacher: Any
    task: Task
    method: Method | None
    policies: Mapping[str, Any]


def from_config(source: str | os.PathLike[str], *, quiet: bool = False) -> Run:
    """Make a run of a config file, as `opdlab distill` does.

    The keys of `[run]` beside `folder` and `trackers` say what `opdlab distill` writes, and change
    nothing here. A run that the folder holds already is taken up where it was.

    Args:
        source: The path of a TOML file, or TOML text of several lines, whose paths start from the
            working directory.
        quiet: Whether to show no progress.

    Returns:
        The run, ready for its next step.

    Raises:
        InvalidValue: A key or a value of the config cannot be right.
        OpdlabError: A model or a task is not there, or the folder holds another run.
    """
    is_text = isinstance(source, str) and ("\n" in source or "[" in source)
    if is_text:
        config = read_config(parse_toml(str(source)))
    else:
        config = read_config(read_toml(source), Path(source).expanduser().parent, str(source))
    return prepare_run(config, load_parts(config), quiet=quiet)


def load_parts(config: Config, method: Any = None, verify: Any = None) -> Parts:
    """Load the models and the task of a config.

    Args:
        config: The config.
        method: A method in place of the config's.
        verify: A verifier in place of the task's.

    Returns:
        The parts. Models that are loaded in the same way share their weights.

    Raises:
        OpdlabError: One of them is not there. The cheap ones are tried first.
    """
    if method is None and config.method is not None:
        method = make_method(config.method.name, config.method.options)
    task = load_config_task(config, verify)
    models = [one for one in _tables(config) if isinstance(one, ModelTable)]
    fit_threads(*(one.source for one in models))
    loaded: list[tuple[ModelTable, Policy]] = []
    student = load_policy(config.student, loaded)
    teacher = load_teacher(config.teacher, config, loaded)
    policies = {name: load_teacher(one, config, loaded) for name, one in config.policies.items()}
    return Parts(student, teacher, task, method, policies)


def _tables(config: Config) -> list[ModelTable | ServerTable]:
    """The tables of all models and servers, those of several teachers one by one."""
    teacher = [] if config.teacher is None else [config.teacher]
    tables: list[ModelTable | ServerTable] = [config.student]
    for one in (*teacher, *config.policies.values()):
        tables += one.members.values() if isinstance(one, ManyTable) else [one]
    return tables


def load_config_task(config: Config, verify: Any = None) -> Task:
    """Load the task of a config.

    Args:
        config: The config.
        verify: A verifier in place of the task's own; of records alone.

    Returns:
        The task; that of the shipped models where the config has none.

    Raises:
        OpdlabError: There is none.
    """
    table = config.task
    if table is not None and table.records is not None:
        names = ("name", "test", "verify", "max_new_tokens", "keep", "turns")
        options = {k: v for k in names if (v := getattr(table, k)) is not None}
        if verify is not None:
            from opdlab.tasks import from_records

            options.pop("verify", None)
            return from_records(table.records, verify=verify, **options)
        return load_records(table.records, **options)
    if verify is not None:
        raise InvalidValue(
            "A verifier of your own was given beside a task that has one. Give it with records."
        )
    if table is not None:
        found = load_task(table.name, table.options)
    else:
        sources = [one.source for one in _tables(config) if isinstance(one, ModelTable)]
        found = load_task(default_task(*sources))
    if found is None:
        raise OpdlabError(
            "There is no task, the supply of prompts. Give [task] with name = 'market', 'rule' or"
            " 'gym:NAME', or records = a JSONL file (--task on the command line)."
        )
    return found


def load_policy(table: ModelTable, loaded: list[tuple[ModelTable, Policy]]) -> Policy:
    """Load a model as its table says.

    Args:
        table: The table.
        loaded: The models that were loaded before, with their tables. One that is loaded in the
            same way shares its weights; the new one is added.

    Returns:
        The policy, with its context.
    """
    same = [
        policy
        for other, policy in loaded
        if (other.source, other.loading) == (table.source, table.loading)
    ]
    # Another adapter on the same base needs no second base.
    base = [policy for other, policy in loaded if other.source == table.source]
    sharing = {"prefer_shared": base[0]} if base and table.adapter is not None else {}
    policy = same[0].frozen() if same else load_model(table.source, **table.loading, **sharing)
    loaded.append((table, policy))
    if table.hint:
        return policy.seeing()
    return policy if table.context is None else policy.seeing(table.context)


def load_teacher(
    table: ModelTable | ServerTable | ManyTable | None,
    config: Config,
    loaded: list[tuple[ModelTable, Policy]],
) -> Any:
    """Load a teacher, or connect to its server; nothing is sent yet.

    Args:
        table: Its table, or None.
        config: The config that the table is of.
        loaded: See `load_policy`.

    Returns:
        A policy, a model that only writes, a server, several of these, or None.

    Raises:
        OpdlabError: There is no such model.
    """
    if table is None:
        return None
    if isinstance(table, ServerTable):
        return _connect(table)
    if isinstance(table, ManyTable):
        members = {name: load_teacher(one, config, loaded) for name, one in table.members.items()}
        return MultiTeacher(members, table.route, table.mixture)
    policy = load_policy(table, loaded)
    if table == config.teacher == config.student == ModelTable(SMALL):
        policy = policy.seeing(rule_and_examples)  # as everywhere, SmolLM2 teaches itself the rule
    if table.kind == "bytes":
        return ByteTeacher(policy)
    return TextOnly(policy) if table.kind == "text" else policy


def _connect(table: ServerTable) -> LogprobServer | TextServer:
    """Make the teacher of a server; nothing is sent yet."""
    others = ("kind", "url", "model", "k", "budget")
    options = {
        one.name: value
        for one in fields(table)
        if one.name not in others and (value := getattr(table, one.name)) is not None
    }
    if table.budget is not None:
        options["budget"] = _read_budget(table.budget)
    if table.kind == "logprobs":
        k = {} if table.k is None else {"k": table.k}
        return LogprobServer(table.url, table.model, **k, **options)
    if table.k is not None:
        raise InvalidValue(
            f"The teacher of kind 'text' got k={table.k}, and texts have no log-probs. Leave k out,"
            " or use kind = 'logprobs'."
        )
    return TextServer(table.url, table.model, **options)


def _read_budget(table: Mapping[str, Any]) -> Budget:
    known = [one.name for one in fields(Budget) if one.name != "spent"]
    for key in table:
        if key not in known:
            raise InvalidValue(
                f"The budget of the teacher has no key {key!r}. {did_you_mean(key, known)}There are"
                f" {', '.join(known)}."
            )
    prices = {"prices": tuple(table["prices"])} if "prices" in table else {}
    return Budget(**{**table, **prices})


def prepare_run(
    config: Config, parts: Parts, *, quiet: bool = False, accept_changes: bool = False
) -> Run:
    """Make the run of a config, or take up the one that its folder holds.

    Args:
        config: The config.
        parts: Its models and its task.
        quiet: Whether to show no progress.
        accept_changes: Whether to go on with a run although its parts or settings are others now.

    Returns:
        The run; `done` says how many steps were done before.

    Raises:
        OpdlabError: The run in the folder was begun with something else. The message names both.
    """
    options: dict[str, Any] = {
        "policies": dict(parts.policies) or None,
        "log_with": config.run.trackers,
        "quiet": quiet,
    }
    if config.sampler is not None:
        options["sampler"] = make_sampler(config.sampler)
    folder = config.run.folder
    settings: Any = dict(config.settings)
    student, teacher, task = parts.student, parts.teacher, parts.task
    if folder is None or not run_folder.list_checkpoints(Path(folder)):
        return distill(
            student, teacher, task, method=parts.method, save=folder, **options, **settings
        )
    free = _compare_settings(Path(folder), parts, settings, accept_changes)
    with warnings.catch_warnings():
        if accept_changes:
            warnings.simplefilter("always")
        try:
            return resume(
                folder,
                student,
                teacher,
                task,
                method=parts.method,
                allow=run_identity.PARTS if accept_changes else (),
                **options,
                **{**free, **settings},
            )
        except OpdlabError as error:
            raise _explained(error, folder) from None


def _explained(error: OpdlabError, folder: str) -> OpdlabError:
    """The same error, with the ways out that a command line has, for a run that is another one."""
    before, is_other, _ = str(error).partition(" Give what the run was trained with")
    if not is_other:
        return error
    return type(error)(f"{before} {_ways_out(folder)}")


def _ways_out(folder: str) -> str:
    return (
        "Put back what the run began with; begin a new run in another folder ([run] folder,"
        " opdlab distill --fresh); or go on in spite of that (opdlab distill --accept-changes)."
    )


def _compare_settings(
    folder: Path, parts: Parts, given: Mapping[str, Any], accept_changes: bool
) -> dict[str, Any]:
    """Refuse settings that are not those of the run in the folder.

    Returns:
        The settings that may differ (`FREE`), as the config has them now.
    """
    saved = checkpoint.read_json(checkpoint.find_checkpoint(folder) / "run.json")["settings"]
    from opdlab.methods import OPD

    method = OPD() if parts.method is None else parts.method
    now = make_settings(
        {"lora": saved.get("lora"), **given} if "lora" not in given else given, method, parts.task
    )
    changed = [
        f"{one.name} was {saved[one.name]!r} and is {getattr(now, one.name)!r}"
        for one in fields(Settings)
        if one.name in saved and one.name not in FREE and saved[one.name] != getattr(now, one.name)
    ]
    if changed and not accept_changes:
        raise OpdlabError(
            f"{folder} holds a run with other settings: {'; '.join(changed)}."
            f" {_ways_out(str(folder))}"
        )
    return {name: getattr(now, name) for name in FREE}


def make_sampler(table: NamedOptions) -> Any:
    """Make the sampler that `[sampler]` names.

    Args:
        table: The kind and its options.

    Returns:
        The sampler, which has not started.

    Raises:
        InvalidValue: There is no such kind, or an option cannot be right.
    """
    kinds = {"vllm": samplers.VLLM, "vllm-server": samplers.VLLMServer}
    name = table.name
    kind = kinds.get(name)
    if kind is None:
        raise InvalidValue(
            f"[sampler] has kind={name!r}. {did_you_mean(name, kinds)}"
            f"Use {' or '.join(kinds)}, or leave [sampler] out for the built-in sampler."
        )
    return kind(**table.options)
