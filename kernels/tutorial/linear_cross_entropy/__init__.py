"""Five linear cross-entropies, from all logits to three products, one new idea each; README.md is the guide.

    all_logits         a kernel writes every logit to memory, XLA reduces them
    online_logsumexp   one tile of the vocabulary at a time, with a running maximum and sum
    tile_skipping      a mask in the last tile only; tiles of rows without targets are skipped
    backward           kernels for dh and for dw, which compute the logits again
    three_products     the gradients in the forward pass, scaled by the cotangents later

A step's file is named after its number and its name, such as `step1_all_logits.py`. Each step has the signature of an
implementation of `dantinox.kernels.linear_cross_entropy`, the last two with gradients.
"""

import importlib
from collections.abc import Callable

import jax

Array = jax.Array
STEPS = ("all_logits", "online_logsumexp", "tile_skipping", "backward", "three_products")


def load_step(name: str) -> Callable[..., Array]:
    """Import a step of the tutorial and return its `linear_cross_entropy`."""
    module = f"step{STEPS.index(name) + 1}_{name}"
    return importlib.import_module(f"dantinox.kernels.tutorial.linear_cross_entropy.{module}").linear_cross_entropy
