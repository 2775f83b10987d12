"""Sample conversations: the student's turns, and what an environment says between them.

    prompt ids | turn 0, sampled | template's ids around the reply | turn 1, sampled | …

Token ids stay as they were sampled and are never tokenized again. What stands between two turns
comes from the chat template: the conversation with the reply is rendered as a whole, and the ids
behind the end of the student's last turn are appended. They are checked to change nothing before:
the prompt and earlier replies must be rendered as they were.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opdlab.data.conversation import Environment, FinalText, Parser, ToolCall, Turn
from opdlab.data.prompt import Prompt, name_of, read_messages
from opdlab.data.rollout import Rollout
from opdlab.data.sampling_config import SamplingConfig
from opdlab.data.seeds import seed_of
from opdlab.data.tokens import completion_texts
from opdlab.errors import InvalidValue, OpdlabError
from opdlab.models.fingerprints import vocabulary_digest
from opdlab.models.head import Head
from opdlab.models.sampling import SampledTexts, SamplingLoop
from opdlab.models.tool_calls import find_parser
from opdlab.models.weights import Weights
from opdlab.support.expect import shortened

TURNS = 4096  # most turns of a conversation, for seeds

# Tokenizers whose users know that their template renders earlier turns in another way.
_warned: WeakSet[PreTrainedTokenizerBase] = WeakSet()


class Talker(Protocol):
    """The part of a `Policy` that talks: it reads chats and writes turns."""

    weights: Weights
    chat_template_kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        """The model's name in errors."""
        ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the weights."""
        ...

    @property
    def adapter(self) -> str | None:
        """Name of the adapter in use."""
        ...

    @property
    def head(self) -> Head:
        """The output head as the adapter leaves it."""
        ...

    def encode_all(self, prompts: Sequence[Prompt], room: int = 0) -> list[list[int]]:
        """Encode prompts, and check that `room` new tokens fit behind each.

        Args:
            prompts: The prompts.
            room: New tokens that must fit.

        Returns:
            Token ids of each prompt.
        """
        ...

    def encode_unchecked(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Encode prompts, however long they are.

        Args:
            prompts: The prompts.

        Returns:
            Token ids of each prompt.
        """
        ...

    def with_template(self, **chat_template_kwargs: Any) -> Talker:
        """Make a view with more arguments for the chat template.

        Args:
            chat_template_kwargs: Arguments by name.

        Returns:
            The view.
        """
        ...


@dataclass
class Talk:
    """One conversation that goes on.

    Attributes:
        prompt: The prompt, with the environment's tools.
        start: Token ids of the prompt as the policy reads it.
        place: Number of the conversation in the whole batch, for seeds.
        ids, learn, turn, logp, entropy: One value for each token after the prompt.
        messages: The conversation after the prompt.
        turns: The student's turns so far.
        finish: Why it ended; "" while it goes on.
        replies: For each reply, the number of end tokens before it and its ids without the opening
            of the next turn.
    """

    prompt: Prompt
    start: list[int]
    place: int
    ids: list[int] = field(default_factory=list)
    learn: list[bool] = field(default_factory=list)
    turn: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    turns: int = 0
    finish: str = ""
    text: str = ""
    replies: list[tuple[int, list[int]]] = field(default_factory=list)

    def extended(self) -> Prompt:
        """The prompt with the conversation so far behind it."""
        return replace(self.prompt, messages=(*(self.prompt.messages or ()), *self.messages))

    def append(self, ids: Sequence[int], numbers: tuple[list[float], list[float]] | None) -> None:
        """Add tokens to the turn that runs; `numbers` are log-probs and entropies of the student's.

        Tokens that the student did not write have none.
        """
        self.ids += ids
        self.learn += [numbers is not None] * len(ids)
        self.turn += [self.turns] * len(ids)
        zeros = [0.0] * len(ids)
        self.logp += zeros if numbers is None else numbers[0]
        self.entropy += zeros if numbers is None else numbers[1]


