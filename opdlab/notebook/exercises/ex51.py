"""Notebook 51: what a LoRA costs in training, and the largest micro-batch that fits."""

from __future__ import annotations

from collections.abc import Sequence

from opdlab.notebook.checking import Exercise


def training_bytes(shapes: Sequence[tuple[int, int]], rank: int) -> int:
    numbers = sum(rank * (inputs + outputs) for inputs, outputs in shapes)
    return numbers * 4 * (1 + 1 + 2)


def by_parts(shapes: Sequence[tuple[int, int]], rank: int) -> int:
    """Each of A and B, with its gradient and its two moments, in float32."""
    return sum(4 * 4 * (inputs * rank + rank * outputs) for inputs, outputs in shapes)


def full(shapes: Sequence[tuple[int, int]], rank: int) -> int:
    return 16 * sum(inputs * outputs for inputs, outputs in shapes)


def micro_batch(fixed: float, each: float, free: float, rows: int) -> int:
    room = free - fixed
    return max(0, min(rows, int(room // each)))


def by_trying(fixed: float, each: float, free: float, rows: int) -> int:
    return max([n for n in range(1, rows + 1) if fixed + n * each <= free], default=0)


GIB = 2.0**30
EXERCISES = (
    Exercise(
        "51.1",
        asks=(
            "return the bytes of an adapter of this rank in training: weights, gradient and two"
            " moments, in float32"
        ),
        says="and that is all that training keeps, whatever the model's size",
        truth=by_parts,
        solution=training_bytes,
        cases=lambda: [
            ([(576, 576), (576, 192), (1536, 576)], 16),
            ([(1024, 3072)] * 28, 8),
            ([(64, 256)], 1),
        ],
        mistakes={
            "that is the whole matrix. An adapter is A, inputs × rank, and B, rank × outputs.": (
                full
            ),
            "that is the weights alone; each has a gradient and two moments of AdamW beside it.": (
                lambda shapes, rank: training_bytes(shapes, rank) // 4
            ),
            "the two moments of AdamW are left out.": lambda shapes, rank: (
                training_bytes(shapes, rank) // 2
            ),
        },
    ),
    Exercise(
        "51.2",
        asks="return the most completions, up to rows, whose backward pass fits, or 0",
        says="the result of a step is the same, whatever it is",
        truth=by_trying,
        solution=micro_batch,
        cases=lambda: [
            (10 * GIB, 0.5 * GIB, 24 * GIB, 64),
            (1.0, 2.0, 9.0, 8),
            (1.0, 2.0, 100.0, 8),
            (5.0, 1.0, 4.0, 8),
            (5.0, 2.0, 6.0, 8),
        ],
        mistakes={
            "what always stays in memory comes off first.": lambda fixed, each, free, rows: (
                micro_batch(0, each, free, rows)
            ),
            "there are only so many rows in a batch.": lambda fixed, each, free, rows: micro_batch(
                fixed, each, free, 10**9
            ),
            "a micro-batch cannot be negative: where nothing fits, return 0.": (
                lambda fixed, each, free, rows: min(rows, int((free - fixed) // each))
            ),
        },
    ),
)
