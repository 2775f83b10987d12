"""A training run: settings, checks, the phases of a step, checkpoints, evaluation."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submodules=["snapshots"])
