"""The sampling parameters of vLLM, the same for its engine and for its server."""

from __future__ import annotations

from typing import Any

from opdlab.data.sampling_config import SamplingConfig
from opdlab.data.seeds import seed_of
from opdlab.errors import InvalidValue
from opdlab.models.policy import Policy

COLDEST, HOTTEST = 0.01, 2.0  # vLLM refuses what is above, and changes what is below
SEEDS = 1 << 62  # vLLM's seeds are signed numbers of 64 bits, and it adds a sample's number to them


def fields_of(config: SamplingConfig, student: Policy) -> dict[str, Any]:
    """Translate sampling settings.

    All that shapes the distribution is said, since vLLM fills in from a model's
    generation_config.json what is missing. The student's own set of tokens ends a text, in place of
    the one that vLLM reads from the model's files.

    Args:
        config: The sampling settings.
        student: The policy whose texts are written.

    Returns:
        Fields by the names that `vllm.SamplingParams` and the server's /completions share.

    Raises:
        InvalidValue: vLLM does not sample at this temperature.
    """
    if config.temperature and not COLDEST <= config.temperature <= HOTTEST:
        raise InvalidValue(
            f"vLLM does not sample at temperature={config.temperature:g}. Use 0 for the likeliest"
            f" token or a number from {COLDEST:g} to {HOTTEST:g}, or leave sampler= out."
        )
    fields: dict[str, Any] = {
        "max_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "min_p": config.min_p,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "ignore_eos": True,
        "stop_token_ids": sorted(student.weights.eos),
        "skip_special_tokens": False,
        "logprobs": 0,  # of the sampled token alone
    }
    if config.min_new_tokens:
        fields |= {"min_tokens": config.min_new_tokens}
    if config.stop:
        fields |= {"stop": list(config.stop), "include_stop_str_in_output": True}
    return fields


def seed_of_prompt(config: SamplingConfig, number: int) -> int:
    """Make the seed of one prompt's completions.

    Args:
        config: The sampling settings with the seed of all.
        number: The prompt's number, from 0.

    Returns:
        A seed that differs between prompts, so that a question asked twice has two answers.
    """
    return seed_of(config.seed % SEEDS, number, 0) % SEEDS
