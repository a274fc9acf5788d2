"""The mixture of experts on Hopper: what the kernels take, and the products that its derivative needs."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from dantinox.kernels.dispatch import current_device
from dantinox.kernels.ops.grouped_matmul.pallas_sm90 import gmm, tgmm
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.vjp import cores, refusal
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.warp_specialized import Static
from dantinox.kernels.ops.moe import vjp
from dantinox.kernels.ops.moe.pallas_sm90 import kernel as experts_kernel
from dantinox.kernels.vma import match_vma

Array = jax.Array


class Hopper(NamedTuple):
    """The products of a mixture, as `vjp.Kernels` wants them."""

    static: Static

    def up(self, x: Array, w_gate: Array, w_up: Array, sizes: Array, *, keep: bool) -> list[Array]:
        return [match_vma(each, x) for each in experts_kernel.up(x, w_gate, w_up, sizes, self.static, keep=keep)]

    def down(self, h: Array, w_down: Array, p: Array, sizes: Array) -> Array:
        return match_vma(gmm.product([h], [w_down], sizes, self.static, scale=p, name="experts_down"), h)

    def back(self, dy: Array, w_down: Array, g: Array, u: Array, p: Array, sizes: Array) -> list[Array]:
        return [match_vma(each, dy) for each in experts_kernel.back(dy, w_down, g, u, p, sizes, self.static)]

    def dx(self, dg: Array, du: Array, w_gate: Array, w_up: Array, sizes: Array) -> Array:
        options = {"transposed": True, "name": "experts_dx"}
        return match_vma(gmm.product([dg, du], [w_gate, w_up], sizes, self.static, **options), dg)

    def dw(self, x: Array, dys: Sequence[Array], sizes: Array, name: str) -> list[Array]:
        # One after the other: x comes from memory again, but products take longer than all that they read does where
        # M F / (M + F) is above 270 (F of 320 beside M of 2048). A tile of both would read as much from L2.
        return [match_vma(tgmm.summed(x, dy, sizes, self.static, name=name), x) for dy in dys]


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
    """See `dantinox.kernels.moe_mlp`, where arguments are checked; the options are those of `grouped_matmul`.

    Raises:
        NotImplementedError: a dtype or size that the kernels do not take.
    """
    if (why := refusal(x.dtype, *w_gate.shape[1:], of="w_gate")) is not None:
        raise NotImplementedError(f"moe_mlp: implementation='pallas' cannot run here: {why}")
    if 0 in (*x.shape, *w_gate.shape):
        return jnp.zeros_like(x)
    given = x, w_gate, w_up, w_down, expert_ids, expert_weights
    on = vjp.KernelsBackend(Hopper(Static(blocks or cores(current_device().kind), interpret, width)))
    return vjp.experts(*(match_vma(each, *given) for each in given), on)
