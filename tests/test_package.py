"""`import opdlab` has all names and imports none early; functions win over modules."""

from __future__ import annotations

import subprocess
import sys

import opdlab


def python(source: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=1200, check=True
    ).stdout.strip()


def test_every_name_is_there():
    assert sorted(dir(opdlab)) == sorted(opdlab.__all__)
    for name in opdlab.__all__:
        assert getattr(opdlab, name) is not None
    assert len(set(opdlab.__all__)) == len(opdlab.__all__) > 40


def test_the_package_and_its_command_line_wait_for_no_torch():
    assert (
        python(
            "import sys, opdlab, opdlab.commands.cli, opdlab.errors; print({'torch',"
            " 'transformers', 'pandas'} & set(sys.modules))"
        )
        == "set()"
    )


def test_a_function_is_not_hidden_by_the_module_that_it_is_in():
    assert python("import opdlab.audit.kl, opdlab; print(opdlab.audit.__name__)") == "audit"
    assert python("from opdlab import audit; import opdlab.audit; print(callable(audit))") == "True"
