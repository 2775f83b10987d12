"""Write a run as a config, or say what of it no config can hold.

A run describes its parts when it is made, before training moves any of them. Code is refused: a
config is data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from opdlab import methods
from opdlab.data.prompt import ChatHint, own_hint
from opdlab.errors import InvalidValue, OpdlabError
from opdlab.losses.divergences import TopK
from opdlab.methods import Method
from opdlab.methods.by_name import allows_none, list_methods
from opdlab.methods.contract import name_of
from opdlab.models.origin import Told
from opdlab.models.policy import Policy, as_policy
from opdlab.samplers import VLLM, VLLMServer
from opdlab.support.expect import shortened
from opdlab.tasks import Task
from opdlab.tasks.by_name import load_records, load_task
from opdlab.tasks.market import MODELS, data
from opdlab.tasks.market.world import SKILLS
from opdlab.tasks.profiles import (
    SMALL_OPTIONS,
    find_smollm2,
    rule_and_examples,
    rule_messages,
)
from opdlab.teachers import ByteTeacher, LogprobServer, MultiTeacher, TextServer
from opdlab.training.config import (
    Config,
    ManyTable,
    ModelTable,
    NamedOptions,
    RunTable,
    ServerTable,
    TaskTable,
)
from opdlab.training.run_identity import model_behind
from opdlab.training.settings import Settings


@dataclass(frozen=True, eq=False)
class Described:
    """The models of a run as tables of a config, or the reason why there is none.

    Attributes:
        tables: By name: "student", "teacher", and the names in `policies=`.
        reasons: By name, why a model cannot be written.
    """

    tables: Mapping[str, ModelTable | ServerTable | ManyTable] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)


def describe_models(student: Policy, teacher: Any, policies: Mapping[str, Any]) -> Described:
    """Describe the models of a run before it trains.

    Args:
        student: The student.
        teacher: The teacher, or None.
        policies: The user's replacements.

    Returns:
        A table, or a reason, for each.
    """
    tables: dict[str, ModelTable | ServerTable | ManyTable] = {}
    reasons = {}
    given = {"student": student, "teacher": teacher, **policies}
    for name, model in given.items():
        if model is None:
            continue
        try:
            tables[name] = _describe_model(model)
        except OpdlabError as error:
            reasons[name] = str(error)
    return Described(tables, reasons)


def write_config(
    described: Described,
    task: Task,
    method: Method,
    settings: Settings,
    folder: Path | None,
    log_with: Any,
    sampler: Any = None,
) -> Config:
    """Write a run as a config.

    Args:
        described: Its models.
        task: Its task.
        method: Its method.
        settings: All its settings.
        folder: Its folder, or None.
        log_with: Its trackers.
        sampler: Who writes the student's texts; None for the student's own loop.

    Returns:
        The config.

    Raises:
        OpdlabError: Something of it cannot be written. The message says what, and what to do.
    """
    for name, reason in described.reasons.items():
        raise OpdlabError(f"The run cannot be written as a config: {_who(name)} {reason}")
    tables = dict(described.tables)
    student = tables.pop("student")
    assert isinstance(student, ModelTable)
    return Config(
        student=student,
        teacher=tables.pop("teacher", None),
        policies=tables,
        task=_describe_task(task),
        method=_describe_method(method),
        sampler=_describe_sampler(sampler),
        settings=_describe_settings(settings),
        run=RunTable(
            folder=None if folder is None else str(folder.absolute()),
            trackers=_describe_trackers(log_with),
        ),
    )


def _who(name: str) -> str:
    return f"the {name}" if name in ("student", "teacher") else f"the policy {name!r}"


def _describe_model(model: Any) -> ModelTable | ServerTable | ManyTable:
    if isinstance(model, MultiTeacher):
        return _describe_many(model)
    return _describe_one(model)


def _describe_many(teacher: MultiTeacher) -> ManyTable:
    route = teacher.route
    if callable(route):
        raise OpdlabError(
            f"chooses its teachers by the function {shortened(route)}. Keep a column with their"
            " names in the task (from_records(…, keep=…)), and give route= that column."
        )
    members = {name: _describe_one(member) for name, member in teacher.members.items()}
    return ManyTable(members, route if isinstance(route, str) else dict(route), teacher.mixture)


def _describe_one(model: Any) -> ModelTable | ServerTable:
    if isinstance(model, ByteTeacher):
        if (model.floor, model.lookahead) != (ByteTeacher.FLOOR, None):
            raise OpdlabError(
                f"is {shortened(model)}, and a config knows a ByteTeacher with its defaults alone."
                " Keep the Python that makes the run."
            )
        return _describe_policy(model.policy, "bytes")
    behind = model_behind(model)
    if behind is not None:
        return _describe_policy(behind, "text")
    local = as_policy(model)
    if local is not None:
        return _describe_policy(local, "local")
    if isinstance(model, (LogprobServer, TextServer)):
        return _describe_server(model)
    raise OpdlabError(
        f"is {shortened(model)}, code of your own. Keep the Python that makes the run."
    )


def _describe_policy(policy: Policy, kind: Any) -> ModelTable:
    origin = policy.origin
    if origin is None:
        raise OpdlabError(
            f"({policy!r}) was made of a model in memory. Save it (save_pretrained) and load it"
            " with Policy.load."
        )
    if change := origin.find_change(policy):
        raise OpdlabError(
            f"({policy!r}) is no longer what {origin.source} gives: {change}. Save it and load it"
            " with Policy.load before the run."
        )
    for key, value in origin.options.items():
        if not _is_plain(value):
            raise OpdlabError(
                f"was loaded with {key}={shortened(value)}, an object of Python. Give Policy.load a"
                " name or a path for it."
            )
    options = dict(origin.options)
    template = {"chat_template_kwargs": dict(policy.chat_template_kwargs)}
    if policy.chat_template_kwargs:
        options |= template
    source = _short_name(origin.source, options)
    return ModelTable(source, kind, **options, **_describe_context(policy))


def _short_name(source: str, options: dict[str, Any]) -> str:
    """The name of a shipped model or of SmolLM2, without the options that the name stands for."""
    found, defaults = source, {}
    for name in MODELS:
        if source == str(data() / name):
            found, defaults = name, {"device": "cpu"}
            for skill in SKILLS:
                if options.get("adapter") == str(data() / skill):
                    options["adapter"] = skill
    if source == str(find_smollm2()):
        found, defaults = "small", SMALL_OPTIONS
    for key, value in defaults.items():
        if options.get(key) == value:
            del options[key]
    return found


def _describe_context(policy: Policy) -> dict[str, Any]:
    context = policy.context
    if context is None:
        return {}
    if context is rule_and_examples:
        return {"context": rule_messages()}
    if context is own_hint:
        return {"hint": True}
    if isinstance(context, Told):
        if isinstance(context.text, ChatHint):
            return {"context": [dict(one) for one in context.text.messages]}
        return {"context": str(context.text)}
    raise OpdlabError(
        f"sees its prompts through the function {shortened(context)}. Give seeing() a text or chat"
        " messages."
    )


def _describe_server(server: LogprobServer | TextServer) -> ServerTable:
    writer = server.text if isinstance(server, LogprobServer) else server
    service = writer.service
    budget = service.budget
    limits = {one.name: getattr(budget, one.name) for one in fields(budget) if one.name != "spent"}
    limits = {name: value for name, value in limits.items() if value not in (None, (0.0, 0.0))}
    return ServerTable(
        kind="logprobs" if isinstance(server, LogprobServer) else "text",
        url=[service.url, *service.replicas] if service.replicas else service.url,
        model=writer.model,
        k=server.k if isinstance(server, LogprobServer) else None,
        extra=dict(writer.extra) or None,
        cache=None if service.cache.path is None else str(service.cache.path.absolute()),
        budget=limits or None,
        timeout=service.timeout,
        retries=service.retries,
        concurrency=service.concurrency,
        key_env=service.key_env,
    )


def _describe_sampler(sampler: Any) -> NamedOptions | None:
    """The table `[sampler]`; None for the student's own loop."""
    if sampler is None:
        return None
    said = "The run cannot be written as a config: its sampler"
    if isinstance(sampler, VLLM):
        options = {"base": sampler.base, **sampler.options}
        name = "vllm"
    elif isinstance(sampler, VLLMServer):
        options = sampler.given
        name = "vllm-server"
    else:
        raise OpdlabError(
            f"{said} is {shortened(sampler)}, code of your own. Keep the Python that makes the run."
        )
    kept = {key: value for key, value in options.items() if value is not None}
    for key, value in kept.items():
        if not isinstance(value, (str, int, float, bool)):
            raise OpdlabError(
                f"{said} has {key}={shortened(value)}, which is no plain value. Keep the Python"
                " that makes the run."
            )
    return NamedOptions(name, kept)


