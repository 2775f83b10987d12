"""A local teacher with another tokenizer, whose distributions are told in the student's tokens.

    q(v) = P( the longest token of the student that the teacher's next bytes begin with is v )
         = sum over the teacher's next tokens w that settle it,   q_T(w)
         + for a w that leaves it open,  q_T(w) · the same after w

This is byte-prefix marginalisation (arXiv 2607.22334): all of the teacher's probability, for every
token of the student, whatever the tokenizers. With it every method and every divergence trains as
with a teacher of the same tokens; `SpanOPD` grades the sampled token alone. The longest-match rule,
the residual and the exactness where no token is left open are the paper's, read second-hand [S];
what follows are our readings [O].

- The teacher reads the text so far in its own usual tokens. Within one of them, its next token is
  known to begin with the bytes that were written: q_T is renormalised on those tokens.
- A token that is left open is followed where the text itself goes that way, which costs nothing.
  Elsewhere its probability stays with the longest token so far, a bound, unless `lookahead` asks
  the teacher again. `report()` says how much is bounded.
- The residual (text that no token of the student begins) and `floor` are spread evenly, so that
  the target is a distribution without zeros and the reverse KL is finite. The paper keeps the
  residual as a category of its own.
"""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import ClassVar

import torch

from opdlab.data.alignment import decode_bytes
from opdlab.data.byte_maps import ByteMap, vocabulary_bytes
from opdlab.data.prompt import Prompt
from opdlab.data.rollout import Rollout
from opdlab.errors import InvalidValue, OpdlabError
from opdlab.models.graded import Graded, States
from opdlab.models.policy import Policy, as_policy
from opdlab.models.routed import join_graded
from opdlab.models.translated import Node, Path, Sums, Translated
from opdlab.support.expect import shortened
from opdlab.support.validation import Share, ShareBelowOne, validate

DEEPEST = 64  # tokens of the teacher that are asked for in a row, for one token of the student


@dataclass
class _Reading:
    """A completion in the teacher's tokens.

    `first` is the row of the teacher's states before the text.
    """

    sample: int
    starts: list[int]
    ids: list[int]
    pieces: list[bytes]
    text: bytes
    first: int = 0


