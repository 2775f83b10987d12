"""Map: OmniOPD against white-box OPD and sequence KD, by style, tokenizer, traps and similarity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from benchmarks.maps.atlas import MapPlan, head, record
from opdlab.data.map_results import MapRecord, Named, Value
from opdlab.exact.worlds import StyleWorld
from opdlab.exact.worlds.pulls import pull_reverse_kl
from opdlab.exact.worlds.styles import VOCAB, spell
from opdlab.methods.similarity import SIMILARITIES

STEPS = 40
TEXTS = 16  # of an update
CHUNKS = 2  # M, of one token each
ALPHA, BETA = 1.0, 0.1
RATES = (1.0, 4.0, 16.0)


def content(ours: str, theirs: str) -> float:
    """A similarity of one's own: 1 for equal contents, whatever their form."""
    return float(ours[0] == theirs[0])


def table_of(name: str) -> Tensor:
    """The similarity of all pairs of tokens, `[V, V]`."""
    similarity = content if name == "content" else SIMILARITIES[name]
    rows = [[similarity(spell(a), spell(b)) for b in range(VOCAB)] for a in range(VOCAB)]
    return torch.tensor(rows, dtype=torch.float64)


@dataclass(frozen=True)
class Stack:
    """Worlds of one seed side by side, `C` of them times the learning rates."""

    worlds: Sequence[StyleWorld]

    def student(self) -> Tensor:
        rows = torch.stack([world.student() for world in self.worlds])
        return rows[:, None].repeat(1, len(RATES), 1, 1, 1).flatten(0, 1)

    def teacher(self) -> Tensor:
        rows = torch.stack([world.teacher() for world in self.worlds])
        return rows.repeat_interleave(len(RATES), 0)

    def graded(self) -> Tensor:
        rows = torch.stack([world.graded for world in self.worlds])
        return rows.repeat_interleave(len(RATES), 0)


