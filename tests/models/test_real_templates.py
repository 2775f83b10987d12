"""Real chat templates and vocabularies: where hints land, thinking, tools, foreign pairs, spans."""

from __future__ import annotations

import pytest
from imitation_hub.repositories import STUDENT, TEACHER
from imitation_hub.server import TOKEN

import opdlab as opd
from opdlab.errors import InvalidValue, TokenizerMismatch
from opdlab.models.same_tokens import check_same_tokens
from opdlab.tasks import from_prompts

NAMES = {
    "qwen3": STUDENT,
    "gemma3": "google/gemma-3-270m-it",
    "llama3": "meta-llama/Llama-3.2-1B-Instruct",
    "deepseek": "deepseek-ai/DeepSeek-V3",
}
CHAT = opd.Prompt(messages=({"role": "user", "content": "What is 2 + 2?"},), hint="It is 4.")
HINTED = {
    "qwen3": "<|im_start|>system\nIt is 4.<|im_end|>\n<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n"
    "<|im_start|>assistant\n",
    "gemma3": "<bos><start_of_turn>user\nIt is 4.\n\nWhat is 2 + 2?<end_of_turn>\n"
    "<start_of_turn>model\n",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nIt is 4.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhat is 2 + 2?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "deepseek": "<｜begin▁of▁sentence｜>It is 4.<｜User｜>What is 2 + 2?<｜Assistant｜>",
}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
    },
}


@pytest.fixture(scope="module")
def policies(running_hub) -> dict[str, opd.Policy]:
    """One tiny model of each family."""
    from imitation_hub import connection

    with pytest.MonkeyPatch.context() as patch:
        connection.connect(running_hub, patch)
        patch.setenv("HF_TOKEN", TOKEN)
        return {name: opd.Policy.load(repository) for name, repository in NAMES.items()}


def read(policy: opd.Policy, prompt: opd.Prompt) -> str:
    """What a policy reads, special tokens included."""
    return policy.tokenizer.decode(policy.encode_all([prompt])[0])


def sums() -> opd.Task:
    """Four sums, asked in chats."""
    prompts = [opd.Prompt(messages=({"role": "user", "content": f"{i} + 1?"},)) for i in range(4)]
    return from_prompts(prompts, name="sums", test=1, max_new_tokens=12)


@pytest.mark.parametrize("name", NAMES)
def test_a_hint_lands_where_the_template_has_room_for_it(name, policies):
    assert read(policies[name].seeing(), CHAT) == HINTED[name]


@pytest.mark.parametrize("name", NAMES)
def test_hints_change_what_is_graded_and_not_which_tokens(name, policies):
    policy = policies[name]
    rollout = policy.sample([CHAT], 2, max_new_tokens=12, seed=0)
    plain, hinted = policy.grade(rollout).logp(), policy.seeing().grade(rollout).logp()
    assert plain.shape == hinted.shape
    assert (plain - hinted).abs().max() > 1e-3


def test_a_placeholder_of_images_is_refused_by_a_model_of_text(policies):
    gemma = policies["gemma3"]
    assert len(gemma.tokenizer) == gemma.weights.vocab_size + 1
    with pytest.raises(TokenizerMismatch, match=r"'<image_soft_token>' \(262144\).*text alone"):
        gemma.encode_all([opd.Prompt("See <image_soft_token> here")])


def test_thinking_is_switched_by_the_template(policies):
    policy = policies["qwen3"]
    assert read(policy, CHAT).endswith("assistant\n")
    without = policy.with_template(enable_thinking=False)
    assert read(without, CHAT).endswith("assistant\n<think>\n\n</think>\n\n")
    for name in ("gemma3", "llama3", "deepseek"):
        with pytest.raises(InvalidValue, match="enable_thinking"):
            policies[name].with_template(enable_thinking=False)


def test_tools_are_listed_where_the_template_reads_them(policies):
    told = policies["qwen3"].with_template(tools=[TOOL])
    assert '"name": "add"' in read(told, CHAT)
    for name in ("gemma3", "llama3", "deepseek"):
        with pytest.raises(InvalidValue, match="tools, which this tokenizer's chat template"):
            policies[name].with_template(tools=[TOOL])


@pytest.mark.parametrize("student", NAMES)
@pytest.mark.parametrize("teacher", NAMES)
def test_foreign_pairs_are_refused_in_words(student, teacher, policies):
    if student == teacher:
        check_same_tokens(policies[student], policies[teacher])
        return
    with pytest.raises(TokenizerMismatch, match="compare unrelated tokens"):
        check_same_tokens(policies[student], policies[teacher])


@pytest.mark.parametrize("teacher", ["gemma3", "llama3", "deepseek"])
def test_span_opd_learns_from_a_teacher_with_other_tokens(teacher, policies):
    student = policies["qwen3"].copied()
    run = opd.distill(
        student, policies[teacher], sums(), method=opd.SpanOPD(), steps=1, batch=2, quiet=True
    )
    assert next(iter(run)).metrics["loss"] > 0


def test_a_pair_of_one_family_trains(hub, policies):
    student, teacher = policies["qwen3"].copied(), opd.Policy.load(TEACHER)
    run = opd.distill(student, teacher, sums(), steps=1, batch=2, quiet=True)
    assert next(iter(run)).metrics["loss"] > 0
