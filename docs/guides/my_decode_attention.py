"""Decode attention: one Pallas kernel for TPUs, interpreted on a CPU, that appends to the cache and attends.

The cache of a sequence is a ring of C slots in blocks of 128. The kernel starts at the block of the new token and goes
back, around the end of the ring, to the block of the oldest token that the query sees; it does not load the others. The
new cache has the memory of the old one, and the kernel writes one block of it per sequence.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dantinox.kernels.dispatch import current_device
from dantinox.kernels.precision import matmul_precision
from dantinox.kernels.vma import call_invariant, varying_shape

Array = jax.Array
M_INIT = -1e30  # a score without a weight; finite, so that exp(-inf - M_INIT) is 0 before any token
NT, NN = ((2,), (2,)), ((2,), (1,))  # a b^T and a b, of every head


def decode_attention(q, k, v, cache, *, gate, window, scale, softcap, sinks=None):
    """See `dantinox.kernels.decode_attention`, which has checked the arguments."""
    if q.ndim == 4:
        raise NotImplementedError("my decode attention takes one new token per sequence")
    if current_device().platform == "gpu" or q.dtype == jnp.float64:
        raise NotImplementedError("my decode attention runs on TPU and CPU, and not in float64")
    if (cache.k.dtype, cache.v.dtype) != (q.dtype, q.dtype):
        raise NotImplementedError(f"my cache is {q.dtype} as q is; this one is {cache.k.dtype} and {cache.v.dtype}")
    (B, H, D), (_, K, C, _) = q.shape, cache.k.shape
    if 0 in q.shape:
        slot = (jnp.arange(C) == (cache.length % C)[:, None])[:, None, :, None]
        k, v = (jnp.where(slot, new[:, :, None], old) for new, old in ((k, cache.k), (v, cache.v)))
        return jnp.zeros_like(q), cache._replace(k=k, v=v, length=cache.length + 1)
    G, size = H // K, min(C, 128)
    blocks = pl.cdiv(C, size)

    # Tables in scalar memory: slot of the new token, number of tokens that the query sees, number of their blocks.
    newest = cache.length % C
    visible = jnp.minimum(cache.length + 1, C if window is None else min(C, window))
    oldest = (newest - visible + 1) % C
    count = newest // size - oldest // size + 1
    count = jnp.minimum(jnp.where(oldest > newest, count + blocks, count), blocks)
    steps = blocks if window is None else min(blocks, pl.cdiv(window, size) + 2)

    def new_block(b, step, newest, visible, count):
        return b, 0, newest[b] // size, 0

    def block(b, step, newest, visible, count):  # blocks that are skipped are not loaded
        return b, 0, block_of(jnp.minimum(step, count[b] - 1), newest[b], size, blocks), 0

    token = lambda rows, columns: pl.BlockSpec((None, K, rows, columns), lambda b, *_: (b, 0, 0, 0))
    inputs, in_specs = [q.reshape(B, K, G, D), k[:, :, None], v[:, :, None]], [token(G, D), token(1, D), token(1, D)]
    if gate is not None:
        inputs, in_specs = [*inputs, gate.reshape(B, K, G, -1)], [*in_specs, token(G, gate.shape[-1])]
    # A sink is one more key, which the softmax begins with; without sinks it has no weight.
    first_score = jnp.full(H, M_INIT) if sinks is None else jnp.maximum(sinks, M_INIT)
    inputs.append(first_score.astype(jnp.float32).reshape(K, G, 1))
    in_specs.append(pl.BlockSpec((K, G, 1), lambda b, *_: (0, 0, 0)))
    call = pl.pallas_call(
        functools.partial(kernel, C=C, size=size, blocks=blocks, scale=scale, softcap=softcap),
        out_shape=[varying_shape(x.shape, x.dtype) for x in (inputs[0], cache.k, cache.v)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, steps),
            in_specs=[*in_specs, pl.BlockSpec((None, K, size, D), block), pl.BlockSpec((None, K, size, D), block)],
            out_specs=[token(G, D), *[pl.BlockSpec((None, K, size, D), new_block)] * 2],
            scratch_shapes=[pltpu.VMEM((K, G, n), jnp.float32) for n in (1, 1, D)],
        ),
        input_output_aliases={3 + len(inputs): 1, 4 + len(inputs): 2},  # input: output; the tables are inputs
        interpret=current_device().platform == "cpu",
        name="my_decode_attention",
    )
    arrays = (newest, visible, count, *inputs, cache.k, cache.v)
    o, new_k, new_v = call_invariant(call, *arrays)  # also under `shard_map`
    return o.reshape(B, H, D), cache._replace(k=new_k, v=new_v, length=cache.length + 1)


def block_of(step: Any, newest: Any, size: int, blocks: int) -> Any:
    """Block of slots of a step: that of the new token, the one before it, and around the end of the ring."""
    block = newest // size - step
    return jnp.where(block < 0, block + blocks, block)


def dot(a: Array, b: Array, contract: Any) -> Array:
    """Multiply the tiles of every head, in float32 if they are float16; accumulate in float32."""
    a, b = (x.astype(jnp.float32) if x.dtype == jnp.float16 else x for x in (a, b))
    dims = (contract, ((0,), (0,)))
    return jax.lax.dot_general(a, b, dims, precision=matmul_precision(a, b), preferred_element_type=jnp.float32)


def kernel(newest_ref, visible_ref, count_ref, q_ref, k_new_ref, v_new_ref, *refs, C, size, blocks, scale, softcap):
    """One block of slots of one sequence, of all heads."""
    *gate_ref, sink_ref, k_ref, v_ref, o_ref, k_out_ref, v_out_ref, m_ref, l_ref, acc_ref = refs
    b, step = pl.program_id(0), pl.program_id(1)
    newest, visible = newest_ref[b], visible_ref[b]
    first = block_of(step, newest, size, blocks) * size

    def slots(shape, axis):
        return first + jax.lax.broadcasted_iota(jnp.int32, shape, axis)

    def is_visible(slot):
        age = jnp.where(slot <= newest, newest - slot, newest - slot + C)
        return (age < visible) & (slot < C)

    @pl.when(step == 0)
    def init():
        m_ref[...] = sink_ref[...]
        l_ref[...] = jnp.ones_like(l_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    @pl.when(step < count_ref[b])
    def add_block():
        slot = slots((1, size, 1), 1)
        k = jnp.where(slot == newest, k_new_ref[...], k_ref[...])
        v = jnp.where(slot == newest, v_new_ref[...], v_ref[...])

        @pl.when(step == 0)
        def append():
            k_out_ref[...] = k
            v_out_ref[...] = v

        s = dot(q_ref[...], k, NT) * scale
        if softcap is not None:
            s = softcap * jnp.tanh(s / softcap)
        s = jnp.where(is_visible(slots((1, 1, size), 2)), s, -jnp.inf)
        m = jnp.maximum(m_ref[...], jnp.max(s, axis=2, keepdims=True))
        p = jnp.exp(s - m)
        decay = jnp.exp(m_ref[...] - m)
        m_ref[...] = m
        l_ref[...] = decay * l_ref[...] + jnp.sum(p, axis=2, keepdims=True)
        v = jnp.where(is_visible(slot), v, 0)  # the other slots may hold NaN, and 0 * NaN is NaN
        acc_ref[...] = decay * acc_ref[...] + dot(p.astype(v.dtype), v, NN)

    @pl.when(step == pl.num_programs(1) - 1)
    def write():
        o = acc_ref[...] / l_ref[...]
        if gate_ref:
            o *= jax.nn.sigmoid(gate_ref[0][...].astype(jnp.float32))
        o_ref[...] = o.astype(o_ref.dtype)
