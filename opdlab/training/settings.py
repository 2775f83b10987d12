"""The settings of `distill`, and the learning rates that follow from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

from opdlab.data.sampling_config import SamplingConfig
from opdlab.engine.needs import did_you_mean
from opdlab.errors import InvalidValue, MissingPolicy
from opdlab.methods.contract import (
    Method,
    fewest_completions,
    needs_verifier,
    recipe_of,
    student_share,
    writer_names,
)
from opdlab.support.validation import (
    Amount,
    AmountOrInfinity,
    Count,
    CountOrZero,
    Flag,
    PositiveShare,
    Seed,
    Share,
    Temperature,
    validate_fields,
)
from opdlab.tasks import Task

CPU_TOKENS_PER_BACKWARD = 1024


@dataclass(frozen=True)
class Settings:
    """The settings of a run.

    Attributes:
        steps: Updates in all.
        batch: Prompts in each step, over all processes together. Each process takes its share;
            shares differ by one prompt at most.
        n: Completions of each prompt.
        max_new_tokens: Length limit of completions, in tokens.
        lr: Learning rate of AdamW, after the warm-up.
        schedule: "constant", or "cosine" down to 0.
        warmup: Steps, fewer than `steps`, over which the learning rate rises to `lr`.
        lora: Rank of the adapter on all linear layers; None trains all weights.
        normalize: The loss is a mean over "token" (all tokens alike), "sequence" (each completion
            alike) or "constant" (each completion, divided by `max_new_tokens`).
        micro_batch: Completions in one backward pass of a process; by default all of its share, and
            on a CPU as many as have up to 1,024 tokens with their prompts. Changes memory and no
            number.
        temperature: Used for sampling. Values other than 1 make the data off-policy; 0 takes the
            likeliest token each time, so it allows one completion for each prompt only.
        top_p: Used for sampling. Values other than 1 make the data off-policy.
        clip: Largest norm of the gradient; 0 clips nothing.
        weight_decay: Weight decay of AdamW.
        ema_rate: The share of the way that `ema` moves to the student after each update; 0.05 as in
            SDPO (arXiv 2601.20802).
        seed: Seed of all random numbers: prompts, completions, the adapter's first values.
        precision: "bf16" computes the models in bfloat16 by autocast, on float32 weights.
        checkpointing: Whether layers run again in the backward pass. Changes memory and no number.
        evaluate_every: Steps between two evaluations; 0 for none.
        snapshot_every: Steps between two snapshots of the adapter in memory; 0 for none.
        save_every: Steps between two checkpoints; 0 saves the last step only.
        importance_cap: Corrects the gap between sampler and trainer: each token's weight in the
            loss is multiplied by min(importance_cap, p(y) / p_sampler(y)). At least 1, infinity for
            no cap; None corrects nothing. It costs one more pass of the student.
        importance_over: The tokens whose ratios are multiplied: "token", the token itself;
            "prefix", all up to it; "sequence", the whole completion. See
            `opdlab.training.sampler_gap`.
        generate_ahead: Whether the student writes the next step's texts while the teacher's server
            grades this step's, so that a step's texts are one update old. `history` has the column
            `staleness`. For teachers that grade on a server; see `opdlab.training.ahead`.
        start_kl: Whether `history` has `start_kl`, the KL from the student before training, also
            where the method reads no reference. It costs one more pass without gradient; see
            `opdlab.training.start_distance`.
        trace_k: Top tokens of each policy that a step keeps for `step.trace()`, from before its
            update, with the slopes of the loss on them; 0 keeps none, and more than the vocabulary
            are refused. Changes no number of training. It costs 424 bytes per token with 8 and
            two policies (`opdlab.engine.kept_tokens`).

    Raises:
        InvalidValue: A value that cannot be right, alone or beside another.
    """

    steps: Count = 100
    batch: Count = 16
    n: Count = 1
    max_new_tokens: Count = 64
    lr: Amount = 1e-4
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: CountOrZero = 0
    lora: Count | None = 16
    normalize: Literal["token", "sequence", "constant"] = "token"
    micro_batch: Count | None = None
    temperature: Temperature = 1.0
    top_p: PositiveShare = 1.0
    clip: Amount = 1.0
    weight_decay: Amount = 0.0
    ema_rate: Share = 0.05
    seed: Seed = 0
    precision: Literal["no", "bf16"] = "no"
    checkpointing: Flag = False
    evaluate_every: CountOrZero = 0
    snapshot_every: CountOrZero = 0
    save_every: CountOrZero = 0
    importance_cap: AmountOrInfinity | None = None
    importance_over: Literal["token", "prefix", "sequence"] = "token"
    generate_ahead: Flag = False
    start_kl: Flag = False
    trace_k: CountOrZero = 0

    def __post_init__(self) -> None:
        validate_fields(self)
        if self.warmup and self.warmup >= self.steps:
            raise InvalidValue(
                f"Settings got warmup={self.warmup} for steps={self.steps}, so the learning rate"
                " would never reach lr. Use a warmup of fewer steps."
            )
        if self.temperature == 0 and self.n > 1:
            raise InvalidValue(
                f"Settings got temperature=0 with n={self.n}: without randomness, all completions"
                " of a prompt are the same. Use n=1, or a temperature above 0."
            )
        self._check_importance()

    def _check_importance(self) -> None:
        if self.importance_cap is None:
            return
        if self.importance_cap < 1:
            raise InvalidValue(
                f"Settings got importance_cap={self.importance_cap:g}, which would shrink the"
                " weight of tokens on which sampler and trainer agree. Use a number of at least 1,"
                " as 2."
            )
        if self.temperature != 1 or self.top_p != 1:
            raise InvalidValue(
                f"Settings got importance_cap={self.importance_cap:g} with"
                f" temperature={self.temperature:g} and top_p={self.top_p:g}. The correction"
                " divides by the probability that a token was drawn with, and samplers give it at"
                " temperature 1 without filters only. Use temperature=1 and top_p=1, or leave"
                " importance_cap out."
            )

    def rate(self, done: int) -> float:
        """Compute the learning rate of the update after `done` others.

        Args:
            done: Number of updates made before.

        Returns:
            The learning rate: a linear warm-up, then constant or along a cosine to zero.
        """
        warm = min(1.0, (done + 1) / (self.warmup + 1))
        if self.schedule == "constant":
            return self.lr * warm
        return self.lr * warm * 0.5 * (1 + math.cos(math.pi * done / self.steps))

    def sampling(self, seed: int) -> SamplingConfig:
        """Return how the run samples completions.

        Args:
            seed: The seed of the draws.

        Returns:
            Length, temperature, top_p and seed.
        """
        return SamplingConfig(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=seed,
        )

    def tokens_per_backward(self, device: torch.device) -> int | None:
        """Return how many tokens one backward pass has, beside a prompt that its rows share.

        Args:
            device: Where the student is.

        Returns:
            `CPU_TOKENS_PER_BACKWARD` on a CPU. None where there is no limit, and where
            `micro_batch` is set.
        """
        is_limited = self.micro_batch is None and device.type == "cpu"
        return CPU_TOKENS_PER_BACKWARD if is_limited else None

    def per_backward(self, completions: int, longest: int, device: torch.device) -> int:
        """Return how many completions of one length one backward pass has, without shared prompts.

        Args:
            completions: Completions of this process in the step, `B`.
            longest: Tokens of the longest of them, with its prompt.
            device: Where the student is.

        Returns:
            `micro_batch` if it is set; otherwise `B`, and on a CPU as many as have up to
            `CPU_TOKENS_PER_BACKWARD` tokens, the same in each pass. More of them make no product
            faster there, and each holds the activations of all layers.
        """
        if self.micro_batch is not None:
            return self.micro_batch
        tokens = self.tokens_per_backward(device)
        if tokens is None:
            return completions
        passes = math.ceil(completions / max(1, tokens // longest))
        return math.ceil(completions / max(1, passes))


def make_settings(
    given: Mapping[str, Any], method: Method | None, task: Task, where: str = "distill"
) -> Settings:
    """Put together the settings of a run.

    The user's come first, then the method's recipe, then the task's, then the defaults.

    Args:
        given: The settings that the user passed.
        method: The method whose recipe counts, or None.
        task: The task whose recipe and length limit count.
        where: The function that was called, for errors.

    Returns:
        The settings, checked.

    Raises:
        InvalidValue: A name that is no setting, or a value that cannot be right.
    """
    recipes = {"task": task.recipe, "method": recipe_of(method)}
    _check_names(given, where)
    for whose, recipe in recipes.items():
        _check_names(recipe, f"the {whose}'s recipe")
    return Settings(
        **{"max_new_tokens": task.max_new_tokens, **recipes["task"], **recipes["method"], **given}
    )


def check_settings(
    settings: Settings, given: Mapping[str, Any], method: Method, task: Task, *, saves: bool = True
) -> None:
    """Refuse settings that this method and task leave without effect, or cannot work with.

    Args:
        settings: The settings of the run.
        given: The settings that the user passed; a recipe may name more than a method uses.
        method: The method that trains.
        task: The task that it trains on.
        saves: Whether the run has a folder to save in.

    Raises:
        InvalidValue: A setting that the user passed would be ignored.
        MissingPolicy: The method learns from a verifier, and the task has none.
    """
    name = _name_of(method)
    if needs_verifier(method) and task.verify is None:
        raise MissingPolicy(
            f"{name} learns from a verifier, but {task.name} has none. Use a task with verify=, or"
            " a method with a teacher."
        )
    least = fewest_completions(method)
    if settings.n < least:
        raise InvalidValue(
            f"{name} compares the completions of a prompt, but distill got n={settings.n}, too few"
            f" per prompt. Use n=4 or more (at least {least})."
        )
    if settings.evaluate_every and task.verify is None:
        raise InvalidValue(
            f"distill got evaluate_every={settings.evaluate_every}, but {task.name} has no"
            " verifier. Use a task with verify=."
        )
    recipe = {
        **{field.name: field.default for field in fields(Settings)},
        **task.recipe,
        **recipe_of(method),
    }
    for setting, why in settings_without_effect(settings, method, saves=saves).items():
        if setting in given and getattr(settings, setting) != recipe[setting]:
            raise InvalidValue(
                f"distill got {setting}={getattr(settings, setting)!r}, which would change nothing:"
                f" {why}"
            )


def settings_without_effect(
    settings: Settings, method: Method, *, saves: bool = True
) -> dict[str, str]:
    """List the settings that change nothing in a run.

    Args:
        settings: The settings of the run.
        method: The method that trains.
        saves: Whether the run has a folder to save in.

    Returns:
        The reason, and the way out, by the name of the setting.
    """
    name, ignored = _name_of(method), {}
    if student_share(method) == 0 and set(writer_names(method)) == {"answer"}:
        why = f"{name} trains on the reference answers, and nothing is sampled. Leave it out."
        ignored = {"temperature": why, "top_p": why, "n": why, "importance_cap": why}
    if settings.importance_cap is None:
        ignored["importance_over"] = "nothing is corrected. Give importance_cap=… too."
    if not any(need.split("+")[0] == "ema" for need in method.needs):
        ignored["ema_rate"] = f"{name} reads no moving average (`ema`). Leave it out."
    if settings.lora is None:
        ignored["snapshot_every"] = (
            "snapshots keep adapters, and lora=None trains all weights. Use save= and save_every=."
        )
    if not saves:
        ignored["save_every"] = "there is no folder to save in. Give distill save='a folder'."
    return ignored


def _check_names(names: Mapping[str, Any], where: str) -> None:
    known = [field.name for field in fields(Settings)]
    unknown = sorted(str(name) for name in names if name not in known)
    if unknown:
        question = "".join(did_you_mean(name, known) for name in unknown).strip()
        there = "It takes those of distill:" if where == "doctor" else "There are"
        raise InvalidValue(
            f"{where} has no setting {', '.join(unknown)}. {there} {', '.join(known)}."
            f" {question}".strip()
        )


def _name_of(method: Method) -> str:
    from opdlab.methods.contract import name_of

    return name_of(method)
