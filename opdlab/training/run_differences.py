"""Compare two descriptions of a run, and say what differs in words that name both values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def find_differences(
    saved: Mapping[str, Any], given: Mapping[str, Any], moved: Sequence[str] = ()
) -> dict[str, str]:
    """Find the parts in which two descriptions of a run differ.

    Args:
        saved: The description at the beginning of the run.
        given: The description of what it is to go on with.
        moved: State that the method changed by itself in the meantime
            (`method_state.Memory`), which are not compared.

    Returns:
        By part ("student", "tokenizer", "task", "teacher", "policies", "method", "sampler"), a text
        that names both values; parts that agree are left out.
    """
    same_versions = saved.get("transformers") == given.get("transformers")
    tokenizer = _tokenizers(saved["tokenizer"], given["tokenizer"])
    task = _tasks(saved["task"], given["task"])
    if not (tokenizer or task) and saved["tokenizer"]["rendered"] != given["tokenizer"]["rendered"]:
        tokenizer = (
            "the student reads the prompts in another way (context, template or tokenizer): "
        )
        tokenizer += _both(saved["tokenizer"], given["tokenizer"], "rendered")
    found = {
        "student": _models("the student", saved["student"], given["student"], same_versions),
        "tokenizer": tokenizer,
        "task": task,
        "teacher": _teachers("the teacher", saved["teacher"], given["teacher"], same_versions),
        "policies": _policies(saved["policies"], given["policies"], same_versions),
        "method": _methods(saved["method"], given["method"], moved),
        # Checkpoints of earlier versions know no sampler: the student's own loop wrote.
        "sampler": _teachers(
            "the sampler", saved.get("sampler"), given.get("sampler"), same_versions
        ),
    }
    return {part: said for part, said in found.items() if said}


def _models(
    who: str, saved: Mapping[str, Any], given: Mapping[str, Any], same_versions: bool
) -> str:
    names = (
        f"{saved['source'] or saved['model']} was saved and {given['source'] or given['model']} is"
        " given"
    )
    for key, what in (("model", "class"), ("dtype", "precision")):
        if saved[key] != given[key]:
            return f"{who} has another {what}: {saved[key]} was saved and {given[key]} is given"
    keys = saved["config"].keys() | given["config"].keys()
    if not same_versions:  # a new version of transformers may know fields that the old one did not
        keys = saved["config"].keys() & given["config"].keys()
    for key in sorted(keys):
        one, two = saved["config"].get(key, "the default"), given["config"].get(key, "the default")
        if one != two:
            return f"{who} has another configuration: {key} was {one} and is {two}"
    if saved["weights"] != given["weights"]:
        return (
            f"{who} has other weights than at the beginning of the run: fingerprint "
            f"{saved['weights']} was saved and {given['weights']} is given ({names})"
        )
    return _adapters(who, saved["adapter"], given["adapter"])


def _adapters(who: str, saved: str | None, given: str | None) -> str:
    if saved == given:
        return ""
    if saved is None:
        return (
            f"{who} is already trained: its adapter (fingerprint {given}) was fresh when the run"
            " began"
        )
    now = "has none that changes anything" if given is None else f"has one with fingerprint {given}"
    return f"{who} began the run with a trained adapter (fingerprint {saved}) and now {now}"


def _tokenizers(saved: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    if saved["vocabulary"] != given["vocabulary"]:
        return "the student has another tokenizer than the run was trained with: " + _both(
            saved, given, "vocabulary"
        )
    if saved["template"] != given["template"]:
        return "the tokenizer has another chat template: " + _both(saved, given, "template")
    if saved["ends"] != given["ends"]:
        return (
            f"texts end with other tokens: {saved['ends']} was saved and {given['ends']} is given"
        )
    return ""


def _both(saved: Mapping[str, Any], given: Mapping[str, Any], key: str) -> str:
    one, two = (str(side[key])[:16] for side in (saved, given))
    return f"fingerprint {one} was saved and {two} is given"


def _tasks(saved: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    if saved["name"] != given["name"]:
        return f"the run was trained on the task {saved['name']!r} and {given['name']!r} is given"
    if saved["settings"] != given["settings"]:
        return (
            f"the task {saved['name']!r} has other settings: {saved['settings']} was saved and"
            f" {given['settings']} is given"
        )
    if saved["prompts"] != given["prompts"]:
        return f"the task {saved['name']!r} has other prompts: " + _both(saved, given, "prompts")
    if not same_function(saved["verify"], given["verify"]):
        before, now = _function(saved["verify"]), _function(given["verify"])
        return (
            f"the task {saved['name']!r} has another verifier: {before} was saved and {now} is"
            " given"
        )
    one, two = saved.get("feedback"), given.get("feedback")
    # Checkpoints of earlier versions know no feedback.
    if "feedback" in saved and not same_function(one, two):
        return (
            f"the task {saved['name']!r} has other feedback: {_function(one)} was saved and"
            f" {_function(two)} is given"
        )
    return ""


def same_function(saved: Any, given: Any) -> bool:
    """Tell whether two described functions are one, wherever the module now lies that defines it.

    Args:
        saved: The description in the checkpoint.
        given: The description of the function that was given now.

    Returns:
        True if their sources agree, or, where a source is unknown, their bare names, and if their
        bound arguments agree.
    """
    if not (isinstance(saved, dict) and isinstance(given, dict)):
        return bool(saved == given)
    if not ("name" in saved and "name" in given):  # weights by name, as a route may be
        return bool(saved == given)
    if saved.get("source") and given.get("source"):
        return saved["source"] == given["source"] and saved.get("given") == given.get("given")
    return saved["name"].rsplit(".", 1)[-1] == given["name"].rsplit(".", 1)[-1] and saved.get(
        "given"
    ) == given.get("given")


def _function(described: Any) -> str:
    if described is None:
        return "none"
    if not isinstance(described, dict):
        return str(described)
    return (
        f"{described['name']} (source {described.get('source') or 'unknown'}, made with"
        f" {described.get('given', 'nothing')})"
    )


def _teachers(
    who: str, saved: Mapping[str, Any] | None, given: Mapping[str, Any] | None, same_versions: bool
) -> str:
    if saved is None or given is None:
        return (
            ""
            if saved is given
            else f"{who} differs: {_teacher(saved)} was saved and {_teacher(given)} is given"
        )
    if saved["kind"] != given["kind"]:
        return (
            f"{who} is of another kind: {_teacher(saved)} was saved and {_teacher(given)} is given"
        )
    if "members" in saved:
        return _several_teachers(who, saved, given, same_versions)
    if "weights" not in saved:
        if all(given.get(name) == value for name, value in saved.items()):
            return ""
        if saved.get("fields") != given.get("fields"):
            return f"{who} ({_teacher(given)}) has other fields than the one that was saved"
        return f"{who} is another one: {_teacher(saved)} was saved and {_teacher(given)} is given"
    said = _models(who, saved, given, same_versions)
    if not said and saved["rendered"] != given["rendered"]:
        said = f"{who} reads the prompts in another way (context, template or hints): " + _both(
            saved, given, "rendered"
        )
    return said


def _several_teachers(
    who: str, saved: Mapping[str, Any], given: Mapping[str, Any], same_versions: bool
) -> str:
    """Compare several teachers one by one, and who grades which prompt."""
    one, two = saved["members"], given["members"]
    if one.keys() != two.keys():
        return (
            f"{who} has other members: {', '.join(one)} were saved and {', '.join(two)} are given"
        )
    for name in one:
        said = _teachers(f"the teacher {name!r}", one[name], two[name], same_versions)
        if said:
            return said
    if not same_function(saved["route"], given["route"]):
        before, now = _route(saved["route"]), _route(given["route"])
        return f"{who} has another route: {before} was saved and {now} is given"
    if saved["mixture"] != given["mixture"]:
        return f"{who} has another mixture: {_both(saved, given, 'mixture')}"
    return ""


def _route(described: Any) -> str:
    is_function = isinstance(described, dict) and "name" in described
    return _function(described) if is_function else str(described)


def _teacher(described: Mapping[str, Any] | None) -> str:
    if described is None:
        return "none"
    kind = described["kind"].rsplit(".", 1)[-1]
    if "members" in described:
        members = [f"{name}: {_teacher(one)}" for name, one in described["members"].items()]
        return f"{kind}({', '.join(members)})"
    k = f", k={described['k']}" if described.get("k") is not None else ""
    return f"{kind}({described.get('source') or described['model']}{k})"


def _policies(saved: Mapping[str, Any], given: Mapping[str, Any], same_versions: bool) -> str:
    if saved.keys() != given.keys():
        one, two = (", ".join(names) or "none" for names in (saved, given))
        return f"the run was given policies= for {one}, and now for {two}"
    return "; ".join(
        filter(
            None,
            (
                _teachers(f"the policy {name!r}", saved[name], given[name], same_versions)
                for name in saved
            ),
        )
    )


def _methods(saved: Mapping[str, Any], given: Mapping[str, Any], moved: Sequence[str]) -> str:
    one, two = saved["class"], given["class"]
    theirs = [name.startswith("opdlab.") for name in (one, two)]
    is_other = one != two and (any(theirs) or one.rsplit(".", 1)[-1] != two.rsplit(".", 1)[-1])
    is_unsure = one != two and not (saved["source"] and saved["source"] == given["source"])
    if is_other or is_unsure:
        return f"the run was trained with the method {one} and {two} is given"
    if saved["source"] and given["source"] and saved["source"] != given["source"]:
        return (
            f"the code of the method {one} has changed: source {saved['source']} was saved and"
            f" {given['source']} is given"
        )
    keys = saved["options"].keys() | given["options"].keys()
    if all(theirs):  # a newer version may have options that the older one had not
        keys = saved["options"].keys() & given["options"].keys()
    still = [key for key in sorted(keys) if f"{one.rsplit('.', 1)[-1]}.{key}" not in moved]
    for key in still:
        before, now = (_without_moved(side["options"].get(key), moved) for side in (saved, given))
        if before == now or (
            isinstance(before, dict) and "source" in before and same_function(before, now)
        ):
            continue
        if isinstance(before, dict) and "source" in before:
            return (
                f"the method's {key} is another one: {_function(before)} was saved and"
                f" {_function(now)} is given"
            )
        return f"the method {one} has {key}={now!r} and was saved with {key}={before!r}"
    return ""


def _without_moved(described: Any, moved: Sequence[str]) -> Any:
    """A function's description without the enclosing variables that it changes itself."""
    if not isinstance(described, dict) or not isinstance(described.get("given"), list):
        return described
    held, *rest = described["given"]
    names = {name.split(" (of ")[0] for name in moved}
    held = (
        {name: value for name, value in held.items() if name not in names}
        if isinstance(held, dict)
        else held
    )
    return {**described, "given": [held, *rest]}
