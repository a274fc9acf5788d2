"""Five kernels from the plainest attention to a fast one, a new idea each; README.md beside this file is the guide.

    naive              one program a head, the whole score matrix on the chip
    tiled              a tile of the queries at a time
    online_softmax     a tile of the keys at a time: the softmax is carried along
    tile_skipping      only the tiles that hold a visible pair
    packed_gqa_gate    the query heads of a key head in one tile, the gate at its end

The file of a rung is called after its number and its name, such as `step1_naive.py`. A rung is called as
`dantinox.kernels.attention` calls its implementations. There is no backward pass.
"""

import importlib
from collections.abc import Callable

import jax

Array = jax.Array
RUNGS = ("naive", "tiled", "online_softmax", "tile_skipping", "packed_gqa_gate")


def rung(name: str) -> Callable[..., Array]:
    """`attention` of the rung of that name."""
    step = f"step{RUNGS.index(name) + 1}_{name}"
    return importlib.import_module(f"dantinox.kernels.tutorial.{step}").attention
