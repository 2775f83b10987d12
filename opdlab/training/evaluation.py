"""Evaluation on distinct held-out prompts, and paired differences of evaluations.

Measures greedy accuracy, avg@k, pass@k and length.

Every policy answers the same prompts with the same random numbers, so `after - before` is a paired
comparison. A prompt counts once, however often a task gives it. Intervals are those of
`opdlab.training.intervals`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from accelerate import Accelerator

from opdlab.data.prompt import Prompt
from opdlab.data.sampling_config import SamplingConfig
from opdlab.data.trace import Trace
from opdlab.errors import InvalidValue, MissingPolicy, OpdlabError, printable
from opdlab.models.places import seeded
from opdlab.models.policy import Policy
from opdlab.models.protocols import Sampler, Writer
from opdlab.support.expect import shortened
from opdlab.support.progress import Progress
from opdlab.support.validation import (
    Count,
    CountOrZero,
    Flag,
    Seed,
    Text,
    Unchecked,
    validate,
    validate_arguments,
)
from opdlab.tasks import Task
from opdlab.teachers.conversing import write_conversations
from opdlab.teachers.writing import write_texts
from opdlab.training.handover import Handover
from opdlab.training.intervals import Difference, Interval, paired, wilson
from opdlab.training.processes import AcceleratedProcesses
from opdlab.training.sampler_checks import check_turns, expect_sampler

__all__ = ["Difference", "Evaluation", "Interval", "evaluate", "paired"]

Scores = npt.NDArray[np.float64]
BLOCK = 64  # prompts whose samples share one seed: fixed, so that no result depends on `batch_size`


class Conditions(NamedTuple):
    """All that defines an evaluation beside the policy.

    Two evaluations pair where all of it is equal.

    Attributes:
        task: Name of the task.
        settings: Settings of the task, as texts by name.
        verifier: The function that judges.
        n: Number of prompts that were asked.
        prompts: A checksum of everything in them: texts, messages, answers, hints.
        k: Samples for each prompt.
        seed: Seed of the prompts and of the samples.
        max_new_tokens: The longest answer, in tokens.
        temperature: Temperature of the `k` samples; the others are greedy.
    """

    task: str
    settings: tuple[tuple[str, str], ...]
    verifier: str
    n: int
    prompts: str  # a checksum of everything in them: texts, messages, answers, hints
    k: int
    seed: int
    max_new_tokens: int
    temperature: float  # of the k samples; the others are greedy


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The scores of one policy on some held-out prompts.

    Attributes:
        name: The policy's name.
        greedy: `[P]`, the verifier's scores of greedy completions.
        sampled: `[P, k]`, its scores of samples at temperature 1; `k` may be 0.
        length: `[P]`, tokens of the greedy completions; NaN where a teacher gives text only.
        cut: `[P]`, 1 for greedy completions that hit the length limit; NaN where a teacher gives
            text only.
        key: The `Conditions` of the evaluation; two evaluations pair where their keys are equal.
        requested: Number of prompts asked for; more than `P` where the task has no more.
    """

    name: str
    greedy: Scores
    sampled: Scores
    length: Scores
    cut: Scores
    key: tuple[Any, ...]
    requested: int = 0

    @property
    def prompts(self) -> int:
        """The number of distinct prompts that were answered."""
        return len(self.greedy)

    @property
    def accuracy(self) -> float:
        """Mean score of the greedy completions."""
        return float(self.greedy.mean())

    @property
    def interval(self) -> Interval:
        """The 95 % interval of `accuracy` over prompts."""
        return wilson(self.accuracy, self.prompts)

    @property
    def avg_at_k(self) -> float:
        """Mean score of the samples."""
        self._require_samples("avg@k")
        return float(self.sampled.mean())

    @property
    def sampled_interval(self) -> Interval:
        """The 95 % interval of `avg_at_k`; the samples of a prompt count as one observation."""
        return wilson(self.avg_at_k, self.prompts)

    def pass_at(self, k: int) -> float:
        """Estimate the chance that the best of `k` samples is right (scores above 0.5).

        1 - C(n-c, k) / C(n, k) with c right of n samples, unbiased for k <= n (arXiv 2107.03374),
        as a mean over prompts.

        Args:
            k: Number of samples of each prompt, from 1 to the number that was taken.

        Returns:
            A chance from 0 to 1.

        Raises:
            OpdlabError: There are no samples, or fewer than `k`.
            InvalidValue: `k` is no positive whole number.
        """
        self._require_samples("pass@k")
        k = validate("pass_at", {"k": k}, {"k": Count})["k"]
        n = self.sampled.shape[1]
        if k > n:
            raise OpdlabError(
                f"pass@{k} needs at least {k} samples a prompt; there are {n}. Evaluate with k={k}"
                " or more."
            )
        wrong = n - (self.sampled > 0.5).sum(1)
        miss = [np.prod([(w - i) / (n - i) for i in range(k)]) if w >= k else 0.0 for w in wrong]
        return float(1 - np.mean(miss))

    def __sub__(self, before: Evaluation) -> Difference:
        """Paired difference of greedy accuracy.

        Raises:
            OpdlabError: `before` is no evaluation, or was made under other conditions; the error
                says which differ.
        """
        _require_evaluation(before, "minus")
        _require_same_conditions(self.key, before.key)
        return paired(self.greedy, before.greedy)

    def __rsub__(self, other: Any) -> Difference:
        _require_evaluation(other, "subtracted from")
        return NotImplemented

    def table(self) -> dict[str, float]:
        """Return the numbers by name.

        `low` and `high` are the 95 % interval of the accuracy over that many `prompts`.

        Returns:
            `accuracy`, `low`, `high` and `prompts`; `length` (tokens) and `cut` where lengths are
            known; `avg@k` and `pass@k` where there are samples.
        """
        shown = self.interval
        numbers = {
            "accuracy": self.accuracy,
            "low": shown.low,
            "high": shown.high,
            "prompts": float(self.prompts),
        }
        if not np.isnan(self.length).any():
            numbers |= {"length": float(self.length.mean()), "cut": float(self.cut.mean())}
        if self.sampled.shape[1]:
            k = self.sampled.shape[1]
            numbers |= {f"avg@{k}": self.avg_at_k, f"pass@{k}": self.pass_at(k)}
        return numbers

    def __repr__(self) -> str:
        table = self.table()
        accuracy, low, high, prompts = (
            table.pop(name) for name in ("accuracy", "low", "high", "prompts")
        )
        facts = "".join(f", {name} {value:.3g}" for name, value in table.items())
        counted = f"{prompts:.0f} prompt{'s' * (prompts != 1)}"
        if self.requested > prompts:
            counted += f": all there are of {self.requested} asked for"
        said = f"accuracy {accuracy:.3g} [{low:.3g}, {high:.3g}]{facts} ({counted})"
        return f"{printable(self.name)}: {said}"

    def _require_samples(self, what: str) -> None:
        if not self.sampled.shape[1]:
            raise OpdlabError(f"{what} needs samples. Evaluate with k=4 or more.")


