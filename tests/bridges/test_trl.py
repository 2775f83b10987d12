"""opdlab inside TRL: the loss and the gradient of `distill`, for every method that is accepted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from warm_start import python

import opdlab as opd
from opdlab.data.seeds import seed_of
from opdlab.losses.divergences import reverse_kl
from opdlab.tasks import market
from opdlab.tasks.market import model as shipped
from opdlab.teachers import TextOnly
from opdlab.training import phases, sharding

HERE = Path(__file__).parent
needs_fsdp = pytest.mark.skipif(not sharding.IS_SUPPORTED, reason="FSDP needs PyTorch 2.13")


def test_says_how_to_get_trl(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "opdlab.bridges.trl", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'opdlab\[trl\]'"):
        import opdlab.bridges.trl  # noqa: F401


@pytest.fixture(scope="module")
def bridge():
    pytest.importorskip("trl")
    torch.set_num_threads(1)
    from opdlab.bridges import trl

    return trl


@opd.method(
    needs=("teacher",),
    plan=lambda batch: {
        "gain": batch.signals["student_entropy"] / batch.mean(batch.signals["student_entropy"])
    },
)
def gated(rows):
    """Has a plan that compares the tokens of a step."""
    return (1 + rows.gain) * reverse_kl(rows.student, rows.teacher)


@dataclass(frozen=True)
class Audited:
    """A user's own plan: quantiles and random numbers over the whole step."""

    needs = ("teacher",)

    def plan(self, batch):
        logp = batch.rollout.logp
        unsure = logp < batch.gather(logp).quantile(0.5) - 1e-3
        return {"weight": (0.1 + unsure) * batch.random(batch.step)}

    def loss(self, rows):
        return rows.weight * reverse_kl(rows.student, rows.teacher)


AUDITS = {"chunks": 4, "continuations": 4, "length": 1, "similarity": "rouge1"}
METHODS = {
    "OPD": (opd.OPD(), "model"),
    "OPD sampled": (opd.OPD(estimator="sampled", baseline="value", discount=0.9), "model"),
    "OPD mixed": (opd.OPD(on_policy=0.5), "model"),
    "OPDPlus": (opd.OPDPlus("forward_kl", baseline="value"), "model"),
    "TOPD": (opd.TOPD(window=3, share=0.3), "model"),
    "DOPD": (opd.DOPD(), "model"),
    "OmniOPD": (opd.OmniOPD(**AUDITS, match_length=True), "model"),
    "SelfDistillation": (opd.SelfDistillation(anchor="ema"), None),
    "SequenceKD": (opd.SequenceKD(), "writer"),
    "SFT": (opd.SFT(), None),
    "SODA": (opd.SODA(), "model"),
    "SpanOPD": (opd.SpanOPD(), "model"),
    "EOPD": (opd.EOPD(), "model"),
    "OPSA": (opd.OPSA(), None),
    "GOPD": (opd.GOPD(), "model"),
    "gated": (gated, "model"),
    "own plan": (Audited(), "model"),
}


def rows_of(prompts):
    return [
        {"prompt": [dict(m) for m in p.messages], "answer": p.answer, "hint": p.hint, "id": p.id}
        for p in prompts
    ]


def arguments(folder, lora=True, teacher="model", **options):
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DistillationConfig

    student = shipped("student")
    student.weights.model.requires_grad_(not lora)
    torch.manual_seed(0)  # for the adapter's first values, which older TRL draws as they come
    chosen = {
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 12,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "max_steps": 2,
        **options,
    }
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    given = {
        "model": student.weights.model,
        "args": DistillationConfig(output_dir=str(folder), **chosen),
        "peft_config": adapter,
        "processing_class": student.tokenizer,
        "train_dataset": Dataset.from_list(rows_of(market(hint="answer").prompts(16, seed=3))),
    }
    if teacher == "model":
        given["teacher_model"] = shipped("teacher").weights.model
    elif teacher == "writer":
        given["teacher"] = TextOnly(shipped("teacher"))
    return given


