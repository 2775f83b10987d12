"""A training run: settings, checks before the first step, the step itself, checkpoints, evaluation."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submodules=["snapshots"])
