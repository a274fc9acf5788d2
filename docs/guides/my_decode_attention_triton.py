"""Decode attention in Triton, for NVIDIA GPUs: one launch appends to the cache and attends.

Math      s = cap(scale q k^T), o = softmax(s) v over the visible tokens, by an online softmax;
          o *= sigmoid(gate), which XLA computes.
Tiling    grid (KV heads, sequences). A program goes from the oldest visible token to the new one, 64 per step (fewer in
          wide heads), around the end of the ring, and loads nothing else. C = 256, length 500, window 140:

              slots     0      64     128    192    256
              tokens    256 .. 320 .. 384 .. 448 .. 499, and 500 in slot 244
              steps     ░░░░░░░░░░░░░░|--1--|--2--|-3|░      3 ends with the new token

          It has the new token in registers, and its slot, which it writes, counts as not yet written when it loads.
State     maximum and sum of the weights [G], and the output [G, D], in float32.
Traffic   reads each visible key and value once, for the G = H / K query heads together; writes one slot of each ring.
          4 G FLOPs per element of the cache read: bound by memory bandwidth.
Limits    float32, bfloat16, float16, with a cache of q's dtype; D up to 256, G up to 64. One program per KV head and
          sequence fills a GPU only with many of them; Flash-Decoding splits the tokens between more.
Source    Dao, Flash-Decoding (2023).
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from dantinox.kernels.dispatch import triton_unsupported_device
from dantinox.kernels.ops.decode_attention.kv_cache import append_token
from dantinox.kernels.vma import call_invariant


def decode_attention(q, k, v, cache, *, gate, window, scale, softcap, sinks=None):
    """See `dantinox.kernels.decode_attention`, which has checked the arguments."""
    if q.ndim == 4:
        raise NotImplementedError("my decode attention takes one new token per sequence")
    if reason := triton_unsupported_device():
        raise NotImplementedError(reason)
    (_, H, D), K = q.shape, k.shape[1]
    if q.dtype == jnp.float64 or D > 256 or H // K > 64:
        raise NotImplementedError("my Triton decode attention takes no float64; D is at most 256, H / K at most 64")
    if (cache.k.dtype, cache.v.dtype) != (q.dtype, q.dtype):
        raise NotImplementedError(f"my cache is {q.dtype} as q is; this one is {cache.k.dtype} and {cache.v.dtype}")
    if 0 in q.shape:
        return jnp.zeros_like(q), append_token(cache, k, v)
    # A sink is one more key, which the softmax begins with; without sinks it has no weight.
    first_score = jnp.full(H, -1e30) if sinks is None else jnp.maximum(sinks, -1e30)
    arrays = q, k, v, *cache[:3], first_score.astype(jnp.float32)
    o, new_k, new_v = call_invariant(run, *arrays, window=window, scale=scale, softcap=softcap)
    if gate is not None:
        o *= jax.nn.sigmoid(gate.astype(jnp.float32))
    return o.astype(q.dtype), cache._replace(k=new_k, v=new_v, length=cache.length + 1)


def run(q, k, v, cache_k, cache_v, length, first_score, *, window, scale, softcap):
    """Attend without a gate -> (o [B, H, D] float32, the new keys, the new values)."""
    import jax_triton

    (B, H, D), (_, K, C, _) = q.shape, cache_k.shape
    g_tile = max(16, triton.next_power_of_2(H // K))  # tl.dot multiplies at least 16 rows
    d_tile = max(16, triton.next_power_of_2(D))
    new_k, new_v = jax.new_ref(cache_k), jax.new_ref(cache_v)  # the kernel writes to them in place
    o = jax_triton.triton_call(
        q,
        k.astype(q.dtype),
        v.astype(q.dtype),
        length,
        first_score,
        new_k,
        new_v,
        kernel=decode_kernel,
        out_type=jax.ShapeDtypeStruct(q.shape, jnp.float32),
        grid=(K, B),
        num_warps=8 if g_tile * d_tile > 2048 else 4,  # the registers hold [G, D] of output
        num_stages=2,  # two steps of keys and values fit the 99 KiB of shared memory of the smaller GPUs
        backend_options={"ptx_version": 87, "enable_fp_fusion": True},  # assemblers of CUDA 12.8 and newer read 8.7
        C=C,
        K=K,
        G=H // K,
        D=D,
        G_TILE=g_tile,
        D_TILE=d_tile,
        VISIBLE=C if window is None else min(C, window),
        SCALE=scale,
        CAP=softcap or 0.0,
        TILE_SIZE=max(16, min(64, 2**14 // (d_tile * q.dtype.itemsize))),  # tokens per step
    )
    return o, jax.freeze(new_k), jax.freeze(new_v)


@triton.jit
def decode_kernel(
    q,
    k,
    v,
    length,
    first_score,
    cache_k,
    cache_v,
    C: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    G_TILE: tl.constexpr,
    D_TILE: tl.constexpr,
    VISIBLE: tl.constexpr,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,  # 0: none
    TILE_SIZE: tl.constexpr,
    o,
):
    """All visible tokens of one sequence, for the query heads of one KV head."""
    head = tl.program_id(1) * K + tl.program_id(0)
    ring = head.to(tl.int64) * C * D
    g, d = tl.arange(0, G_TILE), tl.arange(0, D_TILE)
    heads = (head * G + g)[:, None] * D + d[None, :]
    in_heads = (g < G)[:, None] & (d < D)[None, :]
    q_tile = tl.load(q + heads, mask=in_heads, other=0.0)
    k_new = tl.load(k + head * D + d, mask=d < D, other=0.0)
    v_new = tl.load(v + head * D + d, mask=d < D, other=0.0)
    old_length = tl.load(length + tl.program_id(1))
    newest = old_length % C
    visible = tl.minimum(old_length + 1, VISIBLE)
    oldest = newest - visible + 1
    oldest = tl.where(oldest < 0, oldest + C, oldest)

    m = tl.load(first_score + tl.program_id(0) * G + g, mask=g < G, other=-1e30)
    l = tl.full((G_TILE,), 1.0, tl.float32)
    acc = tl.zeros((G_TILE, D_TILE), tl.float32)
    for first in range(0, visible, TILE_SIZE):
        token = first + tl.arange(0, TILE_SIZE)  # 0: the oldest; visible - 1: the new one
        slot = tl.where(oldest + token < C, oldest + token, oldest + token - C)
        slots = ring + slot.to(tl.int64)[:, None] * D + d[None, :]
        stored = (token < visible - 1)[:, None] & (d < D)[None, :]  # the other slots may hold NaN
        is_new = (token == visible - 1)[:, None]
        k_tile = tl.where(is_new, k_new[None, :], tl.load(cache_k + slots, mask=stored, other=0.0))
        v_tile = tl.where(is_new, v_new[None, :], tl.load(cache_v + slots, mask=stored, other=0.0))
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="tf32x3") * SCALE
        if CAP > 0:
            s = CAP * (2 * tl.sigmoid(2 * s / CAP) - 1)  # tanh
        s = tl.where((token < visible)[None, :], s, float("-inf"))
        new_m = tl.maximum(m, tl.max(s, axis=1))
        p = tl.exp(s - new_m[:, None])
        decay = tl.exp(m - new_m)
        m = new_m
        l = decay * l + tl.sum(p, axis=1)
        acc = decay[:, None] * acc + tl.dot(p.to(v_tile.dtype), v_tile, input_precision="tf32x3")
    tl.store(o + heads, acc / l[:, None], mask=in_heads)
    new_slot = ring + newest * D + d
    tl.store(cache_k + new_slot, k_new, mask=d < D)
    tl.store(cache_v + new_slot, v_new, mask=d < D)
