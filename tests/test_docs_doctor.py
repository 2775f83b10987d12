"""The blocks of docs/doctor.md run, and print what the page says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from opdlab.losses import DIVERGENCES

PAGE = (Path(__file__).parent.parent / "docs" / "doctor.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_blocks_run_in_order(capsys):
    names: dict[str, Any] = {}
    for block in BLOCKS:
        exec(block, names)  # noqa: S102 (the page is ours)
    said = capsys.readouterr().out
    assert said.startswith("GO student <- teacher")
    assert re.search(r"^(ok|note) +asked +\d+ of 32 prompts", said, re.MULTILINE)
    assert 'begin with  method=opd.OPD("reverse_kl")' in said
    assert "No alarms in 6 steps" in said
    assert names["found"].cost.seconds.keys() == {"write", "grade", "learn"}
    assert {"generate_s", "grade_s", "learn_s"} <= set(names["run"].history.columns)


def test_the_pulls_in_the_table_are_those_of_the_divergences():
    import torch

    student = torch.tensor([[1e-6, 0.9 * (1 - 1e-6), 0.1 * (1 - 1e-6)]]).double().log()
    teacher = torch.tensor([[0.9, 0.001, 0.099]]).double().log()
    said = {
        name: float(value)
        for name, value in re.findall(r"^\| (.+?) \| .+? \| ([\d.e-]+) \|$", PAGE, re.MULTILINE)
    }
    for label, name in (
        ("forward KL", "forward_kl"),
        ("reverse KL", "reverse_kl"),
        ("Jensen-Shannon", "jensen_shannon"),
    ):
        logits = student.clone().requires_grad_()
        DIVERGENCES[name](logits.log_softmax(-1), teacher).sum().backward()
        assert -logits.grad[0, 0].item() == pytest.approx(said[label], rel=0.1)
