"""Adapters that a model brings, that are made, copied, folded, and refused."""

from __future__ import annotations

import gc
import warnings
from itertools import pairwise

import peft
import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

import opdlab as opd
from opdlab import Policy
from opdlab.errors import InvalidValue, OpdlabError
from opdlab.methods import SelfDistillation
from opdlab.training.resolution import trained_tensors

KINDS = {
    "list": {"target_modules": ["q_proj", "down_proj"]},
    "regex": {"target_modules": r".*\.(q|up)_proj"},
    "one layer": {
        "target_modules": ["q_proj", "down_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    },
    "patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"q_proj": 31},
    },
    "rslora": {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 3},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "dropout": {"target_modules": ["q_proj"], "lora_dropout": 0.5},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "whole norm": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "whole embeddings and head": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens", "lm_head"],
    },
    "pissa": {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
}
TASK = opd.tasks.from_records(
    [
        {"prompt": p, "answer": "1", "hint": "say sum"}
        for p in ("ana has 4 7 apples", "ben has 2", "cleo has 2 pears buys 3")
    ],
    test=0,
    max_new_tokens=5,
)


def adapted(
    make_model, seed: int = 0, name: str = "sft", dtype=torch.float32, tied: bool = False, **options
):
    """A `PeftModel` whose adapter is far from the identity."""
    model = make_model(70, seed, dtype=dtype, tie_word_embeddings=tied)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outer = get_peft_model(
            model, LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **options}), adapter_name=name
        )
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, p in outer.named_parameters():
            if p.requires_grad and "magnitude" not in key:
                p.add_(0.2 * torch.randn(p.shape, generator=generator).to(p.dtype))
    return outer.eval()


def own_log_probs(model, policy: Policy, rollout) -> torch.Tensor:
    """What the model itself says, in one unpadded pass a completion."""
    out = []
    for start, body in zip(policy.encode_all(rollout.prompts), rollout.completions(), strict=True):
        with torch.no_grad():
            out.append(
                model(torch.tensor([start + body]))
                .logits[0, len(start) - 1 : -1]
                .float()
                .log_softmax(-1)
            )
    return torch.cat(out)


def close(a, b, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_a_model_brings_counts_everywhere(kind, make_model, words, prompts):
    outer = adapted(make_model, **KINDS[kind])
    policy = Policy.of(outer, words)
    rollout = policy.sample(prompts, n=2, max_new_tokens=6, seed=1)
    want = own_log_probs(outer, policy, rollout)
    sampled = rollout.ids[rollout.mask][:, None]
    assert policy.adapter == "sft"
    assert "adapter 'sft'" in repr(policy)
    close(policy.log_probs(rollout), want)
    close(rollout.logp[rollout.mask], want.gather(-1, sampled)[:, 0])
    bare = Policy(policy.weights).log_probs(rollout)
    assert (bare - want).abs().max() > 0.05
    # Copies keep every setting and every number, and move no more.
    views = {
        "frozen": policy.frozen(),
        "twice": policy.frozen().frozen(),
        "copied": policy.copied(),
        "merged": policy.merged(),
    }
    for view in views.values():
        close(view.log_probs(rollout), want, 1e-3)
    settings = policy.weights.config_of("sft").to_dict()
    for view in (views["frozen"], views["twice"], views["copied"]):
        assert view.weights.config_of(view.adapter).to_dict() == settings | {
            "inference_mode": False
        }
    assert views["merged"].adapter is None
    assert not [
        name
        for name, _ in views["merged"].weights.model.named_parameters()
        if "lora" in name or "base_layer" in name
    ]
    close(Policy(policy.weights).log_probs(rollout), bare)
    close(own_log_probs(outer, policy, rollout), want)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dropout"])
def test_gradients_are_those_of_the_model_itself(kind, make_model, words, prompts):
    torch.manual_seed(0)  # of the adapter
    outer = adapted(make_model, **KINDS[kind])
    student, teacher = Policy.of(outer, words), Policy.of(make_model(70, 5), words)
    run = opd.distill(student, teacher, TASK, steps=1, batch=3, clip=0, lr=0.0, quiet=True)
    step = next(run)
    got = {name: p.grad.clone() for name, p in run.parameters.items()}
    outer.zero_grad()
    loss = 0.0
    rollout = step.rollout
    for start, body in zip(student.encode_all(rollout.prompts), rollout.completions(), strict=True):
        ids = torch.tensor([start + body])
        p, q = (
            m(ids).logits[0, len(start) - 1 : -1].log_softmax(-1)
            for m in (outer, teacher.weights.model)
        )
        loss = loss + (p.exp() * (p - q)).sum() / rollout.tokens
    loss.backward()
    assert step.metrics["loss"] == pytest.approx(float(loss), rel=1e-4)
    want = {name: p.grad for name, p in student.weights.model.named_parameters() if name in got}
    assert any(g.norm() > 0 for g in want.values() if g is not None)
    # Rounding goes with the largest gradient: small ones are differences of large terms.
    largest = max(float(g.abs().max()) for g in want.values() if g is not None)
    for name, grad in got.items():
        expected = torch.zeros_like(grad) if want[name] is None else want[name]
        torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-4 * largest)


