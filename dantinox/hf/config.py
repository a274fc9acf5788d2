"""Convert the settings of a model to and from config.json of Hugging Face, by the tables of `families`."""

from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

from dantinox.config import ConfigError, ModelConfig
from dantinox.config.aliases import current_names
from dantinox.hf.checks import MAX_INT, check_integer, check_type, check_value
from dantinox.hf.families import FAMILIES, LAYER_TYPES, Family, Layout, shortest_period
from dantinox.hf.rope import layers_with_rope, rope_pattern, rope_settings, rope_to_hf

_EXTRA_FIELDS = (  # stored under "dantinox", unless the family has a name for them
    "dropout",
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "selection_bias_rate",
    "dtype",
    "remat",
    "kv_cache_dtype",
)
_NEEDS = {"attn_out_bias": "attn_bias", "qk_norm_all_heads": "qk_norm"} | dict.fromkeys(
    ("n_dense_layers", "router", "router_renormalise", "router_scale", "selection_bias"), "n_experts"
)
"""A setting -> the one without which it has no effect."""
_MOST = {"n_layers": 4096, "n_experts": 65536}  # more would take forever to list
_DERIVED: dict[str, Callable[[ModelConfig], int]] = {
    "hidden": lambda config: config.hidden,
    "resolved_head_dim": lambda config: config.resolved_head_dim,
    "dense_hidden": lambda config: config.dense_hidden,
    "shared_experts": lambda config: config.shared_hidden // config.hidden if _has_shared_expert(config) else 0,
    "n_dense_layers": lambda config: config.n_dense_layers if config.n_experts else config.n_layers,
    "attn_scale": lambda config: round(config.attn_scale**-2) if config.attn_scale else config.resolved_head_dim,
}
"""Integers that families store instead of settings of ours."""
_MAY_BE_ZERO = ("shared_experts", "n_dense_layers")
_PLAIN_INTEGERS = {"max_window_layers": 0} | dict.fromkeys(
    ("sliding_window", "no_rope_layer_interval", "global_attn_every_n_layers", "sliding_window_pattern"), 1
)
"""Settings of config.json that no setting of ours corresponds to -> their smallest value."""


def layout_of(config: ModelConfig) -> Layout:
    """Return the first layout that can represent a model; that which lacks the least if none can."""
    if config.attn_sinks:  # no other has them
        return "gpt_oss"

    def lacking(layout: Layout) -> tuple[bool, int]:
        family = FAMILIES[layout]
        return not _has_such_mlps(config, family), len(_unsupported(config, family))

    return min(FAMILIES, key=lacking)


def _has_such_mlps(config: ModelConfig, family: Family) -> bool:
    """Return whether a family has models with experts, or without, as the model is."""
    return family.experts is not None if config.n_experts else family.experts is None or family.may_be_dense


def _has_shared_expert(config: ModelConfig) -> bool:
    return config.shared_expert and config.n_experts > 0


def to_hf(config: ModelConfig, layout: Layout | None = None) -> dict[str, Any]:
    """Return config.json of a model stored in float32.

    Raises:
        ConfigError: the layout cannot represent a setting; the message names every such setting.
    """
    layout = layout_of(config) if layout is None else layout
    if layout not in FAMILIES:
        raise ConfigError(f"layout is {layout!r}; allowed: {', '.join(FAMILIES)}")
    family = FAMILIES[layout]
    if unsupported := _unsupported(config, family):
        raise ConfigError(f"the {layout} layout cannot represent {', '.join(unsupported)}")
    hf_config = {
        "architectures": [family.class_name],
        "model_type": layout,
        "dtype": "float32",
        "torch_dtype": "float32",  # name before transformers 5
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,  # a default may be outside of the vocabulary
        **rope_to_hf(config, family),
        **{hf_name: _value(config, field) for field, hf_name in family.names.items()},
        **family.all_required,
        **{hf_name: _value(config, field) for field, hf_name in family.written.items()},
        **{hf_name: getattr(config, field) == on for field, (hf_name, _, on) in family.switches.items()},
    }
    if family.windows == "pattern":
        pattern = ["L" if config.layer_window(layer) is None else "S" for layer in range(config.n_layers)]
        hf_config["layer_types"] = [LAYER_TYPES[letter] for letter in pattern]
        hf_config["sliding_window"] = config.window or config.max_context  # transformers wants a number always
    elif family.windows == "one":
        hf_config["sliding_window"] = config.layer_window(0)
    if family.switch:
        hf_config["use_sliding_window"] = any(config.layer_window(layer) for layer in range(config.n_layers))
    return hf_config | {"dantinox": {name: getattr(config, name) for name in _extra_fields(family)}}


def _value(config: ModelConfig, field: str) -> Any:
    """Return the value of a field of a family."""
    return _DERIVED[field](config) if field in _DERIVED else getattr(config, field)


