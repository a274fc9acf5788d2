"""Grouped matmul in Triton with its backward pass, for NVIDIA GPUs.

Math      y[n] = x[n] w[e] for the rows n of group e, and 0 for the rows past the last group.
          dx[n] = dy[n] w[e]^T, the same kernel with the strides of w exchanged; dw[e] = sum over n of x[n]^T dy[n].
Tiling    y and dx: grid (tiles of columns, tiles of rows). Tiles of rows start where their group starts, so that each
          has rows of one group; the last tile of a group is partial. The sizes are known on the device only, so the
          grid has as many tiles as any sizes can need, and the last ones may have no rows:

              groups    |   0   | 1|       2       |  past  |
              tiles     |  0 | 1|2 |  3 |  4 |  5  | 6 |  7 | 8 ░
                                                       zeros  no rows

          dw: grid (groups, tiles of M, tiles of F). A program adds up the rows of its group, tile after tile.
State     a tile of float32 sums.
Traffic   a tile of 64 x 64 sums reads 64 rows of x and 64 columns of w: 32 FLOPs per byte in bfloat16. Programs of one
          tile of rows run one after the other and find the rows in L2. 2 N M F FLOPs each for y, dx and dw.
Limits    float32, bfloat16, float16; N up to 4 million, because of CUDA's grids. Rows past the sum and matrices of
          empty groups are not read.
Source    Gale et al., MegaBlocks (arXiv:2211.15841).
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from dantinox.kernels.dispatch import triton_unsupported_device
from dantinox.kernels.vma import call_invariant

TILE = 64  # rows and columns of a tile of sums
DEPTH = 32  # summands per step


def grouped_matmul(x, w, group_sizes):
    """See `dantinox.kernels.grouped_matmul`, which has checked the arguments."""
    if reason := triton_unsupported_device():
        raise NotImplementedError(reason)
    if x.dtype == jnp.float64:
        raise NotImplementedError("my Triton grouped matmul takes no float64")
    return product(x, w, group_sizes)


@jax.custom_vjp
def product(x, w, group_sizes):
    """Grouped matmul with a derivative."""
    return call_invariant(multiply_rows, x, w, group_sizes)


def product_forward(x, w, group_sizes):
    """The backward pass needs the inputs only."""
    return product(x, w, group_sizes), (x, w, group_sizes)


def product_backward(inputs, dy):
    """The kernel of dx reads w transposed where it is."""
    x, w, group_sizes = inputs
    dx = call_invariant(multiply_rows, dy, w, group_sizes, transposed=True)
    return dx, call_invariant(multiply_columns, x, dy, group_sizes), None


product.defvjp(product_forward, product_backward)


def call(kernel, *arrays, out, grid, **constants):
    """Call a kernel with the sizes of a tile. PTX 8.7 is what assemblers of CUDA 12.8 and newer read."""
    import jax_triton

    constants |= {"TILE_SIZE": TILE, "TILE_DEPTH": DEPTH}
    options = {"ptx_version": 87, "enable_fp_fusion": True}
    return jax_triton.triton_call(
        *arrays, kernel=kernel, out_type=out, grid=grid, num_warps=4, backend_options=options, **constants
    )


def multiply_rows(x, w, group_sizes, *, transposed=False):
    """y[n] = x[n] w[group of n], or x[n] w[group of n]^T, and zero past the last group."""
    (N, M), (E, rows, columns) = x.shape, w.shape
    F, strides = (rows, (1, columns)) if transposed else (columns, (columns, 1))
    # Tables: the first row, the end and the group of each tile. Rows past the last group are group E.
    sizes = jnp.append(group_sizes, N - jnp.sum(group_sizes)).astype(jnp.int32)
    ends, count = jnp.cumsum(sizes), -(-sizes // TILE)
    first_tile = jnp.cumsum(count) - count
    tile = jnp.arange(N // TILE + E + 1, dtype=jnp.int32)
    group = jnp.sum(first_tile[1:] <= tile[:, None], axis=1, dtype=jnp.int32)
    start = (ends - sizes)[group] + (tile - first_tile[group]) * TILE
    return call(
        rows_kernel,
        x,
        w,
        start,
        ends[group],
        group,
        out=jax.ShapeDtypeStruct((N, F), x.dtype),
        grid=(triton.cdiv(F, TILE), tile.size),
        M=M,
        F=F,
        E=E,
        W_M=strides[0],
        W_F=strides[1],
    )


def multiply_columns(x, dy, group_sizes):
    """dw[e] = x^T dy over the rows of group e; zero for an empty group."""
    M, F, E = x.shape[1], dy.shape[1], group_sizes.size
    ends = jnp.cumsum(group_sizes).astype(jnp.int32)
    out = jax.ShapeDtypeStruct((E, M, F), x.dtype)
    grid = (triton.cdiv(F, TILE), triton.cdiv(M, TILE), E)
    return call(columns_kernel, x, dy, group_sizes, ends, out=out, grid=grid, M=M, F=F)


@triton.jit
def rows_kernel(
    x,
    w,
    start,
    end,
    group,
    M: tl.constexpr,
    F: tl.constexpr,
    E: tl.constexpr,
    W_M: tl.constexpr,  # strides of w
    W_F: tl.constexpr,
    TILE_SIZE: tl.constexpr,
    TILE_DEPTH: tl.constexpr,
    y,
):
    """One tile of y: up to 64 rows of one group."""
    f = tl.program_id(0) * TILE_SIZE + tl.arange(0, TILE_SIZE)
    t = tl.program_id(1)
    e = tl.load(group + t)
    n = tl.load(start + t) + tl.arange(0, TILE_SIZE)
    in_group = n < tl.load(end + t)
    row = n.to(tl.int64)[:, None]
    summands = tl.where(e < E, M, 0)  # rows past the last group are not read, and get zeros
    acc = tl.zeros((TILE_SIZE, TILE_SIZE), tl.float32)
    for first in range(0, summands, TILE_DEPTH):
        m = first + tl.arange(0, TILE_DEPTH)
        x_tile = tl.load(x + row * M + m[None, :], mask=in_group[:, None] & (m < M)[None, :], other=0.0)
        w_rows = w + e.to(tl.int64) * M * F + m[:, None] * W_M
        w_tile = tl.load(w_rows + f[None, :] * W_F, mask=(m < M)[:, None] & (f < F)[None, :], other=0.0)
        acc = tl.dot(x_tile, w_tile, acc, input_precision="tf32x3")
    tl.store(y + row * F + f[None, :], acc.to(y.dtype.element_ty), mask=in_group[:, None] & (f < F)[None, :])


@triton.jit
def columns_kernel(
    x,
    dy,
    sizes,
    ends,
    M: tl.constexpr,
    F: tl.constexpr,
    TILE_SIZE: tl.constexpr,
    TILE_DEPTH: tl.constexpr,
    dw,
):
    """One tile of dw, summed over the rows of its group in their order: two runs are bit-equal."""
    f = tl.program_id(0) * TILE_SIZE + tl.arange(0, TILE_SIZE)
    m = tl.program_id(1) * TILE_SIZE + tl.arange(0, TILE_SIZE)
    e = tl.program_id(2)
    end = tl.load(ends + e)
    acc = tl.zeros((TILE_SIZE, TILE_SIZE), tl.float32)
    for first in range(end - tl.load(sizes + e), end, TILE_DEPTH):
        n = first + tl.arange(0, TILE_DEPTH)
        in_group = (n < end)[:, None]  # other rows may hold NaN
        row = n.to(tl.int64)[:, None]
        x_tile = tl.load(x + row * M + m[None, :], mask=in_group & (m < M)[None, :], other=0.0)
        dy_tile = tl.load(dy + row * F + f[None, :], mask=in_group & (f < F)[None, :], other=0.0)
        acc = tl.dot(tl.trans(x_tile), dy_tile, acc, input_precision="tf32x3")
    out = dw + (e.to(tl.int64) * M + m[:, None]) * F + f[None, :]
    tl.store(out, acc.to(dw.dtype.element_ty), mask=(m < M)[:, None] & (f < F)[None, :])