def converse(
    policy: Talker,
    prompts: Sequence[Prompt],
    n: int,
    environment: Environment,
    config: SamplingConfig,
    *,
    batch_size: int | None = None,
    writer: str = "student",
    places: Sequence[int] | None = None,
) -> Rollout:
    """Let a policy talk to an environment: row `i * n + j` is conversation `j` of prompt `i`.

    The first turns are written as `Policy.sample` writes them, so a conversation of one turn is the
    same to the bit. Later turns of all conversations that wait are written side by side, whichever
    turn they are at. The random numbers of a token depend on seed, row and position alone.

    Args:
        policy: The policy that writes.
        prompts: Chats.
        n: Conversations of each prompt.
        environment: Replies between the turns.
        config: How tokens are drawn. `max_new_tokens` limits all tokens after the prompt, those of
            the environment among them.
        batch_size: Prompts held in memory at once; all by default.
        writer: Who writes, for the trace.
        places: Where each prompt stands in a batch that several processes share.

    Returns:
        The conversations. `learn` is true on the student's own tokens, `turn` numbers its turns (a
        reply counts to the turn before it), and `texts` are `FinalText`s. A conversation that ran
        out of tokens or turns has the finish "length".

    Raises:
        InvalidValue: A prompt is no chat, or an option does not suit several turns.
        OpdlabError: The environment fails, or the chat template cannot go on with a conversation.
    """
    check_environment(environment)
    _check_options(policy, config)
    _check_chats(prompts)
    prompts = with_tools(prompts, environment)
    parse = environment.parse or find_parser(
        policy.tokenizer, policy.chat_template_kwargs, has_tools=bool(environment.tools)
    )
    frame = Frame(policy)
    starts = policy.encode_all(prompts, config.max_new_tokens)
    rows = range(len(prompts)) if places is None else places
    talks = [
        Talk(prompt, start, place * n + j)
        for prompt, start, place in zip(prompts, starts, rows, strict=True)
        for j in range(n)
    ]
    size = batch_size or len(prompts)
    waiting: list[Talk] = []
    with torch.no_grad(), policy.weights.using(policy.adapter):
        loop = SamplingLoop(policy.weights, policy.head, config)
        uniform = loop.draw_uniform(len(prompts), n, places).flatten(0, 1)
        of_talk = {id(talk): uniform[i] for i, talk in enumerate(talks)}

        def go_on(written: SampledTexts, part: list[Talk]) -> None:
            _take(written, part, policy)
            _answer(part, environment, parse, config)
            frame.append_replies([talk for talk in part if not talk.finish], config.max_new_tokens)
            waiting.extend(talk for talk in part if not talk.finish)

        for i in range(0, len(prompts), size):
            part = talks[i * n : (i + size) * n]
            go_on(loop.write(starts[i : i + size], n, uniform[i * n : (i + size) * n]), part)
            # A pass is worth its while when it is full, or when no first turns are left.
            while waiting and (len(waiting) >= size * n or i + size >= len(prompts)):
                part, waiting[:] = waiting[: size * n], waiting[size * n :]
                go_on(_write_next(loop, part, of_talk), part)
    return _make_rollout(policy, talks, n, writer)


def check_environment(environment: Any) -> None:
    """Check that an object can reply to turns.

    Args:
        environment: As the user gave it.

    Raises:
        InvalidValue: It is no environment, or has a limit of turns that cannot be right.
    """
    if isinstance(environment, type) or not isinstance(environment, Environment):
        raise InvalidValue(
            f"environment is {shortened(environment)}. Use opdlab.tasks.Tools(function, …), or an"
            " object of a subclass of opdlab.tasks.Environment with a method reply(prompt,"
            " messages, seed)."
        )
    limit = environment.max_turns
    if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= TURNS:
        raise InvalidValue(
            f"The environment has max_turns={shortened(limit)}. Use a whole number from 1 to"
            f" {TURNS}."
        )


def _check_options(policy: Talker, config: SamplingConfig) -> None:
    if config.min_new_tokens:
        raise InvalidValue(
            "min_new_tokens cannot be kept in a conversation, whose turns end when the student ends"
            " them. Leave it out, or sample without environment=."
        )
    for name in ("add_generation_prompt", "continue_final_message"):
        if name in policy.chat_template_kwargs:
            raise InvalidValue(
                f"This policy sets {name} for its chat template, which a conversation sets itself."
                " Use a policy without it."
            )


def with_tools(prompts: Sequence[Prompt], environment: Environment) -> list[Prompt]:
    """Show the environment's tools in the chats that show none of their own.

    Args:
        prompts: The prompts; plain texts stay as they are.
        environment: Its `tools` are shown.

    Returns:
        The prompts in order; the same objects where nothing changes.
    """
    return [
        replace(prompt, tools=environment.tools)
        if environment.tools and prompt.messages is not None and not prompt.tools
        else prompt
        for prompt in prompts
    ]


def _check_chats(prompts: Sequence[Prompt]) -> None:
    for prompt in prompts:
        if prompt.messages is None:
            raise InvalidValue(
                f"Prompt {name_of(prompt)} is a plain text, and an environment replies in a chat."
                " Give messages=."
            )


