"""Pairs of enumerable policies, and exact slopes of divergences between them."""

from __future__ import annotations

import torch

from opdlab import exact


def pair(
    seed: int = 0, vocab: int = 5, length: int = 1, prompts: int = 2, scale: float = 1.0
) -> dict[str, exact.Table]:
    make = lambda i: exact.Table.random(vocab, length, prompts, seed=2 * seed + i, scale=scale)
    return {"student": make(0), "teacher": make(1)}


def near(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-8) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def slope(divergence, tables: dict[str, exact.Table]) -> torch.Tensor:
    """Finite differences of a divergence at the only prefix there is."""
    return exact.differences(
        lambda table: divergence(table.logp, tables["teacher"].logp).sum(), tables["student"]
    )
