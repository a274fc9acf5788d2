"""The mixture of experts on an NVIDIA GPU: rows move by Triton, products are XLA's.

Math      permute     rows[r] = s[r] x[token of r]: the tokens' rows, sorted by expert; s is 1, or the router's weight
          combine     out[n] = sum_j p[n, j] y[place[n, j]]: back in the tokens' order, weighted; p is 1, or the weights
          shares      dp[n, j] = <dout[n], y[place[n, j]]>
          Each is the derivative of another: of permute (s = 1) it is combine (p = 1), of combine it is permute (s = p)
          and shares.
Tiling    permute: grid (tiles of sorted rows, tiles of columns); combine: (tiles of tokens, tiles of columns);
          shares: (tiles of tokens, choices).

              tokens    0 1 2 3          a program gathers some rows, wherever they lie,
              rows      2 0 2 1 0 3      and writes its own tile, whole: no atomics
                        └e 0┘ └e 1 ..┘
State     the float32 sum of one tile of tokens; else none.
Traffic   permute reads and writes each sorted row once; combine reads them once and writes each token once, where a
          gather and a sum by XLA write the gathered rows between. No FLOPs to speak of: the memory binds.
Limits    float32, bfloat16, float16; NVIDIA, compute capability 8.0 and newer, with jax-triton. ValueError comes from
          `dantinox.kernels.moe_mlp`.
Source    Gale et al., MegaBlocks (arXiv:2211.15841), for permuting and un-permuting rows apart from their products.
"""

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl

from dantinox.kernels.ops.moe import ragged_dot

Array = jax.Array

ROWS, COLUMNS = 16, 256  # of one tile