def move_a_little(trainer):
    """Give a LoRA that has not trained yet weights of its own, so that all policies differ."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator)


def gradients(trainer, prompts):
    """TRL's own way through one step of two accumulated batches; returns its loss too."""
    trainer.model.train()
    trainer.model.zero_grad()
    total = 0.0
    for number in range(2):
        inputs = trainer._prepare_inputs(prompts)
        loss = trainer.compute_loss(trainer.model, inputs)
        if number == 0:  # nothing moves before TRL's backward pass
            assert all(p.grad is None for p in trainer.model.parameters())
        loss.backward()
        total += loss.item()
        trainer._step += 1
    return total, {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}


def of_distill(trainer, lora=True, **options):
    """The same step by the phases of `distill`, on the trainer's own completions."""
    rollout = trainer._now.planned.batch.rollout
    prompts = list(dict.fromkeys(map(id, rollout.prompts)))
    settings = {"batch": len(prompts), "steps": 1, "max_new_tokens": 12, "clip": 0.0}
    settings |= {"seed": trainer.args.seed, "quiet": True, "lora": 4 if lora else None, **options}
    run = opd.distill(
        trainer.student, trainer.teacher, market(hint="answer"), method=trainer.method, **settings
    )
    run.policies = trainer.policies | {"student": run.student}
    for parameter in run.parameters.values():
        parameter.grad = None
    planned = phases.plan_step(run, rollout)
    learned = phases.accumulate_gradient(run, planned, rollout)
    loss = float((learned.columns["loss"] * learned.weight).sum())
    return loss, {p: p.grad for p in run.parameters.values()}


@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradient_are_those_of_distill(name, bridge, tmp_path):
    method, teacher = METHODS[name]
    trainer = bridge.MethodTrainer(method, **arguments(tmp_path, teacher=teacher))
    move_a_little(trainer)
    prompts = rows_of(market(hint="answer").prompts(4, seed=5))
    loss, found = gradients(trainer, prompts)
    found = {n: g.clone() for n, g in found.items()}
    parameters = dict(trainer.model.named_parameters())
    want_loss, wanted = of_distill(trainer)
    assert loss == pytest.approx(want_loss, rel=1e-4, abs=1e-6)
    assert len(found) == len(wanted) > 8
    largest = max(g.abs().max().item() for g in wanted.values())
    assert largest > 0
    for parameter_name, gradient in found.items():
        want = wanted[parameters[parameter_name]]
        torch.testing.assert_close(
            gradient, want, rtol=1e-3, atol=1e-4 * largest, msg=parameter_name
        )


def test_all_weights_too(bridge, tmp_path):
    trainer = bridge.MethodTrainer(gated, **arguments(tmp_path, lora=False))
    prompts = rows_of(market(hint="answer").prompts(4, seed=5))
    loss, found = gradients(trainer, prompts)
    found = {n: g.clone() for n, g in found.items()}
    parameters = dict(trainer.model.named_parameters())
    want_loss, wanted = of_distill(trainer, lora=False)
    assert loss == pytest.approx(want_loss, rel=1e-4)
    largest = max(g.abs().max().item() for g in wanted.values())
    for parameter_name, gradient in found.items():
        torch.testing.assert_close(
            gradient,
            wanted[parameters[parameter_name]],
            rtol=1e-3,
            atol=1e-4 * largest,
            msg=parameter_name,
        )


@pytest.mark.parametrize("normalize", ["sequence", "constant"])
def test_the_mean_is_taken_as_distill_takes_it(normalize, bridge, tmp_path):
    trainer = bridge.MethodTrainer(opd.OPD(), normalize=normalize, **arguments(tmp_path))
    loss, _ = gradients(trainer, rows_of(market(hint="answer").prompts(4, seed=5)))
    want, _ = of_distill(trainer, normalize=normalize)
    assert loss == pytest.approx(want, rel=1e-4)


def test_texts_of_other_writers_are_theirs(bridge, tmp_path):
    """The teacher's are those that it writes for `distill` at this seed, the answers are the
    dataset's, and of a mixed method the student writes its share.
    """
    prompts = market(hint="answer").prompts(4, seed=5)
    trainer = bridge.MethodTrainer(opd.SequenceKD(), **arguments(tmp_path))
    trainer._prepare_inputs(rows_of(prompts))
    rollout = trainer._now.planned.batch.rollout
    seed = seed_of(trainer.args.seed, 0, 2)
    want = shipped("teacher").sample(prompts, max_new_tokens=12, seed=seed)
    assert rollout.texts == want.texts
    assert set(rollout.writer) == {"teacher"}
    trainer = bridge.MethodTrainer(opd.SFT(), **arguments(tmp_path, teacher=None))
    trainer._prepare_inputs(rows_of(prompts))
    assert trainer._now.planned.batch.rollout.texts == tuple(p.answer for p in prompts)
    trainer = bridge.MethodTrainer(opd.OPD(on_policy=0.5), **arguments(tmp_path))
    trainer._prepare_inputs(rows_of(prompts))
    assert trainer._now.planned.batch.rollout.writer == ("student",) * 2 + ("teacher",) * 2


