"""Modules of `static/` become one inline module: each once, after what it imports, without names
that clash.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from opdlab.viz import embed

STATIC = Path(embed.__file__).with_name("static")
MODULES = sorted(path.name for path in STATIC.glob("*.js") if path.name != "charts.js")
EXPORTED = re.compile(r"^export const (\w+)", re.MULTILINE)


def test_a_module_comes_once_and_after_its_imports():
    text = embed.bundle(["lens.js", "audits.js"])
    assert text.count("const tokenStrip=") == 1
    places = [text.index(f"const {name}=") for name in ("clamp", "tokenStrip", "miniMap")]
    assert places == sorted(places)
    assert "linePlot" not in text  # nothing here imports lines.js


def test_nothing_of_the_module_system_and_no_comment_remains():
    text = embed.script_text(MODULES)
    assert not re.search(r"^(import|export const)\b|^//|/\*\*", text, re.MULTILINE)
    assert text.count("export default") == 1


def test_exported_names_differ_since_they_share_one_scope():
    names = Counter(name for module in MODULES for name in EXPORTED.findall(embed.asset(module)))
    assert [name for name, count in names.items() if count > 1] == []


def test_only_imports_and_exports_that_the_bundle_understands():
    for module in MODULES:
        found = re.findall(r"^(?:import|export)\b.*", embed.asset(module), re.MULTILINE)
        known = r"import \{.*|export const \w+ .*|export default \{ render \};|export \{\};"
        assert [line for line in found if not re.fullmatch(known, line)] == []