@triton.jit
def permute_kernel(
    x,
    order,
    scale,
    N_ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    SCALED: tl.constexpr,
    TILE: tl.constexpr,
    ACROSS: tl.constexpr,
    rows,
):
    """rows[r] = x[order[r] // K], times scale[order[r]] where SCALED."""
    r = tl.program_id(0) * TILE + tl.arange(0, TILE)
    m = tl.program_id(1) * ACROSS + tl.arange(0, ACROSS)
    place = tl.load(order + r, mask=r < N_ROWS, other=0)
    inside = (r < N_ROWS)[:, None] & (m < WIDTH)[None, :]
    value = tl.load(x + (place // K).to(tl.int64)[:, None] * WIDTH + m[None, :], mask=inside)
    if SCALED:
        s = tl.load(scale + place, mask=r < N_ROWS, other=0.0)
        value = (value.to(tl.float32) * s[:, None]).to(rows.dtype.element_ty)
    tl.store(rows + r.to(tl.int64)[:, None] * WIDTH + m[None, :], value, mask=inside)


@triton.jit
def combine_kernel(
    rows,
    place,
    weights,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    SCALED: tl.constexpr,
    TILE: tl.constexpr,
    ACROSS: tl.constexpr,
    out,
):
    """out[n] = sum_j rows[place[n, j]], each times weights[n, j] where SCALED; added in the order of j."""
    n = tl.program_id(0) * TILE + tl.arange(0, TILE)
    m = tl.program_id(1) * ACROSS + tl.arange(0, ACROSS)
    inside = (n < TOKENS)[:, None] & (m < WIDTH)[None, :]
    total = tl.zeros((TILE, ACROSS), tl.float32)
    for j in range(K):
        r = tl.load(place + n * K + j, mask=n < TOKENS, other=0).to(tl.int64)
        value = tl.load(rows + r[:, None] * WIDTH + m[None, :], mask=inside, other=0.0).to(tl.float32)
        if SCALED:
            value = value * tl.load(weights + n * K + j, mask=n < TOKENS, other=0.0)[:, None]
        total += value
    tl.store(out + n.to(tl.int64)[:, None] * WIDTH + m[None, :], total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def shares_kernel(
    dout,
    rows,
    place,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    TILE: tl.constexpr,
    ACROSS: tl.constexpr,
    found,
):
    """found[n, j] = the inner product of dout[n] and rows[place[n, j]]."""
    n = tl.program_id(0) * TILE + tl.arange(0, TILE)
    j = tl.program_id(1)
    r = tl.load(place + n * K + j, mask=n < TOKENS, other=0).to(tl.int64)
    total = tl.zeros((TILE, ACROSS), tl.float32)
    for first in range(0, WIDTH, ACROSS):
        m = first + tl.arange(0, ACROSS)
        inside = (n < TOKENS)[:, None] & (m < WIDTH)[None, :]
        a = tl.load(dout + n.to(tl.int64)[:, None] * WIDTH + m[None, :], mask=inside, other=0.0)
        b = tl.load(rows + r[:, None] * WIDTH + m[None, :], mask=inside, other=0.0)
        total += a.to(tl.float32) * b.to(tl.float32)
    tl.store(found + n * K + j, tl.sum(total, axis=1), mask=n < TOKENS)


def _call(kernel, *arrays: Array, out: jax.ShapeDtypeStruct, grid: tuple[int, int], **constants) -> Array:
    import jax_triton

    constants |= {"TILE": ROWS, "ACROSS": COLUMNS}
    return jax_triton.triton_call(*arrays, kernel=kernel, out_shape=out, grid=grid, num_warps=4, **constants)


def _tiles(rows: int, width: int) -> tuple[int, int]:
    return -(-rows // ROWS), -(-width // COLUMNS)


def _permuted(x: Array, order: Array, weights: Array, *, scaled: bool) -> Array:
    """[N k, M] for x [N, M], order [N k], weights [N, k] float32."""
    (R,), (N, M) = order.shape, x.shape
    sizes = {"N_ROWS": R, "WIDTH": M, "K": R // N, "SCALED": scaled}
    out = jax.ShapeDtypeStruct((R, M), x.dtype)
    return _call(permute_kernel, x, order, weights, out=out, grid=_tiles(R, M), **sizes)


def _combined(rows: Array, place: Array, weights: Array, *, scaled: bool) -> Array:
    """[N, M] for rows [N k, M], place [N, k], weights [N, k] float32."""
    (N, k), M = place.shape, rows.shape[1]
    sizes = {"TOKENS": N, "WIDTH": M, "K": k, "SCALED": scaled}
    out = jax.ShapeDtypeStruct((N, M), rows.dtype)
    return _call(combine_kernel, rows, place, weights, out=out, grid=_tiles(N, M), **sizes)


@jax.custom_vjp
def permute(x: Array, order: Array, place: Array) -> Array:
    """The rows of x [N, M] sorted by expert: [N k, M]; order [N k] and place [N, k] int32 undo each other."""
    return _permuted(x, order, jnp.ones(place.shape, jnp.float32), scaled=False)


def _permute_backward(kept: tuple, drows: Array) -> tuple:
    order, place = kept
    return _combined(drows, place, jnp.ones(place.shape, jnp.float32), scaled=False), _none(order), _none(place)


permute.defvjp(lambda x, order, place: (permute(x, order, place), (order, place)), _permute_backward)


@jax.custom_vjp
def combine(rows: Array, weights: Array, order: Array, place: Array) -> Array:
    """[N, M]: each token's rows, weighted by weights [N, k] float32 and added in float32."""
    return _combined(rows, place, weights, scaled=True)


def _combine_backward(kept: tuple, dout: Array) -> tuple:
    rows, weights, order, place = kept
    drows = _permuted(dout, order, weights, scaled=True)
    (N, k), M = place.shape, rows.shape[1]
    sizes, found = {"TOKENS": N, "WIDTH": M, "K": k}, jax.ShapeDtypeStruct((N, k), jnp.float32)
    dp = _call(shares_kernel, dout, rows, place, out=found, grid=(-(-N // ROWS), k), **sizes)
    return drows, dp, _none(order), _none(place)


combine.defvjp(lambda *kept: (combine(*kept), kept), _combine_backward)


def moe_mlp(x: Array, w_gate: Array, w_up: Array, w_down: Array, expert_ids: Array, expert_weights: Array) -> Array:
    """See `dantinox.kernels.moe_mlp`; arguments are checked there."""
    N, k = expert_ids.shape
    flat = expert_ids.reshape(-1).astype(jnp.int32)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(N * k, dtype=jnp.int32), unique_indices=True)
    sizes = jnp.sum(flat[:, None] == jnp.arange(w_gate.shape[0]), axis=0, dtype=jnp.int32)
    place = place.reshape(N, k)
    rows = permute(x, order, place)
    y = ragged_dot.experts(rows, w_gate, w_up, w_down, sizes)
    return combine(y, expert_weights.astype(jnp.float32), order, place)


def _none(ids: Array) -> np.ndarray:
    return np.zeros(ids.shape, jax.dtypes.float0)
