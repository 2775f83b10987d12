"""Write the card of a trained model: what it is, how it was made, and how to load it.

Names of models, tasks and methods come from elsewhere. They are shown letter by letter and never
become Markdown, HTML or metadata of their own.
"""

from __future__ import annotations

import json
import math
import platform
import re
import resource
import sys
from collections.abc import Mapping
from dataclasses import asdict
from enum import Enum
from typing import Any

import peft
import torch
import transformers
from huggingface_hub import ModelCardData
from transformers import BitsAndBytesConfig

from opdlab.errors import InvalidValue
from opdlab.models import gguf_files
from opdlab.models.quantization import describe_quantization
from opdlab.support.expect import shortened
from opdlab.support.version import VERSION
from opdlab.training.evaluation import Evaluation
from opdlab.training.intervals import wilson
from opdlab.training.state import RunState

_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_SHOWN = ("loss", "reverse_kl", "entropy", "reward", "length")  # of the first and the last steps


class Form(Enum):
    """What is saved."""

    ADAPTER = "adapter"
    MERGED = "merged"
    BASE_AND_ADAPTER = "base and adapter"


def write_card(
    run: RunState, form: Form, name: str, evaluations: Mapping[str, Evaluation] | None = None
) -> str:
    """Write the card as Markdown with metadata for the Hub.

    Args:
        run: The run.
        form: What is saved beside the card.
        name: The folder or repository, as a reader will load it.
        evaluations: Evaluations by name, as `{"before": …, "after": …}`.

    Returns:
        The content of README.md.

    Raises:
        InvalidValue: `evaluations` is something else.
    """
    checked = _check(evaluations)
    sections = [
        f"---\n{_metadata(run, form)}---",
        f"# {escape(name.rpartition('/')[2] or name)}",
        _introduction(run, form),
        f"## Load it\n\n{_code(run, form, name)}",
        f"## Results\n\n{_results(run, checked)}",
        f"## Method and data\n\n{_table(_method_rows(run))}",
        f"## Settings\n\n{_table(_setting_rows(run))}",
        f"## Cost and versions\n\n{_table(_cost_rows(run))}",
    ]
    return "\n\n".join(sections) + "\n"


def escape(text: object) -> str:
    """Show a foreign text in Markdown letter by letter, on one line.

    Args:
        text: The text.

    Returns:
        Letters, digits, spaces, dots, commas and hyphens as they are, and everything else as
        character references, which Markdown never reads as marks.
    """
    line = " ".join(str(text).split())
    return "".join(
        letter if letter.isalnum() or letter in " .,-" else f"&#{ord(letter)};" for letter in line
    )


def _check(evaluations: Any) -> dict[str, Evaluation]:
    if evaluations is None:
        return {}
    if not isinstance(evaluations, Mapping) or not all(
        isinstance(one, Evaluation) for one in evaluations.values()
    ):
        raise InvalidValue(
            f"evaluations is {shortened(evaluations)}. Use a dict of evaluations by name, as"
            " {'before': opdlab.evaluate(…), 'after': opdlab.evaluate(…)}."
        )
    return {str(name): one for name, one in evaluations.items()}


def _metadata(run: RunState, form: Form) -> str:
    base = run.student.weights.source
    is_peft = form is Form.ADAPTER
    tags = ["opdlab", "on-policy-distillation", "knowledge-distillation"]
    data = ModelCardData(
        base_model=base if _HUB_NAME.fullmatch(base) else None,
        library_name="peft" if is_peft else "transformers",
        pipeline_tag="text-generation",
        tags=[*tags, "lora"] if run.student.adapter else tags,
    )
    return f"{data.to_yaml().rstrip()}\n"


