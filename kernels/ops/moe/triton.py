"""The mixture of experts on an NVIDIA GPU: Triton kernels move the rows, XLA computes the products.

Math      permute              rows[r] = s[r] x[token of r]: the tokens' rows, sorted by expert; s is 1, or the
                               router's weight
          combine              out[n] = sum_j p[n, j] y[inverse[n, j]]: back in the tokens' order, weighted; p is 1, or
                               the router's weights
          router_weight_grad   dp[n, j] = <dout[n], y[inverse[n, j]]>
          Each is the derivative of another: of permute (s = 1) it is combine (p = 1), of combine it is permute (s = p)
          and router_weight_grad.
Tiling    permute: grid (tiles of sorted rows, tiles of columns); combine: (tiles of tokens, tiles of columns);
          router_weight_grad: (tiles of tokens, choices).

              tokens    0 1 2 3          a program gathers rows from anywhere and writes
              rows      2 0 2 1 0 3      one full tile of its own: no atomics
                        └e 0┘ └e 1 ..┘
State     the float32 sum of one tile of tokens; else none.
Traffic   permute reads and writes each sorted row once; combine reads them once and writes each token once, where a
          gather and a sum by XLA write the gathered rows in between. Few FLOPs: bound by memory bandwidth.
Limits    float32, bfloat16, float16 (computed in float32); NVIDIA, compute capability 8.0 and newer, with jax-triton.
          `dantinox.kernels.moe_mlp` raises the ValueErrors.
Source    Gale et al., MegaBlocks (arXiv:2211.15841), for permuting and unpermuting rows apart from their products.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from dantinox.kernels import dispatch, triton_call
from dantinox.kernels.ops.moe.biases import ExpertBiases
from dantinox.kernels.ops.moe.ragged_dot import ragged_dot_experts
from dantinox.kernels.ops.moe.routing import sort_by_expert
from dantinox.kernels.ops.moe.swiglu import Activation
from dantinox.kernels.ops.moe.wide import widen_float16

Array = jax.Array

BLOCK_M, BLOCK_N = 16, 256  # rows and columns per tile


@triton.jit
def permute_kernel(
    x,
    permutation,
    scale,
    N_ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    SCALED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    rows,
):
    """Compute rows[r] = x[permutation[r] // K], times scale[permutation[r]] if SCALED."""
    r = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    m = tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    routed_row = tl.load(permutation + r, mask=r < N_ROWS, other=0)
    in_bounds = (r < N_ROWS)[:, None] & (m < WIDTH)[None, :]
    value = tl.load(x + (routed_row // K).to(tl.int64)[:, None] * WIDTH + m[None, :], mask=in_bounds)
    if SCALED:
        s = tl.load(scale + routed_row, mask=r < N_ROWS, other=0.0)
        value = (value.to(tl.float32) * s[:, None]).to(rows.dtype.element_ty)
    tl.store(rows + r.to(tl.int64)[:, None] * WIDTH + m[None, :], value, mask=in_bounds)


@triton.jit
def combine_kernel(
    rows,
    inverse_permutation,
    weights,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    SCALED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    out,
):
    """Compute out[n] = sum_j rows[inverse_permutation[n, j]], times weights[n, j] if SCALED, in the order of j."""
    n = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    m = tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    in_bounds = (n < TOKENS)[:, None] & (m < WIDTH)[None, :]
    total = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
    for j in range(K):
        r = tl.load(inverse_permutation + n * K + j, mask=n < TOKENS, other=0).to(tl.int64)
        value = tl.load(rows + r[:, None] * WIDTH + m[None, :], mask=in_bounds, other=0.0).to(tl.float32)
        if SCALED:
            value = value * tl.load(weights + n * K + j, mask=n < TOKENS, other=0.0)[:, None]
        total += value
    tl.store(out + n.to(tl.int64)[:, None] * WIDTH + m[None, :], total.to(out.dtype.element_ty), mask=in_bounds)


@triton.jit
def router_weight_grad_kernel(
    dout,
    rows,
    inverse_permutation,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    dweights,
):
    """Compute dweights[n, j], the inner product of dout[n] and rows[inverse_permutation[n, j]]."""
    n = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    j = tl.program_id(1)
    r = tl.load(inverse_permutation + n * K + j, mask=n < TOKENS, other=0).to(tl.int64)
    total = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
    for first_column in range(0, WIDTH, TILE_COLUMNS):
        m = first_column + tl.arange(0, TILE_COLUMNS)
        in_bounds = (n < TOKENS)[:, None] & (m < WIDTH)[None, :]
        a = tl.load(dout + n.to(tl.int64)[:, None] * WIDTH + m[None, :], mask=in_bounds, other=0.0)
        b = tl.load(rows + r[:, None] * WIDTH + m[None, :], mask=in_bounds, other=0.0)
        total += a.to(tl.float32) * b.to(tl.float32)
    tl.store(dweights + n * K + j, tl.sum(total, axis=1), mask=n < TOKENS)


def call_triton(kernel, *arrays: Array, out: jax.ShapeDtypeStruct, grid: tuple[int, int], **constants) -> Array:
    """Call a Triton kernel with the tile sizes and `constants` as its compile-time constants."""
    capability = dispatch.compute_capability()
    assert capability is not None  # `dispatch.triton_unsupported_device` has seen it
    constants |= {"TILE_ROWS": BLOCK_M, "TILE_COLUMNS": BLOCK_N}
    name = f"moe_{kernel.__name__.removesuffix('_kernel')}"
    options = {"out_type": out, "grid": grid, "capability": capability, "name": name}
    return triton_call.call_triton(kernel, *arrays, **options, **constants)


def launch_grid(rows: int, width: int) -> tuple[int, int]:
    """Return the number of tiles along the rows and along the columns."""
    return -(-rows // BLOCK_M), -(-width // BLOCK_N)


def call_permute(x: Array, permutation: Array, weights: Array, *, scaled: bool) -> Array:
    """Return [N k, M] for x [N, M], permutation [N k], weights [N, k] float32."""
    (R,), (N, M) = permutation.shape, x.shape
    sizes = {"N_ROWS": R, "WIDTH": M, "K": R // N, "SCALED": scaled}
    out = jax.ShapeDtypeStruct((R, M), x.dtype)
    return call_triton(permute_kernel, x, permutation, weights, out=out, grid=launch_grid(R, M), **sizes)


def call_combine(rows: Array, inverse_permutation: Array, weights: Array, *, scaled: bool) -> Array:
    """Return [N, M] for rows [N k, M], inverse_permutation [N, k], weights [N, k] float32."""
    (N, k), M = inverse_permutation.shape, rows.shape[1]
    sizes = {"TOKENS": N, "WIDTH": M, "K": k, "SCALED": scaled}
    out = jax.ShapeDtypeStruct((N, M), rows.dtype)
    return call_triton(combine_kernel, rows, inverse_permutation, weights, out=out, grid=launch_grid(N, M), **sizes)


@jax.custom_vjp
def permute(x: Array, permutation: Array, inverse_permutation: Array) -> Array:
    """Sort the rows of x [N, M] by expert: [N k, M]; permutation [N k] int32 and its inverse [N, k]."""
    return call_permute(x, permutation, jnp.ones(inverse_permutation.shape, jnp.float32), scaled=False)


def _permute_fwd(x: Array, permutation: Array, inverse_permutation: Array) -> tuple[Array, Array]:
    return permute(x, permutation, inverse_permutation), inverse_permutation


def _permute_bwd(inverse_permutation: Array, drows: Array) -> tuple:
    ones = jnp.ones(inverse_permutation.shape, jnp.float32)
    return call_combine(drows, inverse_permutation, ones, scaled=False), None, None


permute.defvjp(_permute_fwd, _permute_bwd)


@jax.custom_vjp
def combine(rows: Array, weights: Array, permutation: Array, inverse_permutation: Array) -> Array:
    """Sum each token's rows in float32, weighted by weights [N, k] float32: [N, M]."""
    return call_combine(rows, inverse_permutation, weights, scaled=True)


def _combine_fwd(*args: Array) -> tuple[Array, tuple]:
    return combine(*args), args


def _combine_bwd(residuals: tuple, dout: Array) -> tuple:
    rows, weights, permutation, inverse_permutation = residuals
    drows = call_permute(dout, permutation, weights, scaled=True)
    (N, k), M = inverse_permutation.shape, rows.shape[1]
    sizes, dweights = {"TOKENS": N, "WIDTH": M, "K": k}, jax.ShapeDtypeStruct((N, k), jnp.float32)
    grid = (-(-N // BLOCK_M), k)
    dweights = call_triton(router_weight_grad_kernel, dout, rows, inverse_permutation, out=dweights, grid=grid, **sizes)
    return drows, dweights, None, None


combine.defvjp(_combine_fwd, _combine_bwd)


@widen_float16
def moe_mlp(
    x: Array,
    w_gate: Array,
    w_up: Array,
    w_down: Array,
    expert_ids: Array,
    expert_weights: Array,
    *,
    b_gate: Array | None = None,
    b_up: Array | None = None,
    b_down: Array | None = None,
    activation: Activation = "swiglu",
) -> Array:
    """See `dantinox.kernels.moe_mlp`, which checks the arguments."""
    permutation, inverse_permutation, group_sizes = sort_by_expert(expert_ids, w_gate.shape[0])
    inverse_permutation = inverse_permutation.reshape(expert_ids.shape)
    rows = permute(x, permutation, inverse_permutation)
    biases = ExpertBiases(b_gate, b_up, b_down)
    y = ragged_dot_experts(rows, w_gate, w_up, w_down, group_sizes, biases, activation=activation)
    return combine(y, expert_weights.astype(jnp.float32), permutation, inverse_permutation)
