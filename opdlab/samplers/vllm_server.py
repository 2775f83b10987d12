"""Sample the student's texts with a vLLM server, in an environment or on a machine of its own.

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve <student> --enable-lora --max-lora-rank 16

After each update the adapter is written to a folder that the server reads too, loaded there under a
new name, and the one before is unloaded. Prompts are sent as token ids, and token ids come back. A
server that was started again has lost the adapter: it gets it anew, and is asked again.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from opdlab.data.conversation import Environment
from opdlab.data.prompt import Prompt
from opdlab.data.rollout import Rollout
from opdlab.data.sampling_config import SamplingConfig, SamplingOptions
from opdlab.errors import ContextTooLong, InvalidValue, OpdlabError, SamplerError, TeacherError
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
    CountOrZero,
    Folder,
    Positive,
    Text,
    Unchecked,
    validate_arguments,
)
from opdlab.teachers.budget import Usage
from opdlab.teachers.redaction import plain
from opdlab.teachers.reply import Fault
from opdlab.teachers.service import Service

if TYPE_CHECKING:
    from typing import Unpack

ONE_TOKEN = Usage(1, 1, 1)  # the most that a request without texts uses
AGAIN = 2.0  # seconds between two looks whether a server that went away is back


class VLLMServer:
    """A vLLM server that writes the student's texts, as `VLLMServer("http://127.0.0.1:8000/v1")`.

    It serves the student's base model, started with --enable-lora and with
    VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment.

    Args:
        url: The server's address, with its /v1.
        model: The base model's name at the server; by default the one that answers.
        adapter_folder: A folder that this process writes and the server reads under the same path;
            a temporary one by default, for a server on this machine.
        key_env: The environment variable that holds the key. If it is not set, no key is sent.
        timeout: Seconds from a request to the end of its reply.
        retries: Most times that a request is sent again.
        concurrency: Prompts in flight; the server batches them.
        patience: Seconds to wait for a server that went away, until a step fails.

    Raises:
        InvalidValue: A value cannot be right.
    """

    @validate_arguments
    def __init__(
        self,
        url: Text,
        model: Text | None = None,
        *,
        adapter_folder: Folder | None = None,
        key_env: Text = "OPDLAB_API_KEY",
        timeout: Positive = 600.0,
        retries: CountOrZero = 3,
        concurrency: Count = 64,
        patience: Positive = 300.0,
    ) -> None:
        self.service = Service(
            url,
            key_env=key_env,
            timeout=timeout,
            retries=retries,
            concurrency=concurrency,
            quiet=True,
            who="sampler",
        )
        self.model, self.patience = model, patience
        self._folder = adapter_folder
        self._asked_model = model
        self._adapters: AdapterFiles | None = None
        self._student: Policy | None = None
        self._limit = 0  # tokens that a prompt and its completion may have together
        self._served = ""  # the name that the student has at the server
        self._serial = f"opdlab-{secrets.token_hex(4)}"
        self._number = 0

    @property
    def given(self) -> dict[str, Any]:
        """The arguments that it was made with, by name; those at None are defaults."""
        service = self.service
        return {
            "url": service.url,
            "model": self._asked_model,
            "adapter_folder": None if self._folder is None else str(self._folder),
            "key_env": service.key_env,
            "timeout": service.timeout,
            "retries": service.retries,
            "concurrency": service.concurrency,
            "patience": self.patience,
        }

    # The contract of a sampler.

    def check(self, student: Policy, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
        """Check before a run that the server is there, and takes up adapters.

        Args:
            student: The policy that will be trained.
            prompts: The prompts of the run.
            max_new_tokens: The longest completion, in tokens.

        Raises:
            SamplerError: The server does not answer, refuses the key or does not know the model.
            OpdlabError: It takes up no adapters.
            ContextTooLong: A prompt with its completion does not fit.
        """
        self._meet()
        self._check_takes_adapters()
        self._check_room(student.encode_all(prompts), max_new_tokens)

    def start(self, student: Policy) -> None:
        """Take up the student's adapter as it is now.

        Args:
            student: The policy that learns.

        Raises:
            SamplerError: The server does not load the adapter, or holds another model.
            InvalidValue: vLLM cannot compute the student's adapter, or all weights train.
        """
        self._meet()
        self._refuse_full_training(student)
        if student.adapter is not None:
            check_adapter(student.weights.config_of(student.adapter))
        self._student = student
        self._take_up(student)
        self._check_agrees(student)

    def update(self, student: Policy, step: int) -> None:
        """Load the student's adapter as it is after an update.

        Args:
            student: The policy that learns.
            step: Number of updates done.
        """
        self._student = student
        self._patiently(lambda: self._take_up(student))

    def close(self) -> None:
        """Unload the adapter at the server, and delete its files."""
        if self._served not in ("", self.model):
            with suppress(OpdlabError):  # a server that is gone holds nothing
                self._unload(self._served)
        if self._adapters is not None:
            self._adapters.close()
        self._adapters, self._student, self._served = None, None, ""

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
            batch_size: Prompts sent at once; `concurrency` of them by default.
            writer: Who writes, for the trace.
            places: Where each prompt stands in the batch of all processes; see `Policy.sample`.
            environment: Replies between the student's turns; see `Policy.sample`.
            options: Fields of `SamplingConfig`.

        Returns:
            The completions with vLLM's log-probs at temperature 1, in nats, without entropies.

        Raises:
            SamplerError: `start` was not called, or the server gives no usable answer.
            ContextTooLong: A prompt with its completion does not fit the server.
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
        return sample_with(self._write_patiently, self._check_room, student, request)

    # Talking to the server.

    def _patiently(self, act: Any) -> Any:
        """Do something at the server; one that went away is waited for, and gets its adapter anew.

        Raises SamplerError if it does not come back, or refuses.
        """
        end, lost = time.monotonic() + self.patience, False
        while True:
            try:
                if lost:
                    self._come_back()
                return act()
            except TeacherError as error:
                gone = error.status is None or error.status >= 500 or error.status == 404
                # A model that is not known is a lost adapter the first time, and an error then.
                if not gone or (lost and error.status == 404) or time.monotonic() > end:
                    raise SamplerError(
                        f"{error} The run's last step and its checkpoints are intact: go on with"
                        " it, in this process or by opdlab.resume."
                    ) from None
                lost = True
            time.sleep(AGAIN)

    def _come_back(self) -> None:
        """Give a server that was started again the student's adapter, and compare it again."""
        assert self._student is not None
        self._meet(again=True)
        self._take_up(self._student)
        self._check_agrees(self._student)

    def _meet(self, again: bool = False) -> None:
        """Learn the model's name and how long its texts may be."""
        if self._limit and not again:
            return
        try:
            found = self._post(
                "/tokenize", {"prompt": "a", **self._named()}, _read_limit, root=True
            )
            name = self._post(
                "/completions", {"prompt": [1], "max_tokens": 1, **self._named()}, _read_model
            )
        except TeacherError as error:
            if again:
                raise
            raise SamplerError(str(error)) from None
        self._limit, self.model = found, self.model or name

    def _named(self) -> dict[str, str]:
        return {"model": self.model} if self.model else {}

    def _check_takes_adapters(self) -> None:
        """Refuse a server without the route that loads adapters: an empty request tells."""
        try:
            self._post("/v1/load_lora_adapter", {}, lambda _: None, root=True, retries=0)
        except TeacherError as error:
            if error.status == 404:
                raise OpdlabError(
                    f"{self.service.url} loads no adapters, so it cannot follow the student. Start"
                    " vLLM with --enable-lora and with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its"
                    " environment."
                ) from None
            if error.status not in (400, 422):
                raise SamplerError(str(error)) from None

    def _refuse_full_training(self, student: Policy) -> None:
        parameters = student.weights.model.parameters()
        if student.adapter is None and any(one.requires_grad for one in parameters):
            raise InvalidValue(
                "VLLMServer follows a student by its adapter, and this one trains all weights"
                " (lora=None). Train an adapter (lora=16), or sample in this process:"
                " opdlab.samplers.VLLM()."
            )

    def _take_up(self, student: Policy) -> None:
        """Load the student's adapter under a new name, and unload the one before."""
        before = self._served
        if student.adapter is None:
            self._served = self.model or ""
        else:
            if self._adapters is None:
                self._adapters = AdapterFiles(self._folder)
            self._number += 1
            name = f"{self._serial}-{self._number}"
            folder = self._adapters.write(student, name)
            os.chmod(folder, 0o755)  # nosec B103  # read, not written, by a server of another user
            body = {"lora_name": name, "lora_path": str(folder)}
            try:
                self._post("/v1/load_lora_adapter", body, lambda _: None, root=True)
            except TeacherError as error:
                # vLLM answers 500, as for a fault of its own, where the rank is too high.
                is_rank = "max_lora_rank" in str(error)
                if not is_rank and (error.status is None or error.status >= 500):
                    raise
                raise SamplerError(
                    f"The server does not load the student's adapter from {folder}: {error} If it"
                    " does not see this folder, give adapter_folder= one that both see; if the"
                    " rank is too high, start it with a larger --max-lora-rank."
                ) from None
            self._served = name
            self._adapters.keep_only(folder)
        if before not in ("", self.model, self._served):
            with suppress(TeacherError):  # a server that was started again does not know it
                self._unload(before)

    def _unload(self, name: str) -> None:
        body = {"lora_name": name}
        self._post("/v1/unload_lora_adapter", body, lambda _: None, root=True, retries=0)

    def _check_agrees(self, student: Policy) -> None:
        """Compare the server's log-probs with the student's own, on a prompt of many tokens."""
        start = probe_ids(student)
        gap = mean_gap(student, start, self._write([order_of_trial(start, TRIED)], TRIED))
        if gap > OTHER_MODEL:
            raise SamplerError(
                f"{self.service.url} gives log-probs that differ from the student's by {gap:.2g}"
                f" nats per token: it serves another model than {student.name}. Serve the student's"
                " own base model."
            )
        hot = SamplingConfig(max_new_tokens=TRIED.max_new_tokens, temperature=2.0)
        gap = mean_gap(student, start, self._write([order_of_trial(start, hot)], hot))
        if gap > OTHER_MODEL / 2:
            raise SamplerError(
                f"{self.service.url} gives log-probs after temperature and filters. Start vLLM with"
                " --logprobs-mode raw_logprobs, which is its default."
            )

    def _check_room(self, starts: Sequence[Sequence[int]], room: int) -> None:
        longest = max(map(len, starts))
        if longest + room > self._limit:
            raise ContextTooLong(
                f"A prompt has {longest} tokens and {room} more are to come, but"
                f" {self.service.url} was started for {self._limit} (--max-model-len). Start it"
                f" with {longest + room} or more, or ask for fewer new tokens."
            )

    def _write_patiently(self, orders: Sequence[Order], config: SamplingConfig) -> list[Completion]:
        """Write; a server that went away is waited for, and gets the adapter anew."""
        written: list[Completion] = self._patiently(partial(self._write, orders, config))
        return written

    def _write(self, orders: Sequence[Order], config: SamplingConfig) -> list[Completion]:
        """Ask for all completions, several prompts at once."""
        assert self._student is not None
        fields = fields_of(config, self._student)
        jobs = [
            partial(
                self._ask,
                order.start,
                order.n,
                {**fields, "max_tokens": order.room, "seed": order.seed},
            )
            for order in orders
        ]
        return [one for row in self.service.many(jobs, unit=orders[0].n) for one in row]

    def _ask(self, start: list[int], n: int, fields: Mapping[str, Any]) -> list[Completion]:
        body = {
            "model": self._served,
            "prompt": start,
            "n": n,
            "return_token_ids": True,  # nosec B105  # no password
            "return_tokens_as_token_ids": True,  # nosec B105  # no password
            **fields,
        }
        read = partial(_read_choices, model=self._served, start=start, n=n)
        most = Usage(len(start), n * fields["max_tokens"], 1)
        found: list[Completion] = self._post("/completions", body, read, most=most)
        return found

    def _post(
        self,
        path: str,
        body: Mapping[str, Any],
        read: Any,
        root: bool = False,
        retries: int | None = None,
        most: Usage = ONE_TOKEN,
    ) -> Any:
        """Send a request; paths at the server's root lie beside /v1."""
        is_text = path.endswith("lora_adapter")
        return self.service.post(path, body, most, read, retries, is_text=is_text, at_root=root)

    def __enter__(self) -> VLLMServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"VLLMServer({self.service.url!r}, {self.model!r})"


