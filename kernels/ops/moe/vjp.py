"""The derivative of a mixture of experts, for every backend that has its products as kernels.

The rows are sorted by expert, stably, and go through

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
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from dantinox.kernels.ops.grouped_matmul.common import no_gradient
from dantinox.kernels.ops.moe.routing import sorted_weights, unpermute_and_sum

Array = jax.Array


class ExpertsBackend(Protocol):
    """The experts of R rows sorted by expert: `sizes` [E] says how many each has, p [R] their weights.

    ws: w_gate, w_up [E, M, F], w_down [E, F, M].
    """

    def forward(self, x: Array, ws: Sequence[Array], p: Array, sizes: Array, *, keep: bool) -> Sequence[Array]:
        """y [R, M]; with `keep` g and u [R, F] too."""

    def backward(
        self, x: Array, dy: Array, ws: Sequence[Array], p: Array, sizes: Array, g: Array, u: Array
    ) -> tuple[Array, Sequence[Array], Array]:
        """dx [R, M]; dw of each of ws; dp [R]."""


class ExpertsKernels(Protocol):
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


class KernelsBackend(NamedTuple):
    """A mixture made of such kernels."""

    on: ExpertsKernels

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


def experts(
    x: Array, w_gate: Array, w_up: Array, w_down: Array, expert_ids: Array, expert_weights: Array, on: ExpertsBackend
) -> Array:
    """As `dantinox.kernels.moe_mlp`, by the mixture given, which must be hashable."""
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
    on: ExpertsBackend,
) -> Array:
    """p [N, k]; order [N k]: of each sorted row its token and slot; place [N, k]: the sorted row of each of these."""
    return _forward(x, w_gate, w_up, w_down, p, order, place, sizes, on, keep=False)[0]


def _experts_forward(x, w_gate, w_up, w_down, p, order, place, sizes, on):
    out, g, u = _forward(x, w_gate, w_up, w_down, p, order, place, sizes, on, keep=True)
    return out, (x, w_gate, w_up, w_down, p, order, place, sizes, g, u)


def _forward(x, w_gate, w_up, w_down, p, order, place, sizes, on, *, keep):
    rows, ws = x[order // p.shape[1]], (w_gate, w_up, w_down)
    y, *kept = on.forward(rows, ws, sorted_weights(p, order), sizes, keep=keep)
    return unpermute_and_sum(y, place), *kept


def _experts_backward(on: ExpertsBackend, saved: tuple, dout: Array) -> tuple:
    x, w_gate, w_up, w_down, p, order, place, sizes, g, u = saved
    token, ws = order // p.shape[1], (w_gate, w_up, w_down)
    dx, dws, dp = on.backward(x[token], dout[token], ws, sorted_weights(p, order), sizes, g, u)
    none = [no_gradient(ids) for ids in (order, place, sizes)]
    return unpermute_and_sum(dx, place), *dws, dp[place].astype(p.dtype), *none


_experts.defvjp(_experts_forward, _experts_backward)