def test_an_adapter_that_cannot_be_folded_is_still_trained(make_model, words):
    student = Policy.of(adapted(make_model, target_modules=["q_proj"], lora_bias=True), words)
    with pytest.raises(
        InvalidValue,
        match=r"'sft' cannot be folded into model.layers.0.self_attn.q_proj.*Train it on",
    ):
        student.merged()
    run = opd.distill(student, student.frozen(), TASK, steps=1, batch=3, quiet=True)
    assert next(run).metrics["loss"] == pytest.approx(0, abs=1e-6)
    assert any("lora_B.sft.bias" in name for name in run.parameters)


def test_a_second_stage_trains_the_adapter_on_and_rate_zero_changes_nothing(
    make_model, words, prompts
):
    student = Policy.of(adapted(make_model, target_modules="all-linear"), words)
    rollout = student.sample(prompts, max_new_tokens=5)
    before = student.log_probs(rollout)
    run = opd.distill(
        student, Policy.of(make_model(70, 5), words), TASK, steps=1, batch=3, lr=0.0, quiet=True
    ).train()
    assert run.settings.lora == 4
    assert student.weights.adapters == ["sft"]
    assert torch.equal(student.log_probs(rollout), before)
    opd.distill(
        student, Policy.of(make_model(70, 5), words), TASK, steps=1, batch=3, lr=0.1, quiet=True
    ).train()
    assert (student.log_probs(rollout) - before).abs().max() > 0.01


def test_a_second_stage_may_stack_or_start_from_the_bare_model(make_model, words, prompts):
    outer = adapted(make_model, target_modules="all-linear")
    first, bare = Policy.of(outer, words), Policy.of(outer, words, adapter=None)
    rollout = first.sample(prompts, max_new_tokens=5)
    before, plain = first.log_probs(rollout), bare.log_probs(rollout)
    assert (before - plain).abs().max() > 0.05
    for student, start in ((first.merged(), before), (bare, plain)):
        run = opd.distill(student, first, TASK, steps=1, batch=3, lora=2, lr=0.0, quiet=True)
        assert run.student.weights.config_of(student.adapter).r == 2
        close(student.log_probs(rollout), start)
        opd.distill(
            student, Policy.of(make_model(70, 5), words), TASK, steps=1, batch=3, lr=0.1, quiet=True
        ).train()
        # The first stage's adapter stands as it was.
        assert torch.equal(first.log_probs(rollout), before)


