"""opdlab: on-policy distillation of language models, one token at a time.

The names that a notebook uses stand in `__init__.pyi`; each is imported when it is first used, so
that the command line need not wait for PyTorch.
"""

import lazy_loader

from opdlab.support.version import VERSION

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = VERSION
