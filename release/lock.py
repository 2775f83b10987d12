"""Write the locks: each pinned version with the SHA-256 of the files that pip may install.

`constraints.txt` and `constraints-vllm.txt` pin versions; a lock pins files. `release/lock.txt` has
what `make test` installs, `release/lock-vllm.txt` what `make test-vllm` installs, and
`release/lock-build.txt` what builds the packages that come as source. They are for Linux on x86-64
and Python 3.11, with the CPU build of PyTorch. `release/lock-tools.txt` has the tools of
`make release`, `make audit`, `make lock` and `make test-versions`, resolved anew.

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
# {what}, for Linux on x86-64 and Python 3.11.
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
        platform = ["--python-version", "3.11.9", "--python-platform", "x86_64-manylinux_2_36"]
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


def write_lock(name: str, what: str, source: str, files: dict[str, set[str]]) -> None:
    """Write a lock as pip reads it with `--require-hashes`.

    Args:
        name: The file's name in `release/`.
        what: What is in it, for its first line.
        source: What it was made from.
        files: The hashes of each pin.
    """
    text = HEAD.format(what=what, source=source)
    for pin, hashes in sorted(files.items()):
        lines = [pin, *(f"    --hash=sha256:{value}" for value in sorted(hashes))]
        text += " \\\n".join(lines) + "\n"
    (FOLDER / name).write_text(text, encoding="utf-8")
    print(f"release/{name}: {len(files)} packages")


def run(*command: str) -> None:
    """Run a command and end with its status if it fails."""
    subprocess.run(command, check=True)


def main() -> None:
    """Write all locks."""
    tests = find_hashes(ROOT / "constraints.txt", "--no-deps")
    vllm = find_hashes(ROOT / "constraints-vllm.txt", "--no-deps")
    for torch in {pin for pin in (*tests, *vllm) if pin.startswith("torch==")}:
        cpu = {find_cpu_torch(torch)}
        for pinned in (tests, vllm):
            pinned.update({torch: cpu} if torch in pinned else {})
    builders = {pin: files for pin, files in tests.items() if pin.split("==")[0] in BUILDERS}
    tools = find_hashes(TOOLS)
    write_lock("lock.txt", "What make test installs", "constraints.txt", tests)
    write_lock("lock-vllm.txt", "What make test-vllm installs", "constraints-vllm.txt", vllm)
    write_lock("lock-build.txt", "What builds packages from source", "constraints.txt", builders)
    write_lock("lock-tools.txt", "The tools of a release", "release/tools.txt", tools)


if __name__ == "__main__":
    main()
