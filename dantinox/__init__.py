"""DantinoX: a nano Transformer language model, and a laboratory for its Pallas kernels.

Public names are imported on first use, so `import dantinox.kernels` does not import the model.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING

from dantinox.version import __version__

if TYPE_CHECKING:
    from dantinox.checkpoint.load import load
    from dantinox.config import Config, ConfigError, ModelConfig
    from dantinox.data.tokenizer import load_tokenizer
    from dantinox.hf.weights import load_hf, save_hf
    from dantinox.inference.complete import complete
    from dantinox.inference.generate import generate, stream
    from dantinox.model.transformer import Transformer

__all__ = [
    "Config",
    "ConfigError",
    "ModelConfig",
    "Transformer",
    "__version__",
    "complete",
    "generate",
    "load",
    "load_hf",
    "load_tokenizer",
    "save_hf",
    "stream",
]
_MODULES = {
    "Config": "dantinox.config",
    "ConfigError": "dantinox.config",
    "ModelConfig": "dantinox.config",
    "Transformer": "dantinox.model.transformer",
    "complete": "dantinox.inference.complete",
    "generate": "dantinox.inference.generate",
    "load": "dantinox.checkpoint.load",
    "load_hf": "dantinox.hf.weights",
    "load_tokenizer": "dantinox.data.tokenizer",
    "save_hf": "dantinox.hf.weights",
    "stream": "dantinox.inference.generate",
}


class _Package(types.ModuleType):
    """A package whose functions stay what they are when the program of the same name is imported.

    Python makes an imported module an attribute of its package: `import dantinox.generate` would hide the function.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _MODULES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
