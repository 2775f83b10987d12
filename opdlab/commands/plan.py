"""`opdlab doctor STUDENT TEACHER --plan`: a step on several devices, from shapes alone."""

from __future__ import annotations

from opdlab.commands.flags import WorkFlags
from opdlab.diagnose.plan import DEVICES, Efficiency, Work, plan
from opdlab.diagnose.shapes import shape_of
from opdlab.errors import InvalidValue
from opdlab.tasks.by_name import folder_of_model

WITH_VLLM = 2e-5  # seconds per layer and token besides kernels, with CUDA graphs


def print_plan(student: str, teacher: str | None, gpus: int, device: str, work: WorkFlags) -> None:
    """Print the plan of a step.

    Args:
        student: A shipped model, a folder, a name on the Hub, or one of `shapes.KNOWN`.
        teacher: Likewise.
        gpus: Devices in all.
        device: Their name, one of `DEVICES`.
        work: The step.

    Raises:
        InvalidValue: There is no such device or model, or one model alone.
    """
    if teacher is None:
        raise InvalidValue(
            f"doctor --plan got {student!r} alone. Give two models: opdlab doctor STUDENT TEACHER"
            " --plan."
        )
    if device not in DEVICES:
        raise InvalidValue(f"doctor got device={device!r}. Use {', '.join(DEVICES)}.")
    step = Work(
        batch=work.batch,
        n=work.n,
        prompt=work.prompt_tokens,
        new=work.new_tokens,
        lora=work.lora or None,
        micro_batch=work.micro_batch,
    )
    efficiency = Efficiency(overhead=WITH_VLLM) if work.vllm else Efficiency()
    learner, grader = (shape_of(folder_of_model(name)) for name in (student, teacher))
    print(plan(learner, grader, gpus, DEVICES[device], step, efficiency))