@validate_arguments
def evaluate(
    policy: Any,
    task: Any,
    n: Count = 200,
    k: CountOrZero = 0,
    seed: Seed = 0,
    *,
    name: Text = "",
    batch_size: Count = 64,
    max_new_tokens: Count | None = None,
    quiet: Flag = True,
    processes: Unchecked[Accelerator | None] = None,
    sampler: Unchecked[Any] = None,
) -> Evaluation:
    """Score held-out prompts greedily and, with `k` > 0, with `k` samples each at temperature 1.

    Args:
        policy: A `Policy`, or a teacher that writes (`TextOnly`, `TextServer`, `LogprobServer`):
            every prompt is sent to it.
        task: The source of the prompts, with the verifier that judges texts.
        n: Number of distinct held-out prompts to ask. Where the task has fewer, all of them are
            asked, each once.
        k: Samples for each prompt.
        seed: Seed of the prompts and of the samples.
        name: Names the evaluation; the policy's own name by default.
        batch_size: Prompts held in memory at once, each with its `k` samples (of those, 64 at
            most); changes no result.
        max_new_tokens: The longest answer, in tokens; the task's length by default.
        quiet: Whether to leave out the progress bar.
        processes: `run.accelerator`, to share the prompts among the processes of a run. Every
            process must call it then, and all get the same result. None asks every prompt here.
        sampler: Writes the policy's texts in place of its own loop, as `opdlab.samplers.VLLM()`.

    Returns:
        The scores of every prompt, and what was asked.

    Raises:
        MissingPolicy: The task has no verifier.
        BadVerifier: The verifier returns no number from 0 to 1.
        InvalidValue: An argument has a value that cannot be right.
    """
    if not isinstance(task, Task):
        raise InvalidValue(
            f"evaluate got task={shortened(task)}. Use an opdlab.Task, as from"
            " opdlab.tasks.from_records, market or reasoning_gym."
        )
    _check_writes(policy)
    if task.verify is None:
        raise MissingPolicy(
            f"{task.name} has no verifier, so nothing can be scored. Make the task with verify=…."
        )
    writer = policy if sampler is None else _with_sampler(policy, sampler)
    check_turns(writer, task, "evaluate")
    prompts = task.prompts(n, seed, "test")
    width = max_new_tokens or task.max_new_tokens
    greedy = SamplingConfig(max_new_tokens=width, temperature=0, seed=seed)
    everyone = AcceleratedProcesses.of(processes, "evaluate")
    process, count = everyone.index, everyone.count
    ours = list(range(process, len(prompts), count))
    bar = Progress(len(ours), f"evaluate {name or policy}", "prompt", quiet or process > 0)
    rows: dict[str, list[Any]] = {"greedy": [], "sampled": [], "length": [], "cut": []}
    for start in range(0, len(ours), batch_size):
        part = [prompts[i] for i in ours[start : start + batch_size]]
        best = _write(writer, task, part, 1, greedy, batch_size)
        rows["greedy"] += task.scores(part, best.texts)
        rows["length"] += best.lengths
        rows["cut"] += best.cut
        bar.update(start + len(part), accuracy=float(np.mean(rows["greedy"])))
    for start in range(0, len(prompts) if k else 0, BLOCK):
        block = [i for i in ours if start <= i < start + BLOCK]
        if not block:
            continue
        part = [prompts[i] for i in block]
        config = SamplingConfig(max_new_tokens=width, seed=seed + 7919 * (start + 1))
        places = [i - start for i in block] if count > 1 else None
        many = _write(writer, task, part, k, config, batch_size, places, process)
        rows["sampled"] += task.scores([prompt for prompt in part for _ in range(k)], many.texts)
    bar.close()
    arrays = _gather(rows, ours, k, everyone)
    key = _conditions(task, prompts, k=k, seed=seed, max_new_tokens=width)
    return Evaluation(name or repr(policy), **arrays, key=key, requested=n)


