"""Force a token and go on: what student and teacher write from there, and whether it is right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from opdlab.data.branches import Branch, Tree, WrittenOn
from opdlab.data.rollout import Rollout
from opdlab.data.seeds import seed_of
from opdlab.data.tokens import completion_texts, token_bytes
from opdlab.engine.batch import Batch
from opdlab.errors import InvalidValue
from opdlab.models.policy import Policy
from opdlab.models.same_tokens import check_same_tokens
from opdlab.support.expect import expect
from opdlab.support.progress import Progress
from opdlab.support.validation import (
    Count,
    CountOrZero,
    Flag,
    Seed,
    Temperature,
    Unchecked,
    WholeNumbers,
    validate_arguments,
)
from opdlab.tasks import Task

WRITERS = ("student", "teacher")


@validate_arguments
def branch(
    rollout: Rollout,
    student: Policy,
    teacher: Policy,
    sample: CountOrZero,
    position: CountOrZero,
    *,
    tokens: WholeNumbers = (),
    n: Count = 4,
    max_new_tokens: Count | None = None,
    temperature: Temperature = 1.0,
    task: Unchecked[Any] = None,
    seed: Seed = 0,
    quiet: Flag = False,
) -> Tree:
    """Force a token and let student and teacher write on, `n` times each.

    The student's own token and the teacher's likeliest are always among the branches, so that the
    two can be compared: what would have come of the teacher's token?

    Args:
        rollout: The completions.
        student: The policy that wrote them.
        teacher: Another with the same tokens.
        sample: Number of the completion.
        position: The token's place in it.
        tokens: Further token ids to force.
        n: Texts of each writer from each branch.
        max_new_tokens: The most tokens of each text; by default as many as the longest completion
            has left, and 8 at least.
        temperature: Used for sampling; 0 writes greedily.
        task: The task whose verifier scores the whole completions, if any.
        seed: Seed of the texts; each branch and writer has a stream of its own.
        quiet: Whether to show no progress.

    Returns:
        The tree.

    Raises:
        InvalidValue: There is no such token, or one to force is none of the vocabulary.
        TokenizerMismatch: The two have other tokens.
    """
    if task is not None:
        expect(task, Task, "branch", "task")
    check_same_tokens(student, teacher)
    completion = _completion_of(rollout, sample, position)
    prefix, sampled = completion[:position], completion[position]
    policies = {"student": student, "teacher": teacher}
    at = {
        name: policy.log_probs(rollout.select([sample]))[position].double().exp()
        for name, policy in policies.items()
    }
    wanted = {sampled: "student"}
    wanted.setdefault(int(at["teacher"].argmax()), "teacher")
    for token in tokens:
        if not 0 <= token < len(at["student"]):
            raise InvalidValue(
                f"branch got the token {token}. Use ids from 0 to {len(at['student']) - 1}."
            )
        wanted.setdefault(int(token), "asked")
    room = max_new_tokens or max(int(rollout.lengths.max()) - position - 1, 8)
    branches = []
    pieces = token_bytes(student.tokenizer, list(wanted))
    progress = Progress(len(wanted), "branches", "branch", quiet=quiet, leave=False)
    one = rollout.select([sample])
    for done, ((token, by), piece) in enumerate(zip(wanted.items(), pieces, strict=True)):
        progress.update(done)
        texts = {}
        for k, writer in enumerate(WRITERS):
            drawn = {"temperature": temperature, "seed": seed_of(seed, token, k)}
            options = {"max_new_tokens": room, **drawn}
            texts[writer] = _write_on(one, policies, writer, [*prefix, token], n, options, task)
        p = {name: float(values[token]) for name, values in at.items()}
        branches.append(Branch(token, piece.decode("latin-1"), by, p, texts))
    progress.close()
    return Tree(sample, position, prefix, branches)


def _completion_of(rollout: Rollout, sample: int, position: int) -> list[int]:
    """The tokens of a completion that has this position."""
    if sample >= len(rollout):
        raise InvalidValue(
            f"branch got sample={sample}, and there are {len(rollout)} completions. Use a number"
            f" from 0 to {len(rollout) - 1}."
        )
    completion = rollout.completions()[sample]
    if position >= len(completion):
        raise InvalidValue(
            f"branch got position={position}, and completion {sample} has {len(completion)} tokens."
            " Use one of these."
        )
    return completion


def _write_on(
    one: Rollout,
    policies: dict[str, Policy],
    writer: str,
    begun: list[int],
    n: int,
    options: dict[str, Any],
    task: Any,
) -> list[WrittenOn]:
    """The texts of a writer behind `begun`, scored as whole completions."""
    policy, prompt = policies[writer], one.prompts[0]
    if begun[-1] in policies["student"].weights.eos:
        bodies: list[list[int]] = [[]]  # the text is over
        finish = ["stop"]
    else:
        written = policy.sample([prompt], n, prefixes=[begun], **options)
        bodies, finish = written.completions(), list(written.finish)
    whole = _rollout_of(one, [begun + body for body in bodies], finish, policies["student"])
    kl = Batch(whole, policies).signals["teacher_reverse_kl"]
    scores = task.scores(whole.prompts, whole.texts) if task is not None else [None] * len(bodies)
    start = len(begun)
    return [
        WrittenOn(
            text=_text_behind(policies["student"], begun, body),
            tokens=len(body),
            kl=float(kl[i, start : start + len(body)].mean()) if body else None,
            score=None if score is None else float(score),
            finish=finish[i],
        )
        for i, (body, score) in enumerate(zip(bodies, scores, strict=True))
    ]


def _rollout_of(
    one: Rollout, rows: Sequence[list[int]], finish: Sequence[str], student: Policy
) -> Rollout:
    """Whole completions of the prompt of `one` as a rollout."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=one.ids.device)
    zeros = torch.zeros(ids.shape, device=ids.device)
    return Rollout(
        prompts=(one.prompts[0],) * len(rows),
        ids=ids,
        lengths=torch.tensor([len(row) for row in rows], device=ids.device),
        logp=zeros,
        entropy=zeros.clone(),
        finish=tuple(finish),
        texts=tuple(completion_texts(student.tokenizer, list(rows), student.weights.eos)),
        writer=("student",) * len(rows),
        vocabulary=one.vocabulary,
    )


def _text_behind(student: Policy, begun: list[int], body: list[int]) -> str:
    """The text of `body`, byte for byte."""
    return b"".join(token_bytes(student.tokenizer, body)).decode("utf-8", "replace")
