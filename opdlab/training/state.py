"""The parts of a run.

Saving, resuming and the phases of a step work on this; `Run` adds the loop.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from opdlab.methods import Method
from opdlab.models.policy import Policy
from opdlab.models.protocols import StudentSampler
from opdlab.tasks import Task
from opdlab.training.exclusive import Claim
from opdlab.training.handover import Handover
from opdlab.training.method_state import Memory
from opdlab.training.run_folder import Lineage
from opdlab.training.settings import Settings
from opdlab.training.sharding import Sharding
from opdlab.training.written import Written


class RunState:
    """A run between two steps.

    Attributes:
        student: The policy that trains.
        teacher: The teacher as the user gave it, who may also write texts; None for none.
        task: The source of the prompts.
        method: The method.
        settings: The settings of the run.
        policies: Graders and writers, by the names in the method's `needs`; the student first.
        averages: The moving average of the student, if the method reads one.
        parameters: The parameters that train, by name.
        optimizer: AdamW over the parameters.
        accelerator: The processes and trackers of Accelerate.
        sharding: The student's shards; None where each process holds all weights.
        done: Number of steps done.
        metrics: The metrics of each step done.
        snapshots: The student's adapter after some steps, by step.
        folder: The folder for checkpoints; None for no checkpoints.
        lineage: The name of the run and those that it was resumed from.
        identity: A description of the run's parts, for comparison on resuming.
        memory: The watch over what the method keeps from step to step.
        has_new_embeddings: Whether the student has embeddings that no file of its base model holds.
        claim: Notices when another run moves the student's weights.
        sampler: Who writes the student's texts; None for the student's own loop.
        handover: Brings the student's weights to the sampler; None without one.
        loss_is_checked: Whether the loss was found to treat each row alone.
        ahead: Texts that were written before their step; see `opdlab.training.ahead`.
        is_profiled: Whether steps measure the memory of their phases; see `opdlab.profile`.
    """

    student: Policy
    teacher: Any
    task: Task
    method: Method
    settings: Settings
    policies: dict[str, Any]
    averages: list[Policy]
    parameters: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.AdamW
    accelerator: Accelerator
    sharding: Sharding | None
    done: int
    metrics: list[dict[str, float]]
    snapshots: dict[int, dict[str, Tensor]]
    folder: Path | None
    lineage: Lineage
    identity: dict[str, Any]
    memory: Memory
    has_new_embeddings: bool
    claim: Claim
    sampler: StudentSampler | None
    handover: Handover | None
    loss_is_checked: bool
    ahead: list[Written]
    is_profiled: bool
