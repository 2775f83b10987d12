"""The pictures and tables of maps."""

from __future__ import annotations

from pathlib import Path

from benchmarks.maps.atlas import MapPlan
from opdlab.data.map_results import MapResults
from opdlab.viz import MethodMap

DOCS = Path(__file__).parents[2] / "docs"


def describe(results: MapResults) -> str:
    """The map in characters."""
    return repr(MethodMap(results))


def draw(plan: MapPlan, results: MapResults) -> Path:
    """Draw the picture of docs/maps.md, light and dark."""
    view = MethodMap(results)
    for name, value in plan.shown.items():
        setattr(view, name, value)
    for suffix, dark in (("", False), ("_dark", True)):
        path = view.to_png(DOCS / f"map_{results.name}{suffix}.png", dark=dark, width=900)
        _shrink(path)
    return path


def _shrink(path: Path) -> None:
    """Keep 64 colours: a third of the bytes, and no visible loss."""
    from PIL import Image

    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(64)
    small.save(path, optimize=True)
