"""Checks of one model family against its own plain passes: one text, no padding, no cache."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from family_zoo import build
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

import opdlab as opd
from opdlab import Policy, Prompt
from opdlab.data.rollout import Rollout
from opdlab.engine.passes import gradient
from opdlab.errors import InvalidValue, UnsupportedModel
from opdlab.models.graded import States
from opdlab.tasks.market import tokenizers as market

WORDS = market.words()
RULE = "say sum " + "4 7 1 2 " * 5  # more tokens than a shared prefix needs
APART = [
    Prompt("ana has 4 7 apples"),
    Prompt("ben"),
    Prompt("cleo has 2 pears buys 3 sells 1 9 . total ?"),
]
ALIKE = [Prompt(RULE + prompt.text) for prompt in APART]
# Nats; rounding of these sharp models stays below a tenth of it.
CLOSE = {"rtol": 1e-3, "atol": 1e-3}
MLP = (
    "mlp",
    "ffn",
    "feed_forward",
    "expert",
    "moe",
    "fc",
    "dense_",
    "gate_proj",
    "up_proj",
    "down_proj",
    "w1",
    "w2",
    "w3",
    "c_proj",
)


class Refused(Exception):
    """opdlab refuses, in words, what a check asks."""


class Elsewhere(Exception):
    """What a check asks fails without opdlab, too."""


class Family:
    """A family's policy and what the checks share."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        model = build(name, len(WORDS))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            self.policy = Policy.of(model, WORDS)
        self.warning = " ".join(str(w.message) for w in said if w.category is UserWarning)

    def teacher(self) -> Policy:
        return Policy.of(build(self.name, len(WORDS), seed=1), WORDS)

    def stopping(self, rollout: Rollout) -> Policy:
        """The policy with EOS ids that it says at different positions."""
        return Policy.of(
            self.policy.weights.model, WORDS, eos=[1, *rollout.ids[[0, 2], [1, 2]].tolist()]
        )


def plain_logits(policy: Policy, rollout: Rollout) -> Tensor:
    """The model's own logits `[tokens, V]`, from one pass per text."""
    rows = []
    for start, body in zip(policy.encode_all(rollout.prompts), rollout.completions(), strict=True):
        logits = policy.weights.model(
            input_ids=torch.tensor([start + body]), use_cache=False
        ).logits
        rows.append(logits[0, len(start) - 1 : -1, : policy.weights.vocab_size].float())
    return torch.cat(rows)


def plain_log_probs(policy: Policy, rollout: Rollout) -> Tensor:
    with torch.no_grad(), policy.weights.using(policy.adapter):
        return plain_logits(policy, rollout).log_softmax(-1)


def scoring(family: Family) -> None:
    """Texts of different length, whose prompts begin alike or not."""
    for prompts in (APART, ALIKE):
        rollout = family.policy.sample(prompts, max_new_tokens=6, seed=1)
        torch.testing.assert_close(
            family.policy.log_probs(rollout), plain_log_probs(family.policy, rollout), **CLOSE
        )


def sampling(family: Family) -> None:
    """The sampler's log-probs, with one sample and two; greedy takes the likeliest token."""
    for n, temperature in ((1, 0.0), (2, 1.0)):
        rollout = family.policy.sample(
            APART, n=n, max_new_tokens=8, seed=2, temperature=temperature
        )
        check_sampler(family.policy, rollout, greedy=temperature == 0)


def early_ends(family: Family) -> None:
    """Texts that end at different steps, so that the batch shrinks."""
    policy = family.stopping(family.policy.sample(APART, n=2, max_new_tokens=8, seed=3))
    rollout = policy.sample(APART, n=2, max_new_tokens=8, seed=3)
    assert len(set(rollout.lengths.tolist())) > 1
    check_sampler(policy, rollout)


def check_sampler(policy: Policy, rollout: Rollout, greedy: bool = False) -> None:
    want = plain_log_probs(policy, rollout)
    tokens = rollout.ids[rollout.mask]
    torch.testing.assert_close(
        rollout.logp[rollout.mask], want.gather(-1, tokens[:, None])[:, 0], **CLOSE
    )
    if greedy:
        assert torch.equal(tokens, want.argmax(-1))


def adapter_gradients(family: Family) -> None:
    """A LoRA's gradients through the engine equal those of autograd on the model's full logits."""
    check_gradients(family.policy.copied().adapt(rank=2))


def full_gradients(family: Family) -> None:
    """The same for all of a model's weights, the head included."""
    policy = family.policy.copied()
    policy.weights.model.requires_grad_(True)
    check_gradients(policy)


