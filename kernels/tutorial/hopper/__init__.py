"""A matrix product for Hopper in four kernels, each with one new idea; README.md in this folder is the guide.

    one_warpgroup       one warpgroup loads, waits and multiplies
    tma_ring            loads run ahead of the multiplications, in a ring buffer of stages
    warp_specialized    one warpgroup loads, two multiply
    persistent          one thread block per SM computes tile after tile, in an order that reuses L2

A step's file is named after its number and its name, such as `step1_one_warpgroup.py`. There is no backward pass.
"""

import importlib
from collections.abc import Callable

import jax

Array = jax.Array
STEPS = ("one_warpgroup", "tma_ring", "warp_specialized", "persistent")


def load_step(name: str) -> Callable[..., Array]:
    """Import a step of the tutorial and return its `matmul`."""
    module = f"step{STEPS.index(name) + 1}_{name}"
    return importlib.import_module(f"dantinox.kernels.tutorial.hopper.{module}").matmul
