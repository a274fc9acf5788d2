"""The products of a mixture on a TPU, by the kernels of the grouped matmul."""

from collections.abc import Sequence
from typing import NamedTuple

import jax

from dantinox.kernels.dispatch import Device
from dantinox.kernels.ops.grouped_matmul.pallas_tpu import gmm, tgmm
from dantinox.kernels.ops.moe.swiglu import swiglu, swiglu_bwd

Array = jax.Array


class MosaicTpu(NamedTuple):
    """Those of a TPU."""

    here: Device

    def up(self, x: Array, w_gate: Array, w_up: Array, sizes: Array, *, keep: bool) -> Sequence[Array]:
        outs = ("wide",) * (3 if keep else 1)
        options = {"epilogue": lambda g, u: (swiglu(g, u), g, u)[: len(outs)], "outs": outs, "name": "experts_up"}
        return gmm.product([x], [w_gate, w_up], sizes, self.here, **options)

    def down(self, h: Array, w_down: Array, p: Array, sizes: Array) -> Array:
        options = {"epilogue": lambda y, p: (y * p,), "thin": [p[None]], "name": "experts_down"}
        return gmm.product([h], [w_down], sizes, self.here, **options)[0]

    def back(self, dy: Array, w_down: Array, g: Array, u: Array, p: Array, sizes: Array) -> Sequence[Array]:
        outs = ("wide", "wide", "wide", "thin")
        options = {"transposed": True, "epilogue": swiglu_bwd, "wide": [g, u], "thin": [p[None]], "outs": outs}
        *wide, dp = gmm.product([dy], [w_down], sizes, self.here, **options, name="experts_dh")
        return *wide, dp[0]

    def dx(self, dg: Array, du: Array, w_gate: Array, w_up: Array, sizes: Array) -> Array:
        options = {"transposed": True, "add": True, "name": "experts_dx"}
        return gmm.product([dg, du], [w_gate, w_up], sizes, self.here, **options)[0]

    def dw(self, x: Array, dys: Sequence[Array], sizes: Array, name: str) -> Sequence[Array]:
        return tgmm.summed(x, dys, sizes, self.here, name=name)