def _describe_task(task: Task) -> TaskTable:
    """Find the table that makes this task again, and try it."""
    said = f"The run cannot be written as a config: its task {task.name!r}"
    origin = dict(task.origin)
    if not origin:
        raise OpdlabError(
            f"{said} was made of objects in memory. Write its records to a JSONL file and make it"
            " with from_records(path), whose verifiers have names (opdlab.tasks.verifiers)."
        )
    records = origin.pop("records", None)
    if records is None:
        name = origin.pop("name")
        table, again = TaskTable(name=name, options=origin), load_task(name, origin)
    else:
        table, again = TaskTable(records=records, **origin), load_records(records, **origin)
    assert again is not None
    if not _is_same(task, again):
        raise OpdlabError(
            f"{said} was changed after it was made, or its file was. Make it anew, with what"
            " from_records, market or reasoning_gym can do."
        )
    return table


def _is_same(one: Task, two: Task) -> bool:
    same = (
        getattr(one.verify, "__qualname__", None) == getattr(two.verify, "__qualname__", None)
        and one.name == two.name
        and one.max_new_tokens == two.max_new_tokens
        and dict(one.settings) == dict(two.settings)
        and dict(one.recipe) == dict(two.recipe)
    )
    if one.pool or two.pool:
        return same and {k: list(v) for k, v in one.pool.items()} == {
            k: list(v) for k, v in two.pool.items()
        }
    return same and one.prompts(8, seed=1) == two.prompts(8, seed=1)