def test_another_rank_than_the_adapters_is_refused(make_model, words):
    student = Policy.of(adapted(make_model, target_modules="all-linear"), words)
    with pytest.raises(
        InvalidValue,
        match=r"got lora=16, but the student looks through the adapter 'sft' of rank 4.*merged\(\)",
    ):
        opd.distill(student, student.frozen(), TASK, lora=16)
    assert opd.distill(student, student.frozen(), TASK, lora=4, quiet=True).settings.lora == 4
    with pytest.raises(OpdlabError, match=r"lora=None would leave beside.*student\.merged\(\)"):
        opd.distill(student, student.frozen(), TASK, lora=None)
    with pytest.raises(
        InvalidValue, match=r"new LoRA in the place of the adapter 'sft'.*merged\(\)\.adapt"
    ):
        student.adapt(4)


def test_a_fresh_adapter_may_be_made_again(make_policy, perturb):
    policy = make_policy(0).adapt(4).adapt(2)  # a notebook's cell that is run twice
    assert policy.weights.config_of(policy.adapter).r == 2
    perturb(policy)
    with pytest.raises(InvalidValue, match="new LoRA in the place of the adapter"):
        policy.adapt(4)
    assert policy.weights.config_of(policy.adapter).r == 2


def test_all_weights_of_a_merged_student_can_be_trained(make_model, words, prompts):
    first = Policy.of(adapted(make_model, target_modules="all-linear"), words)
    rollout = first.sample(prompts, max_new_tokens=5)
    before, student = first.log_probs(rollout), first.merged()
    run = opd.distill(
        student,
        Policy.of(make_model(70, 5), words),
        TASK,
        steps=2,
        batch=3,
        lora=None,
        lr=0.01,
        quiet=True,
    ).train()
    assert set(run.parameters) == {name for name, _ in make_model(70).named_parameters()}
    assert (student.log_probs(rollout) - before).abs().max() > 0.01
    assert torch.equal(first.log_probs(rollout), before)


def test_training_all_weights_moves_no_policy_that_looks_at_them(make_policy, prompts):
    student, teacher = make_policy(0), make_policy(1)
    rollout = student.sample(prompts, max_new_tokens=5)
    # Neither takes part in the run.
    still, live = (
        student.frozen(),
        student.seeing(lambda prompt: prompt),
    )
    adapted_twin = student.frozen().adapt(2)
    before = student.log_probs(rollout)
    opd.distill(student, teacher, TASK, steps=1, batch=3, lora=None, lr=0.01, quiet=True).train()
    assert torch.equal(still.log_probs(rollout), before)
    assert torch.equal(adapted_twin.log_probs(rollout), before)
    assert (student.log_probs(rollout) - before).abs().max() > 0.01
    assert torch.equal(live.log_probs(rollout), student.log_probs(rollout))
    assert student.weights.adapters == []


def test_reference_and_average_have_the_students_settings(make_model, words):
    student = Policy.of(adapted(make_model, **KINDS["patterns"] | {"use_rslora": True}), words)
    settings = student.weights.config_of("sft").to_dict()
    run = opd.distill(
        student,
        None,
        TASK,
        method=SelfDistillation.sdft(),
        steps=2,
        batch=3,
        lr=0.05,
        ema_rate=0.5,
        quiet=True,
    )
    (average,) = run.averages
    assert average.adapter != student.adapter
    assert student.weights.config_of(average.adapter).to_dict() == settings | {
        "inference_mode": False
    }
    state, start = trained_tensors(average), trained_tensors(student.frozen())
    assert all(torch.equal(state[name], start[name]) for name in start)
    run.train()
    assert all(torch.isfinite(value).all() for value in trained_tensors(average).values())
    assert any(
        not torch.equal(value, start[name]) for name, value in trained_tensors(average).items()
    )


