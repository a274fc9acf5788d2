"""Grouped matmul and the mixture of experts on Hopper: what the kernels take, and the derivatives around them.

y = x w_e        dx = dy w_e^T, w read as it lies        dw_e = sum of x_n^T dy_n over the rows n of group e

The derivative of the mixture is that of `moe.py`, by the kernels of this chip.
"""

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.dispatch import device
from kernels.grouped_matmul import moe, mosaic_gpu, mosaic_gpu_dw, mosaic_gpu_moe
from kernels.grouped_matmul.roles import Static
from kernels.varying import vary

Array = jax.Array
DTYPES = (jnp.bfloat16, jnp.float16)
SIDE = 64  # M and F are multiples of it: columns of a tile in the layout that the tensor cores read


def refusal(dtype: jnp.dtype, M: int, F: int, *, of: str = "w") -> str | None:
    """Why the kernels cannot take these arrays; None where they can."""
    if dtype not in DTYPES:
        return f"x has dtype {jnp.dtype(dtype)} and Hopper's tensor cores take bfloat16 and float16 here"
    for name, size in (("M", M), ("F", F)):
        if size % SIDE:
            return f"{of} has {name} = {size} and its tiles are multiples of {SIDE}"
    return None


def cores(kind: str) -> int:
    """How many cores a Hopper chip of that name has; where it has fewer, some blocks run after the others."""
    return 114 if "PCIe" in kind else 78 if re.search(r"H20\b", kind) else 132


def grouped_matmul(
    x: Array,
    w: Array,
    group_sizes: Array,
    *,
    interpret: plgpu.InterpretGPUParams | None = None,
    blocks: int = 0,
    width: int | None = None,
) -> Array:
    """See `kernels.grouped_matmul`, where arguments are checked; with `interpret` the kernels run on the CPU.

    Args:
        blocks: that share the tiles; 0: one for each core of the device.
        width: of a tile, where a kernel can have it so; None lets `tiles.py` choose.

    Raises:
        NotImplementedError: a dtype or size that the kernels do not take.
    """
    if (why := refusal(x.dtype, *w.shape[1:])) is not None:
        raise NotImplementedError(f"grouped_matmul: implementation='pallas' cannot run here: {why}")
    if 0 in (*x.shape, *w.shape):
        return jnp.zeros((x.shape[0], w.shape[2]), x.dtype)
    # The sum over devices of a matrix that all of them have is taken where it begins to vary: before the kernels.
    x, w, group_sizes = (vary(each, x, w, group_sizes) for each in (x, w, group_sizes))
    return _matmul(x, w, group_sizes, Static(blocks or cores(device().kind), interpret, width))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _matmul(x: Array, w: Array, group_sizes: Array, static: Static) -> Array:
    return vary(mosaic_gpu.product([x], [w], group_sizes, static), x)


def _matmul_forward(x: Array, w: Array, group_sizes: Array, static: Static) -> tuple[Array, tuple]:
    return _matmul(x, w, group_sizes, static), (x, w, group_sizes)


def _matmul_backward(static: Static, kept: tuple, dy: Array) -> tuple:
    x, w, group_sizes = kept
    dx = mosaic_gpu.product([dy], [w], group_sizes, static, transposed=True, name="grouped_matmul_dx")
    dw = mosaic_gpu_dw.summed(x, dy, group_sizes, static, name="grouped_matmul_dw")
    return vary(dx, x), vary(dw, w), np.zeros(group_sizes.shape, jax.dtypes.float0)


_matmul.defvjp(_matmul_forward, _matmul_backward)


class Hopper(NamedTuple):
    """The products of a mixture, as `moe.Kernels` wants them."""

    static: Static

    def up(self, x: Array, w_gate: Array, w_up: Array, sizes: Array, *, keep: bool) -> list[Array]:
        return [vary(each, x) for each in mosaic_gpu_moe.up(x, w_gate, w_up, sizes, self.static, keep=keep)]

    def down(self, h: Array, w_down: Array, p: Array, sizes: Array) -> Array:
        return vary(mosaic_gpu.product([h], [w_down], sizes, self.static, scale=p, name="experts_down"), h)

    def back(self, dy: Array, w_down: Array, g: Array, u: Array, p: Array, sizes: Array) -> list[Array]:
        return [vary(each, dy) for each in mosaic_gpu_moe.back(dy, w_down, g, u, p, sizes, self.static)]

    def dx(self, dg: Array, du: Array, w_gate: Array, w_up: Array, sizes: Array) -> Array:
        options = {"transposed": True, "name": "experts_dx"}
        return vary(mosaic_gpu.product([dg, du], [w_gate, w_up], sizes, self.static, **options), dg)

    def dw(self, x: Array, dys: Sequence[Array], sizes: Array, name: str) -> list[Array]:
        # One after the other: x comes from memory again, but products take longer than all that they read does where
        # M F / (M + F) is above 270 (F of 320 beside M of 2048). A tile of both would read as much from L2.
        return [vary(mosaic_gpu_dw.summed(x, dy, sizes, self.static, name=name), x) for dy in dys]


def moe_mlp(
    x: Array,
    w_gate: Array,
    w_up: Array,
    w_down: Array,
    expert_ids: Array,
    expert_weights: Array,
    *,
    interpret: plgpu.InterpretGPUParams | None = None,
    blocks: int = 0,
    width: int | None = None,
) -> Array:
    """See `kernels.moe_mlp`, where arguments are checked; the options are those of `grouped_matmul`.

    Raises:
        NotImplementedError: a dtype or size that the kernels do not take.
    """
    if (why := refusal(x.dtype, *w_gate.shape[1:], of="w_gate")) is not None:
        raise NotImplementedError(f"moe_mlp: implementation='pallas' cannot run here: {why}")
    if 0 in (*x.shape, *w_gate.shape):
        return jnp.zeros_like(x)
    given = x, w_gate, w_up, w_down, expert_ids, expert_weights
    on = moe.Products(Hopper(Static(blocks or cores(device().kind), interpret, width)))
    return moe.experts(*(vary(each, *given) for each in given), on)
