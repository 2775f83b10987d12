"""A plan on paper counts what real models have, and its sums are those of `cost` and of runs."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from warm_start import python

import opdlab as opd
from opdlab.diagnose.cost import _saved_per_token, cost
from opdlab.diagnose.plan import DEVICES, PLACEMENTS, Efficiency, Plans, Work, plan, saved_per_token
from opdlab.diagnose.shapes import KNOWN, Shape, shape_of, shape_of_config
from opdlab.errors import InvalidValue
from opdlab.tasks.market import data, model
from opdlab.training.settings import Settings

ROOT = Path(__file__).parents[2]
SMALL, BIG = "Qwen/Qwen3-1.7B", "Qwen/Qwen3-32B"
HUGE = "Qwen/Qwen3-235B-A22B"


def planned(teacher: str = BIG, gpus: int = 8, **work: object) -> Plans:
    return plan(shape_of(SMALL), shape_of(teacher), gpus, work=Work(**work))


def by_name(plans: Plans) -> dict[str, object]:
    return {one.placement: one for one in plans.plans}


# Shapes.


@pytest.mark.parametrize("name", ["student", "teacher", "scribe"])
def test_a_shape_counts_what_the_model_has(name):
    policy = model(name)
    real, found = policy.weights.model, shape_of(str(data() / name))
    assert found.parameters == sum(p.numel() for p in real.parameters())
    assert found.head == real.get_output_embeddings().weight.numel()
    table = real.get_input_embeddings().weight
    outside = {id(table), id(real.get_output_embeddings().weight)}
    assert found.active == sum(p.numel() for p in real.parameters() if id(p) not in outside)
    adapted = policy.adapt(rank=4)
    state = adapted.weights.adapter_state(str(adapted.adapter))
    assert 4 * found.lora == sum(value.numel() for value in state.values())


@pytest.mark.parametrize(
    ("name", "billions", "active"),
    [("Qwen/Qwen3-4B", 4.0, 3.6), (BIG, 32.8, 31.2), ("Qwen/Qwen3-30B-A3B", 30.5, 2.7)],
)
def test_known_shapes_have_the_sizes_of_their_names(name, billions, active):
    """Experts count as far as a token goes through them; embeddings and head are apart."""
    found = shape_of(name)
    assert found.parameters / 1e9 == pytest.approx(billions, abs=0.05)
    assert found.active / 1e9 == pytest.approx(active, abs=0.05)


def test_what_is_no_model_is_refused():
    with pytest.raises(InvalidValue, match="has no configuration from which a causal language"):
        shape_of(str(ROOT / "docs"))


def small_llama() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=200,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )


# Memory, against what `cost` counts on real models.


@pytest.mark.parametrize("rank", [None, 8])
def test_memory_of_one_device_is_that_of_cost(rank):
    torch.manual_seed(0)
    tokenizer = model("student").tokenizer
    config = small_llama()
    config.vocab_size = len(tokenizer)
    student = opd.Policy.of(LlamaForCausalLM(config), tokenizer, eos=1)
    teacher = opd.Policy.of(LlamaForCausalLM(config), tokenizer, eos=1)
    rollout = student.sample(opd.tasks.market().prompts(4), max_new_tokens=16, seed=0)
    settings = Settings(batch=4, max_new_tokens=16, lora=rank)
    counted = cost(student, teacher, rollout, settings).memory
    longest = max(map(len, student.encode_all(rollout.prompts)))
    work = Work(batch=4, prompt=longest, new=16, lora=rank, checkpointing=False, itemsize=4)
    shape = shape_of_config(config, "llama")
    (copies, *_) = plan(shape, shape, 1, DEVICES["h100"], work).plans
    assert copies.memory["student"] + copies.memory["teacher"] == counted["weights"]
    assert copies.memory["training"] == counted["training"]
    kept = _saved_per_token(student, rollout)
    assert saved_per_token(shape, work) == pytest.approx(kept, rel=0.25)


# The sums.


def test_more_devices_share_the_work():
    one, eight = (by_name(planned("Qwen/Qwen3-4B", gpus, batch=64)) for gpus in (1, 8))
    assert set(one) == {"copies"}
    assert set(eight) == set(PLACEMENTS)
    alone, copies = one["copies"], eight["copies"]
    for part in ("grade", "learn"):
        assert copies.seconds[part] == pytest.approx(alone.seconds[part] / 8)
    assert copies.memory["student"] == alone.memory["student"]
    assert alone.traffic["gradients"] == 0
    trained = 16 * shape_of(SMALL).lora
    assert copies.traffic["gradients"] == pytest.approx(2 * 7 / 8 * 4 * trained)
    assert eight["sharded"].memory["student"] == pytest.approx(alone.memory["student"] / 8)
    assert eight["sharded"].traffic["weights"] > copies.traffic["weights"] == 0


def test_writing_a_token_reads_the_weights_once_for_all_rows():
    """So it takes as long for 8 rows as for one, until their operations take longer."""
    free = Efficiency(overhead=0.0)
    shapes = shape_of(SMALL), shape_of(SMALL)
    few, many, most = (
        plan(*shapes, 1, work=Work(batch=batch, prompt=16, new=256), efficiency=free).plans[0]
        for batch in (1, 8, 4096)
    )
    assert many.seconds["write"] < 1.2 * few.seconds["write"]
    assert most.seconds["write"] > 20 * few.seconds["write"]


def test_a_teacher_that_does_not_fit_beside_the_student_goes_to_servers_or_shards():
    plans = by_name(planned(HUGE, 64, batch=64))
    assert not plans["copies"].fits
    assert plans["servers"].fits
    assert plans["servers"].serving % 8 == 0
    assert plans["servers"].training + plans["servers"].serving == 64
    assert plans["servers"].memory["teacher"] == 0
    assert plans["servers"].traffic["grades"] > 0
    nothing = planned(HUGE, 1)
    assert nothing.best is None
    assert "do not fit" in str(nothing)


def test_all_weights_cost_sixteen_bytes_each():
    (copies, *_) = planned("Qwen/Qwen3-4B", 1, lora=None).plans
    bytes_ = copies.memory["student"] + copies.memory["training"]
    assert bytes_ == 16 * shape_of(SMALL).parameters


def test_bad_plans_are_refused():
    with pytest.raises(InvalidValue, match="a prompt for each"):
        planned(gpus=8, batch=4)
    with pytest.raises(InvalidValue, match="plan got gpus=0"):
        planned(gpus=0)
    with pytest.raises(InvalidValue, match="plan got student='small'"):
        plan("small", shape_of(SMALL))
    with pytest.raises(InvalidValue, match="shape_of got source=3"):
        shape_of(3)
    with pytest.raises(InvalidValue, match="Work got new=0"):
        Work(new=0)
    with pytest.raises(InvalidValue, match="Efficiency got passes="):
        Efficiency(passes=1.5)


def opdlab(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python(), "-m", "opdlab.commands.cli", *words],
        capture_output=True,
        text=True,
        timeout=2500,
        check=False,
    )


def test_it_is_a_command():
    found = opdlab("doctor", SMALL, HUGE, "--gpus", "64", "--plan")
    assert found.returncode == 0, found.stderr
    assert "on 64 x H100 SXM" in found.stdout
    assert all(placement in found.stdout for placement in PLACEMENTS)
    alone = opdlab("doctor", SMALL, "--plan")
    assert alone.returncode == 1
    assert "Give two models" in alone.stderr


# The page and the measurements.


def test_the_block_of_the_page_runs():
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (block,) = [block for block in blocks if "shape_of" in block]
    exec(block, {})  # noqa: S102 (the page is ours)


def test_the_table_of_the_page_is_what_plan_says():
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    number = r"([\d.]+) \| "
    row = r"^\| (\d+) \| (Qwen3-\S+) \| ([a-z, ]+) \| " + 3 * number + r"([\d,]+) \|$"
    rows = re.findall(row, page, re.MULTILINE)
    assert len(rows) >= 8
    for gpus, teacher, placement, peak, step, sent, speed in rows:
        best = plan(
            shape_of("Qwen/Qwen3-1.7B"),
            shape_of(f"Qwen/{teacher}"),
            int(gpus),
            DEVICES["h100"],
            Work(batch=8 * int(gpus)),
            Efficiency(overhead=2e-5),
        ).best
        assert best is not None
        assert best.placement == placement
        assert f"{best.peak / 2**30:.1f}" == peak
        assert f"{best.step:.1f}" == step
        assert f"{sum(best.traffic.values()) / 2**30:.1f}" == sent
        assert f"{best.tokens_per_second:,.0f}" == speed


def test_predictions_are_as_good_as_the_page_says():
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    (seconds, memory) = map(
        float,
        re.search(r"within a factor of ([\d.]+) in CPU seconds and ([\d.]+) in", page).groups(),
    )
    rows = json.loads((ROOT / "benchmarks" / "results" / "scaling.json").read_text())
    assert {(row["size"], row["processes"]) for row in rows} == {
        (size, count) for size in ("3M", "17M", "54M") for count in (1, 2, 3)
    }
    for row in rows:
        measured, predicted = row["measured"], row["predicted"]
        if row["processes"] > 1:
            assert measured["bytes"] == predicted["bytes"]
        ratio = sum(measured["seconds"].values()) / sum(predicted["seconds"].values())
        assert 1 / seconds <= ratio <= seconds, row
        assert 1 / memory <= measured["memory"] / predicted["memory"] <= memory, row


def test_known_names_are_said():
    assert {SMALL, BIG, HUGE} <= set(KNOWN)
    assert isinstance(shape_of("small"), Shape)
