"""Measure on a GPU: limits of the card, the loss, scoring, writing, and whole steps.

A case is measured in a process of its own and gives a record: `seconds` of each repetition after a
warm-up, `peak_mib`, and for some `operations`, the multiplications and additions that its matrix
products cannot do without.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from benchmarks import divergence, step
from benchmarks.gpu.sizes import CONTEXT, Size, build_qwen, make_rollout
from benchmarks.workload import clock, device, measured, prompts
from opdlab.diagnose.plan import operations_of_token
from opdlab.diagnose.shapes import shape_of_config
from opdlab.engine.passes import compute
from opdlab.models.policy import Policy

Record = dict[str, Any]


@dataclass(frozen=True)
class World:
    """Hold the sizes and the tokenizer of a case, and build its models.

    Attributes:
        size: The sizes.
        tokenizer: The tokenizer of both models.
    """

    size: Size
    tokenizer: PreTrainedTokenizerFast

    def student(self) -> Any:
        """Build the student."""
        return build_qwen(self.size.student, self.size, self.tokenizer, 0)

    def teacher(self) -> Any:
        """Build the teacher."""
        return build_qwen(self.size.teacher, self.size, self.tokenizer, 1)


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        group: What it is about.
        name: What is measured there.
        run: Measures it.
        about_s: Seconds that it may take on an H200, with the start of its process: a guess.
        needs: What it cannot run without: names of modules, or "cuda".
    """

    group: str
    name: str
    run: Callable[[World], Record]
    about_s: float
    needs: tuple[str, ...] = ()

    @property
    def full_name(self) -> str:
        return f"{self.group}/{self.name}"

    def lacking(self) -> str | None:
        """Say what is not there that the case needs; None for nothing."""
        for need in self.needs:
            if need == "cuda":
                is_there = torch.cuda.is_available()
            else:
                is_there = importlib.util.find_spec(need) is not None
            if not is_there:
                return f"needs {need}, which is not here"
        return None


def repeat(work: Callable[[], object], repeats: int, **numbers: object) -> Record:
    """Do the work several times and measure all but the first."""
    costs = []
    for _ in range(repeats):
        with measured() as cost:
            work()
        costs.append(cost)
    return {
        "seconds": [cost.seconds for cost in costs[1:]],
        "peak_mib": max(cost.peak_mib for cost in costs),
        **numbers,
    }


# The card's limits.


def multiply(world: World, rows: int, width: int, columns: int, wide: bool = False) -> Record:
    """Measure a product of bfloat16 matrices, `wide` with its float32 sums as the result."""
    one = torch.randn(rows, width, device=device(), dtype=torch.bfloat16)
    other = torch.randn(columns, width, device=device(), dtype=torch.bfloat16).T
    options = {"out_dtype": torch.float32} if wide else {}
    times = 20  # in one measurement, so that a launch does not count

    def work() -> None:
        for _ in range(times):
            torch.mm(one, other, **options)  # type: ignore[call-overload]

    return repeat(work, world.size.repeats + 1, operations=2 * rows * width * columns * times)


def copy(world: World) -> Record:
    """Measure the memory's bandwidth: each byte is read and written."""
    one = torch.zeros(world.size.copied, dtype=torch.uint8, device=device())
    other = torch.empty_like(one)
    work = partial(other.copy_, one)
    return repeat(work, world.size.repeats + 2, bytes=2 * world.size.copied)


def limits(size_rows: int = 2048) -> list[Case]:
    def square(world: World) -> Record:
        return multiply(world, *[world.size.square] * 3)

    def head(world: World, wide: bool) -> Record:
        size = world.size
        rows = min(size_rows, size.loss_tokens)
        return multiply(world, rows, size.student["hidden_size"], size.vocab, wide)

    def layer(world: World) -> Record:
        size = world.size
        inner = size.teacher["intermediate_size"]
        return multiply(world, size.loss_tokens, size.teacher["hidden_size"], inner)

    return [
        Case("limits", "square product", square, 15),
        Case("limits", "product with the head", partial(head, wide=False), 15),
        Case(
            "limits", "product with the head, float32 sums", partial(head, wide=True), 15, ("cuda",)
        ),
        Case("limits", "product with a layer", layer, 15),
        Case("limits", "copy", copy, 15),
    ]


