"""Step 1, read everything: XLA appends the new token, then a kernel attends to all slots of the cache.

Math      for each block of slots:  s = scale q k^T, -inf where not visible;  m' = max(m, max s);  p = exp(s - m')
          l = exp(m - m') l + sum p;  acc = exp(m - m') acc + p v;  m = m';      at the end o = acc / l
Tiling    grid (B, blocks of C). A grid step has the K heads of a block, and the G query heads of each as rows:

              slots ->      block  block  block  block
              sequence 0      ▞      ▞      ▞      ▞      ▞ loaded, computed, then masked; n has the new token too
              sequence 1      n      ▞      ▞      ▞

State     m and l [K, G, 1] and acc [K, G, D] in float32, from the first block of a sequence to its last.
Traffic   all C slots of k and v, whatever the length, for 4 H D FLOPs per slot, 2 G per element: memory is the limit.
          XLA writes the new token to its slot before the kernel starts, in place if the cache is donated.
Limits    float32, bfloat16; float16 only interpreted. Any B, H, K, D, C, length. Window, scale; NotImplementedError:
          gate, softcap, a cache of another dtype than q. ValueError: other shapes; a block not divisible by 16.
Source    Vaswani et al. (arXiv:1706.03762), equation 1, for one query; Shazeer (arXiv:1911.02150): its cost is memory.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dantinox.kernels.ops.decode_attention.kv_cache import KVCache, append_token
from dantinox.kernels.tutorial.decode_attention.common import M_INIT, NN, NT, check, dot, interpret, iota

Array = jax.Array


def decode_attention(
    q: Array,
    k: Array,
    v: Array,
    cache: KVCache,
    *,
    window: int | None = None,
    scale: float | None = None,
    block: int = 256,
    **unsupported: None,
) -> tuple[Array, KVCache]:
    """(o [B, H, D], the new cache), as `dantinox.kernels.decode_attention`: q [B, H, D], k and v [B, K, D]."""
    ring, scale = check(q, k, v, cache, window, scale, block, **unsupported)
    (B, H, D), K = q.shape, k.shape[1]
    newest, num_visible = ring.newest(cache.length)
    cache = append_token(cache, k, v)
    if 0 in q.shape:
        return jnp.zeros_like(q), cache
    scalars = pl.BlockSpec(memory_space=pltpu.SMEM)  # the whole array, in scalar memory
    q_spec = pl.BlockSpec((None, K, H // K, D), lambda b, j: (b, 0, 0, 0))
    kv_spec = pl.BlockSpec((None, K, block, D), lambda b, j: (b, 0, j, 0))
    kernel = pl.pallas_call(
        functools.partial(_kernel, ring=ring, scale=scale),
        out_shape=jax.ShapeDtypeStruct((B, K, H // K, D), q.dtype),
        grid=(B, ring.num_blocks),
        in_specs=[scalars, scalars, q_spec, kv_spec, kv_spec],
        out_specs=q_spec,
        scratch_shapes=[pltpu.VMEM((K, H // K, n), jnp.float32) for n in (1, 1, D)],
        interpret=interpret(),
        name="read_everything",
    )
    o = kernel(newest, num_visible, q.reshape(B, K, H // K, D), cache.k, cache.v)
    return o.reshape(B, H, D), cache


def _kernel(newest_ref, num_visible_ref, q_ref, k_ref, v_ref, o_ref, m_ref, l_ref, acc_ref, *, ring, scale):
    b, j = pl.program_id(0), pl.program_id(1)

    @pl.when(j == 0)
    def init_state() -> None:
        m_ref[...] = jnp.full(m_ref.shape, M_INIT, jnp.float32)
        l_ref[...] = jnp.zeros(l_ref.shape, jnp.float32)
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

    def visible(shape: tuple[int, ...], axis: int) -> Array:
        return ring.is_visible(j * ring.block + iota(shape, axis), newest_ref[b], num_visible_ref[b])

    s = dot(q_ref[...], k_ref[...], NT) * scale  # [K, G, block]
    s = jnp.where(visible((1, 1, ring.block), 2), s, -jnp.inf)
    m = jnp.maximum(jnp.max(s, axis=2, keepdims=True), m_ref[...])
    p = jnp.exp(s - m)
    decay = jnp.exp(m_ref[...] - m)  # rescales what was accumulated under a smaller maximum
    m_ref[...] = m
    l_ref[...] = decay * l_ref[...] + jnp.sum(p, axis=2, keepdims=True)
    v = jnp.where(visible((1, ring.block, 1), 1), v_ref[...], 0)  # unused slots may hold NaN, and 0 * NaN is NaN
    acc_ref[...] = decay * acc_ref[...] + dot(p.astype(v.dtype), v, NN)

    @pl.when(j == pl.num_programs(1) - 1)
    def epilogue() -> None:
        o_ref[...] = (acc_ref[...] / l_ref[...]).astype(o_ref.dtype)  # l > 0: a query sees its own token
