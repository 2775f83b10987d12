"""Tasks: where prompts come from and how a completion is judged."""

from opdlab.tasks.environments import Environment, Tools
from opdlab.tasks.gym import reasoning_gym
from opdlab.tasks.market import market
from opdlab.tasks.task import Task, from_prompts, from_records

__all__ = [
    "Environment",
    "Task",
    "Tools",
    "from_prompts",
    "from_records",
    "market",
    "reasoning_gym",
]