# The loss.


def loss(world: World, case: divergence.Case) -> Record:
    """Measure a divergence with its gradient, for bfloat16 states and heads."""
    size = world.size
    widths = size.student["hidden_size"], size.teacher["hidden_size"]
    case = divergence.Case(
        case.side, case.loss, case.trainable, size.loss_tokens, case.watch, size.vocab
    )
    problem = divergence.Problem.of(case, widths, torch.bfloat16)
    record = divergence.measure_case(case, problem, size.repeats + 1)
    # Both heads forward and the student's backward; a trainable head gets a gradient too.
    students = 3 if case.trainable else 2
    times = students * widths[0] + widths[1]
    return {**record, "operations": 2 * case.tokens * case.vocab * times}


def losses() -> list[Case]:
    needs = {"trl": ("trl",), "liger": ("liger_kernel", "cuda")}
    found = []
    for side in ("opdlab", "products", "trl", "liger", "full logits"):
        for kind in ("reverse_kl", "jensen_shannon"):
            if kind != "reverse_kl" and side in ("products", "full logits"):
                continue
            for is_trainable in (False, True):
                case = divergence.Case(side, kind, is_trainable)
                name = f"{side}/{kind}/{'trainable' if is_trainable else 'frozen'}"
                run = partial(loss, case=case)
                found.append(Case("loss", name, run, 18, needs.get(side, ())))
    for is_trainable in (False, True):
        case = divergence.Case("opdlab", trainable=is_trainable, watch=True)
        name = f"opdlab/reverse_kl/{'trainable' if is_trainable else 'frozen'}/watched"
        found.append(Case("loss", name, partial(loss, case=case), 18))
    return found


# Scoring.


def score(world: World, log_probs: bool) -> Record:
    """Let the teacher grade: its states, or also its log-probs of the tokens."""
    model = world.teacher()
    policy = Policy.of(model, world.tokenizer, eos=())
    texts, tokens = world.size.texts
    rollout = make_rollout(policy, texts, tokens)
    token = rollout.ids[rollout.mask]

    def work() -> None:
        graded = policy.grade(rollout)
        if log_probs:
            compute(lambda rows: rows.logp_of("teacher"), {"teacher": graded}, token)

    shape = shape_of_config(model.config, "teacher")
    length = CONTEXT + tokens
    operations = texts * length * operations_of_token(shape, length / 2)
    operations += log_probs * 2 * shape.head * texts * tokens
    with torch.no_grad():
        return repeat(work, world.size.repeats, operations=operations, tokens=texts * tokens)


# Writing.


def write(world: World, side: str) -> Record:
    """Let the student write; "opdlab, eager" starts every kernel from Python."""
    if side == "opdlab, eager":
        os.environ["OPDLAB_CUDA_GRAPHS"] = "0"  # this process has this case alone
    texts, tokens = world.size.texts
    model = world.student().eval()
    given = prompts(world.tokenizer, texts)
    if side == "transformers":
        work = _generate(model, world.tokenizer, given, tokens)
    else:
        work = _sample(Policy.of(model, world.tokenizer, eos=()), side, given, tokens)
    return repeat(work, world.size.repeats, tokens=texts * tokens)


def _generate(
    model: Any, tokenizer: PreTrainedTokenizerFast, given: list[str], tokens: int
) -> Callable[[], object]:
    ids = tokenizer(given, return_tensors="pt")["input_ids"].to(device())
    options = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": True, "top_k": 0}
    mask = torch.ones_like(ids)
    return partial(model.generate, input_ids=ids, attention_mask=mask, pad_token_id=0, **options)


def _sample(policy: Policy, side: str, given: list[str], tokens: int) -> Callable[[], object]:
    from opdlab.data.prompt import Prompt

    writer: Any = policy
    options: dict[str, Any] = {"max_new_tokens": tokens}
    if side == "vllm":
        writer = make_vllm(len(given))
        writer.start(policy)
    asked = [Prompt(text) for text in given]

    def work() -> None:
        rollout = writer.sample(asked, seed=0, **options)
        assert rollout.tokens == len(given) * tokens

    return work


