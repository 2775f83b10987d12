"""opdlab inside TRL: the same losses as TRL's own where it has them, and the same gradients as
autograd where it has not.
"""

import sys

import pytest
import torch

import opdlab as opd
from opdlab.losses.divergences import reverse_kl
from opdlab.tasks import market
from opdlab.tasks.market import model as shipped


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
        "gain": batch.signals["student_entropy"] / batch.signals["student_entropy"].max()
    },
)
def gated(rows):
    """Has a plan that compares the tokens of a batch."""
    return (1 + rows.gain) * reverse_kl(rows.student, rows.teacher)


def arguments(folder, lora=True, **options):
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DistillationConfig

    student, teacher = shipped("student"), shipped("teacher")
    student.weights.model.requires_grad_(not lora)
    args = DistillationConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=4,
        max_completion_length=12,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        max_steps=2,
        **options,
    )
    prompts = [{"prompt": [dict(m) for m in p.messages]} for p in market().prompts(16, seed=3)]
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    return {
        "model": student.weights.model,
        "teacher_model": teacher.weights.model,
        "args": args,
        "peft_config": adapter,
        "processing_class": student.tokenizer,
        "train_dataset": Dataset.from_list(prompts),
    }


def test_trains_as_trl_does_where_trl_has_the_loss(bridge, tmp_path):
    from trl import DistillationTrainer

    histories = []
    for make in (lambda **a: bridge.MethodTrainer(opd.OPD(), **a), DistillationTrainer):
        trainer = make(**arguments(tmp_path, beta=1.0, gradient_accumulation_steps=2))
        trainer.train()
        histories.append([row for row in trainer.state.log_history if "loss" in row])
    assert len(histories[0]) == 2
    for ours, theirs in zip(*histories, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3, abs=2e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        assert ours["entropy"] == pytest.approx(theirs["entropy"], rel=1e-3)


def test_gradients_of_all_weights_are_those_of_full_logits(bridge, tmp_path):
    trainer = bridge.MethodTrainer(gated, **arguments(tmp_path, lora=False))
    prompts = [{"prompt": [dict(m) for m in p.messages]} for p in market().prompts(3, seed=5)]
    inputs = trainer._generate_and_score_completions(prompts)
    ids, mask = (
        torch.cat([inputs[f"prompt_{what}"], inputs[f"completion_{what}"]], 1)
        for what in ("ids", "mask")
    )
    width, told = inputs["completion_ids"].shape[1], inputs["completion_mask"].bool()

    p, q = (
        m(input_ids=ids, attention_mask=mask).logits[:, -width - 1 : -1].log_softmax(-1)[told]
        for m in (trainer.model, trainer.teacher_model)
    )
    entropy = -(p.exp() * p).sum(-1).detach()
    want = ((1 + entropy / entropy.max()) * (p.exp() * (p - q.detach())).sum(-1)).sum() / told.sum()
    want.backward()
    grads = {name: x.grad.clone() for name, x in trainer.model.named_parameters()}
    trainer.model.zero_grad()

    half, entropies, tokens = trainer._compute_loss(
        trainer.model, inputs, 2 * told.sum()
    )  # as one of two accumulated batches
    assert all(x.grad is None for x in trainer.model.parameters())  # nothing moves before backward
    (2 * half).backward()
    assert half.item() == pytest.approx(want.item() / 2, rel=1e-5)
    assert (entropies / tokens).item() == pytest.approx(entropy.mean().item(), rel=1e-4)
    for name, x in trainer.model.named_parameters():
        torch.testing.assert_close(
            x.grad, grads[name], rtol=1e-3, atol=1e-3 * grads[name].abs().max().item(), msg=name
        )


def test_refuses_what_trl_cannot_give(bridge, tmp_path):
    with pytest.raises(
        opd.OpdlabError, match=r"SelfDistillation needs reference\+hint.*Use opdlab.distill"
    ):
        bridge.MethodTrainer(opd.SelfDistillation())
    with pytest.raises(opd.OpdlabError, match="GRPO looks at no teacher"):
        bridge.MethodTrainer(opd.GRPO())
    with pytest.raises(opd.OpdlabError, match="OPD learns from texts of teacher too"):
        bridge.MethodTrainer(opd.OPD(on_policy=0.5))
    with pytest.raises(opd.OpdlabError, match=r"temperature is 0\.7"):
        bridge.MethodTrainer(opd.OPD(), **arguments(tmp_path, temperature=0.7))
