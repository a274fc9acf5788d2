"""Rotary positions of a model, to and from config.json of Hugging Face."""

import math
from collections.abc import Mapping
from typing import Any

from dantinox.config import ConfigError, ModelConfig
from dantinox.hf.checks import MAX_INT, check_integer, check_type, check_value
from dantinox.hf.families import LAYER_TYPES, Family, listed_ropes, shortest_period
from dantinox.model.rope import original_context

_YARN = {"beta_fast": 32, "beta_slow": 1}  # the constants of our yarn; _LLAMA3: of our llama3
_LLAMA3 = {"low_freq_factor": 1, "high_freq_factor": 4}


def rope_to_hf(config: ModelConfig, family: Family) -> dict[str, Any]:
    """Return the rotary settings of config.json."""
    D, factor = config.resolved_head_dim, config.rope_factor
    theta, scaling = config.rope_theta, None
    original = {"original_max_position_embeddings": original_context(config)}
    match config.rope_scaling:
        case "ntk" if D > 2:  # only a larger base
            theta = theta * factor ** (D / (D - 2))
        case "linear":
            scaling = {"rope_type": "linear", "factor": factor}
        case "yarn":
            scaling = {"rope_type": "yarn", "factor": factor} | original | _YARN | {"truncate": config.rope_truncate}
        case "llama3":
            scaling = {"rope_type": "llama3", "factor": factor} | original | _LLAMA3
        case _:
            pass
    if scaling is None and family.default_scaling:  # transformers takes the scaling of the published models otherwise
        scaling = {"rope_type": "default"}
    settings: dict[str, Any] = {"rope_theta": theta, "rope_scaling": scaling}
    if family.windowed_theta:
        full = (scaling or {"rope_type": "default"}) | {"rope_theta": theta}
        own_theta = config.rope_theta_windowed
        windowed = full if own_theta is None else {"rope_type": "default", "rope_theta": own_theta}
        by_type = {"rope_parameters": {LAYER_TYPES["L"]: full, LAYER_TYPES["S"]: windowed}}
        if name := family.windowed_theta[0]:
            settings |= {name: windowed["rope_theta"], "rope_theta": theta} | by_type
        else:
            settings = by_type
    if family.rope_layers == "listed":
        settings["no_rope_layers"] = [int(has_rope) for has_rope in layers_with_rope(config)]
    return settings


def layers_with_rope(config: ModelConfig) -> list[bool]:
    """Return for each layer whether it has rotary positions."""
    return [config.layer_rope(layer) is not None for layer in range(config.n_layers)]


def rope_pattern(hf_config: Mapping[str, Any], family: Family, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return which layers have rotary positions, given the settings of the windows."""
    n_layers = settings["n_layers"]
    if family.rope_layers == "all":
        return {}
    if family.rope_layers == "windowed":
        pattern = settings.get("window_pattern", "S") if settings.get("window") else "L"
        return {"rope_pattern": pattern.replace("S", "R").replace("L", "N")}
    has_rope = listed_ropes(hf_config, n_layers)
    if not isinstance(has_rope, list) or len(has_rope) < n_layers or any(x not in (0, 1) for x in has_rope):
        raise ConfigError(f"no_rope_layers is {has_rope!r}; allowed: a list of 0 or 1 for each of {n_layers} layers")
    return {"rope_pattern": shortest_period("".join("NR"[int(x)] for x in has_rope[:n_layers]))}


def rope_settings(hf_config: Mapping[str, Any], family: Family, max_context: int) -> dict[str, Any]:
    """Return the rotary settings; transformers 5 and earlier versions store them differently."""
    by_type, scaling = _table(hf_config, "rope_parameters"), _table(hf_config, "rope_scaling")
    theta = hf_config.get("rope_theta") or family.rope_theta
    if family.windowed_theta is None:
        return _read_rope(by_type or scaling or family.default_scaling or {}, hf_config, theta, max_context)
    if by_type.keys() - set(LAYER_TYPES.values()):
        raise ConfigError(f"rope_parameters is {by_type!r}; allowed: a table for each type of layers")
    full, windowed = (_table(by_type, LAYER_TYPES[letter]) for letter in "LS")
    name, default = family.windowed_theta
    scaling = scaling or ({} if by_type else family.default_scaling or {})
    plain = _read_rope({**full, **scaling}, hf_config, theta, max_context)
    own = _read_rope(windowed, hf_config, hf_config.get(name) or default, max_context)
    if own == plain:
        return plain
    if "rope_scaling" in own:
        raise ConfigError(
            "rope_parameters scales sliding_attention in a way of its own; allowed: that of full_attention"
        )
    return plain | {"rope_theta_windowed": own["rope_theta"]}


def _table(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a table of the settings, empty if it is absent."""
    table = settings.get(name) or {}
    if not isinstance(table, Mapping):
        raise ConfigError(f"{name} is {table!r}; allowed: a table")
    return table


def _read_rope(
    rope: Mapping[str, Any], hf_config: Mapping[str, Any], default_theta: Any, max_context: int
) -> dict[str, Any]:
    """Return the rotary settings of one table of config.json."""
    theta = rope.get("rope_theta") or default_theta
    check_type("rope_theta", theta, float)
    scaling = rope.get("rope_type") or rope.get("type") or "default"
    if scaling not in ("default", "linear", "yarn", "llama3"):
        raise ConfigError(f"rope_scaling has type {scaling!r}; allowed: default, linear, yarn, llama3")
    check_value(rope, "partial_rotary_factor", 1)
    if scaling == "default":
        return {"rope_theta": float(theta)}
    factor = rope.get("factor")
    check_type("factor of rope_scaling", factor, float)
    settings = {"rope_theta": float(theta), "rope_scaling": scaling, "rope_factor": float(factor)}
    if scaling == "linear":
        return settings
    for name, allowed in (_YARN if scaling == "yarn" else _LLAMA3).items():
        check_value(rope, name, allowed)
    if scaling == "yarn":
        settings["rope_truncate"] = rope.get("truncate", True)
        check_value(rope, "attention_factor", 0.1 * math.log(factor) + 1 if factor > 1 else 1)
        if rope.get("mscale") and rope.get("mscale_all_dim"):
            raise ConfigError(f"rope_scaling has mscale {rope['mscale']} and mscale_all_dim; allowed: neither")
    name = "original_max_position_embeddings"
    original = rope.get(name) or hf_config.get(name) or max_context
    check_integer(name, original, MAX_INT)
    return settings | {"rope_original_context": original}
