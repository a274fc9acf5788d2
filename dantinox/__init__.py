"""DantinoX: a nano Transformer language model, and the laboratory in which its Pallas kernels are made."""

from dantinox.completion import complete
from dantinox.config import Config, ConfigError, ModelConfig
from dantinox.generation import generate, stream
from dantinox.model import Transformer

__all__ = [
    "Config",
    "ConfigError",
    "ModelConfig",
    "Transformer",
    "complete",
    "generate",
    "load",
    "load_hf",
    "save_hf",
    "stream",
]


def __getattr__(name: str) -> object:
    if name == "load":  # late, for it takes a second to import Orbax
        from dantinox.checkpoint import load

        return load
    if name in ("load_hf", "save_hf"):
        from dantinox import hf

        return getattr(hf, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
