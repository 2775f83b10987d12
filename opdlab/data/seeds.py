"""Seeds: one for every use of randomness in every step."""


def seed_of(seed: int, step: int, use: int) -> int:
    """A seed of its own for every use of randomness in every step: nothing random has a state that
    could be lost.
    """
    return (seed * 1_000_003 + step) * 4096 + use
