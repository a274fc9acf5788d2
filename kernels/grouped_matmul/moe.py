"""The Pallas grouped matmul with its derivative, and the mixture of experts built of the same two kernels.

A mixture's rows are sorted by expert, stably, and go through

    forward    h = silu(g) u,  g = x w_gate,  u = x w_up        one pass over x, both matrices in one step
               y = p (h w_down)                                 p, the router's weight of the row, in the epilogue
               out[n] = sum of the token's k rows of y          a gather and a sum: no atomics, one order of adding
    backward   s = dy w_down^T;  dp = sum of s h over F;  du = p s silu(g);  dg = p s u silu'(g);  p h
               dx = dg w_gate^T + du w_up^T                     one sum
               dw_gate, dw_up = x^T dg, x^T du                  one pass over x
               dw_down = (p h)^T dy

g and u are kept, in x's dtype: 8 bytes a hidden feature of a row to write and to read again in bfloat16, against 4 M
FLOPs to compute it anew. An accelerator that does 240 to 560 FLOPs a byte moved is faster keeping them from M = 480 to
1150 on, and experts are wider. h is made again from them, and the sorted rows of x and dy are gathered again, for
they are k times as large as x. Because p is multiplied into y's rows, its gradient needs h, which is there, and not
the rows of h w_down, which would have to be kept.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from kernels.dispatch import Device, device
from kernels.grouped_matmul import interpreted, interpreted_moe, mosaic_tpu, mosaic_tpu_dw
from kernels.grouped_matmul.epilogues import swiglu, through

Array = jax.Array


def _product(x: Array, w: Array, group_sizes: Array, here: Device, **options: Any) -> Array:
    if here.platform == "cpu":
        return interpreted.product(x, w, group_sizes, **options)
    return mosaic_tpu.product([x], [w], group_sizes, here, **options)[0]


def _summed(x: Array, dy: Array, group_sizes: Array, here: Device, *, name: str) -> Array:
    if here.platform == "cpu":
        return interpreted.summed(x, dy, group_sizes, name=name)
    return mosaic_tpu_dw.summed(x, [dy], group_sizes, here, name=name)[0]


def grouped_matmul(x: Array, w: Array, group_sizes: Array) -> Array:
    """See `kernels.grouped_matmul`; arguments are checked there."""
    return _matmul(x, w, group_sizes, device())


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _matmul(x: Array, w: Array, group_sizes: Array, here: Device) -> Array:
    return _product(x, w, group_sizes, here, name="grouped_matmul")


def _matmul_forward(x: Array, w: Array, group_sizes: Array, here: Device) -> tuple[Array, tuple]:
    return _matmul(x, w, group_sizes, here), (x, w, group_sizes)


def _matmul_backward(here: Device, kept: tuple, dy: Array) -> tuple:
    x, w, group_sizes = kept
    dx = _product(dy, w, group_sizes, here, transposed=True, name="grouped_matmul_dx")
    dw = _summed(x, dy, group_sizes, here, name="grouped_matmul_dw")
    return dx, dw, _no_gradient(group_sizes)


_matmul.defvjp(_matmul_forward, _matmul_backward)


class Mixture(Protocol):
    """The experts of R rows sorted by expert: `sizes` [E] says how many each has, p [R] their weights.

    ws: w_gate, w_up [E, M, F], w_down [E, F, M].
    """

    def forward(self, x: Array, ws: Sequence[Array], p: Array, sizes: Array, *, keep: bool) -> Sequence[Array]:
        """y [R, M]; with `keep` g and u [R, F] too."""

    def backward(
        self, x: Array, dy: Array, ws: Sequence[Array], p: Array, sizes: Array, g: Array, u: Array
    ) -> tuple[Array, Sequence[Array], Array]:
        """dx [R, M]; dw of each of ws; dp [R]."""


class Kernels(Protocol):
    """The products of a mixture on an accelerator, a kernel each."""

    def up(self, x: Array, w_gate: Array, w_up: Array, sizes: Array, *, keep: bool) -> Sequence[Array]:
        """h [R, F]; with `keep` g and u too."""

    def down(self, h: Array, w_down: Array, p: Array, sizes: Array) -> Array:
        """y [R, M]; p [R]."""

    def back(self, dy: Array, w_down: Array, g: Array, u: Array, p: Array, sizes: Array) -> Sequence[Array]:
        """dg, du, p h [R, F] and dp [R]."""

    def dx(self, dg: Array, du: Array, w_gate: Array, w_up: Array, sizes: Array) -> Array:
        """[R, M]."""

    def dw(self, x: Array, dys: Sequence[Array], sizes: Array, name: str) -> Sequence[Array]:
        """[E, columns of x, columns of dy] for each dy."""


class Products(NamedTuple):
    """A mixture made of such kernels."""

    on: Kernels

    def forward(self, x: Array, ws: Sequence[Array], p: Array, sizes: Array, *, keep: bool) -> Sequence[Array]:
        w_gate, w_up, w_down = ws
        h, *kept = self.on.up(x, w_gate, w_up, sizes, keep=keep)
        return self.on.down(h, w_down, p, sizes), *kept

    def backward(
        self, x: Array, dy: Array, ws: Sequence[Array], p: Array, sizes: Array, g: Array, u: Array
    ) -> tuple[Array, Sequence[Array], Array]:
        w_gate, w_up, w_down = ws
        dg, du, ph, dp = self.on.back(dy, w_down, g, u, p, sizes)
        dx = self.on.dx(dg, du, w_gate, w_up, sizes)
        dws = *self.on.dw(x, [dg, du], sizes, "experts_dw_up"), *self.on.dw(ph, [dy], sizes, "experts_dw_down")
        return dx, dws, dp


class MosaicTpu(NamedTuple):
    """Those of a TPU."""

    here: Device

    def up(self, x: Array, w_gate: Array, w_up: Array, sizes: Array, *, keep: bool) -> Sequence[Array]:
        outs = ("wide",) * (3 if keep else 1)
        options = {"epilogue": lambda g, u: (swiglu(g, u), g, u)[: len(outs)], "outs": outs, "name": "experts_up"}
        return mosaic_tpu.product([x], [w_gate, w_up], sizes, self.here, **options)

    def down(self, h: Array, w_down: Array, p: Array, sizes: Array) -> Array:
        options = {"epilogue": lambda y, p: (y * p,), "thin": [p[None]], "name": "experts_down"}
        return mosaic_tpu.product([h], [w_down], sizes, self.here, **options)[0]

    def back(self, dy: Array, w_down: Array, g: Array, u: Array, p: Array, sizes: Array) -> Sequence[Array]:
        outs = ("wide", "wide", "wide", "thin")
        options = {"transposed": True, "epilogue": through, "wide": [g, u], "thin": [p[None]], "outs": outs}
        *wide, dp = mosaic_tpu.product([dy], [w_down], sizes, self.here, **options, name="experts_dh")
        return *wide, dp[0]

    def dx(self, dg: Array, du: Array, w_gate: Array, w_up: Array, sizes: Array) -> Array:
        options = {"transposed": True, "add": True, "name": "experts_dx"}
        return mosaic_tpu.product([dg, du], [w_gate, w_up], sizes, self.here, **options)[0]

    def dw(self, x: Array, dys: Sequence[Array], sizes: Array, name: str) -> Sequence[Array]:
        return mosaic_tpu_dw.summed(x, dys, sizes, self.here, name=name)


def moe_mlp(x: Array, w_gate: Array, w_up: Array, w_down: Array, expert_ids: Array, expert_weights: Array) -> Array:
    """See `kernels.moe_mlp`; arguments are checked there."""
    here = device()
    on = interpreted_moe if here.platform == "cpu" else Products(MosaicTpu(here))
    return experts(x, w_gate, w_up, w_down, expert_ids, expert_weights, on)


def experts(
    x: Array, w_gate: Array, w_up: Array, w_down: Array, expert_ids: Array, expert_weights: Array, on: Mixture
) -> Array:
    """As `kernels.moe_mlp`, by the mixture given, which must be hashable."""
    (N, k), E = expert_ids.shape, w_gate.shape[0]
    flat = expert_ids.reshape(-1).astype(jnp.int32)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)  # sorted row -> n * k + j
    place = jnp.zeros_like(order).at[order].set(jnp.arange(N * k, dtype=jnp.int32), unique_indices=True)
    sizes = jnp.sum(flat[:, None] == jnp.arange(E), axis=0, dtype=jnp.int32)
    return _experts(x, w_gate, w_up, w_down, expert_weights, order, place.reshape(N, k), sizes, on)


@functools.partial(jax.custom_vjp, nondiff_argnums=(8,))
def _experts(
    x: Array,
    w_gate: Array,
    w_up: Array,
    w_down: Array,
    p: Array,
    order: Array,
    place: Array,
    sizes: Array,
    on: Mixture,
) -> Array:
    """p [N, k]; order [N k]: of each sorted row its token and slot; place [N, k]: the sorted row of each of these."""
    return _forward(x, w_gate, w_up, w_down, p, order, place, sizes, on, keep=False)[0]


def _experts_forward(x, w_gate, w_up, w_down, p, order, place, sizes, on):
    out, g, u = _forward(x, w_gate, w_up, w_down, p, order, place, sizes, on, keep=True)
    return out, (x, w_gate, w_up, w_down, p, order, place, sizes, g, u)


def _forward(x, w_gate, w_up, w_down, p, order, place, sizes, on, *, keep):
    rows, ws = x[order // p.shape[1]], (w_gate, w_up, w_down)
    y, *kept = on.forward(rows, ws, _sorted(p, order), sizes, keep=keep)
    return _gathered(y, place), *kept


def _experts_backward(on: Mixture, saved: tuple, dout: Array) -> tuple:
    x, w_gate, w_up, w_down, p, order, place, sizes, g, u = saved
    token, ws = order // p.shape[1], (w_gate, w_up, w_down)
    dx, dws, dp = on.backward(x[token], dout[token], ws, _sorted(p, order), sizes, g, u)
    none = [_no_gradient(ids) for ids in (order, place, sizes)]
    return _gathered(dx, place), *dws, dp[place].astype(p.dtype), *none


_experts.defvjp(_experts_forward, _experts_backward)


def _gathered(rows: Array, place: Array) -> Array:
    """The sum of each token's rows."""
    wide = (rows[place[:, j]].astype(jnp.float32) for j in range(place.shape[1]))
    return functools.reduce(jnp.add, wide).astype(rows.dtype)


def _sorted(p: Array, order: Array) -> Array:
    """[N k]: the weights in the order of the sorted rows."""
    return p.astype(jnp.float32).reshape(-1)[order]


def _no_gradient(ids: Array) -> np.ndarray:
    return np.zeros(ids.shape, jax.dtypes.float0)