def _write_next(loop: SamplingLoop, part: list[Talk], uniform: dict[int, Tensor]) -> SampledTexts:
    """Write the next turn of conversations that are at any turn."""
    limit = loop.config.max_new_tokens
    room = torch.tensor([limit - len(talk.ids) for talk in part])
    numbers = torch.zeros(len(part), int(room.max()), dtype=torch.float64)
    for row, talk in enumerate(part):
        numbers[row, : int(room[row])] = uniform[id(talk)][len(talk.ids) :]
    return loop.write([talk.start + talk.ids for talk in part], 1, numbers, room)


def _take(written: SampledTexts, part: list[Talk], policy: Talker) -> None:
    """Put sampled turns into their conversations."""
    columns = (written.ids, written.logp, written.entropy)
    ids, logp, entropy = (values.tolist() for values in columns)
    ended = zip(written.lengths.tolist(), written.stopped.tolist(), strict=True)
    bodies = []
    for row, (talk, (length, stopped)) in enumerate(zip(part, ended, strict=True)):
        body = ids[row][:length]
        talk.append(body, (logp[row][:length], entropy[row][:length]))
        talk.finish = "" if stopped else "length"
        bodies.append(body)
    texts = completion_texts(policy.tokenizer, bodies, policy.weights.eos)
    for talk, text in zip(part, texts, strict=True):
        talk.text = text


def _read_turn(parse: Parser, text: str) -> Turn:
    """Read a turn; a parser of the user's own that fails gives a turn with an error."""
    try:
        turn = parse(text)
    except OpdlabError:
        raise
    except Exception as error:
        return Turn(text, error=f"the turn cannot be parsed: {type(error).__name__}")
    if not isinstance(turn, Turn) or not all(isinstance(one, ToolCall) for one in turn.calls):
        raise InvalidValue(
            f"The parser of the environment returned {shortened(turn)}. Return an"
            " opdlab.data.conversation.Turn, whose calls are ToolCall(name, arguments)."
        )
    return turn


def _answer(
    part: list[Talk], environment: Environment, parse: Parser, config: SamplingConfig
) -> None:
    """Let the environment reply to each turn; conversations without a reply end."""
    for talk in part:
        said = _read_turn(parse, talk.text)
        talk.messages.append(said.message())
        if talk.finish:
            continue
        seed = seed_of(config.seed, talk.place % 2**32, talk.turns)
        try:
            # A copy, since what was written must stay what it was.
            given = environment.reply(talk.prompt, copy.deepcopy(tuple(talk.messages)), seed)
            if given is None:
                raise OpdlabError(
                    f"The environment {type(environment).__name__} replied None on prompt"
                    f" {name_of(talk.prompt)}. Return a list of messages; [] ends the conversation."
                )
            reply = read_messages(given, "the reply") if len(given) else ()
        except OpdlabError:
            raise
        except Exception as error:
            raise OpdlabError(
                f"The environment {type(environment).__name__} failed on prompt"
                f" {name_of(talk.prompt)} after turn {talk.turns}: {type(error).__name__}: {error}."
                " Mend its reply(), or let it return a message that tells the error."
            ) from error
        if any(message["role"] == "assistant" for message in reply):
            raise OpdlabError(
                f"The environment {type(environment).__name__} replied with a message of the"
                " assistant, which the student writes itself. Use the roles tool, user or system."
            )
        if not reply:
            talk.finish = "stop"
        elif talk.turns + 1 >= environment.max_turns:
            talk.finish = "length"
        else:
            talk.messages += reply