class _Texts(NamedTuple):
    """Texts for some prompts: row `i * n + j` is sample `j` of prompt `i`."""

    texts: Sequence[str]
    lengths: list[float]
    cut: list[float]


def _write(
    policy: Sampler | Writer,
    task: Task,
    prompts: list[Prompt],
    n: int,
    config: SamplingConfig,
    batch_size: int,
    places: list[int] | None = None,
    process: int = 0,
) -> _Texts:
    """Let the policy answer; lengths and cuts are known of a local policy alone."""
    if isinstance(policy, Sampler):
        options: dict[str, Any] = {**config.options(), **task.sample_options}
        options |= seeded(policy.sample, config.seed, places, process)
        rollout = policy.sample(prompts, n, batch_size=batch_size, **options)
        is_cut = [float(finish == "length") for finish in rollout.finish]
        return _Texts(rollout.texts, rollout.lengths.tolist(), is_cut)
    written: Sequence[Sequence[str]]
    if task.environment is None:
        written = write_texts(policy, prompts, n, config, places, process)
    else:
        written = write_conversations(
            policy, prompts, n, task.environment, config, places=places, process=process
        )
    texts = [text for row in written for text in row]
    return _Texts(texts, [np.nan] * len(texts), [np.nan] * len(texts))


def _gather(
    rows: dict[str, list[Any]], ours: list[int], k: int, processes: AcceleratedProcesses
) -> dict[str, Scores]:
    """The scores of all processes, in the order of the prompts."""
    sampled = np.asarray(rows["sampled"], float).reshape(len(ours), k)
    columns = [np.asarray(rows[name], float) for name in ("greedy", "length", "cut")]
    table = np.column_stack([np.asarray(ours, float), *columns, sampled])
    whole = processes.gather(torch.from_numpy(table)).numpy()
    whole = whole[np.argsort(whole[:, 0])]
    return {
        "greedy": whole[:, 1],
        "length": whole[:, 2],
        "cut": whole[:, 3],
        "sampled": whole[:, 4:],
    }


