"""The blocks of docs/sampling.md run; the one for vLLM runs where vLLM is (`make test-vllm`)."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from opdlab.training.settings import Settings

PAGE = (Path(__file__).parent.parent / "docs" / "sampling.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
HERE = [block for block in BLOCKS if "where vLLM is installed" not in block]


def test_one_block_needs_vllm():
    assert (len(BLOCKS), len(HERE)) == (4, 3)


@pytest.mark.parametrize("number", range(len(HERE)))
def test_a_block_runs(number):
    exec(HERE[number], {})  # noqa: S102 (the page is ours)


def test_the_page_names_what_there_is():
    for name in ("sampler_gap", "sampler_gap_max", "sampler_beyond", "sampler_kl"):
        assert f"`{name}`" in PAGE
    for way in get_args(get_type_hints(Settings)["importance_over"]):
        assert f'| `"{way}"`' in PAGE
    assert "importance_cap" in {field.name for field in fields(Settings)}
