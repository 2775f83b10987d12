"""Write the locks: each pinned version with the SHA-256 of the files that pip may install.

`constraints.txt` pins versions; a lock pins files. `release/lock.txt` has what `make test`
installs, and `release/lock-build.txt` what builds the packages that come as source. Both are for
Linux on x86-64 and Python 3.11, with the CPU build of PyTorch. `release/lock-tools.txt` has the
tools of `make release`, `make audit`, `make lock` and `make test-versions`, resolved anew.

    make lock
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "release"
TOOLS = FOLDER / "tools.txt"
BUILDERS = ("editables", "hatchling", "packaging", "pathspec", "pluggy", "setuptools")
BUILDERS += ("trove-classifiers",)
HEAD = """\
# {what}
# Made by `make lock` from {source}; tests/test_supply_chain.py holds that they agree.
"""


def find_hashes(requirements: Path, *options: str) -> dict[str, set[str]]:
    """Ask the package index for the files of each requirement.

    Args:
        requirements: A file of requirements.
        options: Further words for `uv pip compile`.

    Returns:
        The SHA-256 of the files by `name==version`: of the wheels that fit this platform, or of the
        source where there is no such wheel.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "pylock.toml"
        platform = ["--python-version", "3.11.9", "--python-platform", "x86_64-manylinux_2_28"]
        command = ["uv", "pip", "compile", *platform, "--format", "pylock.toml", *options]
        run(*command, "--quiet", "--output-file", str(out), str(requirements))
        packages = tomllib.loads(out.read_text(encoding="utf-8"))["packages"]
    found = {}
    for package in packages:
        files = package.get("wheels") or [package["sdist"]]
        hashes = {file["hashes"]["sha256"] for file in files}
        found[f"{package['name']}=={package['version']}"] = hashes
    return found


def find_cpu_torch(pin: str) -> str:
    """Find the hash of the CPU build of PyTorch, which has other bytes than PyPI's build.

    Args:
        pin: The version, as `torch==2.13.0`.

    Returns:
        The hash of the file that pip takes on this machine.

    Raises:
        SystemExit: pip takes another build here.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = ["-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, pin]
        run(sys.executable, *words)
        (file,) = Path(folder).iterdir()
        if "+cpu" not in file.name:
            raise SystemExit(
                f"pip takes {file.name} here, which is no CPU build. Set PIP_EXTRA_INDEX_URL to"
                " https://download.pytorch.org/whl/cpu and run make lock again."
            )
        return hashlib.sha256(file.read_bytes()).hexdigest()


def write_lock(path: Path, what: str, source: str, files: dict[str, set[str]]) -> None:
    """Write a lock as pip reads it with `--require-hashes`.

    Args:
        path: The file.
        what: A sentence for its first line.
        source: What it was made from.
        files: The hashes of each pin.
    """
    text = HEAD.format(what=what, source=source)
    for pin, hashes in sorted(files.items()):
        lines = [pin, *(f"    --hash=sha256:{value}" for value in sorted(hashes))]
        text += " \\\n".join(lines) + "\n"
    path.write_text(text, encoding="utf-8")
    print(f"{path.relative_to(ROOT)}: {len(files)} packages")


def run(*command: str) -> None:
    """Run a command and end with its status if it fails."""
    subprocess.run(command, check=True)


def main() -> None:
    """Write all three locks."""
    pinned = find_hashes(ROOT / "constraints.txt", "--no-deps")
    (torch,) = (pin for pin in pinned if pin.startswith("torch=="))
    pinned[torch] = {find_cpu_torch(torch)}
    builders = {pin: files for pin, files in pinned.items() if pin.split("==")[0] in BUILDERS}
    where = "for Linux on x86-64 and Python 3.11"
    write_lock(FOLDER / "lock.txt", f"What make test installs, {where}.", "constraints.txt", pinned)
    write_lock(
        FOLDER / "lock-build.txt",
        f"What builds the packages that come as source, {where}.",
        "constraints.txt",
        builders,
    )
    write_lock(
        FOLDER / "lock-tools.txt",
        f"The tools of a release, {where}.",
        "release/tools.txt",
        find_hashes(TOOLS),
    )


if __name__ == "__main__":
    main()