def _with_sampler(policy: Any, sampler: Any) -> Sampler:
    """Hand a policy over to a sampler, which then writes in its place."""
    sampler = expect_sampler(sampler, "evaluate")
    if not isinstance(policy, Policy):
        raise InvalidValue(
            f"evaluate got sampler={shortened(sampler)} for {shortened(policy)}, which is no Policy"
            " whose weights could be handed over. Leave sampler out."
        )
    return Handover(sampler).bring(policy, 0)


def _check_writes(policy: Any) -> None:
    """Refuse objects that cannot answer prompts."""
    is_table = isinstance(policy, (pd.DataFrame, Trace))  # these have a `sample` of another kind
    if isinstance(policy, type) or is_table or not isinstance(policy, (Sampler, Writer)):
        raise InvalidValue(
            f"evaluate got policy={shortened(policy)}. Use a Policy (Policy.load, Policy.of(model,"
            " tokenizer)), or a teacher that writes, as opdlab.teachers.TextOnly or TextServer."
        )


def _conditions(
    task: Task, prompts: list[Prompt], *, k: int, seed: int, max_new_tokens: int
) -> Conditions:
    settings = tuple(sorted((str(name), str(value)) for name, value in task.settings.items()))
    # Prompts without tools are named as they were before there were tools.
    named = [
        {name: value for name, value in asdict(prompt).items() if value or name != "tools"}
        for prompt in prompts
    ]
    asked = hashlib.sha256(repr(named).encode()).hexdigest()[:8]
    return Conditions(
        task.name,
        settings,
        _function_identity(task.verify),
        len(prompts),
        asked,
        k,
        seed,
        max_new_tokens,
        temperature=1.0,
    )


def _function_identity(function: Any) -> str:
    """Identify a function by the place of its definition and a checksum of its code.

    Two closures that one factory makes are equal.
    """
    function = getattr(function, "__func__", function)
    module = getattr(function, "__module__", "")
    named = f"{module}.{getattr(function, '__qualname__', type(function).__qualname__)}"
    code = getattr(function, "__code__", None)
    if code is None:
        return named
    constants = [
        value
        for value in code.co_consts
        if isinstance(value, (int, float, str, bytes, tuple, type(None)))
    ]
    body = hashlib.sha256(
        code.co_code + repr((constants, code.co_names)).encode("utf-8", "replace")
    )
    return f"{named} {body.hexdigest()[:8]}"


def _require_evaluation(value: Any, role: str) -> None:
    if not isinstance(value, Evaluation):
        raise InvalidValue(
            f"An evaluation {role} {shortened(value)} is not a paired comparison. Compare two"
            " evaluations of the same prompts, after - before, or compute with their .accuracy."
        )


def _require_same_conditions(after: tuple[Any, ...], before: tuple[Any, ...]) -> None:
    if after == before:
        return
    if not (isinstance(after, Conditions) and isinstance(before, Conditions)):
        raise OpdlabError(
            f"These evaluations are on different prompts ({after} and {before}), so they do not"
            " pair. Use the same task, n and seed."
        )
    pairs = {
        name: (a, b) for name, a, b in zip(Conditions._fields, after, before, strict=True) if a != b
    }
    differing = "; ".join(f"{name} {a!r} and {b!r}" for name, (a, b) in pairs.items())
    on_other_prompts = {"task", "settings", "n", "prompts", "seed"} & pairs.keys()
    where = (
        "are on different prompts" if on_other_prompts else "were made under different conditions"
    )
    wanted = "task, n and seed" if on_other_prompts else ", ".join(pairs)
    raise OpdlabError(
        f"These evaluations {where} ({differing}), so they do not pair. Use the same {wanted}."
    )
