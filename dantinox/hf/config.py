"""Convert the settings of a model to and from config.json of Hugging Face, for Llama, Mistral and Mixtral."""

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from dantinox.config import ConfigError, ModelConfig
from dantinox.config.aliases import current_names
from dantinox.model.rope import original_context

Layout = Literal["llama", "mistral", "mixtral"]

_CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "mixtral": "MixtralForCausalLM"}
_DEFAULT_THETA = {"llama": 1e4, "mistral": 1e4, "mixtral": 1e6}
_YARN = {"beta_fast": 32, "beta_slow": 1, "truncate": True}  # the constants of our yarn; _LLAMA3: of our llama3
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


def layout_of(config: ModelConfig) -> Layout:
    """Return the default layout of a model."""
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
            scaling = {"rope_type": "yarn", "factor": factor} | original | _YARN
        case "llama3":
            scaling = {"rope_type": "llama3", "factor": factor} | original | _LLAMA3
        case _:
            pass
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
    hf_config |= {hf_name: getattr(config, field) for field, hf_name in _HF_NAMES.items()}
    if layout == "llama":
        hf_config |= {"attention_bias": False, "mlp_bias": False}
    else:
        hf_config["sliding_window"] = config.layer_window(0)
    if layout == "mixtral":
        hf_config |= {hf_name: getattr(config, field) for field, hf_name in _MOE_HF_NAMES.items()}
    return hf_config | {"dantinox": {name: getattr(config, name) for name in _EXTRA_FIELDS}}


def _check_representable(config: ModelConfig, layout: Layout) -> None:
    """Raise `ConfigError` if the layout cannot represent every setting."""
    allowed = {
        "pos_encoding": "rope",
        "attn_gate": "none",
        "qk_norm": False,
        "attn_softcap": None,
        "logit_softcap": None,
        "mlp": "swiglu",
        "shared_expert": False,
    }
    unsupported = [
        f"{name} {getattr(config, name)!r}" for name, value in allowed.items() if getattr(config, name) != value
    ]
    windows = {config.layer_window(layer) for layer in range(config.n_layers)}
    if len(windows) > 1:
        unsupported.append(f"window_pattern {config.window_pattern!r} with window {config.window}")
    elif layout == "llama" and windows != {None}:
        unsupported.append(f"window {config.window}")
    if (layout == "mixtral") != bool(config.n_experts):
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
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0,
        "router_jitter_noise": 0,
        "quantization_config": None,
        "partial_rotary_factor": 1,
    }.items():
        _check_value(hf_config, name, allowed)
    names = _HF_NAMES | (_MOE_HF_NAMES if layout == "mixtral" else {})
    settings = {field: hf_config[hf_name] for field, hf_name in names.items() if hf_config.get(hf_name) is not None}
    for field in ("vocab_size", "dim", "hidden", "n_layers", "n_heads", "max_context"):
        value = settings.get(field)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{names[field]} is {value!r}; allowed: an integer, 1 or more")
    settings.setdefault("n_kv_heads", settings["n_heads"])
    settings.setdefault("tie_embeddings", False)
    settings["mlp_ratio"] = settings.pop("hidden") / settings["dim"]
    settings["head_dim"] = settings.pop("resolved_head_dim", None)
    if layout == "mixtral":
        settings = {"n_experts": 8} | settings
    else:
        settings["n_experts"] = 0
    window = None if layout == "llama" else hf_config.get("sliding_window")
    layer_types = set(hf_config.get("layer_types") or ())
    if window is not None and layer_types - {"sliding_attention"}:
        names = ", ".join(sorted(map(str, layer_types)))
        raise ConfigError(f"layer_types are {names}; allowed: one type for all layers")
    extra = current_names(hf_config.get("dantinox") or {})
    extra = {name: extra[name] for name in _EXTRA_FIELDS if name in extra}
    stored_dtype = hf_config.get("dtype") or hf_config.get("torch_dtype")
    extra.setdefault("dtype", "bfloat16" if stored_dtype == "bfloat16" else "float32")
    return ModelConfig(
        **settings, window=window, **_rope_settings(hf_config, layout), **extra
    ).without_default_head_dim()


def _rope_settings(hf_config: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """Return the rotary settings; transformers 5 and earlier versions store them differently."""
    rope = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
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
