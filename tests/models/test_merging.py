"""While a text is written, a LoRA stands in its layers' weights, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

from opdlab import Prompt
from opdlab.models.adapters.layers import find_layers
from opdlab.models.adapters.merging import FEWEST_TOKENS, merged_for_writing

PROMPTS = [Prompt("ana has"), Prompt("ben has 3 figs and")]


def with_lora(make_policy, **options):
    """A policy with a LoRA that changes what it writes."""
    policy = make_policy()
    torch.manual_seed(0)
    policy.adapt(4, **options)
    for name, parameter in policy.weights.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return policy


def products_of_lora(policy):
    """Count the calls of LoRA matrices in a pass of `FEWEST_TOKENS` tokens."""
    calls = []
    hooks = [
        module.register_forward_hook(lambda *_: calls.append(1))
        for name, module in policy.weights.model.named_modules()
        if ".lora_" in name and isinstance(module, torch.nn.Linear)
    ]
    policy.sample(PROMPTS, max_new_tokens=FEWEST_TOKENS, temperature=0)
    for hook in hooks:
        hook.remove()
    return len(calls)


def test_what_is_written_is_what_the_policy_grades(make_policy):
    policy = with_lora(make_policy)
    rollout = policy.sample(PROMPTS, n=3, max_new_tokens=12, seed=1)
    graded = policy.log_probs(rollout)
    mine = graded.gather(-1, rollout.ids[rollout.mask][:, None])[:, 0]
    torch.testing.assert_close(rollout.logp[rollout.mask], mine, rtol=1e-4, atol=1e-5)
    bare = make_policy().log_probs(rollout)
    assert (graded - bare).abs().max() > 0.1  # the LoRA matters


def test_weights_come_back_bit_for_bit_also_after_an_error(make_policy):
    policy = with_lora(make_policy)
    model = policy.weights.model
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}

    def write_and_fail():
        with policy.weights.using(policy.adapter), merged_for_writing(model, 100):
            now = dict(model.named_parameters())
            changed = [name for name, p in now.items() if p is not before[name][0]]
            assert len(changed) == len(find_layers(model)) > 0
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_and_fail()
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, (parameter, value) in before.items():
        assert after[name] is parameter
        assert torch.equal(parameter, value)
    assert policy.weights.active is None
    with policy.weights.using(policy.adapter):
        assert policy.weights.active == policy.adapter


def test_no_product_of_the_lora_is_made_while_a_text_is_written(make_policy):
    assert products_of_lora(with_lora(make_policy)) == 0


@pytest.mark.parametrize("kind", ["DoRA", "bfloat16", "autocast", "few tokens"])
def test_layers_stay_as_they_are_where_a_sum_is_another_number(make_policy, kind):
    policy = with_lora(make_policy, **({"use_dora": True} if kind == "DoRA" else {}))
    model, tokens = policy.weights.model, FEWEST_TOKENS - (kind == "few tokens")
    if kind == "bfloat16":
        for layer in find_layers(model):
            layer.get_base_layer().to(torch.bfloat16)
    before = dict(model.named_parameters())
    with (
        policy.weights.using(policy.adapter),
        torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"),
        merged_for_writing(model, tokens),
    ):
        assert all(p is before[name] for name, p in model.named_parameters())
        assert policy.weights.active == policy.adapter


def test_a_policy_on_the_bare_model_is_not_touched(make_policy):
    policy = with_lora(make_policy)
    bare = policy.frozen() if policy.adapter is None else type(policy)(policy.weights)
    before = dict(policy.weights.model.named_parameters())
    with bare.weights.using(None), merged_for_writing(policy.weights.model, 100):
        after = dict(policy.weights.model.named_parameters())
        assert all(after[name] is p for name, p in before.items())
