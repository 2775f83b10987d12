"""Put tables of results into benchmarks/README.md, between comments that name them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "README.md"


def fill(
    page: str,
    kind: str,
    tables: Mapping[str, Callable[[Mapping[str, Any]], str]],
    data: Mapping[str, Any],
) -> str:
    """Replace tables of a page.

    Args:
        page: The text of the page. A table stands between `<!-- KIND: NAME -->` and `<!-- end -->`.
        kind: The first word of the comments.
        tables: By name, what makes the table of the results.
        data: The results.

    Returns:
        The page with the tables of these results.
    """
    for name, make in tables.items():
        place = re.compile(rf"(<!-- {kind}: {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        table = make(data)
        page = place.sub(lambda found, table=table: f"{found[1]}\n{table}\n{found[2]}", page)
    return page