def test_a_checkpoint_keeps_the_settings_and_can_be_loaded(make_model, words, prompts, tmp_path):
    base = tmp_path / "base"
    make_model(70).save_pretrained(base)
    words.save_pretrained(base)
    outer = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(
            r=4,
            target_modules=r".*\.q_proj",
            use_rslora=True,
            lora_alpha=5,
            modules_to_save=["lm_head"],
            task_type="CAUSAL_LM",
        ),
        adapter_name="sft",
    )
    student = Policy.of(outer, words)
    run = opd.distill(
        student, Policy.of(make_model(70, 5), words), TASK, steps=2, batch=3, lr=0.05, quiet=True
    ).train()
    rollout = student.sample(prompts, max_new_tokens=5)
    folder = run.save(tmp_path / "run")
    again = Policy.load(folder, device="cpu")
    assert again.adapter == "default"
    config = again.weights.config_of("default")
    assert (config.r, config.target_modules, config.use_rslora, config.lora_alpha) == (
        4,
        r".*\.q_proj",
        True,
        5,
    )
    close(again.log_probs(rollout), student.log_probs(rollout))


# Heads.


def test_tied_embeddings_stay_as_the_model_says(make_model, words, prompts):
    for options in (
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ):
        outer = adapted(make_model, tied=True, **options)
        policy = Policy.of(outer, words)
        rollout = policy.sample(prompts, max_new_tokens=5)
        want = own_log_probs(outer, policy, rollout)
        close(policy.log_probs(rollout), want)
        merged = policy.merged()
        close(merged.log_probs(rollout), want, 1e-3)
        assert not merged.weights.model.config.tie_word_embeddings


@pytest.mark.parametrize("targets", ["lm_head", "modules_to_save"])
def test_a_new_adapter_on_the_head_trains(targets, make_policy, make_model, words):
    student, teacher = make_policy(0), make_policy(1)
    options = (
        {"targets": ["lm_head", "q_proj"]}
        if targets == "lm_head"
        else {"targets": ["q_proj"], "modules_to_save": ["lm_head"]}
    )
    student.adapt(4, **options)
    before = {k: v.clone() for k, v in student.weights.adapter_state(student.adapter).items()}
    opd.distill(student, teacher, TASK, steps=2, batch=3, lr=0.01, quiet=True).train()
    after = student.weights.adapter_state(student.adapter)
    moved = [k for k, v in after.items() if "lm_head" in k and not torch.equal(v, before[k])]
    assert moved


def test_heads_that_are_no_plain_matrix_are_refused(make_model, words, make_policy):
    model = make_model(70)
    torch.nn.utils.parametrizations.weight_norm(model.lm_head)
    with pytest.raises(
        InvalidValue,
        match=r"no plain matrix but a parametrized Parametrized.*remove parametrizations",
    ):
        Policy.of(model, words)
    model = make_model(70)
    model.lm_head.weight = torch.nn.Parameter(
        (model.lm_head.weight * 10).to(torch.int8), requires_grad=False
    )
    with pytest.raises(
        InvalidValue, match=r"no plain matrix but a quantised Linear \(torch.int8\)"
    ):
        Policy.of(model, words)
    model = make_model(70).model
    with pytest.raises(InvalidValue, match="LlamaModel has no output head"):
        Policy.of(model, words)
    with pytest.raises(InvalidValue, match=r"special kind of LoRA.*Leave the head out"):
        make_policy(0).adapt(4, targets=["lm_head"], use_dora=True)
    with pytest.raises(InvalidValue, match="special kind of LoRA"):
        Policy.of(adapted(make_model, target_modules=["lm_head"], lora_bias=True), words)


# Precision.


