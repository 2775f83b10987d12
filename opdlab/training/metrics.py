"""The metrics of a training step, over the batch of all processes.

Every metric is a ratio of sums (over tokens, completions or nothing), and each process contributes
its sums. So the history is the same for any number of processes and any micro-batches.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from opdlab.engine.batch import Batch
from opdlab.teachers.many import MultiTeacher

FIRST = 4  # positions at the beginning of a completion that `first_mass` looks at


def measure_step(batch: Batch, columns: Mapping[str, Tensor], weight: Tensor) -> dict[str, float]:
    """Compute the metrics of a step.

    Args:
        batch: The rollout of this process with its graders.
        columns: Numbers of its tokens, `[tokens]` each: `loss`, `student_entropy`, and
            `..._reverse_kl` where a teacher grades.
        weight: `[tokens]`, each token's share in the loss of the whole batch.

    Returns:
        `loss`; means per token of `reverse_kl` (nats, of the first teacher) and `entropy` (nats);
        means per completion of `length` (tokens), `cut`, `empty` and, where the student wrote all
        of them and a verifier can judge, `reward`; the count `tokens`.
    """
    sums = _local_sums(batch, columns, weight)
    total = batch.sum(torch.tensor(list(sums.values()), dtype=torch.float64, device=weight.device))
    summed = dict(zip(sums, total.tolist(), strict=True))
    completions, tokens = summed["completions"], summed["tokens"]
    metrics = {"loss": summed["loss"]}
    metrics |= {
        name: _ratio(summed[name], tokens) for name in ("reverse_kl", "entropy") if name in summed
    }
    metrics |= {name: _ratio(summed[name], completions) for name in ("length", "cut", "empty")}
    if "reward" in summed and summed["by_others"] == 0:
        metrics["reward"] = _ratio(summed["reward"], completions)
    return metrics | {"tokens": tokens}


def measure_first_mass(batch: Batch, wanted: Tensor) -> dict[str, float]:
    """Compute how much probability the student gives to what its teacher wants at the beginning.

    Where it gives none, a mode-seeking divergence has no gradient, and the run stalls.

    Args:
        batch: The rollout of this process with its graders.
        wanted: The student's probability of the teacher's likeliest token, `[tokens]`.

    Returns:
        `first_mass`: the mean over completions at the worst of the first `FIRST` positions; nothing
        for a batch without tokens.
    """
    rollout = batch.rollout
    spread = wanted.new_zeros(rollout.ids.shape).masked_scatter(rollout.mask, wanted)
    sums = wanted.new_zeros(2, FIRST, dtype=torch.float64)
    width = min(FIRST, spread.shape[1])
    learn = rollout.learn[:, :width]
    sums[0, :width] = (spread[:, :width] * learn).double().sum(0)
    sums[1, :width] = learn.double().sum(0)
    total, count = batch.sum(sums)
    if not bool(count.any()):
        return {}
    return {"first_mass": float((total / count)[count > 0].min())}


def measure_teachers(batch: Batch, columns: Mapping[str, Tensor]) -> dict[str, float]:
    """Compute what each of several teachers did in a step (`opdlab.teachers.MultiTeacher`).

    Args:
        batch: The rollout of this process with its graders.
        columns: Numbers of its tokens, `[tokens]` each, with `..._reverse_kl` of the teachers.

    Returns:
        By `<teacher>/<number>`: `rows` (completions in which it has a weight), `tokens`,
        `reverse_kl` (mean nats per token, by weight), `reward` where a verifier can judge,
        `grade_s` (seconds over all processes) and `paid` (tokens of its server); nothing for one
        teacher.
    """
    metrics: dict[str, float] = {}
    for policy, teacher in batch.policies.items():
        if not isinstance(teacher, MultiTeacher):
            continue
        weights = teacher.weights_of(batch.rollout.prompts).to(batch.mask.device)  # [B, M]
        learn = batch.rollout.learn.sum(1).double()  # [B]
        meters = teacher.read_meters()
        by_row = {"rows": (weights > 0).double(), "tokens": learn[:, None] * (weights > 0)}
        by_row["weighted"] = learn[:, None] * weights
        kl = next((columns[n] for n in _kl_names(policy) if n in columns), None)
        if kl is not None:
            summed = (batch.spread(kl) * batch.rollout.learn).double().sum(1)
            by_row["kl"] = summed[:, None] * weights
        by_others = sum(writer != "student" for writer in batch.rollout.writer)
        judged = batch.task is not None and batch.task.verify is not None
        if judged and not float(batch.sum(weights.new_tensor(by_others))):
            by_row["reward"] = batch.rewards.double()[:, None] * (weights > 0)
        sums = torch.stack([values.sum(0) for values in by_row.values()])  # [numbers, M]
        costs = [[meters[name].seconds, meters[name].paid] for name in teacher.members]
        total = batch.sum(torch.cat([sums, sums.new_tensor(costs).T])).tolist()
        found = dict(zip((*by_row, "grade_s", "paid"), total, strict=True))
        for m, name in enumerate(teacher.members):
            one = {what: values[m] for what, values in found.items()}
            said = {"rows": one["rows"], "tokens": one["tokens"]}
            if "kl" in one:
                said["reverse_kl"] = _ratio(one["kl"], one["weighted"])
            if "reward" in one:
                said["reward"] = _ratio(one["reward"], one["rows"])
            said |= {"grade_s": one["grade_s"], "paid": one["paid"]}
            metrics |= {f"{name}/{what}": value for what, value in said.items()}
    return metrics


def _kl_names(policy: str) -> tuple[str, str]:
    return f"{policy}_reverse_kl", f"{policy}_coarse_reverse_kl"


def _local_sums(batch: Batch, columns: Mapping[str, Tensor], weight: Tensor) -> dict[str, float]:
    """This process's sums. The names are the same in all processes, whoever wrote their texts."""
    rollout, learned = batch.rollout, batch.rollout.learned
    by_others = sum(writer != "student" for writer in rollout.writer)
    sums = {
        "completions": float(len(rollout)),
        "tokens": float(rollout.learn.sum()),
        "by_others": float(by_others),
        "loss": _summed(columns["loss"] * weight),
        "entropy": _summed(columns["student_entropy"] * learned),
        "length": float(rollout.learn.sum()),
        "cut": float(sum(finish == "length" for finish in rollout.finish)),
        "empty": _summed(rollout.lengths == 0),
    }
    kl = next((name for name in columns if name.endswith("_reverse_kl")), None)
    if kl is not None:
        sums["reverse_kl"] = _summed(columns[kl] * learned)
    if batch.task is not None and batch.task.verify is not None:
        sums["reward"] = 0.0 if by_others else _summed(batch.rewards)
    return sums


def _summed(values: Tensor) -> float:
    return float(values.detach().cpu().double().sum())


def _ratio(total: float, count: float) -> float:
    return total / count if count else float("nan")
