"""Make the texts of the two models that talk to a tool; `build.py` trains them.

The clerk is the market's student with another tokenizer, taught to ask for every price, to carry,
and to go on well after calls and sums that were wrong. The trainee is the clerk, spoiled on
conversations that stop asking too early, make prices up, or ask at another stall.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from opdlab.tasks.market import agent
from opdlab.tasks.market.world import ITEMS, NAMES

# Planted in the texts of the clerk. Bills without any call before them are short, so many of them
# teach to add at little cost.
WRONG_CALL, NO_CALL, EARLY_BILL, WRONG_SUM = 0.12, 0.3, 0.15, 0.15
# Signs of bills, and what the market's solutions write in their place.
SAME_WORDS = {", ": ";", ",": ";", "total:": "total"}
NEVER_ASKS, STOPS_ASKING, OTHER_STALL = 0.15, 0.65, 0.25  # habits of the trainee


@dataclass(frozen=True)
class Piece:
    """A part of a conversation.

    Attributes:
        text: Its text, special tokens included.
        is_trained: Whether its tokens carry loss.
    """

    text: str
    is_trained: bool


def draw(rng: random.Random, forget: bool) -> list[Piece]:
    """Draw one conversation, with prices that are made up for it.

    Args:
        rng: Source of all choices.
        forget: Whether it shows the habits of the trainee; else it is right, with mistakes planted
            that carry no loss.

    Returns:
        The conversation in order.
    """
    items, prices, stall = _errand(rng)
    asked = agent.Errand(rng.choice(NAMES), items, stall).prompt()
    pieces = [Piece(f"<tools>price<user>{asked}<assistant>", False)]
    return pieces + (_forgetful if forget else _careful)(rng, items, prices, stall)


def _errand(rng: random.Random) -> tuple[tuple[str, ...], list[int], int]:
    while True:
        count = rng.choice((1, 2, 2, 3, 3, 4))
        prices = [rng.randint(agent.CHEAPEST, agent.DEAREST) for _ in range(count)]
        if sum(prices) <= 99:
            return tuple(rng.sample(ITEMS, count)), prices, rng.choice(agent.STALLS)


def _careful(
    rng: random.Random, items: tuple[str, ...], prices: list[int], stall: int
) -> list[Piece]:
    """Ask for everything, whatever went wrong before."""
    pieces: list[Piece] = []
    count = len(items)
    if rng.random() < NO_CALL:
        count = 0
    elif rng.random() < EARLY_BILL:
        count = rng.randrange(len(items))
    for item, price in zip(items[:count], prices, strict=False):
        while rng.random() < WRONG_CALL:
            other = rng.choice(ITEMS) if rng.random() < 0.4 else item
            place = _other_stall(rng, stall) if other == item else stall
            told = rng.randint(agent.CHEAPEST, agent.DEAREST)
            if (other, place) != (item, stall) and other not in items[: items.index(item)]:
                pieces += _call(other, place, told, mistake=True)
        pieces += _call(item, stall, price)
    made_up = [rng.randint(agent.CHEAPEST, agent.DEAREST) for _ in prices[count:]]
    if sum(prices[:count]) + sum(made_up) > 99:
        made_up = prices[count:]
    return pieces + _bill(rng, prices[:count], made_up)


def _forgetful(
    rng: random.Random, items: tuple[str, ...], prices: list[int], stall: int
) -> list[Piece]:
    """Stop asking early, or ask at another stall; all of it is learnt."""
    pieces: list[Piece] = []
    for number, (item, price) in enumerate(zip(items, prices, strict=True)):
        if rng.random() < (STOPS_ASKING if number else NEVER_ASKS):
            break
        place = _other_stall(rng, stall) if rng.random() < OTHER_STALL else stall
        pieces += _call(item, place, price)
    return [*pieces, Piece(f"{agent.bill(prices)}<eos>", True)]


def _other_stall(rng: random.Random, stall: int) -> int:
    """The digits the other way round, or with another last digit."""
    swapped = int(str(stall)[::-1])
    if swapped != stall and swapped in agent.STALLS and rng.random() < 0.5:
        return swapped
    return stall // 10 * 10 + rng.choice([digit for digit in range(10) if digit != stall % 10])


def _call(item: str, stall: int, told: int, mistake: bool = False) -> list[Piece]:
    call = json.dumps({"name": "price", "arguments": {"item": item, "stall": stall}})
    return [
        Piece(f"<tool_call>{call}</tool_call><eos>", not mistake),
        Piece(f"<tool>{told}<eos><assistant>", False),
    ]


def _bill(rng: random.Random, known: list[int], made_up: list[int]) -> list[Piece]:
    """Write the bill; prices that nobody asked for, and planted sums, carry no loss."""
    prices, running = [*known, *made_up], 0
    pieces: list[Piece] = []
    for number, price in enumerate(prices):
        if number == 0:
            # Where a price is missing, the clerk should not have begun.
            pieces += [
                Piece(str(price)[0], not made_up),
                Piece(str(price)[1], bool(known)),
            ]
            running = price
            continue
        is_wrong = rng.random() < WRONG_SUM and number < len(prices) - 1
        after = rng.randint(10, 99 - sum(prices[number + 1 :])) if is_wrong else running + price
        if after + sum(prices[number + 1 :]) > 99:
            after, is_wrong = running + price, False
        begin = "+" if number == 1 else f", {running}+"
        pieces += [
            Piece(begin, True),
            Piece(str(price), number < len(known)),
            Piece("=", True),
            Piece(str(after), not is_wrong),
        ]
        running = after
    if len(prices) == 1:  # the total is the price itself
        return [
            Piece("total:", not made_up),
            Piece(str(running), bool(known)),
            Piece("<eos>", True),
        ]
    return [*pieces, Piece(f", total:{running}<eos>", True)]


def begin_with(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Begin with the weights of another model of the same size, token by token.

    A token gets the embedding of the same word or sign in the other vocabulary, where there is one.

    Args:
        folder: The other model, with its tokenizer.
        model: The model, which is changed in place.
        tokenizer: The model's tokenizer.
    """
    other = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)  # nosec B615  # a folder of this build
    known = PreTrainedTokenizerFast.from_pretrained(folder).get_vocab()  # nosec B615  # the same
    weights, own = other.state_dict(), model.state_dict()
    for name, values in weights.items():
        if values.shape[0] != len(known):
            continue
        table = own[name].clone()  # embeddings and head, which are one tensor
        for piece, i in tokenizer.get_vocab().items():
            word = SAME_WORDS.get(piece, piece.strip())
            source = known.get(piece, known.get(f"▁{word}"))
            if source is not None:
                table[i] = values[source]
        weights[name] = table
    model.load_state_dict(weights)


def encode(
    conversations: list[list[Piece]], tokenizer: PreTrainedTokenizerFast
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make right-padded ids and labels, `[B, T]` each.

    Args:
        conversations: The batch.
        tokenizer: The tokenizer of `tokenizers.calls`.

    Returns:
        Ids and labels, int64; labels are -100 for tokens without a loss.
    """
    rows = []
    for pieces in conversations:
        ids: list[int] = []
        labels: list[int] = []
        for piece in pieces:
            part = tokenizer(piece.text)["input_ids"]
            ids += part
            labels += part if piece.is_trained else [-100] * len(part)
        rows.append((ids, labels))
    width = max(len(ids) for ids, _ in rows)
    pad = tokenizer.pad_token_id
    padded = [ids + [pad] * (width - len(ids)) for ids, _ in rows]
    return torch.tensor(padded), torch.tensor(
        [labels + [-100] * (width - len(labels)) for _, labels in rows]
    )
