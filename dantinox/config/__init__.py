"""Every toggle of DantinoX in one frozen dataclass tree, checked when it is built.

`Config.model` is the network, `Config.data` the text, `Config.optim` the optimizer, `Config.train` the run. Field names
are unique over the tree, so flags, YAML files and overrides are flat: `--window 64`, `window: 64`, `window=64`.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from dantinox.config.aliases import current_names
from dantinox.config.data import DataConfig
from dantinox.config.model import Implementation, KVDtype, ModelConfig
from dantinox.config.optimizer import OptimConfig
from dantinox.config.training import TrainConfig
from dantinox.config.validation import ConfigError, check, did_you_mean
from dantinox.config.yaml_loader import load_yaml_mapping

__all__ = [
    "Config",
    "ConfigError",
    "DataConfig",
    "Implementation",
    "KVDtype",
    "ModelConfig",
    "OptimConfig",
    "TrainConfig",
    "coerce_numbers",
    "presets",
]


@dataclass(frozen=True)
class Config:
    """Everything a run is made of."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        check(
            self.train.seq_len <= self.model.max_context,
            f"seq_len is {self.train.seq_len} but max_context is {self.model.max_context}; "
            f"shorten seq_len or raise max_context to {self.train.seq_len}",
        )

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "Config":
        """The named preset with flat overrides by field name.

        Raises:
            ConfigError: unknown preset, unknown field (with a suggestion), or a value that cannot be.
        """
        if name not in presets():
            raise ConfigError(f"preset is {name!r}; {did_you_mean(name, presets())}")
        text = (resources.files("dantinox") / "presets" / f"{name}.yaml").read_text()
        return cls.from_flat(_parse_yaml(text, f"preset {name}")).replace(**overrides)

    @classmethod
    def from_yaml(cls, path: str | Path, base: "Config | None" = None) -> "Config":
        """The settings of a YAML file laid over `base` (default: the defaults). Unknown keys raise `ConfigError`."""
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"config {path}: cannot be read ({getattr(error, 'strerror', error)})") from None
        return (base or cls()).replace(**_parse_yaml(text, f"config {path}"))

    @classmethod
    def from_flat(cls, settings: Mapping[str, Any]) -> "Config":
        """The defaults with flat settings laid over them."""
        return cls().replace(**settings)

    def replace(self, **overrides: Any) -> "Config":
        """A copy with flat overrides by field name; every check runs again."""
        owner = {name: section for section, names in _fields().items() for name in names}
        changes: dict[str, dict[str, Any]] = {}
        for name, value in current_names(overrides).items():
            if name not in owner:
                raise ConfigError(f"unknown setting {name!r}; {did_you_mean(name, owner)}")
            changes.setdefault(owner[name], {})[name] = value
        loose = self.loose()
        return Config(**{s: dataclasses.replace(getattr(loose, s), **changes.get(s, {})) for s in _fields()})

    def loose(self) -> "Config":
        """A copy to build others from: a head_dim that was derived is None again, to follow a new dim or n_heads."""
        copied = dataclasses.replace(self, model=dataclasses.replace(self.model))
        if self.model.head_dim is not None and self.model.head_dim * self.model.n_heads == self.model.dim:
            object.__setattr__(copied.model, "head_dim", None)
        return copied

    def flat(self) -> dict[str, Any]:
        """Every setting by its field name."""
        return {name: getattr(getattr(self, s), name) for s, names in _fields().items() for name in names}

    def to_yaml(self) -> str:
        """The flat settings as YAML, a comment above each section; `from_yaml` reads it back."""
        parts = []
        for section, names in _fields().items():
            values = {name: getattr(getattr(self, section), name) for name in names}
            parts.append(f"# {section}\n" + yaml.safe_dump(values, sort_keys=False))
        return "\n".join(parts)


def presets() -> list[str]:
    """Names of the presets that come with DantinoX."""
    folder = resources.files("dantinox") / "presets"
    return sorted(path.name.removesuffix(".yaml") for path in folder.iterdir() if path.name.endswith(".yaml"))


def _fields() -> dict[str, list[str]]:
    sections = {"model": ModelConfig, "data": DataConfig, "optim": OptimConfig, "train": TrainConfig}
    return {name: [f.name for f in dataclasses.fields(cls)] for name, cls in sections.items()}


def _parse_yaml(text: str, source: str) -> dict[str, Any]:
    return coerce_numbers(load_yaml_mapping(text, source), source)


def coerce_numbers(settings: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Settings as YAML gives them: what is meant as a number is taken as one, for YAML 1.1 reads 3e-4 as text.

    Raises:
        ConfigError: naming the setting, below the name of its `source`.
    """
    try:
        settings = current_names(settings)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    sections = (ModelConfig, DataConfig, OptimConfig)
    floats = {f.name for cls in sections for f in dataclasses.fields(cls) if f.type in (float, float | None)}
    for name, value in settings.items():
        if name in floats and isinstance(value, str):
            try:
                settings[name] = float(value)
            except ValueError:
                raise ConfigError(f"{source}: {name} is {value!r}; allowed: a number") from None
    return settings