def _introduction(run: RunState, form: Form) -> str:
    what = {
        Form.ADAPTER: "A LoRA adapter for",
        Form.MERGED: "A trained copy of",
        Form.BASE_AND_ADAPTER: "The base model, and in the folder `adapter` a LoRA adapter, of",
    }[form]
    weights = run.student.weights
    kind = describe_quantization(weights.model)
    teacher = "" if run.teacher is None else f" The teacher was {escape(_name_of(run.teacher))}."
    text = (
        f"{what} {escape(weights.name)}{f' ({kind})' if kind else ''}, trained by on-policy"
        f" distillation with opdlab {VERSION}: {run.done} of {run.settings.steps} steps.{teacher}"
    )
    if unpacked := gguf_files.origin(weights.source):
        text += (
            f" The base was unpacked from the GGUF file {escape(unpacked['file'])} with the SHA-256"
            f" {escape(unpacked['sha256'])}; opdlab unpacks it again with Policy.load."
        )
    return text


def _name_of(teacher: Any) -> str:
    """A teacher's name: that of a local model or of a server's model, never its address."""
    for attribute in ("name", "model"):
        value = getattr(teacher, attribute, None)
        if isinstance(value, str) and value:
            return value
    return type(teacher).__name__


def _code(run: RunState, form: Form, name: str) -> str:
    weights = run.student.weights
    dtype, here = str(weights.model.dtype), ascii(name)
    if form is Form.MERGED:
        return _fence(
            [
                "import torch",
                "from transformers import AutoModelForCausalLM, AutoTokenizer",
                "",
                f"model = AutoModelForCausalLM.from_pretrained({here}, dtype={dtype})",
                f"tokenizer = AutoTokenizer.from_pretrained({here})",
            ]
        )
    is_beside = form is Form.BASE_AND_ADAPTER
    base = here if is_beside else ascii(weights.source)
    adapter = ascii(f"{name}/adapter") if is_beside else here
    config = _quantization_code(weights.model)
    lines = [
        "import torch",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig"
        if config
        else "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        *([f"config = {config}"] if config else []),
        "base = AutoModelForCausalLM.from_pretrained(",
        f"    {base}, dtype={dtype}{', quantization_config=config' if config else ''}",
        ")",
    ]
    if run.has_new_embeddings and not is_beside:
        rows = weights.embeddings.shape[0]
        lines += [f"base.resize_token_embeddings({rows})  # its rows lie beside the adapter"]
    lines += [
        f"model = PeftModel.from_pretrained(base, {adapter})",
        f"tokenizer = AutoTokenizer.from_pretrained({here})",
    ]
    return _fence(lines)


def _quantization_code(model: Any) -> str:
    """The expression for a quantisation config of bitsandbytes; "" for other models."""
    config = getattr(model.config, "quantization_config", None)  # not every model has one
    if not isinstance(config, BitsAndBytesConfig):
        return ""
    given = {
        name: value
        for name, value in config.to_diff_dict().items()
        if name.startswith(("load_in_", "bnb_", "llm_int8_")) and value is not None
    }
    return f"BitsAndBytesConfig({', '.join(f'{name}={value!r}' for name, value in given.items())})"


def _fence(lines: list[str]) -> str:
    """A block of Python; names in it are literals, which hold no line breaks."""
    code = "\n".join(lines)
    fence = "`" * (2 + max((len(run) for run in re.findall("`+", code)), default=1))
    return f"{fence}python\n{code}\n{fence}"


def _results(run: RunState, evaluations: Mapping[str, Evaluation]) -> str:
    parts: list[str] = []
    rows: list[Any]
    head: tuple[str, ...]
    if evaluations:
        head = ("evaluation", "accuracy", "95 % interval (Wilson)", "prompts")
        parts.append(
            _table([_evaluation_row(name, evaluations[name]) for name in evaluations], head)
        )
    measured = [row for row in run.metrics if "accuracy" in row]
    if measured:
        head = ("during training", "accuracy, greedy", "95 % interval (Wilson)", "prompts")
        parts.append(_table([_measured_row(row) for row in measured], head))
    if run.metrics:
        first, last = run.metrics[:5], run.metrics[-5:]
        shown = [name for name in _SHOWN if name in run.metrics[-1]]
        rows = [(name, _mean(first, name), _mean(last, name)) for name in shown]
        head = ("metric", f"first {len(first)} steps", f"last {len(last)} steps")
        parts.append(_table(rows, head))
    if not evaluations and not measured:
        parts.append("It was not evaluated on held-out prompts.")
    return "\n\n".join(parts)


