"""What a new user does: a JSONL of questions, two names on the Hub, and one command."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import torch
from warm_start import python

STUDENT, TEACHER = "Qwen/Qwen3-0.6B", "Qwen/Qwen3-4B"
PLAIN = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, base = sys.argv[1:3]
assert "opdlab" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer("What is 2 + 2?", return_tensors="pt")["input_ids"]
before = model(ids).logits
after = PeftModel.from_pretrained(model, folder)(ids).logits
print(json.dumps(float((after - before).abs().max())))
"""


def run(*words: str, cwd: Path, hub) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder of the user's own, with the imitation as its Hub."""
    package, given = str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")
    paths = os.pathsep.join(path for path in (package, given) if path)
    return subprocess.run(
        [python(), *words],
        capture_output=True,
        text=True,
        timeout=2900,
        check=False,
        cwd=cwd,
        env=hub.environment(PYTHONPATH=paths),
    )


def test_questions_and_two_names_give_an_adapter_with_a_card_and_a_report(hub, tmp_path):
    lines = [{"prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(24)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "questions.jsonl").write_text(text, encoding="utf-8")
    words = ["--student", STUDENT, "--teacher", TEACHER, "--task", "questions.jsonl"]
    sizes = {"settings.steps": 2, "settings.batch": 2, "task.max_new_tokens": 8}
    sizes |= {"run.eval_prompts": 4, "run.trace_prompts": 2}
    for name, value in sizes.items():
        words += ["--set", f"{name}={value}"]
    done = run(
        *["-m", "opdlab.commands.cli", "distill", *words, "--out", "first", "--json"],
        cwd=tmp_path,
        hub=hub,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    folder = tmp_path / "first"
    assert report["is_finished"]
    assert report["accuracy"].keys() == {"before", "after", "teacher"}
    assert Path(report["files"]["adapter"]) == folder / "adapter"
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<html" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    card = (folder / "adapter" / "README.md").read_text(encoding="utf-8")
    assert f"base_model: {STUDENT}" in card.replace('"', "").replace("'", "")
    assert "before" in card
    assert "after" in card
    loaded = run("-c", PLAIN, str(folder / "adapter"), STUDENT, cwd=tmp_path, hub=hub)
    assert loaded.returncode == 0, loaded.stderr[-3000:]
    moved = torch.tensor(json.loads(loaded.stdout.splitlines()[-1]))
    assert moved > 0
