"""Convert the settings of a model to and from config.json of Hugging Face, by the tables of `families`."""

import math
from collections.abc import Mapping
from typing import Any

from dantinox.config import ConfigError, ModelConfig
from dantinox.config.aliases import current_names
from dantinox.hf.families import COMMON_FIELDS, FAMILIES, Family, Layout
from dantinox.model.rope import original_context

_YARN = {"beta_fast": 32, "beta_slow": 1}  # the constants of our yarn; _LLAMA3: of our llama3
_LLAMA3 = {"low_freq_factor": 1, "high_freq_factor": 4}
_EXTRA_FIELDS = ("dropout", "router_z_loss_coef", "dtype", "remat", "kv_cache_dtype")  # stored under "dantinox"
_DEFAULT_GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
_LAYER_TYPES = {"S": "sliding_attention", "L": "full_attention"}  # by the letter of window_pattern
_DEFAULT_WINDOW = {"qwen3": 4096, "qwen3_moe": 4096, "gpt_oss": 128}
_DEFAULT_MAX_WINDOW_LAYERS = 28


def layout_of(config: ModelConfig) -> Layout:
    """Return the default layout of a model."""
    if config.attn_sinks:
        return "gpt_oss"
    if config.qk_norm:
        return "qwen3_moe" if config.n_experts else "qwen3"
    if config.n_experts:
        return "mixtral"
    return "llama" if config.layer_window(0) is None else "mistral"


def to_hf(config: ModelConfig, layout: Layout | None = None) -> dict[str, Any]:
    """Return config.json of a model stored in float32.

    Raises:
        ConfigError: the layout cannot represent a setting; the message names every such setting.
    """
    layout = layout_of(config) if layout is None else layout
    if layout not in FAMILIES:
        raise ConfigError(f"layout is {layout!r}; allowed: {', '.join(FAMILIES)}")
    family = FAMILIES[layout]
    _check_representable(config, layout, family)
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
    if layout == "gpt_oss" and scaling is None:  # transformers takes the scaling of the published models otherwise
        scaling = {"rope_type": "default"}
    hf_config = {
        "architectures": [family.class_name],
        "model_type": layout,
        "dtype": "float32",
        "torch_dtype": "float32",  # name before transformers 5
        "hidden_act": "silu",
        "bos_token_id": 0,
        "eos_token_id": 0,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "attention_dropout": 0.0,
    }
    names = COMMON_FIELDS | family.fields
    hf_config |= {hf_name: getattr(config, field) for field, hf_name in names.items()} | family.required
    if layout == "qwen3_moe":
        hf_config["intermediate_size"] = config.hidden  # of dense layers, of which there are none
    if family.windows == "pattern":
        pattern = ["L" if config.layer_window(layer) is None else "S" for layer in range(config.n_layers)]
        hf_config["layer_types"] = [_LAYER_TYPES[letter] for letter in pattern]
        hf_config["sliding_window"] = config.window or config.max_context  # transformers wants a number always
    elif family.windows == "one":
        hf_config["sliding_window"] = config.layer_window(0)
    if family.switch:
        hf_config["use_sliding_window"] = any(config.layer_window(layer) for layer in range(config.n_layers))
    return hf_config | {"dantinox": {name: getattr(config, name) for name in _EXTRA_FIELDS}}


def _check_representable(config: ModelConfig, layout: Layout, family: Family) -> None:
    """Raise `ConfigError` if the layout cannot represent every setting."""
    unsupported = [
        f"{name} {getattr(config, name)!r}" for name, value in family.fixed.items() if getattr(config, name) != value
    ]
    windows = {config.layer_window(layer) for layer in range(config.n_layers)}
    if len(windows) > 1 and family.windows != "pattern":
        unsupported.append(f"window_pattern {config.window_pattern!r} with window {config.window}")
    elif family.windows == "full" and windows != {None}:
        unsupported.append(f"window {config.window}")
    if (family.experts is not None) != bool(config.n_experts):
        unsupported.append(f"n_experts {config.n_experts}")
    if unsupported:
        raise ConfigError(f"the {layout} layout cannot represent {', '.join(unsupported)}")


def from_hf(hf_config: Mapping[str, Any]) -> ModelConfig:
    """Return the settings of a model from the content of its config.json.

    Raises:
        ConfigError: a setting is missing, invalid, or not supported by DantinoX.
    """
    layout = hf_config.get("model_type")
    if layout not in FAMILIES:
        raise ConfigError(f"model_type is {layout!r}; allowed: {', '.join(FAMILIES)}")
    family = FAMILIES[layout]
    for name, allowed in {
        "hidden_act": "silu",
        "mlp_bias": False,
        "attention_dropout": 0,
        "router_jitter_noise": 0,
        "partial_rotary_factor": 1,
        **family.required,
        **({} if "attn_bias" in family.fields else {"attention_bias": False}),
    }.items():
        _check_value(hf_config, name, allowed)
    if layout == "qwen3_moe" and hf_config.get("norm_topk_prob") is None:  # the default of transformers
        raise ConfigError("norm_topk_prob is False, which DantinoX does not support; allowed: True")
    if not is_mxfp4(hf_config):
        _check_value(hf_config, "quantization_config", None)
    if layout == "qwen3_moe" and "num_local_experts" in hf_config:  # its name in some versions of transformers
        hf_config = {"num_experts": hf_config["num_local_experts"]} | hf_config
    names = COMMON_FIELDS | family.fields
    given = {field: hf_config[hf_name] for field, hf_name in names.items() if hf_config.get(hf_name) is not None}
    settings = dict(family.defaults) | given
    for field in ("vocab_size", "dim", "hidden", "n_layers", "n_heads", "max_context"):
        value = settings.get(field)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{names[field]} is {value!r}; allowed: an integer, 1 or more")
    settings.setdefault("n_kv_heads", settings["n_heads"])
    settings.setdefault("tie_embeddings", False)
    settings["mlp_ratio"] = settings.pop("hidden") / settings["dim"]
    settings["head_dim"] = settings.pop("resolved_head_dim", None)
    settings.setdefault("n_experts", 0)
    settings |= {name: family.fixed[name] for name in ("mlp", "qk_norm", "attn_sinks", "moe_bias")}
    extra = current_names(hf_config.get("dantinox") or {})
    extra = {name: extra[name] for name in _EXTRA_FIELDS if name in extra}
    stored_dtype = hf_config.get("dtype") or hf_config.get("torch_dtype") or (is_mxfp4(hf_config) and "bfloat16")
    extra.setdefault("dtype", "bfloat16" if stored_dtype == "bfloat16" else "float32")
    settings |= _window_settings(hf_config, layout, settings["n_layers"]) | _rope_settings(hf_config, layout) | extra
    return ModelConfig(**settings).without_default_head_dim()