@pytest.mark.parametrize(
    "kind",
    ["list", "dora", "embeddings", "whole norm", "head", "whole head", "whole embeddings and head"],
)
def test_adapters_of_a_bf16_model_are_float32_and_stay_it(kind, make_model, words, prompts):
    student = Policy.of(adapted(make_model, dtype=torch.bfloat16, **KINDS[kind]), words)
    fresh = Policy.of(make_model(70, dtype=torch.bfloat16), words)
    fresh.adapt(
        4, targets=KINDS[kind]["target_modules"], modules_to_save=KINDS[kind].get("modules_to_save")
    )
    for policy in (student, fresh):
        rollout = policy.sample(prompts, max_new_tokens=5)
        views = [policy, policy.frozen(), policy.copied()]
        assert {v.dtype for p in views for v in p.weights.adapter_state(p.adapter).values()} == {
            torch.float32
        }
        for view in views[1:]:
            assert torch.equal(view.log_probs(rollout), policy.log_probs(rollout))
        run = opd.distill(
            policy,
            Policy.of(make_model(70, 5), words),
            TASK,
            steps=2,
            batch=3,
            quiet=True,
            snapshot_every=1,
        ).train()
        assert {p.dtype for p in run.parameters.values()} == {torch.float32}
        assert {v.dtype for s in run.optimizer.state.values() for v in s.values()} == {
            torch.float32
        }
        assert {
            v.dtype
            for p in (run.at(1), run.at(2))
            for v in p.weights.adapter_state(p.adapter).values()
        } == {torch.float32}
        assert torch.equal(run.at(2).log_probs(rollout), policy.log_probs(rollout))


def test_bf16_weights_are_not_trained_themselves(make_model, words):
    student = Policy.of(make_model(70, dtype=torch.bfloat16), words)
    with pytest.raises(
        InvalidValue, match=r"lora=None trains the weights.*bfloat16.*dtype=torch\.float32"
    ):
        opd.distill(student, student.frozen(), TASK, lora=None)


# What is made.


def test_options_of_a_new_adapter_are_kept_and_checked(make_policy):
    policy = make_policy(0)
    policy.adapt(4, alpha=3, targets=r".*q_proj", use_rslora=True, rank_pattern={"q_proj": 2})
    config = policy.weights.config_of(policy.adapter)
    assert (
        config.r,
        config.lora_alpha,
        config.target_modules,
        config.use_rslora,
        config.rank_pattern,
    ) == (4, 3, r".*q_proj", True, {"q_proj": 2})
    assert (
        policy.weights.adapter_state(policy.adapter)[
            "model.layers.0.self_attn.q_proj.lora_A.weight"
        ].shape[0]
        == 2
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "adapt got rank=0. Use a whole number of at least 1"),
        ({"rank": 2.0}, "adapt got rank=2.0"),
        ({"rank": "4"}, "adapt got rank='4'"),
        ({"rank": True}, "adapt got rank=True"),
        ({"alpha": -1}, "adapt got alpha=-1"),
        ({"alpha": float("nan")}, "adapt got alpha=nan"),
        ({"targets": 5}, "adapt got targets=5"),
        ({"targets": []}, "cannot take this LoRA"),
        ({"targets": ["nope"]}, "cannot take this LoRA: .*nope"),
        ({"targets": "(("}, "cannot take this LoRA"),
        ({"targets": ["q_proj", "nope"]}, "fit nothing in LlamaForCausalLM: 'nope'"),
        ({"modules_to_save": ["nope"]}, "fit nothing in LlamaForCausalLM: 'nope'"),
        ({"rank_pattern": {"nope": 3}}, "fit nothing in LlamaForCausalLM: .*rank_pattern.*'nope'"),
        ({"exclude_modules": ["nope"]}, "fit nothing in LlamaForCausalLM: .*exclude_modules"),
        ({"targets": ["q_proj"], "layers_to_transform": [0, 7]}, r"layer 7 \(there are 2\)"),
        ({"layers_to_transform": [0]}, "adapt cannot make this LoRA: .*layers_to_transform"),
        ({"modules_to_save": 5}, "adapt got modules_to_save=5"),
        ({"seed": -1}, "adapt got seed=-1"),
        ({"seed": None}, "adapt got seed=None"),
        ({"r": 4}, "adapt got r=4. Its name here is rank"),
        ({"lora_alpha": 4}, "Its name here is alpha"),
        (
            {"rnak": 4},
            "adapt has no option 'rnak'. There are rank, alpha, targets, seed and .*use_dora",
        ),
        ({"use_dora": "yes"}, "adapt got use_dora='yes'"),
        ({"lora_dropout": 0.1}, "trains without dropout"),
        ({"lora_dropout": "0.1x"}, "adapt got lora_dropout="),
        ({"init_lora_weights": "pissa"}, "would change the base model"),
        ({"init_lora_weights": "nope"}, "init_lora_weights='nope'"),
        ({"bias": "all"}, "moves biases of the base model"),
        ({"layer_replication": [[0, 1]]}, "no option 'layer_replication'"),
        ({"inference_mode": True}, "no option 'inference_mode'"),
    ],
)
def test_wrong_options_leave_the_model_as_it_was(options, said, make_policy):
    policy = make_policy(0)
    names = [name for name, _ in policy.weights.model.named_modules()]
    with pytest.raises(InvalidValue, match=said):
        policy.adapt(**options)
    assert policy.adapter is None
    assert policy.weights.adapters == []
    assert [name for name, _ in policy.weights.model.named_modules()] == names