def test_tokens_of_tools_are_not_learned(bridge, tmp_path, monkeypatch):
    from trl import DistillationTrainer

    generate = DistillationTrainer._generate_and_score_completions

    def with_tools(self, inputs):
        found = generate(self, inputs)
        found["tool_mask"] = found["completion_mask"].clone()
        found["tool_mask"][:, 1:4] = 0
        return found

    monkeypatch.setattr(DistillationTrainer, "_generate_and_score_completions", with_tools)
    trainer = bridge.MethodTrainer(gated, **arguments(tmp_path))
    loss, _ = gradients(trainer, rows_of(market(hint="answer").prompts(4, seed=5)))
    batch = trainer._now.planned.batch
    assert not batch.learn[:, 1:4].any()
    assert batch.mask[:, 1:4].any()
    assert (trainer._now.weight != 0).sum() == batch.learn.sum()
    assert loss == pytest.approx(of_distill(trainer)[0], rel=1e-4)


def test_log_probs_are_the_trainers_whoever_generates(bridge, tmp_path, monkeypatch):
    """As with TRL's vLLM, which hands over ids alone."""
    drawn = shipped("novice").sample(market(hint="answer").prompts(4, seed=5), max_new_tokens=12)
    trainer = bridge.MethodTrainer(opd.OPD(estimator="sampled"), **arguments(tmp_path))
    monkeypatch.setattr(trainer, "_generate_single_turn", lambda *_, **__: drawn.completions())
    trainer._prepare_inputs(rows_of(market(hint="answer").prompts(4, seed=5)))
    rollout = trainer._now.planned.batch.rollout
    assert rollout.completions() == drawn.completions()
    own = torch.zeros_like(rollout.logp)
    own[rollout.mask] = (
        trainer.student.log_probs(rollout).gather(1, rollout.ids[rollout.mask][:, None]).squeeze(1)
    )
    torch.testing.assert_close(rollout.logp, own, rtol=1e-4, atol=1e-5)


def test_an_evaluation_has_the_loss_of_a_step(bridge, tmp_path):
    from datasets import Dataset

    given = arguments(tmp_path, per_device_eval_batch_size=4)
    rows = rows_of(market(hint="answer").prompts(4, seed=5))
    trainer = bridge.MethodTrainer(gated, **given, eval_dataset=Dataset.from_list(rows))
    move_a_little(trainer)
    found = trainer.evaluate()["eval_loss"]
    assert found == pytest.approx(of_distill(trainer)[0], rel=1e-4)


def test_trains_as_trl_does_where_trl_has_the_loss(bridge, tmp_path):
    from trl import DistillationTrainer

    histories = []
    for make in (lambda **a: bridge.MethodTrainer(opd.OPD(), **a), DistillationTrainer):
        # Adam makes a whole step of a gradient that is all rounding; this goes by its size.
        trainer = make(**arguments(tmp_path, beta=1.0, optim="sgd", learning_rate=1.0))
        trainer.train()
        histories.append([row for row in trainer.state.log_history if "loss" in row])
    assert len(histories[0]) == 2
    # Before TRL 1.15, its divergence loses digits of the gradient on tokens that are almost sure.
    has_kernel = tuple(map(int, version("trl").split(".")[:2])) >= (1, 15)
    for ours, theirs in zip(*(rows if has_kernel else rows[:1] for rows in histories), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3, abs=2e-5)
        assert ours["entropy"] == pytest.approx(theirs["entropy"], rel=1e-3)
        assert ours["grad_norm"] == pytest.approx(
            theirs["grad_norm"], rel=1e-3 if has_kernel else 0.2
        )