def make_vllm(texts: int) -> Any:
    """Make opdlab's sampler of vLLM in this process."""
    from opdlab.samplers import VLLM

    return VLLM(dtype="bfloat16", max_num_seqs=texts, max_model_len=2048)


# A whole step.


def train(world: World, side: str, texts: int, tokens: int, micro_batch: int, steps: int) -> Record:
    """Measure steps with a LoRA, for both sides with and without vLLM."""
    student, teacher = world.student(), world.teacher()
    with_vllm = side.endswith("vLLM")
    ours: dict[str, Any] = {"micro_batch": micro_batch}
    theirs: dict[str, Any] = {
        "bf16": device().type == "cuda",
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": texts // micro_batch,
    }
    if with_vllm:
        ours["sampler"] = make_vllm(texts)
        theirs |= {
            "use_vllm": True,
            "vllm_mode": "colocate",
            "vllm_gpu_memory_utilization": 0.3,  # as opdlab's sampler has
            "vllm_max_model_length": 2048,
            "generation_kwargs": {"min_tokens": tokens},
        }
    size = step.Size(steps=steps, batch=texts, completion=tokens, ours=ours, theirs=theirs)
    watch = step.Stopwatch()
    prepare = step.opdlab_side if side.startswith("opdlab") else step.trl_side
    with tempfile.TemporaryDirectory() as folder:
        if with_vllm and not side.startswith("opdlab"):
            student = _on_disk(student, world.tokenizer, folder)  # TRL's vLLM loads it from there
        began = time.perf_counter()
        run = prepare(student, teacher, world.tokenizer, True, watch, size)
        start_s = time.perf_counter() - began
        with measured() as cost:
            found = run()
    record = step.record_of(watch, cost, found)
    return {**record, "start_s": start_s, "all_mib": _all_mib(), "tokens": texts * tokens}


def _on_disk(model: Any, tokenizer: PreTrainedTokenizerFast, folder: str) -> Any:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return type(model).from_pretrained(folder, dtype=model.dtype).to(device())


def _all_mib() -> float:
    """The most that PyTorch had of the card, with the models; vLLM's share comes on top."""
    if device().type == "cpu":
        return float("nan")
    return torch.cuda.max_memory_reserved() / 2**20


def steps() -> list[Case]:
    needs: dict[str, tuple[str, ...]] = {
        "opdlab": (),
        "TRL": ("trl",),
        "opdlab, vLLM": ("vllm", "cuda"),
        "TRL, vLLM": ("trl", "vllm", "cuda"),
    }
    found = []
    for few, seconds in ((True, 45), (False, 100)):
        for side, need in needs.items():

            def run(world: World, side: str = side, few: bool = few) -> Record:
                texts, tokens = world.size.few if few else world.size.texts
                micro = texts if few else min(world.size.micro_batch, texts)
                steps = world.size.steps if few else 2  # a warm-up and a long one
                return train(world, side, texts - texts % micro, tokens, micro, steps)

            name = f"{side}/{'few' if few else 'many'}"
            found.append(Case("step", name, run, seconds, need))
    return found


# The runner's own check: a case that is measured, one that fails, and one that never ends.


def _fail(world: World) -> Record:
    raise RuntimeError(f"no card has {world.size.vocab} GiB\nand this line is not quoted")


def _hang(world: World) -> Record:
    began = clock()
    while True:
        time.sleep(0.1)
        assert clock() >= began


CASES = {
    case.full_name: case
    for case in [
        *limits(),
        *losses(),
        Case("scoring", "states", partial(score, log_probs=False), 40),
        Case("scoring", "states and log-probs", partial(score, log_probs=True), 40),
        Case("writing", "opdlab", partial(write, side="opdlab"), 120),
        Case(
            "writing",
            "opdlab, eager",
            partial(write, side="opdlab, eager"),
            120,
            ("cuda",),
        ),
        Case("writing", "transformers", partial(write, side="transformers"), 140),
        Case("writing", "vllm", partial(write, side="vllm"), 120, ("vllm", "cuda")),
        *steps(),
        Case("check", "measured", partial(multiply, rows=4, width=4, columns=4), 5),
        Case("check", "fails", _fail, 5),
        Case("check", "hangs", _hang, 5),
    ]
}
GROUPS = ("limits", "loss", "scoring", "writing", "step", "check")
