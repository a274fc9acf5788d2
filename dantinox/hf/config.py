"""A model's settings as config.json of Hugging Face, in the layouts of Llama, Mistral and Mixtral, and back."""

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from dantinox.config import ConfigError, ModelConfig
from dantinox.config.aliases import current_names
from dantinox.model.rope import original_context

Layout = Literal["llama", "mistral", "mixtral"]

_CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "mixtral": "MixtralForCausalLM"}
_THETA = {"llama": 1e4, "mistral": 1e4, "mixtral": 1e6}  # where a file names none
_YARN = {"beta_fast": 32, "beta_slow": 1, "truncate": True}  # what our yarn and llama3 are made of
_LLAMA3 = {"low_freq_factor": 1, "high_freq_factor": 4}
_OWN = ("dropout", "router_z_loss_coef", "dtype", "remat", "kv_cache_dtype")  # change no weight: kept below "dantinox"
_NAMES = {
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
_EXPERTS = {
    "n_experts": "num_local_experts",
    "experts_per_token": "num_experts_per_tok",
    "router_aux_loss_coef": "router_aux_loss_coef",
}


def layout_of(config: ModelConfig) -> Layout:
    """The layout that a model of this config is written in where none is asked for."""
    if config.n_experts:
        return "mixtral"
    return "llama" if config.layer_window(0) is None else "mistral"


def to_hf(config: ModelConfig, layout: Layout | None = None) -> dict[str, Any]:
    """config.json of a model stored in float32.

    Raises:
        ConfigError: naming every setting that the layout cannot hold.
    """
    layout = layout_of(config) if layout is None else layout
    if layout not in get_args(Layout):
        raise ConfigError(f"layout is {layout!r}; allowed: {', '.join(get_args(Layout))}")
    _refuse(config, layout)
    D, factor = config.resolved_head_dim, config.rope_factor
    theta, scaling = config.rope_theta, None
    original = {"original_max_position_embeddings": original_context(config)}
    match config.rope_scaling:
        case "ntk" if D > 2:  # nothing but a larger base
            theta = theta * factor ** (D / (D - 2))
        case "linear":
            scaling = {"rope_type": "linear", "factor": factor}
        case "yarn":
            scaling = {"rope_type": "yarn", "factor": factor} | original | _YARN
        case "llama3":
            scaling = {"rope_type": "llama3", "factor": factor} | original | _LLAMA3
        case _:
            pass
    held = {
        "architectures": [_CLASSES[layout]],
        "model_type": layout,
        "dtype": "float32",
        "torch_dtype": "float32",  # its name before transformers 5
        "hidden_act": "silu",
        "bos_token_id": 0,
        "eos_token_id": 0,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "attention_dropout": 0.0,
    }
    held |= {theirs: getattr(config, ours) for ours, theirs in _NAMES.items()}
    if layout == "llama":
        held |= {"attention_bias": False, "mlp_bias": False}
    else:
        held["sliding_window"] = config.layer_window(0)
    if layout == "mixtral":
        held |= {theirs: getattr(config, ours) for ours, theirs in _EXPERTS.items()}
    return held | {"dantinox": {name: getattr(config, name) for name in _OWN}}


def _refuse(config: ModelConfig, layout: Layout) -> None:
    allowed = {
        "pos_encoding": "rope",
        "attn_gate": "none",
        "qk_norm": False,
        "attn_softcap": None,
        "logit_softcap": None,
        "mlp": "swiglu",
        "shared_expert": False,
    }
    lost = [f"{name} {getattr(config, name)!r}" for name, value in allowed.items() if getattr(config, name) != value]
    windows = {config.layer_window(layer) for layer in range(config.n_layers)}
    if len(windows) > 1:
        lost.append(f"window_pattern {config.window_pattern!r} with window {config.window}")
    elif layout == "llama" and windows != {None}:
        lost.append(f"window {config.window}")
    if (layout == "mixtral") != bool(config.n_experts):
        lost.append(f"n_experts {config.n_experts}")
    if lost:
        raise ConfigError(f"the {layout} layout cannot hold {', '.join(lost)}")


def from_hf(held: Mapping[str, Any]) -> ModelConfig:
    """The config of a model whose config.json holds `held`.

    Raises:
        ConfigError: what a model of ours has no place for, a setting that is missing, or one that cannot be.
    """
    layout = held.get("model_type")
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
        _only(held, name, allowed)
    names = _NAMES | (_EXPERTS if layout == "mixtral" else {})
    found = {ours: held[theirs] for ours, theirs in names.items() if held.get(theirs) is not None}
    for ours in ("vocab_size", "dim", "hidden", "n_layers", "n_heads", "max_context"):
        value = found.get(ours)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{names[ours]} is {value!r}; allowed: an integer, 1 or more")
    found.setdefault("n_kv_heads", found["n_heads"])
    found.setdefault("tie_embeddings", False)
    found["mlp_ratio"] = found.pop("hidden") / found["dim"]
    found["head_dim"] = found.pop("resolved_head_dim", None)
    if layout == "mixtral":
        found = {"n_experts": 8} | found
    else:
        found["n_experts"] = 0
    window = None if layout == "llama" else held.get("sliding_window")
    kinds = set(held.get("layer_types") or ())
    if window is not None and kinds - {"sliding_attention"}:
        raise ConfigError(f"layer_types holds {', '.join(sorted(map(str, kinds)))}; allowed: one kind for all layers")
    own = current_names(held.get("dantinox") or {})
    own = {name: own[name] for name in _OWN if name in own}
    stored = held.get("dtype") or held.get("torch_dtype")
    own.setdefault("dtype", "bfloat16" if stored == "bfloat16" else "float32")
    return ModelConfig(**found, window=window, **_rope(held, layout), **own).without_default_head_dim()


def _rope(held: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """Our rotary settings from theirs, which transformers 5 and before it wrote in two ways."""
    rope = held.get("rope_parameters") or held.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ConfigError(f"rope_scaling is {rope!r}; allowed: a table")
    theta = float(rope.get("rope_theta") or held.get("rope_theta") or _THETA[layout])
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "linear", "yarn", "llama3"):
        raise ConfigError(f"rope_scaling is of type {kind!r}; allowed: default, linear, yarn, llama3")
    _only(rope, "partial_rotary_factor", 1)
    if kind == "default":
        return {"rope_theta": theta}
    factor = rope.get("factor")
    if not isinstance(factor, int | float):
        raise ConfigError(f"factor of rope_scaling is {factor!r}; allowed: a number")
    found = {"rope_theta": theta, "rope_scaling": kind, "rope_factor": factor}
    if kind == "linear":
        return found
    for name, allowed in (_YARN if kind == "yarn" else _LLAMA3).items():
        _only(rope, name, allowed)
    if kind == "yarn":
        _only(rope, "attention_factor", 0.1 * math.log(factor) + 1 if factor > 1 else 1)
        if rope.get("mscale") and rope.get("mscale_all_dim"):
            raise ConfigError(f"rope_scaling has mscale {rope['mscale']} and mscale_all_dim; allowed: neither")
    original = rope.get("original_max_position_embeddings") or held.get("original_max_position_embeddings")
    return found | {"rope_original_context": original or held["max_position_embeddings"]}


def _only(held: Mapping[str, Any], name: str, allowed: Any) -> None:
    """Where `held` has the name, it must have this value."""
    value = held.get(name)
    near = isinstance(value, int | float) and isinstance(allowed, float) and math.isclose(value, allowed, rel_tol=1e-6)
    if value is not None and value != allowed and not near:
        raise ConfigError(f"{name} is {value!r}, for which our models have no place; allowed: {allowed!r}")
