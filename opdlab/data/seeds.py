"""Make seeds: one for every use of randomness in every step."""


def seed_of(seed: int, step: int, use: int) -> int:
    """Make the seed of one use of randomness in one step.

    Nothing random has a state that could be lost, so a resumed run draws the same numbers.

    Args:
        seed: The run's seed.
        step: Number of the step, below 2**32.
        use: Number of the use within the step, from 0 to 4095.

    Returns:
        The seed; it differs between any two steps or uses of a run.
    """
    return (seed * 1_000_003 + step) * 4096 + use