def _extra_fields(family: Family) -> list[str]:
    """Return the settings that only DantinoX stores."""
    return [name for name in _EXTRA_FIELDS if name not in family.fields]


def _unsupported(config: ModelConfig, family: Family) -> list[str]:
    """Return the settings that a family cannot represent."""
    unsupported = [
        f"{name} {getattr(config, name)!r}"
        for name, value in family.fixed.items()
        if getattr(config, name) != value and (name not in _NEEDS or getattr(config, _NEEDS[name]))
    ]
    unsupported += [
        f"{name} {getattr(config, name)!r}"
        for name, (_, *values) in family.switches.items()
        if getattr(config, name) not in values
    ]
    own_scale = config.attn_scale if "attn_scale" in family.fields else None
    if own_scale and _DERIVED["attn_scale"](config) ** -0.5 != own_scale:
        unsupported.append(f"attn_scale {config.attn_scale}")
    windows = {config.layer_window(layer) for layer in range(config.n_layers)}
    if len(windows) > 1 and family.windows != "pattern":
        unsupported.append(f"window_pattern {config.window_pattern!r} with window {config.window}")
    elif family.windows == "full" and windows != {None}:
        unsupported.append(f"window {config.window}")
    is_windowed = [config.layer_window(layer) is not None for layer in range(config.n_layers)]
    has_rope = layers_with_rope(config)
    ropes = {"all": [True] * config.n_layers, "windowed": is_windowed, "listed": has_rope}[family.rope_layers]
    if config.pos_encoding == "rope" and has_rope != ropes:
        unsupported.append(f"rope_pattern {config.rope_pattern!r}")
    if "shared_experts" in family.fields and _has_shared_expert(config) and config.shared_hidden % config.hidden:
        unsupported.append(f"shared_ratio {config.shared_ratio} with mlp_ratio {config.mlp_ratio}")
    own_theta = any(config.layer_rope(layer) == "windowed" for layer in range(config.n_layers))
    if own_theta and family.windowed_theta is None:
        unsupported.append(f"rope_theta_windowed {config.rope_theta_windowed}")
    if not _has_such_mlps(config, family):
        unsupported.append(f"n_experts {config.n_experts}")
    if family.whole_heads and config.dim % config.n_heads:
        unsupported.append(f"dim {config.dim} with n_heads {config.n_heads}")
    return unsupported


def from_hf(hf_config: Mapping[str, Any]) -> ModelConfig:
    """Return the settings of a model from the content of its config.json.

    Raises:
        ConfigError: a setting is missing, invalid, or not supported by DantinoX.
    """
    layout = hf_config.get("model_type")
    if not isinstance(layout, str) or layout not in FAMILIES:
        raise ConfigError(f"model_type is {layout!r}; allowed: {', '.join(FAMILIES)}")
    family = FAMILIES[layout]
    _check_supported(hf_config, family)
    for other, name in family.other_names.items():
        hf_config = {name: hf_config[other]} | hf_config if other in hf_config else hf_config
    names = family.names
    given = {field: hf_config[hf_name] for field, hf_name in names.items() if hf_config.get(hf_name) is not None}
    for field, value in given.items():
        check_type(names[field], value, _type_of(field))
    if hf_config.get("num_key_value_heads", 0) is None:
        given["n_kv_heads"] = given.get("n_heads")
    settings = dict(family.defaults) | given
    sizes = ["vocab_size", "dim", "hidden", "n_layers", "n_heads", "max_context"]
    sizes += [field for field in _DERIVED if field in settings and field not in sizes]
    for field in sizes:
        check_integer(names[field], settings.get(field), _MOST.get(field, MAX_INT), int(field not in _MAY_BE_ZERO))
    if family.may_be_dense and settings["n_dense_layers"] >= settings["n_layers"]:
        settings |= {"hidden": settings["dense_hidden"], "n_dense_layers": 0, "n_experts": 0, "shared_experts": 0}
    elif family.experts:
        check_integer(names["n_experts"], settings.get("n_experts"), _MOST["n_experts"])
    settings["shared_expert"] = settings.get("shared_experts", 0) > 0
    if family.whole_heads and settings["dim"] % settings["n_heads"]:
        heads = f"a multiple of num_attention_heads {settings['n_heads']}"
        raise ConfigError(f"hidden_size is {settings['dim']}; allowed: {heads}")
    settings.setdefault("n_kv_heads", settings["n_heads"])
    settings.setdefault("tie_embeddings", False)
    settings |= _ratios(settings)
    if score_dim := settings.get("attn_scale"):
        settings["attn_scale"] = None if score_dim == settings["resolved_head_dim"] else score_dim**-0.5
    settings["head_dim"] = settings.pop("resolved_head_dim", None)
    settings.setdefault("n_experts", 0)
    for field, (hf_name, off, on) in family.switches.items():
        value = True if hf_config.get(hf_name) is None else hf_config[hf_name]
        check_type(hf_name, value, bool)
        settings[field] = on if value else off
    is_dense = settings["n_experts"] == 0
    settings |= {name: x for name, x in family.fixed.items() if not (is_dense and _NEEDS.get(name) == "n_experts")}
    settings |= _window_settings(hf_config, family, settings["n_layers"])
    settings |= rope_settings(hf_config, family, settings["max_context"])
    if settings.get("window") is None:
        settings.pop("rope_theta_windowed", None)
    settings |= rope_pattern(hf_config, family, settings)
    settings |= _extra_settings(hf_config, family)
    known = get_type_hints(ModelConfig)
    return ModelConfig(**{name: x for name, x in settings.items() if name in known}).without_default_head_dim()


