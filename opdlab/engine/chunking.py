"""Choose how many tokens the engine works on at once, from the memory that there is.

A **chunk** of tokens goes through the heads at once: more rows make faster products, since each
chunk reads the whole head. A **block** is a part of a chunk on which softmax, loss and gradient
run. Sizes change the speed and the memory of a pass and never its result.

On a CPU the sizes are constants: a chunk for a laptop, a block for the processor's cache. On a GPU
no block fits a cache; there each block costs some forty launches of kernels, half a millisecond of
Python, which should be small beside their work. So both grow with the free memory, up to what is
enough for fast products.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# The fewest tokens of a chunk on a CPU, where every chunk reads the head from memory, and of a
# block: each costs a call of the loss, some tenths of a millisecond.
FEWEST_OF_CHUNK, FEWEST_OF_BLOCK = 192, 4
MULTIPLE_OF_CHUNK = 32  # products of 131 rows take 5 % longer per row than those of 128
BUFFERS = 10  # [block, V] tensors that are alive at once in a block

# On a GPU: the share of the free memory that one [chunk, V] tensor may take, its bounds in bytes,
# and the blocks in a chunk. With 151,936 tokens the largest chunk has 1,760 of them. A loss of two
# policies takes 4.5 GiB then.
SHARE, SMALLEST, LARGEST, BLOCKS = 16, 64 << 20, 1 << 30, 4
ASSUMED = 4 << 30  # free bytes of a device that does not tell


@dataclass(frozen=True)
class Budget:
    """Bytes for the tensors of a pass.

    Attributes:
        chunk: Of one `[chunk, V]` float32 tensor; a pass holds one per policy.
        block: Of one `[block, V]` float32 tensor; a pass holds about `BUFFERS`.
    """

    chunk: int
    block: int


CPU = Budget(32 << 20, 2 << 20)


def budget_of_free(free: float) -> Budget:
    """Choose the budget of a pass on a GPU.

    Args:
        free: Bytes that are free.

    Returns:
        A power of two near a `SHARE` of the free memory, within bounds. So small differences in
        the free memory seldom change the sizes.
    """
    share = max(SMALLEST, min(LARGEST, int(free) // SHARE))
    chunk = 1 << (share.bit_length() - 1)
    return Budget(chunk, chunk // BLOCKS)


def budget_of(device: torch.device) -> Budget:
    """Choose the budget of a pass on a device, from what is free there now.

    Args:
        device: The device of the tokens.

    Returns:
        The budget. It holds for a whole pass: ask once, before the pass takes memory itself.
    """
    return budget_of_kind(device.type, free_bytes(device) if device.type == "cuda" else None)


def budget_of_kind(kind: str, free: float | None = None) -> Budget:
    """Choose the budget of a pass on a kind of device.

    Args:
        kind: Such as "cpu" or "cuda".
        free: Bytes that are free on a device that is no CPU; `ASSUMED` by default.

    Returns:
        The budget.
    """
    if kind == "cpu":
        return CPU
    return budget_of_free(ASSUMED if free is None else free)


def free_bytes(device: torch.device) -> float:
    """Count the bytes that PyTorch can still allocate on a CUDA device.

    Args:
        device: The device.

    Returns:
        What the driver has, and what PyTorch's allocator keeps for itself and does not use.
    """
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def chunks(tokens: int, vocab_size: int, budget: Budget, chunk: int | None = None) -> list[slice]:
    """Cut tokens into chunks such that one `[chunk, V]` buffer keeps to the memory budget.

    Args:
        tokens: Number of tokens; 0 gives one empty slice.
        vocab_size: V.
        budget: The budget of the pass.
        chunk: Tokens in one chunk, in place of the budget's.

    Returns:
        Slices in order that cover all tokens.
    """
    return _slices(tokens, chunk or _rows_of_chunk(vocab_size, budget))


def blocks(tokens: int, vocab_size: int, budget: Budget) -> list[slice]:
    """Cut the tokens of a chunk into blocks whose `[block, V]` tensors keep to the budget.

    Args:
        tokens: Number of tokens of the chunk; 0 gives one empty slice.
        vocab_size: V.
        budget: The budget of the pass.

    Returns:
        Slices in order that cover all tokens of the chunk.
    """
    return _slices(tokens, max(FEWEST_OF_BLOCK, budget.block // (4 * vocab_size)))


def _rows_of_chunk(vocab_size: int, budget: Budget) -> int:
    rows = budget.chunk // (4 * vocab_size)
    return max(FEWEST_OF_CHUNK, rows - rows % MULTIPLE_OF_CHUNK)


def _slices(tokens: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, tokens)) for i in range(0, max(tokens, 1), size)]


def bytes_of_pass(
    tokens: float, vocab_size: int, kind: str, policies: int = 2, free: float | None = None
) -> float:
    """Count the bytes that a pass over `tokens` tokens holds at once, beside its states.

    Args:
        tokens: Number of tokens.
        vocab_size: V.
        kind: The kind of device, such as "cpu" or "cuda".
        policies: Number of policies that the loss reads.
        free: Bytes that are free on a GPU before the pass; `ASSUMED` by default.

    Returns:
        Bytes of a `[chunk, V]` tensor per policy, and of the `[block, V]` tensors of a loss and
        its gradient, of which a profile counted about ten.
    """
    row, budget = 4 * vocab_size, budget_of_kind(kind, free)
    chunk = _rows_of_chunk(vocab_size, budget) * row
    block = max(FEWEST_OF_BLOCK * row, budget.block)
    return policies * min(chunk, tokens * row) + BUFFERS * min(block, tokens * row)
