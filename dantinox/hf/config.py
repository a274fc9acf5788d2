"""Convert the settings of a model to and from config.json of Hugging Face, for Llama, Mistral, Mixtral and gpt-oss."""

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from dantinox.config import ConfigError, ModelConfig
from dantinox.config.aliases import current_names
from dantinox.model.rope import original_context

Layout = Literal["llama", "mistral", "mixtral", "gpt_oss"]

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
}
_DEFAULT_THETA = {"llama": 1e4, "mistral": 1e4, "mixtral": 1e6, "gpt_oss": 150_000.0}
_YARN = {"beta_fast": 32, "beta_slow": 1}  # the constants of our yarn; _LLAMA3: of our llama3
_LLAMA3 = {"low_freq_factor": 1, "high_freq_factor": 4}
_EXTRA_FIELDS = ("dropout", "router_z_loss_coef", "dtype", "remat", "kv_cache_dtype")  # stored under "dantinox"
_HF_NAMES = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "hidden": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "resolved_head_dim": "head_dim",
    "max_context": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
_MOE_HF_NAMES = {
    "n_experts": "num_local_experts",
    "experts_per_token": "num_experts_per_tok",
    "router_aux_loss_coef": "router_aux_loss_coef",
}
_GPT_OSS_HF_NAMES = _MOE_HF_NAMES | {
    "attn_bias": "attention_bias",
    "mlp_limit": "swiglu_limit",
    "mlp_alpha": "swiglu_alpha",
}
_EXTRA_HF_NAMES = {"mixtral": _MOE_HF_NAMES, "gpt_oss": _GPT_OSS_HF_NAMES}  # beside _HF_NAMES
# Defaults of transformers that are not ours, for settings that config.json leaves out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mixtral": {"n_experts": 8},
    "gpt_oss": {
        "n_experts": 128,
        "experts_per_token": 4,
        "n_kv_heads": 8,
        "resolved_head_dim": 64,
        "norm_eps": 1e-5,
        "router_aux_loss_coef": 0.001,
        "attn_bias": True,
    },
}
_DEFAULT_GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
# Settings that a layout takes one value of.
_FIXED: dict[str, Any] = {
    "pos_encoding": "rope",
    "attn_gate": "none",
    "qk_norm": False,
    "attn_softcap": None,
    "logit_softcap": None,
    "shared_expert": False,
}
_FIXED_LLAMA = _FIXED | {"mlp": "swiglu", "attn_bias": False, "attn_sinks": False, "moe_bias": False}
_FIXED_GPT_OSS = _FIXED | {"mlp": "swiglu_clamped", "attn_sinks": True, "moe_bias": True}
_LAYER_TYPES = {"S": "sliding_attention", "L": "full_attention"}  # by the letter of window_pattern


def layout_of(config: ModelConfig) -> Layout:
    """Return the default layout of a model."""
    if config.attn_sinks:
        return "gpt_oss"
    if config.n_experts:
        return "mixtral"
    return "llama" if config.layer_window(0) is None else "mistral"


def to_hf(config: ModelConfig, layout: Layout | None = None) -> dict[str, Any]:
    """Return config.json of a model stored in float32.

    Raises:
        ConfigError: the layout cannot represent a setting; the message names every such setting.
    """
    layout = layout_of(config) if layout is None else layout
    if layout not in get_args(Layout):
        raise ConfigError(f"layout is {layout!r}; allowed: {', '.join(get_args(Layout))}")
    _check_representable(config, layout)
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
        "architectures": [_CLASSES[layout]],
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
    names = _HF_NAMES | _EXTRA_HF_NAMES.get(layout, {})
    hf_config |= {hf_name: getattr(config, field) for field, hf_name in names.items()}
    if layout == "llama":
        hf_config |= {"attention_bias": False, "mlp_bias": False}
    elif layout == "gpt_oss":
        pattern = ["L" if config.layer_window(layer) is None else "S" for layer in range(config.n_layers)]
        hf_config["layer_types"] = [_LAYER_TYPES[letter] for letter in pattern]
        hf_config["sliding_window"] = config.window or config.max_context  # transformers wants a number always
    else:
        hf_config["sliding_window"] = config.layer_window(0)
    return hf_config | {"dantinox": {name: getattr(config, name) for name in _EXTRA_FIELDS}}


