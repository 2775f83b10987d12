"""The floors of the package: which folder may import which, written down once.

Every import counts: at the top of a file, inside a function, and for type checkers alone.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from opdlab.data.notes import Windows
from opdlab.data.trace import Trace
from opdlab.viz.made_up import make_trace

PACKAGE = Path(__file__).parents[1] / "opdlab"

# Each folder (or file) imports from itself and from those above it in this list.
FLOORS = [
    "errors",  # all errors that users see
    "support",  # validation, progress, interrupts, files
    "data",  # Prompt, Rollout, Column, Trace, SamplingConfig; no model, no transformers
    "losses",  # divergences, generators, supports
    "models",  # weights, adapters, policies, heads, sampling
    "engine",  # rows, batch, signals, scoring
    "methods",  # one file per technique
    "teachers",  # local texts and servers
    # Who writes the student's texts in place of its own loop (that one is in models): vLLM. Its
    # server is talked to as teachers are.
    "samplers",
    "tasks",  # market, reasoning-gym, records, profiles
    "training",  # settings, run, checkpoints, evaluation
    "exact",  # toy models that can be enumerated
    "audit",  # which gradient a loss trains
    "conformance",  # certificates for the losses of other code bases; a zoo of mistakes
    "diagnose",  # doctor, health, exposure, privilege, cost
    "evidence",  # what caused a gain: controls of a run, effects of single tokens
    "viz",  # views
    "notebook",  # set-up, exercises, freezing
    "bridges",  # TRL
    "commands",  # command line, demo, gallery
    "__main__",  # python -m opdlab
]


def modules() -> dict[str, Path]:
    """All modules of the package but its own `__init__`, by dotted name without `opdlab.`."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
    return found


MODULES = modules()


def imports_of(name: str) -> set[str]:
    """Modules of the package that a module imports anywhere in its file."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import; write it out"
            module = node.module or ""
            names = {f"{module}.{alias.name}" for alias in node.names}
            found |= {one if one.removeprefix("opdlab.") in MODULES else module for one in names}
    inside = {
        one.removeprefix("opdlab.") for one in found if one == "opdlab" or one.startswith("opdlab.")
    }
    return {one for one in inside if one != name}


def floor_of(name: str) -> int:
    return FLOORS.index(name.split(".", maxsplit=1)[0])


def test_every_folder_is_on_one_floor():
    assert {name.split(".")[0] for name in MODULES} == set(FLOORS)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_from_its_own_floor_and_those_above_in_the_list(name):
    imports = imports_of(name)
    assert "opdlab" not in imports, f"{name} imports the whole package; name the module"
    upward = sorted(one for one in imports if floor_of(one) > floor_of(name))
    assert not upward, f"{name} imports {', '.join(upward)}"


def test_no_cycles():
    graph = {name: imports_of(name) & MODULES.keys() for name in MODULES}
    cycle = find_cycle(graph)
    assert cycle is None, " → ".join(cycle or [])


def find_cycle(graph: dict[str, set[str]]) -> list[str] | None:
    """A cycle of imports as a list that begins and ends with the same module, or None."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str] | None:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        for other in sorted(graph[name]):
            if cycle := visit(other, [*path, name]):
                return cycle
        done.add(name)
        return None

    for name in graph:
        if cycle := visit(name, []):
            return cycle
    return None


def test_a_cycle_is_found():
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


HEAVY = ("torch", "transformers", "peft", "accelerate", "datasets", "scipy")
LOADED = f"import sys; print('loaded', *[name for name in {HEAVY} if name in sys.modules])"


def heavy_modules_after(code: str) -> list[str]:
    """The heavy modules that a fresh interpreter has loaded after running this code."""
    run = subprocess.run(
        [sys.executable, "-c", f"{code}\n{LOADED}"], capture_output=True, text=True, check=True
    )
    return run.stdout.splitlines()[-1].split()[1:]


@pytest.mark.parametrize("statement", ["import opdlab.viz", "from opdlab.data.trace import Trace"])
def test_pictures_need_no_models(statement):
    assert heavy_modules_after(statement) == []


def test_showing_a_trace_needs_no_models(tmp_path):
    file, out = tmp_path / "trace.parquet", tmp_path / "page.html"
    trace = make_trace([b"a", b" b", b" c"], ("student", "teacher", "teacher+hint"))
    note = Windows(
        [{"sample": 0, "position": 1, "student": [0], "teacher": [1], "distance": 0.5}]
    ).as_json()
    Trace(trace.table, trace.meta | {"notes": {"mine": {"windows": note}}}).save(file)
    arguments = ["opdlab", "show", str(file), "--out", str(out), "--no-open"]
    code = f"import sys; sys.argv = {arguments}\nfrom opdlab.commands.cli import main; main()"
    assert heavy_modules_after(code) == []
    written = out.read_text(encoding="utf-8")
    for view in ("lens", "timeline", "regimes", "privilege", "forks", "tail"):
        assert f"opd-{view}" in written