def is_mxfp4(hf_config: Mapping[str, Any]) -> bool:
    """Return whether the experts are stored in mxfp4."""
    quantization = hf_config.get("quantization_config")
    is_gpt_oss = hf_config.get("model_type") == "gpt_oss"
    return is_gpt_oss and isinstance(quantization, Mapping) and quantization.get("quant_method") == "mxfp4"


def _window_settings(hf_config: Mapping[str, Any], layout: Layout, n_layers: int) -> dict[str, Any]:
    """Return the settings of the windows."""
    family = FAMILIES[layout]
    window, layer_types = hf_config.get("sliding_window", _DEFAULT_WINDOW.get(layout)), hf_config.get("layer_types")
    if family.windows == "full" or (family.switch and not hf_config.get("use_sliding_window")):
        return {}
    if family.windows == "one":
        if window is not None and set(layer_types or ()) - {"sliding_attention"}:
            names = ", ".join(sorted(map(str, set(layer_types or ()))))
            raise ConfigError(f"layer_types are {names}; allowed: one type for all layers")
        return {"window": window}
    letters = {name: letter for letter, name in _LAYER_TYPES.items()}
    if not layer_types:
        first = hf_config.get("max_window_layers", _DEFAULT_MAX_WINDOW_LAYERS)
        pattern = ["LS"[i >= first] if layout == "qwen3" else "SL"[i % 2] for i in range(n_layers)]
        layer_types = [_LAYER_TYPES[letter] for letter in pattern]
    if len(layer_types) != n_layers or set(layer_types) - letters.keys():
        names = ", ".join(map(str, layer_types))
        raise ConfigError(f"layer_types are {names}; allowed: {' or '.join(letters)} for each of {n_layers} layers")
    pattern = "".join(letters[name] for name in layer_types)
    if "S" not in pattern:
        return {}
    if window is None:
        raise ConfigError(
            "sliding_window is None; allowed: an integer, 1 or more, with layers of type sliding_attention"
        )
    period = next(n for n in range(1, n_layers + 1) if pattern == (pattern[:n] * n_layers)[:n_layers])
    return {"window": window, "window_pattern": pattern[:period]}


def _rope_settings(hf_config: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """Return the rotary settings; transformers 5 and earlier versions store them differently."""
    rope = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    if not rope and layout == "gpt_oss":
        rope = _DEFAULT_GPT_OSS_ROPE
    if not isinstance(rope, Mapping):
        raise ConfigError(f"rope_scaling is {rope!r}; allowed: a table")
    theta = float(rope.get("rope_theta") or hf_config.get("rope_theta") or FAMILIES[layout].rope_theta)
    scaling = rope.get("rope_type") or rope.get("type") or "default"
    if scaling not in ("default", "linear", "yarn", "llama3"):
        raise ConfigError(f"rope_scaling has type {scaling!r}; allowed: default, linear, yarn, llama3")
    _check_value(rope, "partial_rotary_factor", 1)
    if scaling == "default":
        return {"rope_theta": theta}
    factor = rope.get("factor")
    if not isinstance(factor, int | float):
        raise ConfigError(f"factor of rope_scaling is {factor!r}; allowed: a number")
    settings = {"rope_theta": theta, "rope_scaling": scaling, "rope_factor": factor}
    if scaling == "linear":
        return settings
    for name, allowed in (_YARN if scaling == "yarn" else _LLAMA3).items():
        _check_value(rope, name, allowed)
    if scaling == "yarn":
        settings["rope_truncate"] = rope.get("truncate", True)
        _check_value(rope, "attention_factor", 0.1 * math.log(factor) + 1 if factor > 1 else 1)
        if rope.get("mscale") and rope.get("mscale_all_dim"):
            raise ConfigError(f"rope_scaling has mscale {rope['mscale']} and mscale_all_dim; allowed: neither")
    original = rope.get("original_max_position_embeddings") or hf_config.get("original_max_position_embeddings")
    return settings | {"rope_original_context": original or hf_config["max_position_embeddings"]}


def _check_value(hf_config: Mapping[str, Any], name: str, allowed: Any) -> None:
    """Raise `ConfigError` if a setting exists and has another value."""
    value = hf_config.get(name)
    is_close = (
        isinstance(value, int | float) and isinstance(allowed, float) and math.isclose(value, allowed, rel_tol=1e-6)
    )
    if value is not None and value != allowed and not is_close:
        raise ConfigError(f"{name} is {value!r}, which DantinoX does not support; allowed: {allowed!r}")