def test_a_moving_average_moves_once_an_update(bridge, tmp_path):
    trainer = bridge.MethodTrainer(
        opd.SelfDistillation(anchor="ema"),
        ema_rate=0.25,
        **arguments(tmp_path, teacher=None, max_steps=1, save_strategy="steps", save_steps=1),
    )
    state = trainer.student.weights.adapter_state
    before = {name: value.clone() for name, value in state(trainer.student.adapter).items()}
    trainer.train()
    (average,) = trainer.averages
    after, moved = state(trainer.student.adapter), state(average.adapter)
    assert any(not torch.equal(before[name], after[name]) for name in after)
    for name, value in moved.items():
        torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * after[name])
    again = bridge.MethodTrainer(
        opd.SelfDistillation(anchor="ema"), **arguments(tmp_path, teacher=None)
    )
    with pytest.raises(opd.OpdlabError, match="a moving average, which TRL's checkpoints do not"):
        again.train(resume_from_checkpoint=True)


@dataclass(frozen=True)
class Case:
    """A run in two processes.

    Attributes:
        method: The method.
        lora: Whether a LoRA trains, and not all weights.
        teacher: As in `arguments`.
        options: Of TRL's config.
        is_tied: Whether the head and the embeddings are one matrix.
    """

    method: Any
    lora: bool = True
    teacher: str | None = "model"
    options: dict[str, Any] = field(default_factory=dict)
    is_tied: bool = True


CASES = {
    "views": Case(  # a plan with thresholds, hinted teacher and student, the reference
        opd.DOPD(),
        options={"gradient_checkpointing": True, "save_strategy": "steps", "save_steps": 1},
    ),
    "average of all weights": Case(
        opd.SelfDistillation(anchor="ema"), lora=False, teacher=None, is_tied=False
    ),
    # In bf16. So few texts are the student's that one process of two has none.
    "one text by the student": Case(opd.OPD(on_policy=0.125), lora=False, options={"bf16": True}),
}
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")
CONFIG = str(HERE.parents[1] / "examples" / "fsdp2.yaml")
LAUNCH = ("accelerate.commands.accelerate_cli", "launch", "--config_file", CONFIG)


def in_two_processes(launcher, folder, *names):
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    env["PYTHONPATH"] = os.pathsep.join(map(str, (HERE, HERE.parent, HERE.parents[1])))
    env["PYTHON_EXEC"] = python()  # what torchrun starts
    script = str(HERE / "two_trl_processes.py")
    command = [python(), "-m", *launcher, script, str(folder), *names]
    subprocess.run(command, env=env, check=True, timeout=3000)
    return folder


@pytest.fixture(scope="module")
def whole(bridge, tmp_path_factory):
    """The runs of two processes with DDP."""
    return in_two_processes(TORCHRUN, tmp_path_factory.mktemp("whole"), *CASES)


@pytest.fixture(scope="module")
def sharded(bridge, tmp_path_factory):
    """The runs of two processes with FSDP2, over gloo."""
    return in_two_processes(LAUNCH, tmp_path_factory.mktemp("sharded"), *CASES)


def assert_close_to(largest_share, found, wanted):
    """Compare tensors by name, to a share of the largest number of all."""
    assert found.keys() == wanted.keys()
    assert len(found) > 8
    largest = max(value.abs().max().item() for value in wanted.values())
    assert largest > 0
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name],
            value,
            rtol=1e-3,
            atol=largest_share * largest,
            msg=lambda said, name=name: f"{name}: {said}",
        )


def read(folder, kind, rank=0):
    return json.loads((folder / f"{kind}-{rank}.json").read_text())


def test_two_processes_have_the_gradient_of_one(bridge, whole, tmp_path):
    """DDP over gloo: the plan's statistics are over the step of both."""
    parts = [read(whole / "views", "rollout", rank) for rank in range(2)]
    trainer = bridge.MethodTrainer(
        CASES["views"].method,
        **arguments(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2),
    )
    ids = {row["id"]: row for row in trainer.train_dataset}
    rows = [ids[name] for part in parts for name in part["prompts"]]
    bodies = [body for part in parts for body in part["completions"]]
    assert len(bodies) == 8
    assert parts[0]["completions"] != parts[1]["completions"]
    trainer._generate_single_turn = lambda *_, **__: bodies
    _, found = gradients(trainer, rows)
    assert_close_to(1e-4, torch.load(whole / "views" / "gradients.pt", weights_only=True), found)


