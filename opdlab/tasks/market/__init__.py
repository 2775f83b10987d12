"""The shipped world as a task, and the models that ship with it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from opdlab.data.prompt import Prompt
from opdlab.errors import InvalidValue
from opdlab.models.policy import Policy
from opdlab.support.expect import shortened
from opdlab.support.validation import Flag, validate_arguments
from opdlab.tasks.market import agent_task, world
from opdlab.tasks.market.agent_task import AGENTS
from opdlab.tasks.task import Split, Task

# 60 steps bring the student from 0.31 to above 0.9 in 20 CPU seconds.
RECIPE = {"batch": 64, "lr": 1e-3, "lora": 16}
MODELS = ("student", "novice", "teacher", "scribe", *AGENTS)


@validate_arguments
def market(
    secret: Flag = False,
    hint: Any = None,
    wrong: Flag = False,
    tools: Flag = False,
    alike: Flag = False,
) -> Task:
    """Make the task of short shop problems (see `world`).

    No problem is in both splits, whatever the seeds and the variants (`world.in_split`).

    Args:
        secret: Whether to add the receipt code, the amount to pay and the lot.
        hint: The kind of each prompt's hint, one of `world.HINTS`; by default the secret ones in
            the secret variant, and the worked solution in the plain one.
        wrong: Whether to give every prompt another problem's hint.
        tools: Whether to make the world of `agent` in place of this one: conversations in which
            prices are known to a tool alone. It has no secrets and no hints.
        alike: Whether both moves of a problem shall be of one kind. `prompt.metadata["skill"]` then
            says which, "addition" or "subtraction", as `teachers` are called.

    Returns:
        A task that draws fresh problems without end, with a recipe for the shipped models.

    Raises:
        InvalidValue: There is no such hint, or `tools` stands beside another variant.
    """
    if tools:
        if secret or hint is not None or wrong or alike:
            raise InvalidValue(
                "market got tools=True beside secret, hint, wrong or alike, of its other world."
                " Leave them out."
            )
        return agent_task.market_with_tools()
    if hint is not None and not (isinstance(hint, str) and hint in world.HINTS):
        raise InvalidValue(
            f"market got hint={shortened(hint)}. Use one of {', '.join(world.HINTS)}, or None."
        )
    kind = hint or ("secret" if secret else "worked")

    def draw(n: int, seed: int, split: Split) -> list[Prompt]:
        rng = random.Random(f"market/{split}/{seed}")
        problems: list[world.Problem] = []
        held: set[str] = set()
        while len(problems) < n:
            problem = world.in_split(world.generate(rng, secret), split)
            if alike and world.skill_of(problem) is None:
                continue
            if split == "test" and problem.prompt() in held:
                continue
            held.add(problem.prompt())
            problems.append(problem)
        hinted = [world.generate(rng, secret) for _ in range(n)] if wrong else problems
        prompts = [
            _prompt(p, h.hint(kind), f"{split}-{seed}-{i}")
            for i, (p, h) in enumerate(zip(problems, hinted, strict=True))
        ]
        if not alike:
            return prompts
        skills = map(world.skill_of, problems)
        return [replace(p, metadata={"skill": s}) for p, s in zip(prompts, skills, strict=True)]

    settings = {"secret": secret, "hint": hint, "wrong": wrong}
    settings |= {"alike": True} if alike else {}
    return Task(
        "market",
        draw,
        verify,
        max_new_tokens=36 if secret else 24,
        settings=settings,
        recipe=RECIPE,
        types=types,
        origin=_origin(settings),
        feedback=feedback,
    )


def _origin(settings: Mapping[str, Any]) -> dict[str, Any]:
    """How a config writes the task."""
    options = {key: value for key, value in settings.items() if key != "secret" and value}
    return {"name": "market-secret" if settings["secret"] else "market", **options}


def types(pieces: Sequence[str]) -> list[str]:
    """Return `world.token_types`, with "end" for the end of the text.

    Args:
        pieces: Tokens of a completion, without their spaces; "<eos>" may end it.

    Returns:
        One type per token.
    """
    words = list(pieces)
    ended = words[-1:] == ["<eos>"]
    return world.token_types(words[: len(words) - ended]) + ["end"] * ended


def verify(prompt: Prompt, text: str) -> float:
    """Return 1.0 if the text states the total of the reference answer, else 0.0.

    Args:
        prompt: The problem, with its solution as the answer.
        text: The text to grade.

    Returns:
        1.0 or 0.0; the calculation before the total is not graded.
    """
    want = world.total(prompt.answer or "")
    return float(want is not None and world.total(text) == want)


def feedback(prompt: Prompt, text: str) -> str | None:
    """Say what a wrong text should have calculated.

    Args:
        prompt: The problem, with its solution as the answer.
        text: The text.

    Returns:
        The two sums, as "4 7 + 3 8 = 8 5 ; 8 5 - 1 9 = 6 6"; None for a text with the right total.
    """
    if verify(prompt, text):
        return None
    return (prompt.answer or "").split(" . ")[0]


def model(name: str, device: str = "cpu") -> Policy:
    """Load a shipped model.

    Args:
        name: "student" (its skill is dormant), "novice" (never learnt to add), "teacher", "scribe"
            (character tokenizer), or, for `market(tools=True)`, "trainee" (forgets to ask for
            prices) and "clerk" (asks for all).
        device: The device to load the model to.

    Returns:
        The policy, with its tokenizer.

    Raises:
        InvalidValue: There is no such model.
    """
    if name not in MODELS:
        raise InvalidValue(
            f"The market world ships {', '.join(MODELS)}, not {shortened(name)}. Use one of those."
        )
    return Policy.load(data() / name, device=device)


def teachers(student: Policy) -> dict[str, Policy]:
    """Load two teachers with one half of the skill each, as adapters on the student's weights.

    Args:
        student: The shipped student, or a view of it.

    Returns:
        "addition" carries and forgets to borrow; "subtraction" borrows and forgets to carry.
    """
    device = student.weights.device
    return {
        skill: Policy.load(
            data() / "student", adapter=data() / skill, device=device, prefer_shared=student
        )
        for skill in world.SKILLS
    }


def data() -> Path:
    """Return the folder of the shipped models: inside the package, or at the top of a clone.

    Returns:
        The folder's path, with one folder per model in it.
    """
    package = Path(__file__).parents[2]
    inside = package / "shipped" / "market"
    return inside if inside.exists() else package.parent / "data" / "market"


def _prompt(problem: world.Problem, hint: str, ident: str) -> Prompt:
    chat = ({"role": "user", "content": problem.prompt()},)
    return replace(Prompt(messages=chat, id=ident), answer=problem.solution(), hint=hint)
