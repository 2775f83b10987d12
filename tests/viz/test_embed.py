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
DECLARED = re.compile(r"^(?:export )?(?:const|let|function|class) (\w+)", re.MULTILINE)


def test_a_module_comes_once_and_after_its_imports():
    text = embed.bundle(["lens.js", "audits.js"])
    names = DECLARED.findall(text)
    assert names.count("tokenStrip") == 1
    assert names.index("clamp") < names.index("tokenStrip") < names.index("miniMap")
    assert "linePlot" not in names  # nothing here imports lines.js


def test_nothing_of_the_module_system_and_no_comment_remains():
    text = embed.script_text(MODULES)
    assert not re.search(r"^(import|export const)\b|^//|/\*\*", text, re.MULTILINE)
    assert text.count("export default") == 1


def test_top_level_names_differ_since_all_modules_share_one_scope():
    names = Counter(name for module in MODULES for name in DECLARED.findall(embed.asset(module)))
    assert [name for name, count in names.items() if count > 1] == []
    for module in MODULES:  # or the pattern above would miss a name
        assert not re.search(r"^(export )?(const|let) [{[]", embed.asset(module), re.MULTILINE)
