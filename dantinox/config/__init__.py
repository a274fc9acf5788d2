"""All settings of DantinoX as one tree of frozen dataclasses, validated on construction.

`Config.model` holds the settings of the network, `Config.data` of the text, `Config.optim` of the optimizer,
`Config.train` of the run. Field names are unique over the tree, so flags, YAML files and overrides are flat:
`--window 64`, `window: 64`, `window=64`.
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
from dantinox.config.numbers import parse_int
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
    "read_settings",
]


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

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
        """Return the named preset with flat overrides by field name.

        Raises:
            ConfigError: unknown preset, unknown field (with a suggestion), or an invalid value.
        """
        if name not in presets():
            raise ConfigError(f"preset is {name!r}; {did_you_mean(name, presets())}")
        text = (resources.files("dantinox") / "presets" / f"{name}.yaml").read_text("utf-8")
        return cls.from_flat(_parse_yaml(text, f"preset {name}")).replace(**overrides)

    @classmethod
    def from_yaml(cls, path: str | Path, base: "Config | None" = None) -> "Config":
        """Return `base` (by default the defaults) with the settings of a YAML file.

        Raises:
            ConfigError: the file cannot be read, or a key or value is invalid.
        """
        settings = read_settings(path)
        try:
            return (base or cls()).replace(**settings)
        except ConfigError as error:
            raise ConfigError(f"config {path}: {error}") from None

    @classmethod
    def from_flat(cls, settings: Mapping[str, Any]) -> "Config":
        """Return the defaults with flat settings applied."""
        return cls().replace(**settings)

    def replace(self, **overrides: Any) -> "Config":
        """Return a copy with flat overrides by field name, validated like a new one.

        A head_dim that equals dim // n_heads follows a new dim or n_heads.
        """
        owner = {name: section for section, names in _fields().items() for name in names}
        changes: dict[str, dict[str, Any]] = {}
        for name, value in current_names(overrides).items():
            if name not in owner:
                raise ConfigError(f"unknown setting {name!r}; {did_you_mean(name, owner)}")
            is_int = isinstance(value, int) and not isinstance(value, bool)
            changes.setdefault(owner[name], {})[name] = float(value) if is_int and name in _float_fields() else value
        current = dataclasses.replace(self, model=self.model.without_default_head_dim())
        sections = {s: dataclasses.replace(getattr(current, s), **changes.get(s, {})) for s in _fields()}
        return Config(**sections | {"model": sections["model"].without_default_head_dim()})

    def flat(self) -> dict[str, Any]:
        """Return every setting by its field name; head_dim is never None."""
        settings = {name: getattr(getattr(self, s), name) for s, names in _fields().items() for name in names}
        return settings | {"head_dim": self.model.resolved_head_dim}

    def to_yaml(self) -> str:
        """Return the flat settings as YAML with a comment above each section; `from_yaml` reads it back."""
        settings, parts = self.flat(), []
        for section, names in _fields().items():
            values = {name: settings[name] for name in names}
            parts.append(f"# {section}\n" + yaml.safe_dump(values, sort_keys=False))
        return "\n".join(parts)


def read_settings(path: str | Path) -> dict[str, Any]:
    """Return the settings of a YAML file under their current names, without checking names and values.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        text = Path(path).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"config {path}: cannot be read (byte {error.start} is not UTF-8)") from None
    except OSError as error:
        raise ConfigError(f"config {path}: cannot be read ({error.strerror})") from None
    return _parse_yaml(text, f"config {path}")


def presets() -> list[str]:
    """Return the names of the presets that come with DantinoX."""
    folder = resources.files("dantinox") / "presets"
    return sorted(path.name.removesuffix(".yaml") for path in folder.iterdir() if path.name.endswith(".yaml"))


def _fields() -> dict[str, list[str]]:
    """Return the field names of each section."""
    sections = {"model": ModelConfig, "data": DataConfig, "optim": OptimConfig, "train": TrainConfig}
    return {name: [f.name for f in dataclasses.fields(cls)] for name, cls in sections.items()}


def _float_fields() -> set[str]:
    sections = (ModelConfig, DataConfig, OptimConfig)
    return {f.name for cls in sections for f in dataclasses.fields(cls) if f.type in (float, float | None)}


def _int_fields() -> set[str]:
    sections = (ModelConfig, DataConfig, TrainConfig)
    return {f.name for cls in sections for f in dataclasses.fields(cls) if f.type in (int, int | None)}


def _parse_yaml(text: str, source: str) -> dict[str, Any]:
    return coerce_numbers(load_yaml_mapping(text, source), source)


def coerce_numbers(settings: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Convert strings in number fields to numbers: YAML 1.1 reads 3e-4 and 1e3 as text.

    Raises:
        ConfigError: a string is not a number; the message names the `source` and the setting.
    """
    try:
        settings = current_names(settings)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    floats, ints = _float_fields(), _int_fields()
    for name, value in settings.items():
        if name in ints and isinstance(value, str | float):
            number = parse_int(str(value))
            settings[name] = value if number is None else number
        if name in floats and isinstance(value, str):
            try:
                settings[name] = float(value)
            except ValueError:
                raise ConfigError(f"{source}: {name} is {value!r}; allowed: a number") from None
    return settings
