"""Dry-run plan and loss on two sampled tokens before training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from opdlab.data.prompt import Prompt
from opdlab.data.rollout import Rollout
from opdlab.engine.batch import Batch
from opdlab.engine.planned import run_plan
from opdlab.errors import PartialDistribution
from opdlab.models.graded import TopLogprobs
from opdlab.models.policy import Policy
from opdlab.tasks import Task


def rehearse(method: Any, policies: Mapping[str, Any], task: Task, prompt: Prompt) -> None:
    """Dry-run plan and loss on two sampled tokens.

    Servers that give only some log-probs are replaced by uniform ones, so no request is sent.

    So a loss that they cannot feed is refused before anything is written. Raises
    PartialDistribution; what else goes wrong on made-up data is left to the first step.
    """
    if not any(hasattr(policy, "k") for policy in policies.values()):
        return
    student = policies["student"]
    made = {
        name: policy if isinstance(policy, Policy) else _Made(policy, student)
        for name, policy in policies.items()
    }
    try:
        batch = Batch(student.sample([prompt], max_new_tokens=2), made, task)
        run_plan(method, batch).compute(lambda rows: method.loss(rows).detach())
    except PartialDistribution:
        raise
    except Exception:
        return


class _Made:
    """Stands for a served teacher in a rehearsal: uniform log-probs, no texts, no requests."""

    def __init__(self, teacher: Any, student: Policy) -> None:
        self.vocab = student.weights.vocab_size
        self.k = min(getattr(teacher, "k", self.vocab), self.vocab)

    def grade(self, rollout: Rollout) -> TopLogprobs:
        n, logp = rollout.tokens, -math.log(self.vocab)
        token = rollout.ids[rollout.mask]
        ids = torch.arange(self.k, device=token.device).expand(n, self.k)
        return TopLogprobs(
            ids,
            torch.full_like(ids, logp, dtype=torch.float32),
            torch.full_like(token, logp, dtype=torch.float32),
            token,
            self.vocab,
        )