@needs_fsdp
@pytest.mark.parametrize("name", CASES)
def test_shards_have_the_losses_gradients_and_weights_of_ddp(name, whole, sharded):
    """Over two updates, each of two accumulated batches."""
    ours, theirs = sharded / name, whole / name
    for rank in range(2):
        assert read(ours, "rollout", rank) == read(theirs, "rollout", rank)
    assert read(ours, "said")["sharded"]
    assert not read(theirs, "said")["sharded"]
    losses = read(ours, "said")["losses"]
    assert losses == pytest.approx(read(theirs, "said")["losses"], rel=1e-4, abs=1e-6)
    for file in ("gradients.pt", "weights.pt"):
        found, want = (torch.load(folder / file, weights_only=True) for folder in (ours, theirs))
        assert_close_to(1e-4, found, want)


@needs_fsdp
def test_a_sharded_run_is_taken_up(sharded):
    folder = sharded / "views"
    found, wanted = (
        torch.load(folder / file, weights_only=True) for file in ("resumed.pt", "weights.pt")
    )
    assert_close_to(1e-4, found, wanted)


@needs_fsdp
def test_shards_take_less_memory(whole, sharded):
    name = "average of all weights"
    assert read(sharded / name, "said")["bytes"] < 0.75 * read(whole / name, "said")["bytes"]


REFUSED = [
    (opd.GRPO(), {}, "GRPO learns from a verifier.*GRPOTrainer"),
    (opd.OVD(), {}, "OVD compares the completions of a prompt, and TRL's"),
    (opd.OPD(), {"teacher": None}, "OPD needs 'teacher', but there is no such policy"),
    (opd.SequenceKD(), {"teacher": None}, "lets a teacher write, but there is none"),
    (opd.SFT(), {}, "got a teacher, and SFT reads none"),
    (opd.OPD(), {"temperature": 0.7}, r"temperature is 0\.7"),
    (opd.OPD(), {"teacher": "writer"}, "must grade tokens, but TextOnly only writes"),
    (opd.DOPD(), {"tools": True}, "renders prompts without TRL's tools"),
    (opd.OPD(), {"normalize": "text"}, "Use 'token', 'sequence' or 'constant'"),
]


@pytest.mark.parametrize(("method", "options", "said"), REFUSED)
def test_refuses_what_cannot_work(method, options, said, bridge, tmp_path):
    options = dict(options)
    added = {"normalize": options.pop("normalize")} if "normalize" in options else {}
    added |= {"tools": [print]} if options.pop("tools", False) else {}
    with pytest.raises(opd.OpdlabError, match=said):
        bridge.MethodTrainer(method, **added, **arguments(tmp_path, **options))


def test_refuses_both_kinds_of_teacher(bridge, tmp_path):
    given = arguments(tmp_path)
    with pytest.raises(opd.OpdlabError, match="teacher and teacher_model"):
        bridge.MethodTrainer(opd.OPD(), teacher=shipped("teacher"), **given)


@needs_fsdp
@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"FSDP_VERSION": "1"}, "FSDP 1, and opdlab shards with FSDP2"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "load empty weights"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "policies gather the shards on the device"),
    ],
)
def test_refuses_options_of_fsdp(variables, said, bridge, monkeypatch):
    from accelerate import Accelerator

    from opdlab.bridges.trl_shards import check_shards

    for name in os.environ:
        if name.startswith(("FSDP_", "ACCELERATE_USE_")):
            monkeypatch.delenv(name)
    for name, value in {"FSDP_VERSION": "2", "ACCELERATE_USE_FSDP": "true", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(opd.OpdlabError, match=said):
        check_shards(Accelerator(), shipped("student").weights.model)


def test_refuses_zero_3(bridge):
    from opdlab.bridges.trl_checks import check_trainer

    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3))
    trainer = SimpleNamespace(
        processing_class=shipped("student").tokenizer,
        temperature=1.0,
        accelerator=SimpleNamespace(state=state),
    )
    with pytest.raises(opd.OpdlabError, match=r"ZeRO-3 gives each process a part.*fsdp2\.yaml"):
        check_trainer(trainer)
