"""The configs of examples/ train: a JSONL file, killed and taken up, and a LoRA on a 4-bit base."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

from safetensors.torch import load_file
from warm_start import python

EXAMPLES = Path(__file__).parents[2] / "examples"
CLI = ["-m", "opdlab.commands.cli"]


def distill(example: str, folder: Path, *changes: str, env=None) -> dict[str, object]:
    """Run `opdlab distill` to its end and return what it prints as JSON."""
    done = subprocess.run(
        [
            python(),
            *CLI,
            "distill",
            EXAMPLES / example,
            "--out",
            folder,
            "--json",
            "--set",
            *changes,
        ],
        capture_output=True,
        text=True,
        timeout=2500,
        check=False,
        cwd=folder.parent,
        env=env,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    printed: dict[str, object] = json.loads(done.stdout)
    return printed


def test_the_jsonl_example_killed_and_taken_up_ends_as_without_the_kill(tmp_path):
    changes = ["settings.save_every=2", "run.eval_prompts=4"]
    whole = distill("jsonl.toml", tmp_path / "whole", *changes)
    assert whole["is_finished"]
    assert whole["accuracy"]["before"]["prompts"] == 4
    command = [
        python(),
        *CLI,
        "distill",
        EXAMPLES / "jsonl.toml",
        "--out",
        tmp_path / "run",
        "--set",
    ]
    process = subprocess.Popen(
        [*command, *changes], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path
    )
    while not (tmp_path / "run" / "step-000002").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    again = distill("jsonl.toml", tmp_path / "run", *changes)
    assert again["accuracy"] == whole["accuracy"]
    weights = [
        load_file(tmp_path / name / "step-000008" / "adapter_model.safetensors")
        for name in ("whole", "run")
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(bool((weights[0][name] == weights[1][name]).all()) for name in weights[0])
    assert (tmp_path / "run" / "adapter" / "README.md").exists()


def test_the_example_of_a_4_bit_base_trains(hub, tmp_path):
    changes = ["settings.steps=2", "settings.batch=2", "settings.n=1", "settings.max_new_tokens=8"]
    changes += ["run.eval_prompts=0", "run.trace_prompts=1", "run.trackers=[]"]
    package, given = str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")
    paths = os.pathsep.join(path for path in (package, given) if path)
    env = hub.environment(PYTHONPATH=paths)
    done = distill("qlora.toml", tmp_path / "run", *changes, env=env)
    assert done["is_finished"]
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "Qwen/Qwen3-4B"
    assert config["r"] == 32
