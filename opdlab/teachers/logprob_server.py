"""A teacher behind a server that gives log-probs: of the `k` likeliest tokens and of the student's
own, at every position.

The student's token ids go out, and what comes back must be about just these ids. With it,
`OPD(top_k=TopK(k, by="teacher"))` and `OPD(estimator="sampled")` train as with a local teacher; a
loss that needs the whole distribution is refused when the run is made. Memory is `[tokens, k]`.
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
from opdlab.data.written_text import WrittenText
from opdlab.errors import OpdlabError, TeacherError, TokenizerMismatch
from opdlab.models.graded import TopLogprobs
from opdlab.models.policy import Policy
from opdlab.support.validation import Count, Text, validate_arguments
from opdlab.teachers import grades
from opdlab.teachers.asking import check_no_error, checked_finish
from opdlab.teachers.budget import Usage
from opdlab.teachers.redaction import plain
from opdlab.teachers.sampling import Sampling
from opdlab.teachers.service import Fault
from opdlab.teachers.text_server import TextServer

T = TypeVar("T")
# How the log-probs of a prompt are asked for, best first.
WAYS: dict[str, Callable[[int], dict[str, Any]]] = {
    "prompt_logprobs": lambda k: {"prompt_logprobs": k},
    "echo by id": lambda k: {"echo": True, "logprobs": k, "return_tokens_as_token_ids": True},
    "echo": lambda k: {"echo": True, "logprobs": k},
}
PROBE = 256  # ids of the vocabulary whose strings are compared


class LogprobServer:
    """`LogprobServer("http://127.0.0.1:8000/v1", k=20)`: it grades (`grade`) and writes (`write`,
    as a `TextServer`).

    k: how many of the likeliest tokens to ask for; vLLM allows 20 unless started with
        --max-logprobs. model and options: see
    `TextServer`. The chat template is the student's, since the teacher grades the very ids that the
    student read.
    """

    K: ClassVar[int] = 20  # what vLLM allows by default

    @validate_arguments
    def __init__(
        self, url: Text, model: Text | None = None, *, k: Count = K, **options: Any
    ) -> None:
        # the teacher reads what the student reads, so its prompts are those of the student,
        # rendered
        self.k, self.text = k, TextServer(url, model, **{"continue_by": "completion", **options})
        self._student: Policy | None = None
        self._names = grades.Names((), {})
        self._way = ""

    def check(self, student: Policy, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
        """Raise TeacherError where the server gives no log-probs, TokenizerMismatch where its
        tokens are not the student's.
        """
        bare = student._view(
            context=None, adapter=None
        )  # the teacher sees no context of the student's
        bare.encode_all(prompts, room=max_new_tokens)
        self.text.check(student, prompts, max_new_tokens)
        self._student, self._names = (
            bare,
            grades.Names.of(student.tokenizer, student.weights.vocab_size),
        )
        ids = _spread(
            student.tokenizer,
            student.weights.vocab_size,
            (student.weights.context_length or PROBE) - 2,
        )
        self._way, said = self._found(ids)
        for i, name in zip(ids[1:], said, strict=True):
            if (
                name is not None
                and "\ufffd" not in name
                and name.strip() != self._names.strings[i].strip()
            ):
                raise _mismatch(
                    f"id {i} is {plain(name)!r} there and {self._names.strings[i]!r} here"
                )
        self._compare_texts(student.tokenizer, prompts)

    def grade(self, rollout: Rollout) -> TopLogprobs:
        """The teacher's log-probs of every completion token, in row order; one request a
        completion.
        """
        if self._student is None:
            raise OpdlabError(
                "This server has not been compared with a student yet. Call check(student, prompts,"
                " max_new_tokens) first."
            )
        starts, bodies = self._student.encode_all(rollout.prompts), rollout.completions()
        rows = self.text.service.many(
            [partial(self._graded, s, b) for s, b in zip(starts, bodies, strict=True) if b]
        )
        vocab, device = self._student.weights.vocab_size, rollout.ids.device
        if not rows:
            k = min(self.k, vocab)
            rows = [(torch.zeros(0, k, dtype=torch.long), torch.zeros(0, k), torch.zeros(0))]
        ids, top, sampled = (torch.cat(column).to(device) for column in zip(*rows, strict=True))
        return TopLogprobs(ids, top, sampled, rollout.ids[rollout.mask], vocab)

    def write(
        self, prompts: Sequence[Prompt], n: int = 1, **options: Any
    ) -> list[list[WrittenText]]:
        """Texts, as `TextServer.write`."""
        return self.text.write(prompts, n, **options)

    def _graded(self, start: list[int], body: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        vocab = len(self._names.strings)
        return self._post(
            start + body,
            self._way,
            lambda entries, _: grades.table(entries[len(start) - 1 :], body, self.k, vocab),
        )

    def _post(
        self,
        ids: list[int],
        way: str,
        read: Callable[[list[dict[int, float]], dict[str, Any]], T],
        retries: int | None = None,
    ) -> T:
        """One sequence graded:

        `read` makes something of the log-probs at each token but the first, and of the reply's
        choice.
        """
        text = self.text
        body = {"prompt": ids, "max_tokens": 1, **WAYS[way](self.k)}

        def accept(reply: dict[str, Any]) -> T:
            text.named(reply)
            listed = reply.get("choices")
            if not isinstance(listed, list) or len(listed) != 1 or not isinstance(listed[0], dict):
                raise Fault("the reply has not one choice for one prompt")
            check_no_error(listed[0])
            checked_finish(listed[0])  # of a request that was broken off, the log-probs may be too
            return read(grades.tops(listed[0], ids, way, self._names), listed[0])

        return text.post("/completions", body, Sampling(), Usage(len(ids), 1, 1), accept, retries)

    def _found(self, ids: list[int]) -> tuple[str, list[str | None]]:
        """The first way in which the server grades `ids`, and what it calls them."""
        refusals = []
        for way in WAYS:

            def read(
                entries: list[dict[int, float]], choice: dict[str, Any], way: str = way
            ) -> list[str | None]:
                grades.table(entries, ids[1:], self.k, len(self._names.strings))
                return grades.strings(choice, ids, way)

            try:
                return way, self._post(ids, way, read, retries=1)
            except TeacherError as error:
                if error.status is None or error.status >= 500 or error.status in (401, 403):
                    raise
                refusals.append(f"{way}: {error}")
        raise TeacherError(
            f"{self.text.service.url} gives no log-probs of a prompt that can be used. Serve the"
            " teacher with vLLM or SGLang, or use it as a TextServer with a method that learns"
            f" from texts alone (OmniOPD, SequenceKD). It was asked so: {' | '.join(refusals)}"
        )

    def _compare_texts(self, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> None:
        """Where the server offers /tokenize (vLLM), texts must fall into the same tokens there."""
        url = self.text.service.url.removesuffix("/v1") + "/tokenize"
        for prompt in prompts[:3]:
            said = prompt.text if prompt.messages is None else prompt.messages[-1]["content"]
            text = f"{said}\n{prompt.answer or ''}"
            body = {"model": self.text.model, "prompt": text, "add_special_tokens": False}
            try:
                theirs = self.text.service.post(url, body, Usage(requests=1), _tokens, retries=1)
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
        return f"LogprobServer({self.text.service.url!r}, {self.text.model!r}, k={self.k})"


def _tokens(reply: dict[str, Any]) -> list[int]:
    tokens = reply.get("tokens")
    if not isinstance(tokens, list) or not all(type(i) is int for i in tokens):
        raise Fault("/tokenize gives no tokens")
    return tokens


def _spread(tokenizer: PreTrainedTokenizerBase, vocab: int, most: int) -> list[int]:
    """Ids from all over the vocabulary that are no special tokens, about `most`; one more before
    them, since a first has no grade.
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
