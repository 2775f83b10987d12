"""Ask an advisory database about every pinned version; a package that it cannot say is a failure.

`pip-audit` asks the Python Packaging Advisory Database through PyPI. A mirror of PyPI may serve no
advisories: `pip-audit` then reports each package as skipped and ends with success. So the answers
are counted here, and an audit that skipped anything fails.

    make audit
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
# What was looked at and does not concern opdlab: the advisory's id and why.
ACCEPTED: dict[str, str] = {}


def ask(lock: Path) -> list[dict[str, Any]]:
    """Ask about each version of a lock.

    Args:
        lock: A file of pinned versions with hashes.

    Returns:
        pip-audit's answers, one for each package.

    Raises:
        SystemExit: There was no answer at all.
    """
    command = ["pip-audit", "--disable-pip", "--require-hashes", "--format", "json"]
    done = subprocess.run(
        [*command, "--progress-spinner", "off", "--requirement", str(lock)],
        check=False,
        capture_output=True,
        text=True,
    )
    try:
        answers: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise SystemExit(f"{lock.name}: the audit failed: {last}") from None
    return answers


def judge(name: str, answers: Sequence[dict[str, Any]]) -> list[str]:
    """Judge the answers.

    Args:
        name: The lock's name.
        answers: What pip-audit said.

    Returns:
        A sentence for each problem: an advisory that is not accepted, or packages without answer.
    """
    problems = []
    skipped = [answer["name"] for answer in answers if "skip_reason" in answer]
    if skipped:
        problems.append(
            f"{name}: no answer about {len(skipped)} of {len(answers)} packages, first"
            f" {skipped[0]}. Use an index that serves advisories, as PyPI itself does."
        )
    for answer in answers:
        for advisory in answer.get("vulns", ()):
            if advisory["id"] not in ACCEPTED:
                fixed = ", ".join(advisory["fix_versions"]) or "no version"
                pin = f"{answer['name']} {answer['version']}"
                problems.append(f"{name}: {pin} has {advisory['id']}; mended in {fixed}")
    return problems


def main() -> int:
    """Audit the locks of the tests and of the release tools.

    Returns:
        The exit status: 0 if every package was looked up and none has an advisory.
    """
    problems = []
    for name in ("lock.txt", "lock-tools.txt"):
        answers = ask(FOLDER / name)
        problems += judge(name, answers)
        print(f"{name}: asked about {len(answers)} packages")
    print("\n".join(problems) or "no known advisories")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