def _ratios(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hidden widths as ratios to the width; None for one that equals that of the MLP, or of each expert."""
    dim, hidden = settings["dim"], settings["hidden"]
    dense_hidden = settings.get("dense_hidden", hidden) if settings.get("n_dense_layers") else hidden
    shared_experts = settings.get("shared_experts") or 1
    return {
        "mlp_ratio": hidden / dim,
        "dense_ratio": None if dense_hidden == hidden else dense_hidden / dim,
        "shared_ratio": None if shared_experts == 1 else shared_experts * hidden / dim,
    }


def is_mxfp4(hf_config: Mapping[str, Any]) -> bool:
    """Return whether the experts are stored in mxfp4."""
    quantization = hf_config.get("quantization_config")
    is_gpt_oss = hf_config.get("model_type") == "gpt_oss"
    return is_gpt_oss and isinstance(quantization, Mapping) and quantization.get("quant_method") == "mxfp4"


def _check_supported(hf_config: Mapping[str, Any], family: Family) -> None:
    """Check the settings of which DantinoX reads one value."""
    for name, allowed in {
        "mlp_bias": False,
        "router_jitter_noise": 0,
        "partial_rotary_factor": 1,
        **family.all_required,
        **family.checked,
        **({} if "attn_bias" in family.fields else {"attention_bias": False}),
    }.items():
        check_value(hf_config, name, allowed)
    if not is_mxfp4(hf_config):
        check_value(hf_config, "quantization_config", None)
    for name, least in _PLAIN_INTEGERS.items():
        if hf_config.get(name) is not None:
            check_integer(name, hf_config[name], MAX_INT, least)


def _extra_settings(hf_config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Return the settings that only DantinoX stores, and the dtype."""
    extra = hf_config.get("dantinox") or {}
    if not isinstance(extra, Mapping):
        raise ConfigError(f"dantinox is {extra!r}; allowed: a table")
    extra = current_names({name: value for name, value in extra.items() if name in _extra_fields(family)})
    dtype = hf_config.get("dtype") or hf_config.get("torch_dtype") or (is_mxfp4(hf_config) and "bfloat16")
    if dtype and not isinstance(dtype, str):
        raise ConfigError(f"dtype is {dtype!r}; allowed: text")
    return {"dtype": "bfloat16" if dtype == "bfloat16" else "float32"} | extra


def _window_settings(hf_config: Mapping[str, Any], family: Family, n_layers: int) -> dict[str, Any]:
    """Return the settings of the windows."""
    window, layer_types = hf_config.get("sliding_window", family.default_window), hf_config.get("layer_types")
    if layer_types is not None and not isinstance(layer_types, list):
        raise ConfigError(f"layer_types is {layer_types!r}; allowed: a list")
    if family.windows == "full" or (family.switch and not hf_config.get("use_sliding_window")):
        return {}
    if family.windows == "one":
        if window is not None and any(name != "sliding_attention" for name in layer_types or ()):
            names = ", ".join(sorted({str(name) for name in layer_types or ()}))
            raise ConfigError(f"layer_types are {names}; allowed: one type for all layers")
        return {"window": window}
    letters = {name: letter for letter, name in LAYER_TYPES.items()}
    default = family.default_pattern(hf_config, n_layers)
    layer_types = layer_types or [LAYER_TYPES.get(letter, "conv") for letter in default]
    if len(layer_types) != n_layers or any(name not in list(letters) for name in layer_types):
        names = ", ".join(map(str, layer_types))
        raise ConfigError(f"layer_types are {names}; allowed: {' or '.join(letters)} for each of {n_layers} layers")
    pattern = "".join(letters[name] for name in layer_types)
    if "S" not in pattern:
        return {}
    if window is None:
        raise ConfigError(
            "sliding_window is None; allowed: an integer, 1 or more, with layers of type sliding_attention"
        )
    return {"window": window, "window_pattern": shortest_period(pattern)}


def _type_of(field: str) -> Any:
    """Return the type of a setting by our name, without None."""
    hint = int if field in _DERIVED else get_type_hints(ModelConfig)[field]
    return next((kind for kind in (int, float, bool) if hint in (kind, kind | None)), hint)