def check_gradients(policy: Policy) -> None:
    rollout = policy.sample(APART, max_new_tokens=6, seed=4)
    token = rollout.ids[rollout.mask]
    with policy.weights.using(policy.adapter) as model:
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for name, p in parameters.items():
            if "lora_B" in name:  # zero at first, and nothing would reach lora_A
                torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(5))
        logp = plain_logits(policy, rollout).log_softmax(-1).gather(-1, token[:, None])[:, 0]
        want = torch.autograd.grad(-logp.mean(), list(parameters.values()), allow_unused=True)
        hidden = policy.hidden(rollout)
        states = {"student": States(hidden, policy.weights.head)}
        weight = torch.full((len(token),), 1 / len(token))
        hidden.backward(gradient(lambda rows: -rows.logp, states, token, weight).gradient)
    largest = max(float(w.abs().max()) for w in want if w is not None)
    for (name, p), w in zip(parameters.items(), want, strict=True):
        w = torch.zeros_like(p) if w is None else w
        got = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(
            got, w, rtol=1e-2, atol=1e-4 * largest, msg=lambda text, name=name: f"{name}: {text}"
        )


def lora_steps(family: Family) -> None:
    """Two steps move the adapter in attention, or its substitute, and in a linear MLP."""
    run = train(family, lora=2)
    moved = {name for name, p in run.parameters.items() if "lora_B" in name and bool(p.any())}
    mlp = {name for name in run.parameters if any(word in name for word in MLP)}
    assert moved - mlp, "no adapter outside the MLP has moved"
    assert moved & mlp or not mlp, "no adapter in the MLP has moved"


def same_policy(family: Family) -> None:
    """A teacher equal to the student teaches nothing: the reverse KL is zero."""
    run = opd.distill(
        family.policy.copied(),
        family.policy,
        task(),
        steps=1,
        batch=3,
        lora=2,
        max_new_tokens=6,
        quiet=True,
    )
    assert abs(next(run).metrics["loss"]) < 1e-4


def full_training(family: Family) -> None:
    """A step on all weights moves them, and to finite values."""
    run = train(family, lora=None)
    assert all(bool(p.isfinite().all()) for p in run.parameters.values())
    before = dict(family.policy.weights.model.named_parameters())
    assert any(not torch.equal(p, before[name]) for name, p in run.parameters.items())


def checkpointing(family: Family) -> None:
    """Gradient checkpointing changes no number, or is refused."""
    try:
        again = train(family, lora=2, checkpointing=True)
    except InvalidValue as error:
        raise Refused(str(error)) from error
    runs = [train(family, lora=2), again]
    for key in ("loss", "grad_norm"):
        torch.testing.assert_close(
            torch.tensor(runs[0].history[key]),
            torch.tensor(runs[1].history[key]),
            rtol=1e-3,
            atol=1e-4,
        )


def adapter_file(family: Family) -> None:
    """A saved adapter, read by PEFT onto the bare model, gives the trained policy's log-probs."""
    if not peft_reads_its_own(family):
        raise Elsewhere("PEFT does not read back what it saves itself")
    run = train(family, lora=2, lr=0.05)
    folder = run.save(family.folder / family.name)
    loaded = PeftModel.from_pretrained(build(family.name, len(WORDS)), folder).eval()
    rollout = run.student.sample(APART, max_new_tokens=6, seed=6)
    want = run.student.log_probs(rollout)
    assert not torch.allclose(want, family.policy.log_probs(rollout), atol=1e-2)
    rows = []
    for start, body in zip(
        run.student.encode_all(rollout.prompts), rollout.completions(), strict=True
    ):
        with torch.no_grad():
            rows.append(
                loaded(input_ids=torch.tensor([start + body]), use_cache=False).logits[
                    0, len(start) - 1 : -1
                ]
            )
    torch.testing.assert_close(torch.cat(rows)[:, : want.shape[1]].log_softmax(-1), want, **CLOSE)


def peft_reads_its_own(family: Family) -> bool:
    """Whether PEFT restores an adapter of its own making on this family."""
    config = LoraConfig(
        r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    try:
        saved = get_peft_model(build(family.name, len(WORDS)), config).eval()
    except ValueError:  # other names of layers
        return True
    saved.save_pretrained(family.folder / f"{family.name}-peft")
    loaded = PeftModel.from_pretrained(
        build(family.name, len(WORDS)), family.folder / f"{family.name}-peft"
    ).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        return torch.allclose(
            saved(input_ids=ids, use_cache=False).logits,
            loaded(input_ids=ids, use_cache=False).logits,
            atol=1e-3,
        )


def train(family: Family, **settings: object):
    options = {"steps": 2, "batch": 3, "max_new_tokens": 6, "lr": 1e-3, "quiet": True, **settings}
    return opd.distill(family.policy.copied(), family.teacher(), task(), **options).train()


def task():
    return opd.tasks.from_records(
        [{"prompt": prompt.text} for prompt in APART], test=0, max_new_tokens=6
    )


CHECKS: dict[str, Callable[[Family], None]] = {
    "scoring": scoring,
    "sampling": sampling,
    "early ends": early_ends,
    "LoRA gradients": adapter_gradients,
    "full gradients": full_gradients,
    "LoRA steps": lora_steps,
    "teacher = student": same_policy,
    "full training": full_training,
    "checkpointing": checkpointing,
    "PEFT file": adapter_file,
}


def make(name: str, folder: Path) -> Family | UnsupportedModel:
    """The family, or the error that refuses it."""
    try:
        return Family(name, folder)
    except UnsupportedModel as error:
        return error
