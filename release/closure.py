"""The packages that an installation consists of, read from the metadata of what is installed."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import Distribution, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def read_requirements(dist: Distribution, extras: Iterable[str] = ()) -> list[Requirement]:
    """Read what a package requires on this machine.

    Args:
        dist: The package.
        extras: Names of its extras that are wanted as well.

    Returns:
        Its requirements whose marker holds here.
    """
    wanted = ["", *extras]
    found = [Requirement(text) for text in dist.requires or ()]
    return [
        one
        for one in found
        if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in wanted)
    ]


def walk(
    requirements: Iterable[Requirement],
) -> tuple[dict[str, Distribution], dict[str, set[str]]]:
    """Follow requirements to everything that they need, directly or not.

    Args:
        requirements: Where to begin.

    Returns:
        The installed packages by name, and the names that each of them requires.

    Raises:
        PackageNotFoundError: A required package is not installed.
    """
    found: dict[str, Distribution] = {}
    needs: dict[str, set[str]] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = list(requirements)
    while waiting:
        one = waiting.pop()
        name, extras = canonicalize_name(one.name), frozenset(one.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        found[name] = distribution(one.name)
        further = read_requirements(found[name], extras)
        needs.setdefault(name, set()).update(canonicalize_name(other.name) for other in further)
        waiting += further
    return found, needs
