"""The blocks of docs/many_teachers.md run, and its configs are configs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import opdlab as opd
from opdlab.methods.by_name import make_method
from opdlab.training.config import parse_toml

PAGE = (Path(__file__).parent.parent / "docs" / "many_teachers.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_blocks_run():
    names: dict[str, object] = {}
    plans = []
    for block in blocks("python"):
        exec(block, names)  # noqa: S102 (the page is ours)
        plans.append(set(names["run"].last.plan))
    assert plans == [
        set(),
        set(),
        set(),
        {"grpo_advantage", "grpo_sampler_logp"},
        {"told", "scale"},
    ]


def test_the_configs_run(tmp_path):
    (config,) = blocks("toml")
    records = [
        {"prompt": f"{i} + 1", "answer": str(i + 1), "subject": ("buying", "other")[i % 2]}
        for i in range(12)
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    (tmp_path / "run.toml").write_text(config, encoding="utf-8")
    run = opd.from_config(tmp_path / "run.toml", quiet=True).train()
    assert run.teacher.report(run.history)["rows"].sum() == 16
    (method,) = [block for block in blocks("text") if "[method]" in block]
    table = parse_toml(method)["method"]
    made = make_method(table.pop("name"), table)
    assert made == opd.Combined(opd.OPD("forward_kl"), opd.GRPO(), weights=(1, 0.5))
