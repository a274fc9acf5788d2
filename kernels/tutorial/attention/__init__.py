"""Attention in eight steps, from naive to fast, each with one new idea; README.md in this folder is the guide.

    naive              one program per head, the whole score matrix on the chip
    tiled              one tile of queries at a time
    online_softmax     one tile of keys at a time, with a running softmax
    tile_skipping      only the tiles that hold a visible pair
    packed_gqa_gate    the query heads of a key head in one tile, the gate fused into its epilogue
    log_sum_exp        saves what a backward pass needs, which is plain jnp
    backward           kernels for dq and for dk, dv
    phases             a tile in phases with scratch memory between them, so that registers suffice

A step's file is named after its number and its name, such as `step1_naive.py`. Each step has the signature of an
implementation of `dantinox.kernels.attention`; the last three have gradients.
"""

import importlib
from collections.abc import Callable

import jax

Array = jax.Array
STEPS = ("naive", "tiled", "online_softmax", "tile_skipping", "packed_gqa_gate", "log_sum_exp", "backward", "phases")


def load_step(name: str) -> Callable[..., Array]:
    """Import a step of the tutorial and return its `attention`."""
    module = f"step{STEPS.index(name) + 1}_{name}"
    return importlib.import_module(f"dantinox.kernels.tutorial.attention.{module}").attention
