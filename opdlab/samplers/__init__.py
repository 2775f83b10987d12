"""Samplers of the student's texts in training: vLLM, in this process or behind a server.

`distill(…, sampler=VLLM())` has vLLM write what the student learns from. Without a sampler, the
student's own loop in transformers writes.
"""

from opdlab.models.protocols import StudentSampler
from opdlab.samplers.vllm_engine import VLLM
from opdlab.samplers.vllm_server import VLLMServer

# mypy reads this line: a class that does not fit the protocol is an error.
_SAMPLERS: tuple[type[StudentSampler], ...] = (VLLM, VLLMServer)

__all__ = ["VLLM", "VLLMServer"]