def _read_limit(reply: Mapping[str, Any]) -> int:
    limit = reply.get("max_model_len")
    if type(limit) is not int or limit < 1:
        raise Fault("/tokenize gives no max_model_len, so this is no vLLM server")
    return limit


def _read_model(reply: Mapping[str, Any]) -> str:
    name = reply.get("model")
    if not isinstance(name, str) or not name:
        raise Fault("the reply names no model")
    return name


def _read_choices(
    reply: Mapping[str, Any], model: str, start: list[int], n: int
) -> list[Completion]:
    """Read the completions of one prompt; raise Fault for a reply that is about something else."""
    if reply.get("model") != model:
        raise Fault(f"another model answered: {plain(reply.get('model'))!r} and not {model!r}")
    choices = reply.get("choices")
    if not isinstance(choices, list) or len(choices) != n:
        raise Fault(f"the reply has not {n} texts")
    if not all(isinstance(choice, dict) for choice in choices):
        raise Fault("the reply has texts of another form")
    places = [choice.get("index") for choice in choices]
    if sorted(map(str, places)) != sorted(map(str, range(n))):
        raise Fault("the reply does not number its texts")
    ordered = sorted(choices, key=lambda choice: int(choice["index"]))
    return [_read_choice(choice, start) for choice in ordered]


def _read_choice(choice: Mapping[str, Any], start: list[int]) -> Completion:
    """Read one completion."""
    if choice.get("prompt_token_ids") != start:
        raise Fault(
            "the reply does not repeat the prompt's token ids as they were sent (return_token_ids:"
            " vLLM 0.10.2 or newer)"
        )
    ids, said = choice.get("token_ids"), choice.get("logprobs")
    said = said if isinstance(said, dict) else {}
    logp = said.get("token_logprobs")
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise Fault("the reply has no token ids")
    if not isinstance(logp, list) or not all(type(value) in (int, float) for value in logp):
        raise Fault("the reply has no log-probs of the tokens")
    if said.get("tokens") != [f"token_id:{token}" for token in ids]:
        raise Fault("the log-probs of the reply are about other tokens than its text")
    return Completion(ids, logp, str(choice.get("finish_reason")))
