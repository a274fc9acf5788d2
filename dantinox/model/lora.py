"""LoRA: frozen weights with trained updates of low rank.

W + (alpha / r) A B,   A [inputs, r] random, B [r, outputs] zero at first, so that training starts from W

The factors are parameters like others, named after their weight: blocks.0.attention.q.lora_a and .lora_b. A model is
made of weights to which the products are added, so no layer knows of them, and an export has them merged.

Source    Hu et al., LoRA (arXiv:2106.09685).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dantinox.config import ModelConfig

Array = jax.Array
A, B = ".lora_a", ".lora_b"
RANK = "r"  # the letter of the axis of the factors


def factor_axes(config: ModelConfig, axes_by_name: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Return the axis letters of the factors, by name, for those of the weights; {} if the settings have no LoRA."""
    targets = set(config.lora_targets.split(",")) if config.lora_rank else set()
    axes: dict[str, tuple[str, ...]] = {}
    for name, letters in axes_by_name.items():
        last = name.split(".")[-1]
        if not name.startswith("blocks.") or last not in targets:
            continue
        stack = 1 if letters[0] == "E" else 0  # experts have factors of their own
        inputs = len(letters) - 1 if last == "o" else stack + 1
        axes[name + A] = (*letters[:inputs], RANK)
        axes[name + B] = (*letters[:stack], RANK, *letters[inputs:])
    return axes


def factor_shapes(
    config: ModelConfig, axes_by_name: Mapping[str, Sequence[str]], weights: Mapping[str, Any]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of the factors, by name, for the axis letters and the shapes of the weights."""
    shapes = {}
    for name, letters in factor_axes(config, axes_by_name).items():
        weight = name.removesuffix(A).removesuffix(B)
        sizes = dict(zip(axes_by_name[weight], weights[weight].shape, strict=True)) | {RANK: config.lora_rank}
        shapes[name] = jax.ShapeDtypeStruct(tuple(sizes[letter] for letter in letters), jnp.float32)
    return shapes


def init_factors(shapes: Mapping[str, Any], key: Array) -> dict[str, Array]:
    """Return factors of the given shapes: A from N(0, 1 / inputs), B zero."""

    def init(n: int, name: str, shape: tuple[int, ...]) -> Array:
        if name.endswith(B):
            return jnp.zeros(shape, jnp.float32)
        inputs = math.prod(shape[:-1]) if ".attention." in name else shape[-2]
        return jax.random.normal(jax.random.fold_in(key, n), shape, jnp.float32) / math.sqrt(inputs)

    return {name: init(n, name, x.shape) for n, (name, x) in enumerate(shapes.items())}


def merge_factors(params: Mapping[str, Array], scale: float) -> dict[str, Array]:
    """Return the weights with the products of their factors, times `scale`, added, in the dtype of the weights."""
    merged = {name: x for name, x in params.items() if not name.endswith((A, B))}
    for name in params:
        if name.endswith(A):
            weight = name.removesuffix(A)
            w, a, b = merged[weight], params[name], params[weight + B]
            stack = w.shape[: a.ndim + b.ndim - w.ndim - 2]  # both factors have the axis of experts
            product = a.reshape(*stack, -1, a.shape[-1]) @ b.reshape(*stack, a.shape[-1], -1)
            merged[weight] = (w + scale * product.reshape(w.shape)).astype(w.dtype)
    return merged


def split_trained[T](params: Mapping[str, T]) -> tuple[dict[str, T], dict[str, T]]:
    """Split parameters into (those that training changes, the frozen ones); with LoRA only its factors change."""
    if not any(name.endswith((A, B)) for name in params):
        return dict(params), {}
    trained = {name: x for name, x in params.items() if name.endswith((A, B))}
    return trained, {name: x for name, x in params.items() if name not in trained}
