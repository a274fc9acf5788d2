"""Five grouped matmuls, from dense to fused, each with one new idea; README.md in this folder is the guide.

    dense              every row times the weights of every group, a mask keeps one product
    row_tiles          one tile of rows at a time, with the groups that have rows in it
    group_metadata     groups padded to full tiles; a table, computed on the device, names the group of each tile
    masked_edges       no padding: two groups share a tile, and each writes its own rows
    swiglu             two weights, and silu(gate) * up while both products are on the chip

A step's file is named after its number and its name, such as `step1_dense.py`. Each step has the signature of an
implementation of `dantinox.kernels.grouped_matmul`, the last one with a second weight. There is no backward pass.
"""

import importlib
from collections.abc import Callable

import jax

Array = jax.Array
STEPS = ("dense", "row_tiles", "group_metadata", "masked_edges", "swiglu")


def load_step(name: str) -> Callable[..., Array]:
    """Import a step of the tutorial and return its `grouped_matmul`."""
    module = f"step{STEPS.index(name) + 1}_{name}"
    return importlib.import_module(f"dantinox.kernels.tutorial.grouped_matmul.{module}").grouped_matmul
