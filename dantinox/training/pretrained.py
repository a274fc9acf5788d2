"""Begin a run with the weights, settings and tokenizer of a folder in the format of Hugging Face: `--init-from DIR`."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from dantinox.config import Config, ConfigError, ModelConfig
from dantinox.data.tokenizer import DEFAULT_VOCAB
from dantinox.hf.folder import find_tokenizer
from dantinox.hf.weights import load_params, local_folder, read_model_config
from dantinox.model.params import Params

# Settings of which a run may choose others: they change neither the parameters nor what these compute.
FREE = (
    "max_context",
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "dropout",
    "dtype",
    "remat",
    "attn",
    "moe",
    "decode",
    "loss",
    "kv_cache_dtype",
    "lora_rank",
    "lora_alpha",
    "lora_targets",
)


def with_pretrained(config: Config, folder: str, named: Mapping[str, Any]) -> Config:
    """Return the settings with those of the model in `folder`, and its tokenizer.

    Args:
        config: the other settings.
        folder: config.json, safetensors and perhaps a tokenizer.
        named: settings that a file of settings names, which must agree with the folder.

    Raises:
        ConfigError: a named setting contradicts the folder.
        ValueError, OSError: the folder has no model or a damaged one; the message is one line.
    """
    model = read_model_config(local_folder(folder))
    settings = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name not in ("dtype", *_OURS)}
    settings = {name: value for name, value in settings.items() if name not in FREE or name not in named}
    _check_model(dataclasses.replace(model, **{name: named[name] for name in named if hasattr(model, name)}), folder)
    seq_len = min(config.train.seq_len, settings.get("max_context", model.max_context))
    settings |= {"init_from": folder} | ({} if "seq_len" in named else {"seq_len": seq_len})
    if "tokenizer" not in named and find_tokenizer(Path(folder)) is not None:
        settings["tokenizer"] = folder
    return config.replace(**settings)


def check_pretrained(config: Config) -> None:
    """Check that the model and the tokenizer of the settings are those of the folder that the run begins with, if any.

    Raises:
        ConfigError: one is not; the message names every such setting.
        ValueError, OSError: the folder has no model or a damaged one.
    """
    if config.train.init_from:
        _check_model(config.model, config.train.init_from)
        _check_tokenizer(config)


def _check_model(config: ModelConfig, folder: str) -> None:
    model = read_model_config(local_folder(folder))
    different = [
        f"{f.name} {_value(config, f.name)!r}, where it has {_value(model, f.name)!r}"
        for f in dataclasses.fields(model)
        if f.name not in FREE and _value(config, f.name) != _value(model, f.name)
    ]
    if different:
        raise ConfigError(f"init_from {folder} contradicts {'; '.join(different)}")


def _check_tokenizer(config: Config) -> None:
    folder, tokenizer = config.train.init_from, config.data.tokenizer
    own = find_tokenizer(Path(folder))
    if tokenizer in DEFAULT_VOCAB:
        reason = "has its own" if own else "has no tokenizer.json"
        allowed = "no --tokenizer" if own else "the path of a tokenizer.json or of its folder"
        raise ConfigError(f"tokenizer is {tokenizer!r}, but init_from {folder} {reason}; allowed: {allowed}")
    other = None if own is None or tokenizer == folder else find_tokenizer(Path(tokenizer))
    if own is not None and other is not None and own.fingerprint != other.fingerprint:
        raise ConfigError(
            f"tokenizer is {tokenizer!r}, but init_from {folder} has another one; allowed: no --tokenizer"
        )


def pretrained_params(config: Config, shardings: Mapping[str, jax.sharding.Sharding]) -> Params:
    """Return the parameters of the folder that a run begins with, in float32, without factors of LoRA."""
    _check_model(config.model, config.train.init_from)
    without_lora = dataclasses.replace(config.model, lora_rank=0)
    return load_params(config.train.init_from, without_lora, shardings, "float32")


# How a run computes is its own choice, whatever wrote the folder.
_LORA = ("lora_rank", "lora_alpha", "lora_targets")
_OURS = ("remat", "attn", "moe", "decode", "loss", "kv_cache_dtype", "dropout", *_LORA)


def _value(model: ModelConfig, name: str) -> Any:
    return model.resolved_head_dim if name == "head_dim" else getattr(model, name)