# What is refused.


def test_other_kinds_of_adapters_are_refused_by_name(make_model, words):
    with pytest.raises(InvalidValue, match=r"'default' is of the kind IA3.*LoRA"):
        Policy.of(get_peft_model(make_model(70), IA3Config(task_type="CAUSAL_LM")), words)
    with pytest.raises(InvalidValue, match="of the kind PROMPT_TUNING"):
        Policy.of(
            get_peft_model(
                make_model(70), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
            ),
            words,
        )
    with pytest.raises(InvalidValue, match="of the kind LOHA"):
        Policy.of(get_peft_model(make_model(70), peft.LoHaConfig(target_modules=["q_proj"])), words)
    with pytest.raises(InvalidValue, match="trainable_token_indices"):
        Policy.of(
            adapted(make_model, target_modules=["q_proj"], trainable_token_indices=[3]), words
        )
    with pytest.raises(InvalidValue, match="bias='all'"):
        Policy.of(adapted(make_model, target_modules=["q_proj"], bias="all"), words)


def test_several_active_adapters_and_merged_ones_are_refused(make_model, words, prompts):
    outer = adapted(make_model, target_modules=["q_proj"])
    outer.add_adapter(
        "dpo", LoraConfig(r=2, target_modules=["down_proj"], modules_to_save=["lm_head"])
    )
    assert Policy.of(outer, words).adapter == "sft"
    second = Policy.of(outer, words, adapter="dpo")
    assert second.adapter == "dpo"
    rollout = second.sample(prompts, max_new_tokens=3)
    bare = Policy.of(outer, words, adapter=None).log_probs(rollout)
    assert torch.equal(second.log_probs(rollout), bare)  # untrained, whatever else is on the model
    outer.base_model.set_adapter(["sft", "dpo"])
    with pytest.raises(InvalidValue, match="goes through 2 adapters at once"):
        Policy.of(outer, words)
    outer.set_adapter("sft")
    with pytest.raises(InvalidValue, match=r"has no adapter 'nope'; there are 'sft', 'dpo'"):
        Policy.of(outer, words, adapter="nope")
    outer.merge_adapter()
    with pytest.raises(InvalidValue, match="merged into it for now"):
        Policy.of(outer, words)


def test_the_model_may_be_switched_from_outside(make_model, words, prompts):
    outer = adapted(make_model, **KINDS["whole head"])
    policy, bare = Policy.of(outer, words), Policy.of(outer, words, adapter=None)
    rollout = policy.sample(prompts, max_new_tokens=5)
    with_it, without = policy.log_probs(rollout), bare.log_probs(rollout)
    policy.weights.model.disable_adapters()
    assert torch.equal(policy.log_probs(rollout), with_it)
    policy.weights.model.enable_adapters()
    assert torch.equal(bare.log_probs(rollout), without)
    assert torch.equal(policy.log_probs(rollout), with_it)
    policy.weights.model.disable_adapters()
    assert Policy.of(policy.weights.model, words).adapter is None


