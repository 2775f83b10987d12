"""Near-future windows: the texts of two policies from one prefix, and their transport distance.

For a position t of a rollout x, with K tokens in a window (arXiv 2606.00305, sections 2.1, 2.2, 3):

    T    = the teacher's continuation of (q, x_<t)
    S    = (x_t, …, x_{t+K-1}), or the student's own continuation
    C_ij = 1 - cos(e(S_i), e(T_j)),         D_OT = min_{γ ∈ Π(1/K, 1/K)} Σ_ij γ_ij C_ij

The paper confirms K = 50, the same prefix for both, windows that start at t itself, and optimal
transport between embedded tokens. Not reported there, and ours: static token embeddings, the cosine
cost, uniform marginals, greedy continuations. The distance compares bags of tokens: it does not see
their order. Rows are the student's window and columns the teacher's, everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from opdlab.data.rollout import Rollout
from opdlab.engine.batch import Batch
from opdlab.errors import InvalidValue, MissingPolicy
from opdlab.models.policy import TOKENS_PER_PASS, as_policy

Point = tuple[int, int]  # completion, position
EMBEDDINGS = ("student", "teacher", "onehot")
SCORES = ("teacher_nll", "log_ratio", "reverse_kl")
SWEEPS, TOLERANCE = 1000, 1e-6  # of Sinkhorn's iteration; rounding removes the rest of its error


def transport(
    student_vectors: Tensor, teacher_vectors: Tensor, epsilon: float | None = None
) -> tuple[float, Tensor]:
    """Compute the transport distance between two windows of vectors, with cost 1 - cosine.

    Args:
        student_vectors: `[K, H]`.
        teacher_vectors: `[K', H]`.
        epsilon: None for the exact plan; otherwise that of the entropic plan, above 0.

    Returns:
        The distance, which is the cost of the plan, and the plan `[K, K']` in float64 on the CPU;
        its rows sum to 1/K and its columns to 1/K'.

    Raises:
        InvalidValue: epsilon is not above 0.
    """
    distances, plans = solve([cost(student_vectors, teacher_vectors)], epsilon)
    return float(distances[0]), plans[0]


def cost(student_vectors: Tensor, teacher_vectors: Tensor) -> Tensor:
    """Compute 1 - cosine as half the squared distance of unit vectors, 0 for equal vectors.

    Args:
        student_vectors: `[K, H]`.
        teacher_vectors: `[K', H]`; a zero vector is at ½ from all others.

    Returns:
        `[K, K']`, float64 on the CPU.
    """
    s, t = (normalize(x.detach().double(), dim=-1) for x in (student_vectors, teacher_vectors))
    return (torch.cdist(s, t, compute_mode="donot_use_mm_for_euclid_dist") ** 2 / 2).cpu()


def solve(costs: Sequence[Tensor], epsilon: float | None = None) -> tuple[Tensor, list[Tensor]]:
    """Solve the transport for many cost matrices, those of one shape side by side.

    Args:
        costs: `P` matrices `[K, K']`.
        epsilon: As in `transport`.

    Returns:
        Distances `[P]`, and a plan `[K, K']` each.

    Raises:
        InvalidValue: epsilon is not above 0.
    """
    if epsilon is not None and not epsilon > 0:
        raise InvalidValue(
            f"The transport's epsilon is {epsilon}. Use a number above 0, or None for the exact"
            " plan."
        )
    plans: list[Tensor] = [torch.empty(0)] * len(costs)
    for shape in sorted({tuple(c.shape) for c in costs}):
        which = [i for i, c in enumerate(costs) if tuple(c.shape) == shape]
        stack = torch.stack([costs[i] for i in which])
        for i, plan in zip(
            which, _exact(stack) if epsilon is None else _entropic(stack, epsilon), strict=True
        ):
            plans[i] = plan
    distances = [float((p * c).sum()) for p, c in zip(plans, costs, strict=True)]
    return torch.tensor(distances, dtype=torch.float64), plans


def _exact(costs: Tensor) -> Tensor:
    import ot  # slow to import

    return torch.stack([torch.from_numpy(ot.emd([], [], c.numpy())) for c in costs])


def _entropic(costs: Tensor, epsilon: float) -> Tensor:
    """Sinkhorn in the log domain on `[P, K, K']`, then rounded to exact marginals.

    The rounding is algorithm 2 of Altschuler et al. (arXiv 1705.09634). Where windows share some
    tokens and not others the iteration converges slowly, whatever the solver; rounding moves no
    more mass than the marginals are off, so it may stop early.
    """
    from ot.batch import bregman_log_projection_batch

    a, b = (torch.full((len(costs), k), 1 / k, dtype=torch.float64) for k in costs.shape[1:])
    plan = bregman_log_projection_batch(-costs / epsilon, a, b, max_iter=SWEEPS, tol=TOLERANCE)["T"]
    # The iteration ends on exact columns, so only rows can be too heavy.
    plan = plan * (a / plan.sum(2)).clamp(max=1)[:, :, None]
    rows, columns = (a - plan.sum(2)).clamp(min=0), (b - plan.sum(1)).clamp(min=0)
    missing = rows[:, :, None] * columns[:, None, :]
    rounded: Tensor = plan + missing / rows.sum(1).clamp(min=1e-300)[:, None, None]
    return rounded


def diagonal(student: Sequence[int], teacher: Sequence[int]) -> Tensor:
    """Make the plan that matches token i with token i, the control that ignores the embeddings.

    Args:
        student: Token ids of the student's window, K of them.
        teacher: Token ids of the teacher's window, K' of them.

    Returns:
        `[K, K']` in float64, with mass 1.
    """
    both = min(len(student), len(teacher))
    return torch.eye(len(student), len(teacher), dtype=torch.float64) / both


def costs(
    students: Sequence[Sequence[int]],
    teachers: Sequence[Sequence[int]],
    embedding: str,
    policies: Mapping[str, Any],
) -> list[Tensor]:
    """Compute the cost matrices of pairs of windows.

    Args:
        students: Token ids of the student's windows.
        teachers: Token ids of the teacher's windows, as many.
        embedding: The policy whose token embeddings are compared, or "onehot": any two different
            tokens are at distance 1.
        policies: The policies by name.

    Returns:
        One matrix `[K, K']` per pair, in float64 on the CPU.

    Raises:
        MissingPolicy: That policy has no token embeddings.
    """
    pairs = [
        (torch.tensor(list(s)), torch.tensor(list(t)))
        for s, t in zip(students, teachers, strict=True)
    ]
    if embedding == "onehot":
        return [(s[:, None] != t[None]).double() for s, t in pairs]
    policy = as_policy(policies[embedding])
    if policy is None:
        kind = type(policies[embedding]).__name__
        raise MissingPolicy(
            f"The {embedding}, a {kind}, has no token embeddings. Use embedding='onehot'."
        )
    table = policy.weights.embeddings
    return [cost(table[s.to(table.device)], table[t.to(table.device)]) for s, t in pairs]


def room(policy: Any, rollout: Rollout, window: int) -> Tensor:
    """Find the tokens at which a window fits into its turn and that are not special ones.

    Args:
        policy: The student.
        rollout: The completions.
        window: K, in tokens.

    Returns:
        `[B, T]`, true there.
    """
    special = set(getattr(policy.tokenizer, "all_special_ids", []))
    local = as_policy(policy)
    if local is not None:
        special |= local.weights.eos
    fits = rollout.left_in_turn >= window
    return fits & ~torch.isin(rollout.ids, torch.tensor(sorted(special), device=rollout.ids.device))


def quota(lengths: Tensor, share: float) -> list[int]:
    """Compute how many positions of each completion are taken: ceil(share N) of N tokens.

    Args:
        lengths: Tokens of each completion that count, `[B]`.
        share: From 0 to 1.

    Returns:
        One number per completion.
    """
    return [math.ceil(share * n - 1e-9) for n in lengths.tolist()]


def top(
    score: Tensor,
    where: Tensor,
    counts: Sequence[int],
    least: float | None = None,
    most: int | None = None,
) -> list[Point]:
    """Choose the positions of highest score in each completion.

    Args:
        score: `[B, T]`.
        where: `[B, T]`, the positions that are allowed.
        counts: Number of points in each completion.
        least: Lower scores do not count; None for any.
        most: Number of points in all, the highest first; None for any number.

    Returns:
        The points in order; of equal scores the earlier.
    """
    score = score.double().cpu()
    allowed = where.cpu() if least is None else where.cpu() & (score >= least)
    found: list[Point] = []
    for b, count in enumerate(counts):
        order = (
            score[b]
            .masked_fill(~allowed[b], -math.inf)
            .argsort(descending=True, stable=True)
            .tolist()
        )
        found += [(b, t) for t in order[:count] if allowed[b, t]]
    if most is not None:
        found = sorted(found, key=lambda p: -float(score[p]))[:most]
    return sorted(found)


def scores(batch: Batch, name: str) -> Tensor:
    """Score how much each token looks like an error.

    Args:
        batch: The batch, with a teacher.
        name: "teacher_nll", "log_ratio" (student over teacher) or "reverse_kl".

    Returns:
        `[B, T]`, nats.
    """
    if name == "reverse_kl":
        return batch.signals["teacher_reverse_kl"]
    theirs: Tensor = batch.map(lambda rows: rows.logp_of("teacher"), needs=("teacher",))
    return -theirs if name == "teacher_nll" else batch.rollout.logp - theirs


def slices(rollout: Rollout, points: Sequence[Point], window: int) -> list[list[int]]:
    """Return the rollout's own tokens from each point on, fewer at the end of a completion.

    Args:
        rollout: The completions.
        points: Completion and position of each window.
        window: K, in tokens.

    Returns:
        Token ids, at most K per point.
    """
    return [
        rollout.ids[b, t : min(t + window, int(rollout.lengths[b]))].tolist() for b, t in points
    ]


def write(policy: Any, rollout: Rollout, points: Sequence[Point], window: int) -> list[list[int]]:
    """Let a policy write on greedily after the prompt and exactly the tokens before each point.

    Points with the same prompt and prefix are written once; the others side by side, as many as fit
    a pass, those of like length together. No random numbers are drawn.

    Args:
        policy: A `Sampler`.
        rollout: The completions.
        points: Completion and position of each window.
        window: The most tokens to write.

    Returns:
        Token ids of each window.
    """
    begun = [(id(rollout.prompts[b]), tuple(rollout.ids[b, :t].tolist())) for b, t in points]
    jobs = {key: rollout.prompts[b] for key, (b, _) in zip(begun, points, strict=True)}
    size = {key: _length(policy, prompt) + len(key[1]) for key, prompt in jobs.items()}
    done: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for group in _groups(sorted(jobs, key=lambda key: size[key]), lambda key: size[key] + window):
        text = policy.sample(
            [jobs[key] for key in group],
            prefixes=[key[1] for key in group],
            temperature=0,
            max_new_tokens=window,
        )
        done |= dict(zip(group, text.completions(), strict=True))
    return [done[key] for key in begun]


def _length(policy: Any, prompt: Any) -> int:
    local = as_policy(policy)
    return 0 if local is None else len(local.encode(prompt))


def _groups(jobs: list[Any], size: Callable[[Any], int]) -> list[list[Any]]:
    """Jobs in ascending size, cut into groups that fit a scoring pass when padded."""
    groups: list[list[Any]] = []
    for job in jobs:
        if groups and (len(groups[-1]) + 1) * size(job) <= TOKENS_PER_PASS:
            groups[-1].append(job)
        else:
            groups.append([job])
    return groups


def scatter(
    batch: Batch,
    points: Sequence[Point],
    texts: Sequence[Sequence[int]],
    plans: Sequence[Tensor],
) -> dict[str, Tensor]:
    """Write soft targets as columns.

    The mean over all tokens of the step, in all processes, of `-sum(weight * logp[target])` is the
    mean over points of `-Σ_ij γ_ij log p(text_j | x_<t+i)`, γ having mass 1. Windows that overlap
    add up; equal tokens at one place are one target.

    Args:
        batch: The completions.
        points: Completion and position of each window.
        texts: The teacher's window at each point.
        plans: The plan `[K, K']` at each point.

    Returns:
        `target [B, T, M]` (token ids) and `target_weight [B, T, M]`, zero where a place is not
        used.
    """
    rollout = batch.rollout
    local = batch.row.new_tensor([rollout.tokens, len(points)])
    tokens, count = batch.sum(local).tolist()
    b_t, token, mass = [], [], []
    for (b, t), text, plan in zip(points, texts, plans, strict=True):
        i, j = plan.nonzero(as_tuple=True)
        b_t.append(b * rollout.ids.shape[1] + t + i)
        token.append(torch.tensor(list(text))[j])
        mass.append(plan[i, j] * tokens / count)
    none = torch.zeros(0, dtype=torch.long)
    place, slot, ids, weight = _merge(
        torch.cat([none, *b_t]), torch.cat([none, *token]), torch.cat([none.double(), *mass])
    )
    shape = (rollout.ids.numel(), batch.largest(1 + int(slot.max()) if len(slot) else 0))
    if not shape[1]:
        return _no_targets(rollout)
    target = torch.zeros(shape, dtype=torch.long)
    share = torch.zeros(shape, dtype=rollout.logp.dtype)
    target[place, slot], share[place, slot] = ids, weight.to(share.dtype)
    return {
        name: values.view(*rollout.ids.shape, -1).to(rollout.ids.device)
        for name, values in (("target", target), ("target_weight", share))
    }


def _merge(place: Tensor, token: Tensor, mass: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Add up entries with equal place and token.

    Returns places, their running numbers within a place, tokens and masses.
    """
    vocab = 1 + int(token.max()) if len(token) else 1
    key, back = torch.unique(place * vocab + token, return_inverse=True)
    place = key // vocab
    first = torch.searchsorted(place, place)
    return (
        place,
        torch.arange(len(key)) - first,
        key % vocab,
        torch.zeros(len(key), dtype=mass.dtype).index_add_(0, back, mass),
    )


def _no_targets(rollout: Rollout) -> dict[str, Tensor]:
    empty = rollout.ids.new_zeros(*rollout.ids.shape, 0)
    return {"target": empty, "target_weight": empty.to(rollout.logp.dtype)}