class ByteTeacher:
    """A local teacher of any tokenizer, for methods that compare distributions.

    Args:
        policy: The teacher.
        floor: Probability that is spread evenly over the student's tokens, below 1.
        lookahead: Ask the teacher again where a token of it that leaves the student's open has at
            least this probability; None asks never.

    Attributes:
        policy: The teacher.
        floor: As given.
        lookahead: As given.

    Raises:
        InvalidValue: `policy` is no local policy, or a number is out of its range.
    """

    FLOOR: ClassVar[float] = 1e-6

    def __init__(
        self, policy: Policy, floor: float = FLOOR, lookahead: float | None = None
    ) -> None:
        if as_policy(policy) is None:
            raise InvalidValue(
                f"ByteTeacher got {shortened(policy)}. Give it a local model, as Policy.load(…): it"
                " reads whole distributions."
            )
        given = {"floor": floor, "lookahead": lookahead}
        checked = validate(
            "ByteTeacher", given, {"floor": ShareBelowOne, "lookahead": Share | None}
        )
        self.policy, self.floor, self.lookahead = policy, checked["floor"], checked["lookahead"]
        self._student: Policy | None = None
        self._maps: dict[tuple[bool, bool], ByteMap] = {}
        self._bytes: dict[bool, list[bytes]] = {}
        self._sums, self._left_out, self._has_warned = Sums(), 0, False

    @property
    def name(self) -> str:
        """The teacher's name."""
        return self.policy.name

    def check(self, student: Policy, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
        """Take up the student, whose tokens the grades shall be in.

        Args:
            student: The policy being trained.
            prompts: The prompts of the run.
            max_new_tokens: Length limit of a completion, in tokens of the student.

        Raises:
            ContextTooLong: A prompt does not fit the teacher's context.
        """
        self.policy.encode_all(prompts, room=max_new_tokens)
        if self._student is None or self._student.weights is not student.weights:
            self._maps = {}
        self._student = student

    def grade(self, rollout: Rollout) -> Graded:
        """Grade a rollout in the student's tokens.

        A completion that the teacher's tokenizer cannot spell, or with special tokens amid its
        text, is graded by the student itself, so that nothing is learnt from it.

        Args:
            rollout: Completions of the student that `check` was called with.

        Returns:
            The grades of `rollout.tokens` tokens, rows in order.

        Raises:
            OpdlabError: `check` was not called.
        """
        student = self._require_student()
        readings = [self._read(rollout, b, student) for b in range(len(rollout))]
        known = [one for one in readings if one is not None]
        rest = [b for b, one in enumerate(readings) if one is None]
        self._sums, self._left_out = Sums(), len(rest)
        if not known and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"The teacher's tokenizer spells none of these {len(rest)} completions as they were"
                f" written, as {rollout.texts[0][:60]!r}, so nothing is learnt from them. Use a"
                " teacher that knows these characters, or OmniOPD().",
                stacklevel=2,
            )
        parts: list[Graded] = []
        rows = []
        if known:
            parts.append(self._translate(rollout, known, student))
            rows.append([one.sample for one in known])
        if rest:
            parts.append(student.grade(rollout.select(rest)))
            rows.append(rest)
        return join_graded(parts, rows, rollout)

    def report(self) -> dict[str, float]:
        """Say how exact the grades of the last rollout were, as far as a loss has read them.

        Returns:
            `exact`, the share of tokens whose target is exact to 1e-6; `unresolved` and `residual`,
            mean probabilities; `left_out`, completions that could not be read.
        """
        tokens = max(self._sums.tokens, 1)
        return {
            "exact": 1 - self._sums.inexact / tokens,
            "unresolved": self._sums.unresolved / tokens,
            "residual": self._sums.residual / tokens,
            "left_out": float(self._left_out),
        }

    def _require_student(self) -> Policy:
        if self._student is None:
            raise OpdlabError(
                "This ByteTeacher does not know the student's tokens yet. Call check(student,"
                " prompts, max_new_tokens) first, as distill does."
            )
        return self._student

    def _map(self, at_start: bool, teacher_at_start: bool) -> ByteMap:
        """The map of tokens at the beginning of a text or within it, made once."""
        key = (at_start, teacher_at_start)
        if key not in self._maps:
            student, teacher = self._require_student(), self.policy
            ours = vocabulary_bytes(
                student.tokenizer, student.weights.vocab_size, at_start=at_start
            )
            theirs = self._pieces(teacher_at_start)
            ends, usual = student.weights.eos, student.tokenizer.eos_token_id
            end = usual if usual in ends else min(ends, default=None)
            self._maps[key] = ByteMap(
                ours, theirs, end, sorted(teacher.weights.eos), _preferred(student, ours)
            )
        return self._maps[key]

    def _read(self, rollout: Rollout, b: int, student: Policy) -> _Reading | None:
        """A completion in the teacher's tokens; None where it has none."""
        length = int(rollout.lengths[b])
        ids = rollout.ids[b, :length].tolist()
        has_end = bool(ids) and rollout.finish[b] == "stop" and ids[-1] in student.weights.eos
        mine = decode_bytes(student.tokenizer, ids[: length - has_end])
        if not all(mine):
            return None
        text = b"".join(mine)
        try:
            theirs: list[int] = []
            if text:
                encoded = self.policy.tokenizer(
                    text.decode(), add_special_tokens=False, split_special_tokens=True
                )
                theirs = list(encoded["input_ids"])
            pieces = decode_bytes(self.policy.tokenizer, theirs)
        except UnicodeDecodeError:
            return None
        if b"".join(pieces) != text or not all(pieces):
            return None
        starts = [0, *accumulate(map(len, mine))][:length]
        return _Reading(b, starts, theirs, pieces, text)

    def _translate(
        self, rollout: Rollout, readings: Sequence[_Reading], student: Policy
    ) -> Translated:
        prompts = [rollout.prompts[one.sample] for one in readings]
        states = self._states(prompts, [one.ids for one in readings])
        asked: list[tuple[Prompt, list[int]]] = []
        for prompt, one in zip(prompts, readings, strict=True):
            one.first = len(asked)
            asked += [(prompt, one.ids[:j]) for j in range(len(one.ids) + 1)]
        paths = [path for one in readings for path in self._paths(one)]
        size, device = student.weights.vocab_size, rollout.ids.device
        work = Translated(states, paths, size, self.floor, device)
        if self.lookahead is not None:
            starts = [start for one in readings for start in one.starts]
            work = self._look_ahead(work, starts, asked)
        return replace(work, sums=self._sums)

    def _states(self, prompts: Sequence[Prompt], bodies: Sequence[list[int]]) -> States:
        """The teacher's states before each token of some texts, and behind the last."""
        stop = min(self.policy.weights.eos, default=0)
        rows = [[*body, stop] for body in bodies]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        none = torch.zeros(ids.shape)
        n, lengths = len(rows), torch.tensor([len(row) for row in rows])
        written = Rollout(
            tuple(prompts), ids, lengths, none, none, ("stop",) * n, ("",) * n, ("student",) * n
        )
        return self.policy.grade(written.to(self.policy.weights.device))

    def _paths(self, one: _Reading) -> list[Path]:
        """The path of each token of the student: followed as far as the text itself goes."""
        ends = list(accumulate(map(len, one.pieces)))
        paths = []
        for start in one.starts:
            j = bisect_right(ends, start)  # tokens of the teacher that are whole by then
            known = one.text[ends[j - 1] if j else 0 : start]
            maps = self._map(start == 0, j == 0)
            table = maps.to_ours(known, b"")
            nodes = [Node(one.first + j, table, known=known, is_first=j == 0)]
            while j < len(one.ids):
                ahead = self._spell(nodes[-1], one.ids[j])
                if not maps.is_open(ahead):
                    break
                nodes.append(
                    self._next(nodes, len(nodes) - 1, one.ids[j], one.first + j + 1, start)
                )
                j += 1
            paths.append(tuple(nodes))
        return paths

    def _spell(self, node: Node, token: int) -> bytes:
        """What the text goes on with from the student's place, if the teacher says this token."""
        return node.before + self._pieces(node.is_first)[token][len(node.known) :]

    def _next(self, path: Sequence[Node], parent: int, token: int, state: int, start: int) -> Node:
        """The node behind an open token."""
        ahead = self._spell(path[parent], token)
        table = self._map(start == 0, False).to_ours(b"", ahead)
        return Node(state, table, parent, token, before=ahead)

    def _pieces(self, is_first: bool) -> list[bytes]:
        """The bytes of the teacher's tokens."""
        if is_first not in self._bytes:
            size = self.policy.weights.vocab_size
            self._bytes[is_first] = vocabulary_bytes(self.policy.tokenizer, size, at_start=is_first)
        return self._bytes[is_first]

    def _look_ahead(
        self, work: Translated, starts: Sequence[int], asked: list[tuple[Prompt, list[int]]]
    ) -> Translated:
        """Ask the teacher behind open tokens, until none has `lookahead` of probability.

        `asked` has the prompt and the teacher's tokens of every row of the states.
        """
        for _ in range(DEEPEST):
            found = work.open_tokens(float(self.lookahead or 0.0))
            if not found:
                break
            rows: dict[tuple[int, tuple[int, ...]], int] = {}
            paths = list(work.paths)
            more: list[tuple[Prompt, list[int]]] = []
            for i, number, token in found:
                prompt, prefix = asked[paths[i][number].state]
                key = (id(prompt), (*prefix, token))
                if key not in rows:
                    rows[key] = len(asked) + len(more)
                    more.append((prompt, [*prefix, token]))
                node = self._next(paths[i], number, token, rows[key], starts[i])
                paths[i] = (*paths[i], node)
            states = self._states([prompt for prompt, _ in more], [ids for _, ids in more])
            last = torch.tensor([len(ids) + 1 for _, ids in more]).cumsum(0) - 1
            hidden = torch.cat([work.states.hidden, states.part(last).hidden])
            asked += more
            work = replace(work, states=replace(work.states, hidden=hidden), paths=paths)
        return work

    def __repr__(self) -> str:
        return f"ByteTeacher({self.policy!r}, floor={self.floor}, lookahead={self.lookahead})"


def _preferred(student: Policy, pieces: Sequence[bytes]) -> dict[bytes, int]:
    """The id that the student's tokenizer uses for bytes that several of its tokens have."""
    seen: dict[bytes, int] = {}
    twice = dict.fromkeys(
        piece for i, piece in enumerate(pieces) if piece and seen.setdefault(piece, i) != i
    )
    chosen = {}
    for piece in twice:
        try:
            ids = student.tokenizer(piece.decode(), add_special_tokens=False)["input_ids"]
        except UnicodeDecodeError:
            continue
        if len(ids) == 1 and pieces[ids[0]] == piece:
            chosen[piece] = ids[0]
    return chosen
