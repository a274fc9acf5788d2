"""Every toggle of DantinoX in one frozen dataclass tree, checked when it is built.

`Config.model` is the network, `Config.data` the text, `Config.optim` the optimizer, `Config.train` the run. Field names
are unique over the tree, so flags, YAML files and overrides are flat: `--window 64`, `window: 64`, `window=64`.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

import kernels
from dantinox.settings_file import read_mapping
from dantinox.training_config import OptimConfig, TrainConfig
from dantinox.validation import ConfigError, check_fields, fraction, positive, require, suggest

KVDtype = Literal["model", "int8", "fp8"]
Attention, Experts, Decode = (Literal[kernels.names(op)] for op in ("attention", "moe_mlp", "decode_attention"))


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    vocab_size: int = 256
    """Number of token ids; training sets it from the tokenizer."""
    dim: int = 512
    """Width M of the residual stream."""
    n_layers: int = 12
    """Number of blocks L."""
    n_heads: int = 16
    """Query heads H."""
    kv_heads: int = 4
    """Key/value heads K; H must be a multiple of K (H = multi-head, 1 = multi-query)."""
    head_dim: int | None = None
    """Width D of one head; None: dim // n_heads."""
    max_context: int = 512
    """Longest sequence a layer without a window can attend to."""
    window: int | None = None
    """Keys a query sees in windowed layers, itself included; None: all of them."""
    layer_pattern: str = "S"
    """Tiled over the layers: S = windowed, L = full attention, such as SSSL."""
    gate: Literal["none", "elementwise", "head"] = "none"
    """Sigmoid gate on the attention output, one value an element or one a head."""
    qk_norm: bool = False
    """RMSNorm on queries and keys, per head."""
    attn_softcap: float | None = None
    """Attention scores s become softcap * tanh(s / softcap)."""
    logit_softcap: float | None = None
    """The same for the final logits."""
    positions: Literal["rope", "learned", "none"] = "rope"
    """How position reaches the model."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: Literal["none", "linear", "ntk", "yarn", "llama3"] = "none"
    """How rotary frequencies are stretched to contexts longer than trained on."""
    rope_factor: float = 1.0
    """Stretch factor of rope_scaling: new context over trained context."""
    rope_original_context: int | None = None
    """Context trained on, for yarn and llama3; None: max_context / rope_factor."""
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    """Feed-forward kind."""
    expansion: float = 4.0
    """Hidden width F of the MLP (of each expert) over dim."""
    n_experts: int = 0
    """Experts E in each MLP; 0: a dense MLP."""
    experts_per_token: int = 2
    """Experts k that each token is sent to."""
    shared_expert: bool = False
    """One more expert that every token passes, unweighted."""
    balance_coef: float = 0.01
    """Weight of the load-balancing loss E * sum_e f_e P_e, averaged over layers."""
    router_z_coef: float = 0.001
    """Weight of the router z-loss, mean logsumexp(router logits)^2, averaged over layers."""
    tie: bool = True
    """Input embedding and output projection are one array."""
    dropout: float = 0.0
    """Dropout rate on both residual branches, in training only."""
    norm_eps: float = 1e-6
    """Epsilon of every RMSNorm."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of every matmul; parameters stay float32."""
    remat: Literal["none", "block", "dots"] = "none"
    """What the backward pass recomputes: nothing, whole blocks, or all but the matmuls."""
    attn: Attention = "auto"
    """Implementation of attention."""
    moe: Experts = "auto"
    """Implementation of the mixture of experts."""
    decode: Decode = "auto"
    """Implementation of cached decoding."""
    kv_dtype: KVDtype = "model"
    """What the key/value cache keeps: the model's dtype, or 8 bits a number and a scale a vector."""

    def __post_init__(self) -> None:
        check_fields(self)
        positive(self, "vocab_size", "dim", "n_layers", "n_heads", "kv_heads", "head_dim", "max_context")
        positive(self, "rope_original_context", "expansion", "norm_eps", "attn_softcap", "logit_softcap")
        require(self.rope_theta > 1, f"rope_theta is {self.rope_theta}; allowed: more than 1")
        fraction(self, "dropout")
        require(
            self.n_heads % self.kv_heads == 0,
            f"n_heads is {self.n_heads} and kv_heads is {self.kv_heads}; n_heads must be a multiple of kv_heads",
        )
        if self.head_dim is None:
            require(
                self.dim % self.n_heads == 0,
                f"dim is {self.dim} and n_heads is {self.n_heads}; dim must be a multiple of n_heads, or set head_dim",
            )
            object.__setattr__(self, "head_dim", self.dim // self.n_heads)
        require(
            self.positions != "rope" or self.head_dim % 2 == 0,
            f"head_dim is {self.head_dim}; rotary positions need an even head_dim",
        )
        require(
            self.window is None or self.window >= 1,
            f"window is {self.window}; allowed: 1 or more keys, or None for no window",
        )
        require(
            self.layer_pattern != "" and set(self.layer_pattern) <= set("SL"),
            f"layer_pattern is {self.layer_pattern!r}; allowed: the letters S (windowed) and L (full)",
        )
        require(self.rope_factor >= 1, f"rope_factor is {self.rope_factor}; allowed: 1 or more")
        require(
            self.rope_scaling == "none" or self.positions == "rope",
            f"rope_scaling is {self.rope_scaling!r} but positions is {self.positions!r}; it needs positions rope",
        )
        require(self.hidden >= 1, f"expansion is {self.expansion}; it leaves no hidden width for dim {self.dim}")
        require(self.n_experts >= 0, f"n_experts is {self.n_experts}; allowed: 0 (dense) or more")
        require(
            self.experts_per_token >= 1,
            f"experts_per_token is {self.experts_per_token}; allowed: 1 or more",
        )
        if self.n_experts:
            require(
                self.experts_per_token <= self.n_experts,
                f"experts_per_token is {self.experts_per_token} but n_experts is {self.n_experts}; "
                "a token cannot go to more experts than there are",
            )
            require(
                self.mlp == "swiglu",
                f"mlp is {self.mlp!r} with n_experts {self.n_experts}; experts are swiglu",
            )
        for name in ("balance_coef", "router_z_coef"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; allowed: 0 or more")

    @property
    def hidden(self) -> int:
        """Hidden width F of the MLP."""
        return round(self.dim * self.expansion)

    def layer_window(self, layer: int) -> int | None:
        """The window of one layer; None where it sees everything."""
        return self.window if self.layer_pattern[layer % len(self.layer_pattern)] == "S" else None

    def layer_slots(self, layer: int, context: int) -> int:
        """Slots C of one layer's key/value cache for a given context length."""
        window = self.layer_window(layer)
        return context if window is None else min(window, context)


@dataclass(frozen=True)
class DataConfig:
    """The text."""

    data: str = "stdlib"
    """A text file, a folder, a glob, or stdlib: the Python standard library's own source."""
    tokenizer: Literal["char", "bpe"] = "char"
    """Characters, or byte-level BPE trained on the training split."""
    bpe_vocab: int = 2048
    """Vocabulary size of the BPE tokenizer."""
    val_fraction: float = 0.1
    """Share of the text held out for validation."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.data != "", "data is empty; give a file, a folder, a glob or stdlib")
        require(
            300 <= self.bpe_vocab <= 1_000_000,
            f"bpe_vocab is {self.bpe_vocab}; allowed: 300 to 1000000 (256 bytes, one special token, merges)",
        )
        require(
            0 < self.val_fraction < 1,
            f"val_fraction is {self.val_fraction}; allowed: between 0 and 1, exclusive",
        )


@dataclass(frozen=True)
class Config:
    """Everything a run is made of."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        require(
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
            raise ConfigError(f"preset is {name!r}; {suggest(name, presets())}")
        text = (resources.files("dantinox") / "configs" / f"{name}.yaml").read_text()
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
        for name, value in overrides.items():
            if name not in owner:
                raise ConfigError(f"unknown setting {name!r}; {suggest(name, owner)}")
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
    folder = resources.files("dantinox") / "configs"
    return sorted(path.name.removesuffix(".yaml") for path in folder.iterdir() if path.name.endswith(".yaml"))


def _fields() -> dict[str, list[str]]:
    sections = {"model": ModelConfig, "data": DataConfig, "optim": OptimConfig, "train": TrainConfig}
    return {name: [f.name for f in dataclasses.fields(cls)] for name, cls in sections.items()}


def _parse_yaml(text: str, source: str) -> dict[str, Any]:
    return numbers(read_mapping(text, source), source)


def numbers(settings: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Settings as YAML gives them: what is meant as a number is taken as one, for YAML 1.1 reads 3e-4 as text.

    Raises:
        ConfigError: naming the setting, below the name of its `source`.
    """
    settings = dict(settings)
    sections = (ModelConfig, DataConfig, OptimConfig)
    floats = {f.name for cls in sections for f in dataclasses.fields(cls) if f.type in (float, float | None)}
    for name, value in settings.items():
        if name in floats and isinstance(value, str):
            try:
                settings[name] = float(value)
            except ValueError:
                raise ConfigError(f"{source}: {name} is {value!r}; allowed: a number") from None
    return settings
