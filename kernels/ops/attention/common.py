"""Static parameters, results and block scores of the attention kernels of TPUs and CPUs.

A block has `block_q` queries of each of the G heads of one key head, packed to R = G block_q rows, against `block_kv`
keys. Blocks are transposed, with keys down and queries across. Arrays consist of subtiles: [B K, query
subtiles, n, rows] along the queries, [B K, key subtiles, keys, D] along the keys. On TPUs those with D numbers for each
query are [B K, G, T, D] instead.
"""

import math
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from dantinox.kernels.ops.attention.block_schedule import BlockSchedule, make_block_schedule
from dantinox.kernels.precision import matmul_precision
from dantinox.kernels.softcap import cap_scores

Array = jax.Array
M_INIT = float(jnp.finfo(jnp.float32).min)  # start of the running maximum: no finite score is below it
MASK_VALUE = -jnp.inf  # a masked score: exp(MASK_VALUE - M_INIT) is 0, so rows without a key keep a sum of 0
SMALL_SCALE = 2.0**-12  # no default of a head dim is as small
NO_OVERLAP, PARTIAL_OVERLAP, FULL_OVERLAP = 0, 1, 2  # pairs of a block that share a segment: none, some, all
NN, NT = ((1,), (0,)), ((1,), (1,))  # a b and a b^T


class BlockSizes(Protocol):
    """The sizes that determine the layout of the arrays: blocks and their subtiles."""

    @property
    def block_q(self) -> int:
        """Queries of each head per block."""
        ...

    @property
    def block_kv(self) -> int:
        """Keys per block."""
        ...

    def subtile(self, G: int) -> tuple[int, int]:
        """Return (packed queries, keys) of a subtile."""
        ...


class AttentionConfig[Sizes: BlockSizes](NamedTuple):
    """Static parameters of a kernel; T and S are the lengths without padding."""

    T: int
    S: int
    G: int
    causal: bool
    window: int | None
    scale: float
    softcap: float | None
    block_sizes: Sizes

    @property
    def num_subtiles(self) -> tuple[int, int]:
        """Subtiles of a block along the packed queries and along the keys."""
        rows, keys = self.block_sizes.subtile(self.G)
        return self.G * self.block_sizes.block_q // rows, self.block_sizes.block_kv // keys

    def block_schedule(self, kv_block_range: tuple[int, int] | None = None) -> BlockSchedule:
        """List the visible blocks of a range of key blocks, or of all of them; see `make_block_schedule`."""
        return make_block_schedule(
            self.T,
            self.S,
            self.block_sizes.block_q,
            self.block_sizes.block_kv,
            causal=self.causal,
            window=self.window,
            kv_block_range=kv_block_range,
        )


class SegmentTables(NamedTuple):
    """Segment ids in the layout of the kernels.

    Attributes:
        q_ids: [heads, query subtiles, 1, rows].
        kv_ids: [heads, key subtiles, 1, keys].
        overlap: [B, query blocks, key blocks]: NO_OVERLAP, PARTIAL_OVERLAP or FULL_OVERLAP.
    """

    q_ids: Array
    kv_ids: Array
    overlap: Array


class ForwardResult(NamedTuple):
    """Results of a forward kernel: `o`, and what the caller asks for.

    `m` and `inv_l` are the log-sum-exp of a row in two parts, because the rounding error of a single number would scale
    every p of the row.

    Attributes:
        o: output, as q.
        o_ungated: output before the gate, in the same shape.
        m: largest score of each row, as the kernel scales scores: [heads, query subtiles, 1, rows].
        inv_l: 1 / sum of each row's exponentials, 0 where the row sees no key; shaped as `m`.
    """

    o: Array
    o_ungated: Array | None = None
    m: Array | None = None
    inv_l: Array | None = None


class QKVGradients(NamedTuple):
    """Gradients in the kernels' layout: each as its argument."""

    dq: Array
    dk: Array
    dv: Array


def split_small_scale(q: Array, k: Array, scale: float) -> tuple[Array, Array, float]:
    """Move the power of two of a small scale into q and k, in equal parts and exactly; return them and the rest.

    Products of q and k then overflow only if the scores do. Those of float16 fit float32 in any case.
    """
    if scale == 0 or abs(scale) >= SMALL_SCALE or q.dtype == jnp.float16:
        return q, k, scale
    half = 2.0 ** (math.frexp(scale)[1] // 2)
    return q * half, k * half, scale / half / half


def with_equal_head_dims(q: Array, k: Array, v: Array, gate: Array | None) -> tuple[Array, Array, Array, Array | None]:
    """Append zeros to the narrower of (q, k) and (v, gate), for kernels that have one head dim."""
    D, Dv = q.shape[-1], v.shape[-1]

    def widen(x: Array) -> Array:
        missing = max(D, Dv) - x.shape[-1]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, missing))) if missing else x

    return widen(q), widen(k), widen(v), gate if gate is None or gate.shape[-1] != Dv else widen(gate)


def without_keys(q: Array, Dv: int, return_lse: bool) -> Array | tuple[Array, Array]:
    """Return the results of attention to no key: o [B, T, H, Dv] and, if requested, lse [B, T, H]."""
    o = jnp.broadcast_to(jnp.zeros_like(q[..., :1]), (*q.shape[:3], Dv))
    return (o, jnp.full_like(q[..., 0], -jnp.inf, jnp.float32)) if return_lse else o


def dot_per_head(a: Array, b: Array, contract: tuple[tuple[int], tuple[int]]) -> Array:
    """Compute a b in float32 over the last two axes; the axes before them are heads."""
    heads = tuple(range(a.ndim - 2))
    dims = tuple(tuple(axis + len(heads) for axis in side) for side in contract)
    precision = matmul_precision(a, b)
    return jax.lax.dot_general(a, b, (dims, (heads, heads)), precision=precision, preferred_element_type=jnp.float32)


def scale_scores(config: AttentionConfig, qk: Array, unit: float = 1.0) -> Array:
    """Compute unit * cap(scale * qk)."""
    if config.softcap is None:
        return qk * (config.scale * unit)
    return cap_scores(qk, scale=config.scale, softcap=config.softcap, unit=unit)


def visible_mask(
    config: AttentionConfig, shape: tuple[int, ...], q_block: Array, kv_block: Array, r: Array | int, c: Array | int
) -> Array:
    """Return the causal and sliding-window mask of a subtile, without keys past the last one.

    Args:
        config: static parameters of the kernel.
        shape: [..., keys, rows] of the subtile; keys may run past the block, into the next ones.
        q_block: index of the query block.
        kv_block: index of the key block.
        r: index of the subtile along the queries of the block.
        c: index of the subtile along the keys of the block.

    Returns:
        A mask that broadcasts to `shape`.
    """
    sizes, (rows, keys) = config.block_sizes, config.block_sizes.subtile(config.G)
    key = jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 2)
    row = jax.lax.broadcasted_iota(jnp.int32, (*shape[:-2], 1, shape[-1]), len(shape) - 1)
    q_minus_kv_start = q_block * sizes.block_q + config.S - config.T - kv_block * sizes.block_kv - c * keys
    if not config.causal:
        return key < config.S - kv_block * sizes.block_kv - c * keys
    distance = ((row + r * rows) & (sizes.block_q - 1)) + q_minus_kv_start - key
    if config.window is None:
        return distance >= 0
    # As an unsigned number, a negative distance is past every window.
    return distance.astype(jnp.uint32) < config.window
