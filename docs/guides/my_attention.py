"""Flash attention with its backward pass: Pallas kernels for TPUs, interpreted on a CPU.

One program handles one tile of 128 queries and one of 128 keys of one head. The last axis of the grid goes over the
tiles that the mask lets through, so scratch memory carries the running softmax from one to the next. The backward pass
computes the probabilities again, from the scores and from their log-sum-exp: one kernel for dq, one for dk and dv.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dantinox.kernels.dispatch import current_device
from dantinox.kernels.precision import matmul_precision
from dantinox.kernels.vma import call_invariant, varying_shape

Array = jax.Array
TILE = 128
M_INIT = -1e30  # finite, so that exp(-inf - M_INIT) is 0 while a row has seen no key
NT, NN, TN = ((1,), (1,)), ((1,), (0,)), ((0,), (0,))  # a b^T, a b, a^T b


def attention(q, k, v, *, gate, causal, window, scale, softcap, segment_ids, return_lse=False):
    """See `dantinox.kernels.attention`, which has checked the arguments."""
    if current_device().platform == "gpu" or q.dtype == jnp.float64:
        raise NotImplementedError("my attention runs on TPU and CPU, and not in float64")
    dtype, (T, S) = q.dtype, (q.shape[1], k.shape[1])
    if S == 0:
        return (jnp.zeros_like(q), jnp.full(q.shape[:3], -jnp.inf)) if return_lse else jnp.zeros_like(q)
    problem = Problem(T, S, causal, window, scale, softcap)
    if window is not None or segment_ids is not None:  # keys that no query sees may hold NaN, and 0 * NaN is NaN
        seen = jnp.any(problem.visible((T, S), 0, 0, *segment_tables(segment_ids)), axis=-2)[..., None, None]
        k, v = jnp.where(seen, k, 0), jnp.where(seen, v, 0)
    if dtype == jnp.float16:  # a TPU does not multiply it
        q, k, v, gate = jax.tree.map(lambda x: x.astype(jnp.float32), (q, k, v, gate))
    q, k, v, gate = jax.tree.map(heads_first, (q, k, v, gate))
    o, lse = gated(problem, q, k, v, gate, segment_ids)
    o = heads_first(o).astype(dtype)
    return (o, heads_first(jnp.where(lse > M_INIT, lse, -jnp.inf))[..., 0]) if return_lse else o


def heads_first(x: Array) -> Array:
    """[B, T, H, D] -> [B, H, T, D] and back: the two axes of a tile must be the last ones."""
    return x.swapaxes(1, 2)


def segment_tables(ids: Any) -> tuple[Array, ...]:
    """Ids of queries as columns [B, T, 1] and of keys as rows [B, 1, S]."""
    return () if ids is None else (ids[0][:, :, None], ids[1][:, None, :])


class Problem(NamedTuple):
    """What is known before a kernel runs. Query t is at position S - T + t of the keys."""

    T: int
    S: int
    causal: bool
    window: int | None
    scale: float
    softcap: float | None

    def visible(self, shape: tuple[int, int], i: Any, j: Any, q_ids: Any = None, kv_ids: Any = None) -> Array:
        """Whether each query of tile i sees each key of tile j."""
        query = self.S - self.T + i * TILE + iota(shape, 0)
        key = j * TILE + iota(shape, 1)
        mask = (query < self.S) & (key < self.S)  # neither is padding
        if self.causal:
            mask &= key <= query
        if self.window is not None:
            mask &= query - key < self.window
        return mask if q_ids is None else mask & (q_ids == kv_ids)

    def key_tiles(self, i: Any) -> tuple[Any, Any]:
        """First and last tile of keys that a tile of queries sees; none if the last is before the first."""
        query = self.S - self.T + i * TILE
        first = 0 if self.window is None else query - self.window + 1
        last = query + TILE - 1 if self.causal else self.S - 1
        return jnp.maximum(first, 0) // TILE, jnp.minimum(last, self.S - 1) // TILE

    def query_tiles(self, j: Any) -> tuple[Any, Any]:
        """First and last tile of queries that see a tile of keys."""
        query = self.T - self.S + j * TILE  # the one at the position of the first key
        first = query if self.causal else 0
        last = self.T - 1 if self.window is None else query + TILE + self.window - 2
        return jnp.maximum(first, 0) // TILE, jnp.minimum(last, self.T - 1) // TILE

    def steps(self, length: int) -> int:
        """Most tiles of this many queries or keys that one tile of the others sees."""
        tiles = pl.cdiv(length, TILE)
        return tiles if self.window is None else min(tiles, pl.cdiv(TILE + self.window - 2, TILE) + 1)

    def scores(self, q: Array, k: Array) -> Array:
        """Scaled and capped scores of two tiles."""
        s = dot(q, k, NT) * self.scale
        return s if self.softcap is None else self.softcap * jnp.tanh(s / self.softcap)


def iota(shape: tuple[int, ...], axis: int) -> Array:
    """0, 1, 2, ... along an axis."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def dot(a: Array, b: Array, contract: Any) -> Array:
    """Multiply two tiles in their own dtype and accumulate in float32."""
    dims = (contract, ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=matmul_precision(a, b), preferred_element_type=jnp.float32)