def _evaluation_row(name: str, evaluation: Evaluation) -> tuple[object, ...]:
    interval = evaluation.interval
    ends = f"{interval.low:.3f} to {interval.high:.3f}"
    return name, f"{evaluation.accuracy:.3f}", ends, evaluation.prompts


def _measured_row(row: Mapping[str, float]) -> tuple[object, ...]:
    """A row for the accuracy after a step; runs of earlier versions kept no number of prompts."""
    accuracy, prompts = row["accuracy"], int(row.get("accuracy_prompts", 0))
    interval = wilson(accuracy, prompts) if prompts else None
    ends = f"{interval.low:.3f} to {interval.high:.3f}" if interval else "–"
    return f"step {row['step']:.0f}", f"{accuracy:.3f}", ends, prompts or "–"


def _mean(rows: list[dict[str, float]], name: str) -> str:
    values = [row[name] for row in rows if name in row and not math.isnan(row[name])]
    return f"{sum(values) / len(values):.4g}" if values else "–"


def _method_rows(run: RunState) -> list[tuple[object, ...]]:
    method = run.identity["method"]
    rows: list[tuple[object, ...]] = [("method", type(run.method).__name__)]
    options = method.get("options") or {}
    rows += [(f"{name} (of the method)", _say(value)) for name, value in options.items()]
    rows += [("task", run.task.name), ("prompts for training", _count(run.task))]
    rows += [("student", run.student.weights.name)]
    if run.teacher is not None:
        rows += [("teacher", _name_of(run.teacher))]
    adapter = run.student.adapter
    if adapter is not None:
        config = run.student.weights.config_of(adapter)
        rows += [("LoRA rank", config.r), ("LoRA alpha", config.lora_alpha)]
    return rows


def _count(task: Any) -> str:
    try:
        return str(len(task))
    except TypeError:
        return "made as they are needed"


def _say(value: object) -> str:
    return json.dumps(value, default=str) if isinstance(value, (dict, list)) else str(value)


def _setting_rows(run: RunState) -> list[tuple[object, ...]]:
    return [(name, value) for name, value in asdict(run.settings).items()]


def _cost_rows(run: RunState) -> list[tuple[object, ...]]:
    settings = run.settings
    seconds = sum(row.get("seconds", 0.0) for row in run.metrics)
    per_step = settings.batch * settings.n  # over all processes
    tokens = sum(row.get("length", 0.0) for row in run.metrics) * per_step
    rows: list[tuple[object, ...]] = [
        ("seconds of training", f"{seconds:.0f}"),
        ("tokens written by the student (about)", f"{tokens:.0f}"),
        ("peak memory of the process", f"{_peak_bytes() / 2**30:.2f} GiB"),
    ]
    if torch.cuda.is_available():
        peak = max(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
        rows += [("peak memory of a GPU", f"{peak / 2**30:.2f} GiB")]
        rows += [("GPU", torch.cuda.get_device_name())]
    rows += [("device", run.student.weights.device), ("seed", settings.seed)]
    rows += [("opdlab", VERSION), ("PyTorch", torch.__version__)]
    rows += [("transformers", transformers.__version__), ("PEFT", peft.__version__)]
    return [*rows, ("Python", platform.python_version())]


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _table(rows: list[Any], head: tuple[str, ...] = ("", "")) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(escape(cell) for cell in row)} |" for row in rows]
    return "\n".join(lines)
