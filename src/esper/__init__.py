"""Neural networks that grow while they train.

The names of the library are those of `__init__.pyi`; each is imported when it is first used, so that `import esper`
costs nothing and loads no torch.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
