"""The rules of the house that a machine can check: floors, safety, notebooks, links."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "opdlab").rglob("*.py"))

# Each module imports only from its own floor and those below (imports inside functions and for
# typing aside).
FLOORS = [
    (
        "errors progress interrupts intervals validation expect needs written_text writers"
        " tensor_files generator divergence"
    ),
    (
        "precision fingerprints tokens alignment vocabulary forward continuation head compatibility"
        " adapter_layers adapter_options adapted_layers adapters loading weights"
    ),
    (
        "prompt templates same_tokens policy recomputation model_files turns own_teacher rollout"
        " settings"
    ),
    "partial loss_contract not_finite rows signals columns batch measures trace preflight",
    "tasks teachers roles trainable profiles",
    "methods",
    "exact estimator",
    (
        "run_folder run_identity run_differences method_state restoring checkpoint saving trackers"
        " evaluate step"
    ),
    "distill resuming snapshots",
    "diagnose",
    "viz notebook bridges",
    "demo gallery cli",
]


def floor(module: str) -> int:
    return next(i for i, names in enumerate(FLOORS) if module in names.split())


def imports(tree: ast.Module) -> set[str]:
    """First-level opdlab modules that a file imports when it is loaded."""
    out = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "opdlab":
            rest = node.module.split(".")[1:]
            out |= {rest[0]} if rest else {alias.name for alias in node.names}
    return out


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_floors(path):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    module = path.relative_to(ROOT / "opdlab").parts[0].removesuffix(".py")
    if module != "__init__":
        above = {name for name in imports(tree) if floor(name) > floor(module)}
        assert not above, f"{module} imports {above} from above"
    if module == "viz":
        assert not imports(tree) & {
            "policy",
            "rollout",
            "head",
            "distill",
        }, "viz draws traces and never imports a model"


def test_nothing_unpickles_or_runs_text():
    words = (
        r"\bimport"
        r" pickle\b|torch\.(load|save)\(|(?<!\.)\b(eval|exec)\(|trust_remote_code|yaml\.load\(|innerHTML|document\.write"
    )
    banned = re.compile(words)
    for path in [*SOURCES, *(ROOT / "opdlab").rglob("*.js")]:
        found = [
            line for line in path.read_text(encoding="utf-8").splitlines() if banned.search(line)
        ]
        assert not found, (path.name, found)


def test_links_of_the_docs_lead_somewhere():
    for page in [
        *ROOT.glob("*.md"),
        *(ROOT / "notebooks").glob("*.md"),
        *(ROOT / "benchmarks").glob("*.md"),
    ]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert link.startswith("http") or (page.parent / link).exists(), (
                f"{page.name} -> {link}"
            )


def test_the_readme_names_methods_that_exist():
    import opdlab

    named = set(re.findall(r"`(\w+)\(", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert {"OPD", "SFT", "SequenceKD", "GRPO"} <= named
    assert all(hasattr(opdlab, name) for name in named if name[0].isupper())
