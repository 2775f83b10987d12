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
from opdlab.methods import Method
from opdlab.models.graded import TopLogprobs
from opdlab.models.protocols import TopGrader
from opdlab.tasks import Task


def rehearse(
    method: Method, policies: Mapping[str, Any], task: Task | None, prompt: Prompt
) -> None:
    """Dry-run plan and loss on two sampled tokens, where a policy gives top log-probs only.

    Such a policy is replaced by one with uniform log-probs, so no request is sent. A loss that
    needs the whole distribution is refused before anything is written. Other errors are left to the
    first step, since made-up log-probs may cause them.

    Args:
        method: The method.
        policies: The resolved policies; the student writes the two tokens.
        task: The task, whose verifier the plan may ask; None for none.
        prompt: The prompt to write to.

    Raises:
        PartialDistribution: The loss or the plan needs all of a distribution of which a server
            gives only some log-probs.
    """
    partial = {
        name: policy.k
        for name, policy in policies.items()
        if isinstance(policy, TopGrader) and policy.k is not None
    }
    if not partial:
        return
    student = policies["student"]
    uniform = {
        name: _Uniform(partial[name], student.weights.vocab_size) if name in partial else policy
        for name, policy in policies.items()
    }
    try:
        batch = Batch(student.sample([prompt], max_new_tokens=2), uniform, task)
        run_plan(method, batch).compute(lambda rows: method.loss(rows).detach())
    except PartialDistribution:
        raise
    except Exception:
        return


class _Uniform:
    """Stands for a server: uniform log-probs of `k` tokens, no texts, no requests."""

    def __init__(self, k: int, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.k = min(k, vocab_size)

    def grade(self, rollout: Rollout) -> TopLogprobs:
        """Give every token the same log-prob."""
        token = rollout.ids[rollout.mask]
        ids = torch.arange(self.k, device=token.device).expand(len(token), self.k)
        logp = torch.full_like(ids, -math.log(self.vocab_size), dtype=torch.float32)
        sampled = torch.full_like(token, -math.log(self.vocab_size), dtype=torch.float32)
        return TopLogprobs(ids, logp, sampled, token, self.vocab_size)
