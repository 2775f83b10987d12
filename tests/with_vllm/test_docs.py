"""What the documentation says about vLLM runs with vLLM."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "sampling.md"


def test_the_block_for_vllm_in_this_process_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [one for one in blocks if "runs where vLLM is installed" in one]
    exec(block, {})  # noqa: S102 (the page is ours)
    assert "sampler_gap" in capsys.readouterr().out
