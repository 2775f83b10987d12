"""Oracles for windows: transport as a linear program, plain Sinkhorn, text token by token from full
passes.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linprog

from opdlab import Policy, Prompt, Rollout, exact

ASKED = [Prompt("a b c", id="x"), Prompt("d", id="y"), Prompt("e f a b c d e f", id="z")]


def cosine_cost(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    return np.array(
        [[1 - float(x @ y / (x.norm() * y.norm())) for y in b.double()] for x in a.double()]
    )


def program(cost: np.ndarray) -> float:
    """The transport's linear program, by a solver that knows nothing of transport."""
    k, m = cost.shape
    rows, columns = np.kron(np.eye(k), np.ones(m)), np.kron(np.ones(k), np.eye(m))
    return linprog(
        cost.ravel(),
        A_eq=np.vstack([rows, columns]),
        b_eq=np.r_[np.full(k, 1 / k), np.full(m, 1 / m)],
    ).fun


def sinkhorn(cost: np.ndarray, epsilon: float) -> np.ndarray:
    kernel, v = np.exp(-cost / epsilon), np.ones(cost.shape[1])
    for _ in range(3000):
        u = 1 / cost.shape[0] / (kernel @ v)
        v = 1 / cost.shape[1] / (kernel.T @ u)
    return u[:, None] * kernel * v


def text(*rows: list[int]) -> Rollout:
    """A rollout of given ids."""
    return exact.table.make_rollout(
        [Prompt("x")] * len(rows), list(rows), exact.Letters(12), 1, "student"
    )


def logits(policy: Policy, prompt: Prompt, ids: list[int]) -> torch.Tensor:
    """Logits that predict each token of `ids`, from index (prompt length - 1) on."""
    start = policy.encode(prompt)
    return policy.weights.model(torch.tensor([start + ids])).logits[0, len(start) - 1 : -1].double()


def greedy(policy: Policy, prompt: Prompt, prefix: list[int], n: int) -> list[int]:
    """Token by token, each from a full pass."""
    out: list[int] = []
    while len(out) < n and 1 not in out:
        with torch.no_grad():
            ids = torch.tensor([policy.encode(prompt) + prefix + out])
            out.append(int(policy.weights.model(ids).logits[0, -1].argmax()))
    return out


def made_pair(make_policy, make_tokenizer) -> dict[str, Policy]:
    """Models that may end a text with token 1; the student trains all its weights if asked."""
    made = [make_policy(seed, make_tokenizer(), initializer_range=0.3) for seed in (0, 1)]
    for policy in made:
        policy.weights.model.get_input_embeddings().weight.data[0] = 0.1 + torch.arange(
            32
        )  # a cosine with zero would be none
    made[0].weights.model.requires_grad_(True)
    return {"student": made[0], "teacher": made[1]}


def texts_of(student: Policy) -> Rollout:
    """Texts of different lengths, some of which end."""
    rollout = student.sample(ASKED, 4, max_new_tokens=12, seed=1, temperature=2.0)
    assert len(set(rollout.lengths.tolist())) > 2
    return rollout