def write(logp: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sample `TEXTS` texts of each policy `[C, words, 3, V]`: tokens and states `[C, B, words]`."""
    p = logp.exp()
    at = torch.zeros(len(p), TEXTS, dtype=torch.long)
    tokens, states = [], []
    for t in range(p.shape[1]):
        rows = p[:, t].gather(1, at[..., None].expand(-1, -1, VOCAB))
        token = torch.multinomial(rows.flatten(0, 1), 1, generator=generator).view(at.shape)
        tokens.append(token)
        states.append(at)
        at = StyleWorld.follow(token)
    return torch.stack(tokens, -1), torch.stack(states, -1)


def at_states(rows: Tensor, states: Tensor) -> Tensor:
    """Rows `[C, words, 3, V]` at the states of texts `[C, B, words]`: `[C, B, words, V]`."""
    index = states[..., None, None].expand(*states.shape, 1, VOCAB)
    return rows[:, None].expand(-1, states.shape[1], -1, -1, -1).gather(3, index)[..., 0, :]


def gather_up(pull: Tensor, states: Tensor) -> Tensor:
    """The mean over texts of pulls `[C, B, words, V]`, at their states: `[C, words, 3, V]`."""
    return torch.einsum("cbts,cbtv->ctsv", one_hot(states, 3).double(), pull) / states.shape[1]


def omniopd_pull(
    logp: Tensor, reference: Tensor, teacher: Tensor, phi: Tensor, n: int, random: torch.Generator
) -> Tensor:
    """One update of OmniOPD with chunks of one token, `[C, words, 3, V]`."""
    tokens, states = write(logp, random)
    rows, theirs = at_states(logp, states), at_states(teacher, states)
    p = rows.exp()
    entropy = -(p * rows).sum(-1)
    audited = torch.zeros_like(entropy).scatter_(-1, entropy.topk(CHUNKS, -1).indices, 1.0)
    texts = torch.multinomial(theirs.exp().flatten(0, 2), n, True, generator=random)
    k = phi[tokens.flatten()[:, None], texts].sum(-1).view(tokens.shape)
    own = p.gather(-1, tokens[..., None])[..., 0]
    weight = (k + ALPHA * own) / (n + ALPHA)
    audit = weight[..., None] * (p - one_hot(tokens, VOCAB))
    anchor = BETA * (p - at_states(reference, states).exp())
    return gather_up(torch.where(audited[..., None] > 0, audit, anchor), states)


def curves(arm: str, stack: Stack, seed: int, steps: int, phi: Tensor, n: int) -> Tensor:
    """Accuracy and share of the own form after each step, `[steps, 2, worlds, rates]`."""
    random = torch.Generator().manual_seed(seed)
    teacher, graded = stack.teacher(), stack.graded()
    logits, world = stack.student(), stack.worlds[0]
    reference = logits.log_softmax(-1)
    rates = torch.tensor(RATES, dtype=torch.float64).repeat(len(stack.worlds)).view(-1, 1, 1, 1)
    out = []
    for _ in range(steps):
        logp = logits.log_softmax(-1)
        if arm == "omniopd":
            pull = omniopd_pull(logp, reference, teacher, phi, n, random)
        else:
            tokens, states = write(teacher if arm == "sequence_kd" else logp, random)
            rows = at_states(logp, states)
            if arm == "sequence_kd":
                pull = gather_up(rows.exp() - one_hot(tokens, VOCAB), states)
            else:
                known = graded[:, None, :, None]
                pull = gather_up(known * pull_reverse_kl(rows, at_states(teacher, states)), states)
        logits = logits - rates * pull
        both = torch.stack([world.accuracy(logits), world.own_form(logits)])
        out.append(both.view(2, len(stack.worlds), len(RATES)))
    return torch.stack(out)


def measure(grid: Mapping[str, Sequence[Value]], seeds: Sequence[int]) -> Iterator[MapRecord]:
    """All styles, alignments, traps and learning rates side by side."""
    names = ("style", "unaligned", "trap")
    places = list(product(*(grid[name] for name in names)))
    similarity, n = str(grid["similarity"][0]), int(grid["continuations"][0])
    phi = table_of(similarity)
    for seed in seeds:
        stack = Stack([StyleWorld(*map(float, place), seed=seed) for place in places])
        words = stack.worlds[0].words
        for arm in ARMS:
            tokens = CHUNKS * n if arm == "omniopd" else words
            stop = round(STEPS * words / tokens)
            key = (arm, seed, tuple(places), (similarity, n) if arm == "omniopd" else None)
            if key not in _known:
                _known[key] = curves(arm, stack, seed, max(STEPS, stop), phi, n)
            found = _known[key]
            for i, place in enumerate(places):
                knobs = dict(zip(names, place, strict=True))
                knobs |= {"similarity": similarity, "continuations": n}
                yield record(knobs, seed, arm, *(best(found[t - 1, :, i]) for t in (STEPS, stop)))


def best(found: Tensor) -> dict[str, float]:
    """The scores at the rate of the best accuracy, of `[2, rates]`."""
    accuracy, own_form = found[:, int(found[0].argmax())].tolist()
    return {"accuracy": accuracy, "own_form": own_form}


_known: dict[tuple, Tensor] = {}  # curves that parts share: those of the other arms


ARMS = ("opd", "sequence_kd", "omniopd")
HEAD = head(
    "omniopd",
    "When are a teacher's texts worth more than its logits?",
    "The teacher's log-probs are blurred by its style, or cannot be told in the student's tokens.",
    knobs=(
        Named("style", "style", "How strongly each side prefers its own form, nats."),
        Named("unaligned", "unaligned", "Share of words for which the log-probs cannot be told."),
        Named("trap", "trap", "The teacher's probability of going on in a loop."),
        Named("similarity", "similarity", "Of two texts."),
        Named("continuations", "continuations", "The teacher's texts for each chunk."),
    ),
    arms=(
        Named("opd", "OPD, white box", "Reverse KL on the words that are graded."),
        Named("sequence_kd", "sequence KD", "Cross-entropy on the teacher's texts."),
        Named("omniopd", "OmniOPD", f"{CHUNKS} chunks of one word, alpha 1, beta 0.1."),
    ),
    metrics=(
        Named("accuracy", "right contents", "Share of words, in whatever form."),
        Named("own_form", "own form kept", "Share of words in the form that the student had."),
    ),
    against=("opd", "sequence_kd"),
)
PLAN = MapPlan(
    HEAD,
    grid={
        "style": (0.0, 1.0, 2.0, 4.0),
        "unaligned": (0.0, 0.5, 0.75, 1.0),
        "trap": (0.1, 0.95),
        "similarity": ("edit", "rouge1", "content"),
        "continuations": (2, 8),
    },
    quick={
        "style": (0.0, 2.0),
        "unaligned": (0.0, 1.0),
        "trap": (0.1,),
        "similarity": ("edit",),
        "continuations": (4,),
    },
    measure=measure,
    together=("style", "unaligned", "trap"),
    shown={"arm": "omniopd", "against": "opd", "at": [0, 2, 0]},
)