def _describe_method(method: Method) -> NamedOptions:
    kind = type(method)
    name = kind.__name__
    if name not in list_methods() or getattr(methods, name) is not kind:
        raise OpdlabError(
            f"The run cannot be written as a config: its method {name_of(method)} is code of your"
            " own. Write the config of a run with one of opdlab's methods, and give yours on the"
            " command line: opdlab distill config.toml --method FILE.py:NAME."
        )
    if isinstance(method, methods.Combined):
        parts = [_describe_method(part) for part in method.methods]
        tables = [{"name": part.name, **part.options} for part in parts]
        return NamedOptions(name, {"methods": tables, "weights": list(method.weights)})
    hints = get_type_hints(kind)
    options: dict[str, Any] = {}
    assert is_dataclass(method)
    for one in fields(method):
        value = getattr(method, one.name)
        default = one.default_factory() if one.default_factory is not MISSING else one.default
        if value == default:
            continue
        if isinstance(value, TopK):
            value = asdict(value)
        if value is None and allows_none(hints[one.name]):
            value = False  # TOML has no None
        if not _is_plain(value):
            raise OpdlabError(
                f"The run cannot be written as a config: {name} has {one.name}={shortened(value)},"
                " an object of Python. Leave it at its default, or keep the Python that makes the"
                " run."
            )
        options[one.name] = dict(value) if isinstance(value, Mapping) else value
    return NamedOptions(name, options)


def _describe_settings(settings: Settings) -> dict[str, Any]:
    """All settings, so that no default of another version changes them."""
    written = {}
    for one in fields(settings):
        value = getattr(settings, one.name)
        if value is not None or one.default is not None:
            written[one.name] = value
    return written


def _describe_trackers(log_with: Any) -> str | list[str] | None:
    if log_with is None:
        return None
    several = log_with if isinstance(log_with, (list, tuple)) else [log_with]
    if not all(isinstance(one, str) for one in several):
        raise InvalidValue(
            f"The run cannot be written as a config: it logs to {shortened(log_with)}, an object of"
            " Python. Give log_with the names of trackers."
        )
    names = [str(getattr(one, "value", one)) for one in several]
    return names if isinstance(log_with, (list, tuple)) else names[0]


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(one) for key, one in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float, str))
