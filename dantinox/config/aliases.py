"""Earlier names of settings and flags, accepted on the command line, in YAML files and by `Config.replace`.

Only this table lists them; help texts and the README do not.
"""

from collections.abc import Mapping
from typing import Any

from dantinox.config.validation import ConfigError

ALIASES = {
    "kv_heads": "n_kv_heads",
    "layer_pattern": "window_pattern",
    "gate": "attn_gate",
    "positions": "pos_encoding",
    "expansion": "mlp_ratio",
    "balance_coef": "router_aux_loss_coef",
    "router_z_coef": "router_z_loss_coef",
    "tie": "tie_embeddings",
    "kv_dtype": "kv_cache_dtype",
    "bpe_vocab": "bpe_vocab_size",
    "warmup": "warmup_ratio",
    "min_lr": "min_lr_ratio",
    "clip": "grad_clip",
    "ema": "ema_decay",
    "keep": "max_checkpoints",
}
"""Earlier name -> name, of settings."""
FLAG_ALIASES = ALIASES | {"lines": "prompt_per_line", "to": "out"}
"""Earlier name -> name, of flags: those of the settings and those of single programs."""
VALUE_ALIASES = {("kv_cache_dtype", "model"): "auto"}
"""(name, earlier value) -> value."""
ORIGINAL_DEFAULTS = {("dtype", "auto"): "float32"}
"""(name, default) -> the default that it replaced."""
NEW_SETTINGS = {
    "attn_bias": False,
    "attn_sinks": False,
    "rope_truncate": True,
    "mlp_limit": 7.0,
    "mlp_alpha": 1.702,
    "moe_bias": False,
    "loss": "auto",
    "expert_exchange": "padded",
    "lora_rank": 0,
    "lora_alpha": 16.0,
    "lora_targets": "q,k,v,o,gate,up,down",
    "init_from": "",
    "data_format": "text",
    "attn_out_bias": True,
    "qk_norm_all_heads": False,
    "norms": "pre",
    "rope_pattern": "R",
    "rope_theta_windowed": None,
    "attn_scale": None,
    "norm_offset": False,
    "scale_embeddings": False,
    "n_dense_layers": 0,
    "dense_ratio": None,
    "shared_ratio": None,
    "router": "softmax",
    "router_renormalise": True,
    "router_scale": 1.0,
    "selection_bias": False,
    "selection_bias_rate": 0.001,
}
"""Settings that came after the first sweeps, and their defaults."""


def current_value(name: str, value: Any) -> Any:
    """Return the current value of a setting that may have an earlier one."""
    return VALUE_ALIASES.get((name, value), value) if isinstance(value, str) else value


def current_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with earlier names and values replaced by the current ones.

    Raises:
        ConfigError: a setting has one value under its name and another under an earlier one.
    """
    result: dict[str, Any] = {}
    sources: dict[str, str] = {}  # name -> the name in `settings`
    for source, value in settings.items():
        name = ALIASES.get(source, source)
        value = current_value(name, value)
        if name in result and result[name] != value:
            first = sources[name]
            raise ConfigError(conflict_message(first, settings[first], source, settings[source], name))
        result[name], sources[name] = value, source
    return result


def conflict_message(first: str, first_value: Any, second: str, second_value: Any, name: str) -> str:
    """Return the message for a setting that is given twice, under two names."""
    return f"{first} is {first_value!r} but {second} is {second_value!r}, and both set {name}; give {name} only"


def original_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings under their earliest names and values, for hashes that must not change with a rename.

    A setting that is newer than the hashes is left out where it has its default value.
    """
    values = {(name, new): old for (name, old), new in VALUE_ALIASES.items()} | ORIGINAL_DEFAULTS
    return {
        original_name(name): values.get((name, value), value) if isinstance(value, str) else value
        for name, value in settings.items()
        if name not in NEW_SETTINGS or value != NEW_SETTINGS[name]
    }


def original_name(name: str) -> str:
    """Return the earliest name of a setting."""
    return next((old for old, current in ALIASES.items() if current == name), name)