def zero_padding(x: Array, rows_left: Any) -> Array:
    """Zero the rows of a tile that are past the end of the array."""
    return jnp.where(iota((TILE, 1), 0) < rows_left, x, 0)


# Forward


def forward_kernel(q_ref, k_ref, v_ref, *refs, problem):
    """One tile of queries against one tile of keys."""
    *ids, o_ref, lse_ref, m_ref, l_ref, acc_ref = refs
    i, step = pl.program_id(2), pl.program_id(3)
    first, last = problem.key_tiles(i)
    j = first + step

    @pl.when(step == 0)
    def init():
        m_ref[...] = jnp.full(m_ref.shape, M_INIT, jnp.float32)
        l_ref[...] = jnp.zeros_like(l_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    @pl.when(j <= last)
    def add_tile():
        mask = problem.visible((TILE, TILE), i, j, *(ref[...] for ref in ids))
        s = jnp.where(mask, problem.scores(q_ref[...], k_ref[...]), -jnp.inf)
        m = jnp.maximum(m_ref[...], jnp.max(s, axis=1, keepdims=True))
        p = jnp.exp(s - m)
        decay = jnp.exp(m_ref[...] - m)
        m_ref[...] = m
        l_ref[...] = decay * l_ref[...] + jnp.sum(p, axis=1, keepdims=True)
        v = zero_padding(v_ref[...], problem.S - j * TILE)
        acc_ref[...] = decay * acc_ref[...] + dot(p.astype(v.dtype), v, NN)

    @pl.when(step == pl.num_programs(3) - 1)
    def write():
        l = jnp.where(l_ref[...] == 0, 1, l_ref[...])  # a query that sees no key gives zeros
        o_ref[...] = (acc_ref[...] / l).astype(o_ref.dtype)
        lse_ref[...] = m_ref[...] + jnp.log(l)


def forward(problem: Problem, q: Array, k: Array, v: Array, ids: Any) -> tuple[Array, Array]:
    """Output without the gate [B, H, T, D], and the log-sum-exp of the scores [B, H, T, 1]."""
    (B, H, T, D), K, S = q.shape, k.shape[1], problem.S

    def key_tile(i, step):
        first, last = problem.key_tiles(i)
        return jnp.clip(first + step, 0, jnp.clip(last, 0))  # tiles that are skipped are not loaded

    rows = lambda n: pl.BlockSpec((None, None, TILE, n), lambda b, h, i, step: (b, h, i, 0))
    keys = pl.BlockSpec((None, None, TILE, D), lambda b, h, i, step: (b, h // (H // K), key_tile(i, step), 0))
    id_specs = [
        pl.BlockSpec((None, TILE, 1), lambda b, h, i, step: (b, i, 0)),
        pl.BlockSpec((None, 1, TILE), lambda b, h, i, step: (b, 0, key_tile(i, step))),
    ]
    tables = segment_tables(ids)
    call = pl.pallas_call(
        functools.partial(forward_kernel, problem=problem),
        out_shape=[varying_shape(q.shape, q.dtype), varying_shape((B, H, T, 1), jnp.float32)],
        grid=(B, H, pl.cdiv(T, TILE), problem.steps(S)),
        in_specs=[rows(D), keys, keys, *id_specs[: len(tables)]],
        out_specs=[rows(D), rows(1)],
        scratch_shapes=[pltpu.VMEM((TILE, n), jnp.float32) for n in (1, 1, D)],
        interpret=current_device().platform == "cpu",
        name="my_attention",
    )
    return call_invariant(call, q, k, v, *tables)  # also under `shard_map`


# Backward


def recompute(problem, mask, q, k, v, do, lse, delta):
    """The probabilities p of two tiles, and the gradient of the scores before the scale and the cap."""
    s = problem.scores(q, k)
    p = jnp.where(mask, jnp.exp(s - lse), 0)
    ds = p * (dot(do, v, NT) - delta)
    if problem.softcap is not None:
        ds *= 1 - (s / problem.softcap) ** 2  # tanh' = 1 - tanh^2
    return p, jnp.where(mask, ds, 0)


def dq_kernel(q_ref, do_ref, lse_ref, delta_ref, k_ref, v_ref, *refs, problem):
    """The tiles of the forward kernel, in its order."""
    *ids, dq_ref, acc_ref = refs
    i, step = pl.program_id(2), pl.program_id(3)
    first, last = problem.key_tiles(i)
    j = first + step

    @pl.when(step == 0)
    def init():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    @pl.when(j <= last)
    def add_tile():
        k, v = (zero_padding(ref[...], problem.S - j * TILE) for ref in (k_ref, v_ref))
        mask = problem.visible((TILE, TILE), i, j, *(ref[...] for ref in ids))
        _, ds = recompute(problem, mask, q_ref[...], k, v, do_ref[...], lse_ref[...], delta_ref[...])
        acc_ref[...] += dot(ds.astype(k.dtype), k, NN)

    @pl.when(step == pl.num_programs(3) - 1)
    def write():
        dq_ref[...] = (acc_ref[...] * problem.scale).astype(dq_ref.dtype)


def dkv_kernel(q_ref, do_ref, lse_ref, delta_ref, k_ref, v_ref, *refs, problem):
    """One tile of keys against the tiles of queries that see it, of every head of the group."""
    *ids, dk_ref, dv_ref, dk_acc_ref, dv_acc_ref = refs
    j, g, step = pl.program_id(2), pl.program_id(3), pl.program_id(4)
    first, last = problem.query_tiles(j)
    i = first + step

    @pl.when((g == 0) & (step == 0))
    def init():
        dk_acc_ref[...] = jnp.zeros_like(dk_acc_ref)
        dv_acc_ref[...] = jnp.zeros_like(dv_acc_ref)

    @pl.when(i <= last)
    def add_tile():
        q, do = (zero_padding(ref[...], problem.T - i * TILE) for ref in (q_ref, do_ref))
        mask = problem.visible((TILE, TILE), i, j, *(ref[...] for ref in ids))
        p, ds = recompute(problem, mask, q, k_ref[...], v_ref[...], do, lse_ref[...], delta_ref[...])
        dk_acc_ref[...] += dot(ds.astype(q.dtype), q, TN)
        dv_acc_ref[...] += dot(p.astype(do.dtype), do, TN)

    @pl.when((g == pl.num_programs(3) - 1) & (step == pl.num_programs(4) - 1))
    def write():
        dk_ref[...] = (dk_acc_ref[...] * problem.scale).astype(dk_ref.dtype)
        dv_ref[...] = dv_acc_ref[...].astype(dv_ref.dtype)


def backward(problem: Problem, q: Array, k: Array, v: Array, ids: Any, o: Array, lse: Array, do: Array, dlse: Array):
    """dq, dk and dv, from the gradients of the output without the gate and of the log-sum-exp."""
    (B, H, T, D), (_, K, S, _) = q.shape, k.shape
    G, tables = H // K, segment_tables(ids)
    # Both reach a score by way of its weight: ds = p (dp - delta + dlse).
    delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1, keepdims=True) - dlse
    inputs = (q, do, lse, delta, k, v, *tables)

    def call(kernel, grid, index, outputs):
        """`index` maps a place in the grid to (batch, head, tile of queries, head of the keys, tile of keys)."""

        def spec(shape, *axes):
            return pl.BlockSpec(shape, lambda *place: tuple(0 if a is None else index(*place)[a] for a in axes))

        rows = lambda n: spec((None, None, TILE, n), 0, 1, 2, None)
        keys = spec((None, None, TILE, D), 0, 3, 4, None)
        id_specs = [spec((None, TILE, 1), 0, 2, None), spec((None, 1, TILE), 0, None, 4)][: len(tables)]
        backward = pl.pallas_call(
            functools.partial(kernel, problem=problem),
            out_shape=[varying_shape(x.shape, x.dtype) for x in outputs],
            grid=grid,
            in_specs=[rows(D), rows(D), rows(1), rows(1), keys, keys, *id_specs],
            out_specs=[rows(D)] if outputs[0] is q else [keys, keys],
            scratch_shapes=[pltpu.VMEM((TILE, D), jnp.float32)] * len(outputs),
            interpret=current_device().platform == "cpu",
            name="my_attention_backward",
        )
        return call_invariant(backward, *inputs)

    def dq_index(b, h, i, step):
        first, last = problem.key_tiles(i)
        return b, h, i, h // G, jnp.clip(first + step, 0, jnp.clip(last, 0))

    def dkv_index(b, h, j, g, step):
        first, last = problem.query_tiles(j)
        return b, h * G + g, jnp.clip(first + step, 0, jnp.clip(last, 0)), h, j

    (dq,) = call(dq_kernel, (B, H, pl.cdiv(T, TILE), problem.steps(S)), dq_index, [q])
    dk, dv = call(dkv_kernel, (B, K, pl.cdiv(S, TILE), G, problem.steps(T)), dkv_index, [k, v])
    return dq, dk, dv


# The gate, and the derivative


def apply_gate(o: Array, gate: Array | None) -> Array:
    """The output, or its gradient, times the sigmoid of the gate."""
    return o if gate is None else (o * jax.nn.sigmoid(gate.astype(jnp.float32))).astype(o.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gated(problem, q, k, v, gate, ids):
    """Attention of arrays with the heads first, and the log-sum-exp; M_INIT where a query sees no key."""
    return gated_forward(problem, q, k, v, gate, ids)[0]


def gated_forward(problem, q, k, v, gate, ids):
    """What the backward pass needs is the output without the gate, and the log-sum-exp."""
    o, lse = forward(problem, q, k, v, ids)
    return (apply_gate(o, gate), lse), (q, k, v, gate, ids, o, lse)


def gated_backward(problem, residuals, cotangents):
    """Gradients of q, k, v and the gate; the ids have none."""
    q, k, v, gate, ids, o, lse = residuals
    do, dlse = cotangents
    dgate = None
    if gate is not None:
        x = gate.astype(jnp.float32)
        dgate = do.astype(jnp.float32) * o.astype(jnp.float32) * jax.nn.sigmoid(x) * jax.nn.sigmoid(-x)
        if gate.shape[-1] == 1:
            dgate = jnp.sum(dgate, axis=-1, keepdims=True)
        dgate = dgate.astype(gate.dtype)
    dq, dk, dv = backward(problem, q, k, v, ids, o, lse, apply_gate(do, gate), dlse)
    return dq, dk, dv, dgate, None


gated.defvjp(gated_forward, gated_backward)
