"""Let a teacher that only writes play conversations with an environment.

Each turn is a text that the teacher writes after the conversation so far, which it reads through
its own template, or its server's. The conversation is kept as messages, so student and teacher need
share neither tokens nor template.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from opdlab.data.conversation import Environment, FinalText, Parser
from opdlab.data.prompt import Prompt
from opdlab.data.sampling_config import SamplingConfig
from opdlab.data.seeds import seed_of
from opdlab.data.written_text import finish_of
from opdlab.models.protocols import Writer
from opdlab.models.replies import (
    ask_for_reply,
    check_chats,
    check_environment,
    read_turn,
    with_tools,
)
from opdlab.models.talks import Talk
from opdlab.models.tool_calls import parse_any, parse_plain
from opdlab.teachers.writing import write_texts

Count = Callable[[Sequence[Prompt]], Sequence[int]]
SEEDS = 1 << 62  # seeds of later turns are below, so that every server takes them


def write_conversations(
    writer: Writer,
    prompts: Sequence[Prompt],
    n: int,
    environment: Environment,
    config: SamplingConfig,
    *,
    places: Sequence[int] | None = None,
    process: int = 0,
    count: Count | None = None,
) -> list[list[FinalText]]:
    """Let a teacher play `n` conversations for each prompt.

    Args:
        writer: The teacher.
        prompts: Chats.
        n: Conversations for each prompt.
        environment: Replies between the turns. Without a `parse` of its own, calls are read in the
            form that they have (`opdlab.models.tool_calls.parse_any`).
        config: The sampling settings.
        places: Where each prompt stands in a batch that several processes share; None for a batch
            of this process alone.
        process: Number of this process.
        count: Counts the tokens of chats, so that `max_new_tokens` limits all that comes after the
            prompt. Without it, the limit counts for each turn.

    Returns:
        `n` conversations for each prompt, each with what cut it.

    Raises:
        InvalidValue: A prompt is no chat, or the teacher cannot be told a setting.
        OpdlabError: The teacher or the environment fails.
    """
    check_environment(environment)
    check_chats(prompts)
    prompts = with_tools(prompts, environment)
    parse = environment.parse or (parse_any if environment.tools else parse_plain)
    numbers = range(len(prompts)) if places is None else places
    talks = [
        Talk(prompt, [], row * n + j, place * n + j)
        for row, (prompt, place) in enumerate(zip(prompts, numbers, strict=True))
        for j in range(n)
    ]
    written = write_texts(writer, prompts, n, config, places, process)
    _take(talks, [text for row in written for text in row], environment, parse, config.seed)
    limit = config.max_new_tokens
    while rooms := _find_rooms([talk for talk in talks if not talk.finish], limit, count):
        going = [talks[row] for row in rooms]
        settings = replace(
            config,
            max_new_tokens=max(rooms.values()),
            seed=seed_of(config.seed, going[0].turns, 3) % SEEDS,
        )
        asked = [talk.extended() for talk in going]
        texts = write_texts(writer, asked, 1, settings, [talk.place for talk in going], process)
        _take(going, [row[0] for row in texts], environment, parse, config.seed)
    played = [FinalText(talk.text, talk.messages, talk.cut) for talk in talks]
    return [played[i : i + n] for i in range(0, len(played), n)]


def _find_rooms(talks: Sequence[Talk], limit: int, count: Count | None) -> dict[int, int]:
    """The tokens that each conversation may still take, by row; those without any end."""
    if count is None or not talks:
        return {talk.row: limit for talk in talks}
    totals = count([talk.extended() for talk in talks])
    begun = count([talk.prompt for talk in talks])
    rooms = {}
    for talk, total, start in zip(talks, totals, begun, strict=True):
        if total - start < limit:
            rooms[talk.row] = limit - (total - start)
        else:
            talk.leave_reply_out()
    return rooms


def _take(
    talks: Sequence[Talk],
    texts: Sequence[str],
    environment: Environment,
    parse: Parser,
    seed: int,
) -> None:
    """Put turns into their conversations, and let the environment reply."""
    for talk, text in zip(talks, texts, strict=True):
        talk.text = str(text)
        talk.messages.append(read_turn(parse, talk.text, talk.prompt).message())
        if finish_of(text) == "length":
            talk.end("tokens")
            continue
        own = seed_of(seed, talk.place % 2**32, talk.turns)
        reply = ask_for_reply(environment, talk.prompt, talk.messages, own)
        talk.turns += 1
        if not reply:
            talk.end()
        elif talk.turns >= environment.max_turns:
            talk.end("turns")
        else:
            talk.messages += reply
