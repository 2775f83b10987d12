"""Plan and loss see numbers of one precision; heads and log-probs stay in float32."""

from __future__ import annotations

import pytest
import torch

import opdlab as opd
from opdlab import Policy
from opdlab.data.sampling_config import SamplingConfig
from opdlab.errors import InvalidValue
from opdlab.models.drawing import draw
from opdlab.models.precision import autocast_backbones

TASK = opd.tasks.from_records(
    [
        {"prompt": p, "answer": "1"}
        for p in ("ana has 4 7 apples", "ben has 2", "cleo has 2 pears buys 3")
    ],
    test=0,
    max_new_tokens=5,
)


class Looking:
    """A method whose plan grades all that its loss sees, and does some arithmetic of its own."""

    needs = ("teacher",)

    def __init__(self) -> None:
        self.differences: list[float] = []

    def plan(self, batch):
        seen = batch.map(
            lambda rows: {"mine": rows.student.clone(), "theirs": rows.teacher.clone()}
        )
        eye = torch.eye(3) + 1e-4
        self.arithmetic = (eye @ eye).dtype, float((eye @ eye)[0, 1])
        return {"mine": seen["mine"], "theirs": seen["theirs"], "written": batch.rollout.logp}

    def loss(self, rows):
        for name, policy in (("mine", "student"), ("theirs", "teacher")):
            self.differences.append(float((rows[name] - rows[policy]).abs().max().detach()))
        self.written = float((rows.written - rows.logp).abs().max().detach())
        return (rows.student.exp() * (rows.student - rows.teacher)).sum(-1)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("lora", [4, None])
def test_plan_and_loss_see_the_same_numbers(precision, lora, make_policy):
    method = Looking()
    student, teacher = make_policy(0), make_policy(1)
    run = opd.distill(
        student,
        teacher,
        TASK,
        method=method,
        steps=2,
        batch=3,
        lora=lora,
        lr=0.01,
        precision=precision,
        quiet=True,
    ).train()
    assert len(method.differences) >= 4  # the engine calls a loss more than once to check it
    assert set(method.differences) == {0.0}
    # The cache adds up in another order.
    assert method.written < (1e-4 if precision == "no" else 0.2)
    # Bfloat16 would say 0.0002 only roughly.
    assert method.arithmetic == (
        torch.float32,
        pytest.approx(2e-4, rel=1e-3),
    )
    assert {p.grad.dtype for p in run.parameters.values()} == {torch.float32}


def test_bf16_changes_the_backbone_and_not_the_head(make_policy):
    policy = make_policy(0)
    rollout = policy.sample(TASK.prompts(3), max_new_tokens=5)
    exact = policy.log_probs(rollout)
    with autocast_backbones(True), torch.no_grad():
        hidden = policy.hidden(rollout)
        rough = policy.log_probs(rollout)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().mean() < 0.1
    want = (hidden.float() @ policy.head.weight[: policy.head.vocab_size].T).log_softmax(-1)
    torch.testing.assert_close(rough, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(policy.log_probs(rollout), exact)  # and it ends with the block


def test_entropies_of_draws_are_float32_under_autocast():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 3
    uniform = torch.full((4,), 0.3, dtype=torch.float64)
    want = draw(logits.clone(), uniform, SamplingConfig())
    with torch.autocast("cpu", torch.bfloat16):
        got = draw(logits.clone(), uniform, SamplingConfig())
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_float16_is_refused_early(make_model, words):
    with pytest.raises(
        InvalidValue, match=r"LlamaForCausalLM is in float16.*dtype=torch\.bfloat16"
    ):
        Policy.of(make_model(70, dtype=torch.float16), words)


@pytest.mark.parametrize("precision", ["fp16", "float16", "16", None, True, "BF16"])
def test_other_precisions_are_refused(precision, make_policy):
    student = make_policy(0)
    with pytest.raises(InvalidValue, match="precision"):
        opd.distill(student, make_policy(1), TASK, precision=precision)
