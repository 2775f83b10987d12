"""Write the bill of materials of a release: CycloneDX 1.6 in JSON.

It lists the wheel, every package that an installation without extras consists of at the versions of
`constraints.txt`, which package requires which, their licences, and the SHA-256 of the files in
`release/lock.txt`. The same release gives the same bytes: the serial number comes from the wheel's
hash, and the time from SOURCE_DATE_EPOCH or the last commit.

    python -m release.bill dist
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Mapping
from datetime import datetime, timezone
from email.message import Message
from email.parser import HeaderParser
from importlib.metadata import Distribution
from pathlib import Path
from zipfile import ZipFile

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from release.closure import walk

ROOT = Path(__file__).parents[1]
PIN = re.compile(r"^([\w.-]+)==([^ \\]+)", re.MULTILINE)


def read_lock(path: Path) -> dict[str, tuple[str, list[str]]]:
    """Read a lock.

    Args:
        path: A file that `release/lock.py` wrote.

    Returns:
        The version and the hashes of each package, by normalised name.
    """
    found = {}
    for block in re.split(r"\n(?=\S)", path.read_text(encoding="utf-8")):
        if pin := PIN.match(block):
            hashes = re.findall(r"--hash=sha256:(\w{64})", block)
            found[str(canonicalize_name(pin[1]))] = (pin[2], hashes)
    return found


def make_bill(wheel: Path, lock: Mapping[str, tuple[str, list[str]]], time: datetime) -> str:
    """Make the bill of a wheel.

    Args:
        wheel: The built wheel. What it requires must be installed, at the lock's versions.
        lock: The version and the hashes of each package, as `read_lock` gives them.
        time: The time of the release.

    Returns:
        The bill as JSON.

    Raises:
        ValueError: A package is installed in another version than the lock's.
    """
    metadata = read_metadata(wheel)
    declared = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    direct = [one for one in declared if one.marker is None or one.marker.evaluate({"extra": ""})]
    found, needs = walk(direct)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    bill = Bom(serial_number=uuid.UUID(digest[:32], version=4))
    bill.metadata.timestamp = time
    root = describe(metadata["Name"], metadata["Version"], metadata, [digest])
    bill.metadata.component = root
    parts = {}
    for name, dist in found.items():
        version, hashes = lock[name]
        if dist.version.split("+")[0] != version:
            raise ValueError(
                f"{name} {dist.version} is installed, but release/lock.txt has {version}. Run"
                " make .venv/test.done again."
            )
        parts[name] = describe(name, version, _read_headers(dist), hashes)
        bill.components.add(parts[name])
    names = {str(canonicalize_name(one.name)) for one in direct}
    bill.register_dependency(root, [parts[name] for name in sorted(names)])
    for name, required in needs.items():
        bill.register_dependency(parts[name], [parts[other] for other in sorted(required)])
    return JsonV1Dot6(bill).output_as_string(indent=2) + "\n"


def describe(name: str, version: str, metadata: Message, hashes: list[str]) -> Component:
    """Describe one package.

    Args:
        name: Its name.
        version: Its version.
        metadata: Its metadata.
        hashes: The SHA-256 of its files, as hexadecimal digits.

    Returns:
        The component, identified by its package URL.
    """
    url = PackageURL("pypi", name=name, version=version)
    given = metadata.get("License-Expression") or metadata.get("License", "").strip()
    if not given or "\n" in given:  # absent, or the whole text of a licence
        trove = [value for value in metadata.get_all("Classifier", []) if "License ::" in value]
        given = " and ".join(value.rsplit(" :: ", 1)[1] for value in trove)
    return Component(
        name=name,
        version=version,
        type=ComponentType.LIBRARY,
        purl=url,
        bom_ref=str(url),
        description=metadata.get("Summary"),
        licenses=[LicenseFactory().make_from_string(given)] if given else None,
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=value) for value in hashes],
    )


def read_metadata(wheel: Path) -> Message:
    """Read the metadata of a wheel."""
    with ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return HeaderParser().parsestr(archive.read(name).decode("utf-8"))


def _read_headers(dist: Distribution) -> Message:
    return HeaderParser().parsestr(dist.read_text("METADATA") or "")


def find_time() -> datetime:
    """Find the time of the release: SOURCE_DATE_EPOCH, or that of the last commit."""
    seconds = os.environ.get("SOURCE_DATE_EPOCH")
    if seconds is None:
        command = ["git", "log", "-1", "--format=%ct"]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
        seconds = done.stdout
    return datetime.fromtimestamp(int(seconds), timezone.utc)


def main(folder: str) -> None:
    """Write the bill of the wheel in a folder beside it, as `opdlab-….cdx.json`."""
    (wheel,) = Path(folder).glob("*.whl")
    text = make_bill(wheel, read_lock(ROOT / "release" / "lock.txt"), find_time())
    path = wheel.with_name("-".join(wheel.name.split("-")[:2]) + ".cdx.json")
    path.write_text(text, encoding="utf-8")
    print(f"{path}: opdlab and {text.count('bom-ref') - 1} packages that it needs")


if __name__ == "__main__":
    main(sys.argv[1])
