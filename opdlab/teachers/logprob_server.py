"""A teacher behind a server that gives log-probs of the `k` likeliest tokens and the student's own.

The student's token ids are sent, and the log-probs that come back must be about these very ids.
With it, `OPD(top_k=TopK(k, by="teacher"))` and `OPD(estimator="sampled")` train as with a local
teacher; a loss that needs the whole distribution is refused when the run is made. Memory is
`[tokens, k]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opdlab.data.prompt import Prompt
from opdlab.data.rollout import Rollout
from opdlab.data.sampling_config import SamplingConfig
from opdlab.data.written_text import WrittenText
from opdlab.errors import OpdlabError, TeacherError, TokenizerMismatch
from opdlab.models.graded import TopLogprobs
from opdlab.models.policy import Policy
from opdlab.support.validation import Addresses, Count, Text, validate_arguments
from opdlab.teachers import grades
from opdlab.teachers.asking import check_no_error, read_finish
from opdlab.teachers.budget import Usage
from opdlab.teachers.redaction import plain
from opdlab.teachers.reply import Fault
from opdlab.teachers.service import USUAL
from opdlab.teachers.text_server import TextServer

T = TypeVar("T")
# Of a completion of n tokens: ids [n, k] and log-probs [n, k] of the likeliest, and of its own [n].
Grade = tuple[Tensor, Tensor, Tensor]
# How the log-probs of a prompt can be asked for, best first: the field for k, and the others.
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt_logprobs": ("prompt_logprobs", {}),
    "echo by id": ("logprobs", {"echo": True, "return_tokens_as_token_ids": True}),  # nosec B105  # no password
    "echo": ("logprobs", {"echo": True}),
}
BYTES_A_GRADE = 256  # of a reply: a log-prob with its rank and its token's name
PROBE = 256  # ids of the vocabulary whose strings are compared


class LogprobServer:
    """A teacher that grades and writes, as `LogprobServer("http://127.0.0.1:8000/v1", k=20)`.

    Its chat template is the student's, since it grades the very ids that the student read.

    Args:
        url: The server's address, with its /v1; or a list of the addresses of servers of the same
            model, which share the requests (see `opdlab.teachers.servers`).
        model: The model's name at the server; by default the one that answers.
        k: Number of the likeliest tokens to ask for. vLLM allows 20 unless it is started with
            --max-logprobs.
        options: As for `TextServer`.

    Attributes:
        k: Number of the likeliest tokens to ask for.
        text: The `TextServer` that it writes with.

    Raises:
        InvalidValue: A value cannot be right.
    """

    K: ClassVar[int] = 20  # what vLLM allows by default

    @validate_arguments
    def __init__(
        self, url: Addresses, model: Text | None = None, *, k: Count = K, **options: Any
    ) -> None:
        # The teacher reads what the student reads: its prompts are the student's, rendered.
        self.k, self.text = k, TextServer(url, model, **{"continue_by": "completion", **options})
        self._student: Policy | None = None
        self._names = grades.Names((), {})
        self._way = ""
        # Grades of a rollout whose grading an error stopped, so that they are not paid for twice.
        self._paid: dict[tuple[int, ...], Grade] = {}

    def check(self, student: Policy, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
        """Check before a run that the server grades the student's tokens.

        Args:
            student: The policy being trained. Its tokenizer is compared with the server's, and its
                context counts.
            prompts: The prompts of the run.
            max_new_tokens: Length limit of a completion, in tokens of the student.

        Raises:
            TeacherError: The server gives no usable log-probs.
            TokenizerMismatch: Its tokens are not the student's.
            ContextTooLong: A prompt with `max_new_tokens` behind it does not fit the student.
        """
        # The teacher sees no context of the student's.
        bare = student.without_context().without_adapter()
        bare.encode_all(prompts, room=max_new_tokens)
        self.text.check(student, prompts, max_new_tokens)
        vocab, context = student.weights.vocab_size, student.weights.context_length
        self._student = bare
        self._names = grades.Names.of(student.tokenizer, vocab)
        ids = _spread_ids(student.tokenizer, vocab, (context or PROBE) - 2)
        self._way = ""
        self.text.service.compare = partial(self._compare, ids, student.tokenizer, prompts[:3])
        self.text.service.compare_servers()

    def _compare(
        self, ids: list[int], tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]
    ) -> None:
        """Check that a server grades `ids`, all in one way, and has the student's tokens."""
        way, said = self._find_way(ids, (self._way,) if self._way else tuple(WAYS))
        for i, name in zip(ids[1:], said, strict=True):
            ours = self._names.strings[i]
            # Half of a character has no string to compare.
            if name is not None and "\ufffd" not in name and name.strip() != ours.strip():
                raise _mismatch(f"id {i} is {plain(name)!r} there and {ours!r} here")
        self._compare_texts(tokenizer, prompts)
        self._way = way

    def grade(self, rollout: Rollout) -> TopLogprobs:
        """Ask for the teacher's log-probs of every completion token.

        One request is sent per completion. The teacher sees the prompts without the student's
        context. If an error stops this, grading the same rollout again goes on from what came.

        Args:
            rollout: Completions of the student that `check` was called with.

        Returns:
            Log-probs of the `k` likeliest tokens and of the token itself, for each of
            `rollout.tokens` tokens, rows in order.

        Raises:
            OpdlabError: The server has not been compared with a student by `check`.
            TeacherError: The server gives no usable answer.
            BudgetSpent: The next request may not fit the budget.
        """
        return self.begin(rollout)()

    def begin(self, rollout: Rollout) -> Callable[[], TopLogprobs]:
        """Encode a rollout, to be graded by the function that is returned.

        Args:
            rollout: Completions of the student that `check` was called with.

        Returns:
            A function that does what `grade` does; it may run in another thread.

        Raises:
            OpdlabError: The server has not been compared with a student by `check`.
        """
        if self._student is None:
            raise OpdlabError(
                "This server has not been compared with a student yet. Call check(student, prompts,"
                " max_new_tokens) first."
            )
        starts, bodies = self._student.encode_all(rollout.prompts), rollout.completions()
        vocab = self._student.weights.vocab_size
        return partial(self._grade, rollout, list(zip(starts, bodies, strict=True)), vocab)

    def _grade(
        self, rollout: Rollout, pairs: Sequence[tuple[list[int], list[int]]], vocab: int
    ) -> TopLogprobs:
        rows = self.text.service.many(
            [partial(self._grade_one, start, body) for start, body in pairs if body]
        )
        self._paid.clear()
        device = rollout.ids.device
        if not rows:
            k = min(self.k, vocab)
            rows = [(torch.zeros(0, k, dtype=torch.long), torch.zeros(0, k), torch.zeros(0))]
        ids, top, sampled = (torch.cat(column).to(device) for column in zip(*rows, strict=True))
        return TopLogprobs(ids, top, sampled, rollout.ids[rollout.mask], vocab)

    def write(
        self,
        prompts: Sequence[Prompt],
        n: int = 1,
        *,
        prefixes: Sequence[str] | None = None,
        places: Sequence[int] | None = None,
        **options: Any,
    ) -> list[list[WrittenText]]:
        """Write `n` texts for each prompt, as `TextServer.write`.

        Args:
            prompts: The questions.
            n: Texts for each prompt.
            prefixes: One unfinished answer for each prompt, which the texts continue.
            places: Where each prompt stands in a batch that several processes share.
            options: Fields of `SamplingConfig`.

        Returns:
            One list for each prompt, with `n` texts.
        """
        return self.text.write(prompts, n, prefixes=prefixes, places=places, **options)

    def _grade_one(self, start: list[int], body: list[int]) -> Grade:
        vocab, key = len(self._names.strings), (len(start), *start, *body)
        if (paid := self._paid.get(key)) is not None:
            return paid
        grade = self._post(
            start + body,
            self._way,
            lambda entries, _: grades.make_table(entries[len(start) - 1 :], body, self.k, vocab),
        )
        self._paid[key] = grade
        return grade

    def _post(
        self,
        ids: list[int],
        way: str,
        read: Callable[[list[dict[int, float]], dict[str, Any]], T],
        retries: int | None = None,
    ) -> T:
        """Have one sequence graded.

        `read` gets the log-probs at each token but the first, and the reply's choice.
        """
        text = self.text
        count, fields = WAYS[way]
        body = {"prompt": ids, "max_tokens": 1, count: self.k, **fields}

        def accept(reply: dict[str, Any]) -> T:
            text.check_model(reply)
            listed = reply.get("choices")
            if not isinstance(listed, list) or len(listed) != 1 or not isinstance(listed[0], dict):
                raise Fault("the reply has not one choice for one prompt")
            check_no_error(listed[0])
            read_finish(listed[0])  # if the request was broken off, the log-probs may be too
            return read(grades.read_logprobs(listed[0], ids, way, self._names), listed[0])

        most = Usage(len(ids), 1, 1)
        largest = USUAL + len(ids) * (self.k + 2) * BYTES_A_GRADE
        return text.post(
            "/completions", body, SamplingConfig(), most, accept, retries, largest=largest
        )

    def _find_way(self, ids: list[int], ways: Sequence[str]) -> tuple[str, list[str | None]]:
        """The first way in which the server grades `ids`, and the names that it has for them."""
        refusals, status = [], None
        for way in ways:

            def read(
                entries: list[dict[int, float]], choice: dict[str, Any], way: str = way
            ) -> list[str | None]:
                grades.make_table(entries, ids[1:], self.k, len(self._names.strings))
                return grades.read_names(choice, ids, way)

            try:
                return way, self._post(ids, way, read, retries=1)
            except TeacherError as error:
                if error.status is None or error.status >= 500 or error.status in (401, 403):
                    raise
                refusals.append(f"{way}: {error}")
                status = error.status
        lost = TeacherError(
            f"{self.text.service.asked_url} gives no log-probs of a prompt that can be used. Serve"
            " the teacher with vLLM or SGLang, or use it as a TextServer with a method that learns"
            f" from texts alone (OmniOPD, SequenceKD). It was asked so: {' | '.join(refusals)}"
        )
        lost.status = status
        raise lost

    def _compare_texts(self, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> None:
        """Check that texts fall into the same tokens at the server, if it has /tokenize (vLLM)."""
        service = self.text.service
        for prompt in prompts:
            said = prompt.text if prompt.messages is None else prompt.messages[-1]["content"]
            text = f"{said}\n{prompt.answer or ''}"
            body = {"model": self.text.model, "prompt": text, "add_special_tokens": False}
            try:
                most = Usage(requests=1)
                theirs = service.post("/tokenize", body, most, _read_ids, retries=1, at_root=True)
            except TeacherError as error:
                if error.status is None:
                    raise
                return
            ours = list(tokenizer(text, add_special_tokens=False)["input_ids"])
            if theirs != ours:
                raise _mismatch(
                    f"{plain(text)!r} has the ids {theirs[:20]} there and {ours[:20]} here"
                )

    def __repr__(self) -> str:
        return f"LogprobServer({self.text.service.shown_url}, {self.text.model!r}, k={self.k})"


def _read_ids(reply: dict[str, Any]) -> list[int]:
    tokens = reply.get("tokens")
    if not isinstance(tokens, list) or not all(type(i) is int for i in tokens):
        raise Fault("/tokenize gives no tokens")
    return tokens


def _spread_ids(tokenizer: PreTrainedTokenizerBase, vocab: int, most: int) -> list[int]:
    """Ids of about `most` tokens from all over the vocabulary, without special tokens.

    One more stands before them, since the first token of a sequence has no grade.
    """
    special = set(tokenizer.all_special_ids)
    ids = [i for i in range(vocab) if i not in special]
    ids = ids[:: -(-len(ids) // max(1, min(most, PROBE)))]
    return [ids[-1], *ids]


def _mismatch(what: str) -> TokenizerMismatch:
    return TokenizerMismatch(
        f"The server's tokenizer differs from the student's: {what}. A token-level loss would"
        " compare unrelated tokens. Serve a teacher of the same family, or use it as a TextServer."
    )