def _check_representable(config: ModelConfig, layout: Layout) -> None:
    """Raise `ConfigError` if the layout cannot represent every setting."""
    allowed = _FIXED_GPT_OSS if layout == "gpt_oss" else _FIXED_LLAMA
    unsupported = [
        f"{name} {getattr(config, name)!r}" for name, value in allowed.items() if getattr(config, name) != value
    ]
    windows = {config.layer_window(layer) for layer in range(config.n_layers)}
    if len(windows) > 1 and layout != "gpt_oss":
        unsupported.append(f"window_pattern {config.window_pattern!r} with window {config.window}")
    elif layout == "llama" and windows != {None}:
        unsupported.append(f"window {config.window}")
    if (layout in _EXTRA_HF_NAMES) != bool(config.n_experts):
        unsupported.append(f"n_experts {config.n_experts}")
    if unsupported:
        raise ConfigError(f"the {layout} layout cannot represent {', '.join(unsupported)}")


def from_hf(hf_config: Mapping[str, Any]) -> ModelConfig:
    """Return the settings of a model from the content of its config.json.

    Raises:
        ConfigError: a setting is missing, invalid, or not supported by DantinoX.
    """
    layout = hf_config.get("model_type")
    if layout not in _CLASSES:
        raise ConfigError(f"model_type is {layout!r}; allowed: {', '.join(_CLASSES)}")
    for name, allowed in {
        "hidden_act": "silu",
        "mlp_bias": False,
        "attention_dropout": 0,
        "router_jitter_noise": 0,
        "partial_rotary_factor": 1,
    }.items():
        _check_value(hf_config, name, allowed)
    if layout != "gpt_oss":
        _check_value(hf_config, "attention_bias", False)
    if not is_mxfp4(hf_config):
        _check_value(hf_config, "quantization_config", None)
    names = _HF_NAMES | _EXTRA_HF_NAMES.get(layout, {})
    given = {field: hf_config[hf_name] for field, hf_name in names.items() if hf_config.get(hf_name) is not None}
    settings = _DEFAULTS.get(layout, {}) | given
    for field in ("vocab_size", "dim", "hidden", "n_layers", "n_heads", "max_context"):
        value = settings.get(field)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{names[field]} is {value!r}; allowed: an integer, 1 or more")
    settings.setdefault("n_kv_heads", settings["n_heads"])
    settings.setdefault("tie_embeddings", False)
    settings["mlp_ratio"] = settings.pop("hidden") / settings["dim"]
    settings["head_dim"] = settings.pop("resolved_head_dim", None)
    settings.setdefault("n_experts", 0)
    if layout == "gpt_oss":
        settings |= {"mlp": "swiglu_clamped", "attn_sinks": True, "moe_bias": True}
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
    """Return the settings of the windows; only gpt-oss has layers of two types."""
    if layout == "llama":
        return {}
    default_window = 128 if layout == "gpt_oss" else None
    window, layer_types = hf_config.get("sliding_window", default_window), hf_config.get("layer_types") or ()
    if layout != "gpt_oss":
        if window is not None and set(layer_types) - {"sliding_attention"}:
            names = ", ".join(sorted(map(str, set(layer_types))))
            raise ConfigError(f"layer_types are {names}; allowed: one type for all layers")
        return {"window": window}
    letters = {name: letter for letter, name in _LAYER_TYPES.items()}
    layer_types = layer_types or [_LAYER_TYPES["SL"[i % 2]] for i in range(n_layers)]
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
    theta = float(rope.get("rope_theta") or hf_config.get("rope_theta") or _DEFAULT_THETA[layout])
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
