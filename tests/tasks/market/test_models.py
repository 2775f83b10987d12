"""The shipped models pass their gates, are small, and are what the build script makes."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from warm_start import python

import opdlab as opd
from opdlab.tasks.market import (
    MODELS,
    build,
    data,
    gates,
    market,
    skills,
    teachers,
    tokenizers,
    world,
)
from opdlab.training.config import parse_toml


@pytest.fixture(scope="module")
def measured():
    return gates.measure(data(), n=300)


@pytest.mark.parametrize("name", gates.BANDS)
def test_gates(measured, name):
    least, most = gates.BANDS[name]
    assert least <= measured[name] <= most + 1e-2, name


def test_sizes_and_formats():
    for name in MODELS:
        files = list((data() / name).iterdir())
        assert sum(f.stat().st_size for f in files) < 4e6
        assert {f.suffix for f in files} <= {".json", ".safetensors", ".jinja"}


def test_the_build_is_deterministic(tmp_path):
    """Two steps a phase of each model, twice, in processes of their own: the same bytes."""
    sums = []
    for run in ("a", "b"):
        command = [
            python(),
            "-m",
            "opdlab.tasks.market.build",
            "--out",
            str(tmp_path / run),
            "--smoke",
        ]
        subprocess.run(
            command,
            check=True,
            capture_output=True,
            timeout=2000,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        sums.append(
            {
                n: (
                    hashlib.sha256(
                        (tmp_path / run / n / "model.safetensors").read_bytes()
                    ).hexdigest()
                )
                for n in MODELS
            }
        )
    assert sums[0] == sums[1]
    assert len(set(sums[0].values())) == len(MODELS)


def test_the_adapters_have_half_of_the_skill():
    for (adapter, skill), value in skills.measure(data(), n=60).items():
        assert value >= 0.95 if adapter == skill else value <= 0.35
    for name in world.SKILLS:
        files = list((data() / name).iterdir())
        assert {f.name for f in files} == {"adapter_config.json", "adapter_model.safetensors"}
        assert sum(f.stat().st_size for f in files) < 200_000


def test_the_teachers_are_adapters_on_the_student():
    student = opd.load("market")[0]
    made = teachers(student)
    assert all(policy.weights is student.weights for policy in made.values())
    task = market(alike=True)
    prompts = task.prompts(40)
    kinds = [prompt.metadata["skill"] for prompt in prompts]
    assert set(kinds) == set(made)
    many = opd.MultiTeacher(made, route="skill")
    run = opd.distill(student, many, task, steps=1, batch=4, quiet=True)
    tables = parse_toml(run.to_config())
    assert tables["task"] == {"name": "market", "alike": True}
    assert tables["teacher"]["members"]["addition"] == {"source": "student", "adapter": "addition"}
    again = opd.from_config(run.to_config(), quiet=True)
    assert next(again).metrics["loss"] == next(run).metrics["loss"]


def test_the_build_of_the_adapters_is_deterministic(tmp_path):
    sums = []
    for run in ("a", "b"):
        shutil.copytree(data() / "student", tmp_path / run / "student")
        for skill in world.SKILLS:
            skills.train(skill, tmp_path / run, steps=2)
        files = sorted(path for path in (tmp_path / run).rglob("adapter_*"))
        sums.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in files])
    assert sums[0] == sums[1]
    assert len(set(sums[0])) == 3  # two adapters, one configuration


def test_planted_mistakes_carry_no_loss():
    tokenizer, rng, seen = tokenizers.words(), random.Random(1), 0
    for _ in range(200):
        text = build.draw(rng, build.RECIPES["teacher"], secret=True, phase=build.Phase(1))
        _, labels = build.encode([text], tokenizer)
        trained = tokenizer.decode(
            [i for i in labels[0].tolist() if i >= 0], skip_special_tokens=True
        ).split()
        whole = text.solution.split()
        assert len(whole) - len(trained) == 2 * len(text.masked)
        seen += bool(text.masked)
    assert 40 < seen < 110


def test_the_wheel_carries_the_models(tmp_path):
    root = Path(__file__).parents[3]
    subprocess.run(
        [
            sys.executable,
            "-m",
            "build",
            "--wheel",
            "--no-isolation",
            "--outdir",
            str(tmp_path),
            str(root),
        ],
        check=True,
        capture_output=True,
        timeout=2000,
    )
    import zipfile

    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    assert {f"opdlab/shipped/market/{name}/model.safetensors" for name in MODELS} <= names
    assert "opdlab/viz/static/token_lens.js" in names or any(
        n.startswith("opdlab/viz/static/") for n in names
    )


def test_load_says_what_there_is():
    with pytest.raises(ValueError, match=r"ships student, novice, .*, clerk, not 'pupil'"):
        opd.load("market", student="pupil")
    with pytest.raises(opd.OpdlabError, match="no profile 'huge'"):
        opd.load("huge")


def test_the_parts_of_a_batch_give_its_gradient():
    tokenizer, rng = tokenizers.words(), random.Random(0)
    texts = [
        build.draw(rng, build.RECIPES["teacher"], secret=True, phase=build.Phase(1))
        for _ in range(9)
    ]
    ids, labels = build.encode(texts, tokenizer)
    lengths = (ids != tokenizer.pad_token_id).sum(1)
    assert len(set(lengths.tolist())) > 3
    model = build.make_model(build.RECIPES["novice"], tokenizer)
    whole = cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    want = torch.autograd.grad(whole, list(model.parameters()))
    for parts in (1, 4, 9):
        model.zero_grad()
        assert build.backward(model, ids, labels, lengths, parts) == pytest.approx(
            whole.item(), rel=1e-5
        )
        torch.testing.assert_close(
            [p.grad for p in model.parameters()], list(want), rtol=1e-3, atol=1e-6
        )


@pytest.mark.parametrize("name", ["clerk", "trainee"])
def test_the_shipped_tokenizer_is_the_one_that_a_build_writes(name, tmp_path):
    tokenizers.calls().save_pretrained(tmp_path)
    built = (tmp_path / "tokenizer.json").read_bytes()
    assert built == (data() / name / "tokenizer.json").read_bytes()