def test_a_policy_whose_adapter_was_taken_off_says_so(make_policy, prompts):
    policy = make_policy(0).adapt(2)
    policy.weights.delete_adapter(policy.adapter)
    with pytest.raises(OpdlabError, match="'lora0' was taken off the model"):
        policy.sample(prompts, max_new_tokens=2)


def test_weights_of_another_adapter_are_refused_whole(make_policy):
    policy, other = make_policy(0).adapt(4), make_policy(0).adapt(2)
    before = {k: v.clone() for k, v in policy.weights.adapter_state(policy.adapter).items()}
    state = other.weights.adapter_state(other.adapter)
    for wrong in (state, {}, dict(list(before.items())[1:]), before | {"more": torch.zeros(1)}):
        with pytest.raises(InvalidValue, match="not the tensors of the adapter 'lora0'"):
            policy.weights.set_adapter_state(policy.adapter, wrong)
    assert all(
        torch.equal(v, before[k]) for k, v in policy.weights.adapter_state(policy.adapter).items()
    )


def test_dropout_of_an_adapter_is_told_when_it_trains(make_model, words):
    student = Policy.of(adapted(make_model, **KINDS["dropout"]), words)
    with pytest.warns(UserWarning, match="lora_dropout=0.5. opdlab trains without dropout"):
        run = opd.distill(student, student.frozen(), TASK, steps=1, batch=3, quiet=True)
    # The student that is graded is the one that trains.
    assert next(run).metrics["loss"] == pytest.approx(0, abs=1e-6)
    assert student.weights.config_of("sft").lora_dropout == 0.5


# Leaks.


def test_looking_back_and_freezing_leave_no_adapters_behind(make_policy, prompts):
    student, teacher = make_policy(0), make_policy(1)
    run = opd.distill(
        student, teacher, TASK, steps=3, batch=3, lr=0.05, lora=2, snapshot_every=1, quiet=True
    ).train()
    rollout = student.sample(prompts, max_new_tokens=4)
    want = [run.at(i).log_probs(rollout) for i in range(4)]
    assert all((a - b).abs().max() > 1e-3 for a, b in pairwise(want))
    before = len(student.weights.adapters)
    for _ in range(3):
        for i in range(4):
            assert torch.equal(run.at(i).log_probs(rollout), want[i])
            student.frozen().seeing("say sum").sample(prompts[:1], max_new_tokens=1)
    gc.collect()
    assert len(student.weights.adapters) <= before
    kept = [run.at(i) for i in range(4)]
    for policy, value in zip(kept, want, strict=True):
        assert torch.equal(policy.log_probs(rollout), value)
    view = kept[1].seeing(lambda prompt: prompt)  # a view keeps its adapter when the policy goes
    del kept, policy
    student.frozen()
    student.frozen()
    assert torch.equal(view.log_probs(rollout), want[1])


def test_the_last_adapter_takes_its_layers_along(make_policy, prompts):
    policy = make_policy(0)
    names = [name for name, _ in policy.weights.model.named_modules()]
    policy.adapt(2, targets=["q_proj", "lm_head"], modules_to_save=["norm"])
    assert "base_layer" in str([name for name, _ in policy.weights.model.named_modules()])
    policy.weights.delete_adapter(policy.adapter)
    assert [name for name, _ in policy.weights.model.named_modules()] == names


def test_all_linear_leaves_routers_that_are_no_plain_layer_alone(make_policy):
    policy = make_policy(0, family="phimoe", num_local_experts=4, num_experts_per_tok=2).adapt(2)
    assert not [name for name in policy.weights.adapter_state(policy.adapter) if "router" in name]
    other = make_policy(0, family="phimoe", num_local_experts=4, num_experts_per_tok=2)
    with pytest.raises(
        InvalidValue, match=r"PhimoeForCausalLM does not run with this LoRA.*Leave the layer out"
    ):
        other.adapt(2, targets=["router"])
    assert other.weights.adapters == []