class Frame:
    """Find the ids that a chat template writes between two turns of the student.

    Args:
        policy: The policy that writes.
    """

    def __init__(self, policy: Talker) -> None:
        self.policy = policy
        # The same policy, whose template does not open an answer.
        self.closed = policy.with_template(add_generation_prompt=False)
        self.eos = policy.weights.eos

    def append_replies(self, talks: list[Talk], limit: int) -> None:
        """Append the template's ids around the replies that the conversations end with.

        Args:
            talks: Conversations whose last messages are a reply.
            limit: The most tokens after the prompt. A conversation whose reply leaves no room for
                another token ends without it.

        Raises:
            OpdlabError: The template renders what was before in another way.
        """
        if not talks:
            return
        asked = self.closed.encode_unchecked([talk.prompt for talk in talks])
        said = self.closed.encode_unchecked([_until_reply(talk) for talk in talks])
        whole = self.policy.encode_unchecked([talk.extended() for talk in talks])
        for talk, before, closed, opened in zip(talks, asked, said, whole, strict=True):
            ids = self._ids_between(talk, before, closed, opened)
            if len(talk.ids) + len(ids) >= limit:
                talk.finish = "length"
                while talk.messages[-1]["role"] != "assistant":
                    talk.messages.pop()
                continue
            talk.append(ids, None)
            talk.turns += 1

    def _ids_between(
        self, talk: Talk, asked: list[int], said: list[int], whole: list[int]
    ) -> list[int]:
        """The ids behind the student's last turn.

        `asked` is the prompt, `said` the conversation until that turn, and `whole` the conversation
        with the reply and the opening of the next turn.
        """
        number = self._count_ends(said)
        is_kept = _starts_with(said, asked) and _starts_with(whole, asked)
        if is_kept and number <= self._count_ends(asked):
            raise OpdlabError(
                f"The chat template of {self.policy.name} writes no end token behind the"
                " assistant's turns, so a conversation cannot go on. Load the policy with a"
                " template that does: Policy.load(…, chat_template=…)."
            )
        cut = self._behind_end(whole, number)
        if cut is None or not is_kept or not self._keeps_replies(talk, whole):
            raise OpdlabError(
                f"The chat template of {self.policy.name} renders the beginning of prompt"
                f" {name_of(talk.prompt)} in another way when the conversation goes on, so the"
                " tokens that the student read would not be those of the template. Load the policy"
                " with a template that only appends: Policy.load(…, chat_template=…)."
            )
        own = talk.start + talk.ids
        has_ended = bool(talk.ids) and talk.ids[-1] in self.eos
        behind = whole[cut:] if has_ended else whole[cut - 1 :]
        rewritten = whole[:cut] != said[: self._behind_end(said, number)]
        if rewritten and whole[: cut - (not has_ended)] != own:
            self._warn_of_rewriting()
        opening = _rest(self.policy.encode_unchecked([talk.prompt])[0], asked)
        kept = whole[cut : len(whole) - len(opening)] if _ends_with(whole, opening) else []
        talk.replies.append((number, kept))
        return behind

    def _keeps_replies(self, talk: Talk, whole: list[int]) -> bool:
        """Check that earlier replies stand where they stood, and as they stood."""
        for number, ids in talk.replies:
            at = self._behind_end(whole, number)
            if at is None or whole[at : at + len(ids)] != ids:
                return False
        return True

    def _count_ends(self, ids: list[int]) -> int:
        return sum(token in self.eos for token in ids)

    def _behind_end(self, ids: list[int], number: int) -> int | None:
        """The place behind the `number`-th end token."""
        ends = [place for place, token in enumerate(ids) if token in self.eos]
        return ends[number - 1] + 1 if len(ends) >= number else None

    def _warn_of_rewriting(self) -> None:
        if self.policy.tokenizer in _warned:
            return
        _warned.add(self.policy.tokenizer)
        warnings.warn(
            f"The chat template of {self.policy.name} renders earlier turns of the assistant in"
            " another way once the conversation goes on (templates of thinking models leave"
            " thoughts out). The tokens stay as they were sampled, so the student is trained on its"
            " own history; a server that renders the conversation anew shows it another one.",
            stacklevel=2,
        )


def _until_reply(talk: Talk) -> Prompt:
    """The conversation until the student's last turn."""
    last = max(i for i, one in enumerate(talk.messages) if one["role"] == "assistant")
    said = talk.messages[: last + 1]
    return replace(talk.prompt, messages=(*(talk.prompt.messages or ()), *said))


def _starts_with(ids: list[int], start: list[int]) -> bool:
    """Check that ids go on from others; the last may have grown into a longer token."""
    return ids[: len(start) - 1] == start[:-1]


def _ends_with(ids: list[int], end: list[int]) -> bool:
    return not end or ids[-len(end) :] == end


def _rest(ids: list[int], start: list[int]) -> list[int]:
    return ids[len(start) :] if ids[: len(start)] == start else []


def _make_rollout(policy: Talker, talks: list[Talk], n: int, writer: str) -> Rollout:
    device = policy.weights.device
    width = max(1, *(len(talk.ids) for talk in talks))

    def column(name: str, dtype: torch.dtype) -> Tensor:
        rows = [getattr(talk, name) for talk in talks]
        return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=dtype)

    columns = {
        "ids": column("ids", torch.long),
        "logp": column("logp", torch.float32),
        "entropy": column("entropy", torch.float32),
        "learn": column("learn", torch.bool),
        "turn": column("turn", torch.long),
    }
    return Rollout(
        prompts=tuple(talk.prompt for talk in talks),
        lengths=torch.tensor([len(talk.ids) for talk in talks], device=device),
        finish=tuple(talk.finish for talk in talks),
        texts=tuple(FinalText(talk.text, talk.messages) for talk in talks),
        writer=(writer,) * len(talks),
        n=n,
        vocabulary=vocabulary_digest(policy.tokenizer),
        **{name: values.to(device) for name, values in columns.items()},
    )
