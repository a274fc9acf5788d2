"""Flash attention in Triton, for NVIDIA GPUs: one program per tile of 64 queries of one head, which loops over keys.

The backward pass is that of plain XLA, which computes its own forward pass again: right, but not yet fast.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from dantinox.kernels.dispatch import triton_unsupported_device
from dantinox.kernels.ops.attention import xla
from dantinox.kernels.vma import call_invariant

TILE = 64


def attention(q, k, v, *, gate, causal, window, scale, softcap, segment_ids, return_lse=False):
    """See `dantinox.kernels.attention`, which has checked the arguments."""
    if reason := triton_unsupported_device():
        raise NotImplementedError(reason)
    if q.dtype == jnp.float64 or q.shape[-1] > 256:
        raise NotImplementedError("my Triton attention takes no float64, and heads of at most 256")
    options = {"causal": causal, "window": window, "scale": scale, "softcap": softcap}

    def forward(q, k, v, gate, segment_ids):
        o, lse = call_invariant(run, q, k, v, segment_ids, **options)
        return o if gate is None else (o * jax.nn.sigmoid(gate.astype(jnp.float32))).astype(q.dtype), lse

    def backward(inputs, cotangents):
        *arrays, segment_ids = inputs
        plain = lambda q, k, v, gate: xla.attention(
            q, k, v, gate=gate, segment_ids=segment_ids, return_lse=True, **options
        )
        return *jax.vjp(plain, *arrays)[1](cotangents), None

    mine = jax.custom_vjp(forward)
    mine.defvjp(lambda *inputs: (forward(*inputs), inputs), backward)
    o, lse = mine(q, k, v, gate, segment_ids)  # every array is an argument: JAX differentiates no closure over one
    return (o, lse) if return_lse else o


def run(q, k, v, segment_ids, *, causal, window, scale, softcap):
    """Attention without a gate [B, T, H, D], and the log-sum-exp [B, T, H]."""
    import jax_triton

    (B, T, H, D), (_, S, K, _) = q.shape, k.shape
    if S == 0:
        return jnp.zeros_like(q), jnp.full((B, T, H), -jnp.inf)
    ids = segment_ids if segment_ids is not None else (jnp.zeros((B, T), jnp.int32), jnp.zeros((B, S), jnp.int32))
    return jax_triton.triton_call(
        q,
        k,
        v,
        *ids,
        kernel=forward_kernel,
        out_type=(jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, T, H), jnp.float32)),
        grid=(triton.cdiv(T, TILE), H, B),
        num_warps=4,
        backend_options={"ptx_version": 87, "enable_fp_fusion": True},  # assemblers of CUDA 12.8 and newer read 8.7
        T=T,
        S=S,
        H=H,
        K=K,
        D=D,
        D_TILE=max(16, triton.next_power_of_2(D)),
        CAUSAL=causal,
        WINDOW=window or 0,
        SCALE=scale,
        CAP=softcap or 0.0,
        TILE_SIZE=TILE,
    )


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    q_ids,
    kv_ids,
    T: tl.constexpr,
    S: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: none
    SCALE: tl.constexpr,
    CAP: tl.constexpr,  # 0: none
    TILE_SIZE: tl.constexpr,
    o,
    lse,
):
    """One tile of queries against the keys that it sees."""
    h, b = tl.program_id(1), tl.program_id(2)
    first_query = tl.program_id(0) * TILE_SIZE
    t = first_query + tl.arange(0, TILE_SIZE)
    d = tl.arange(0, D_TILE)
    in_head = (d < D)[None, :]
    q_rows = ((b * T + t) * H + h).to(tl.int64)[:, None] * D + d[None, :]
    q_tile = tl.load(q + q_rows, mask=(t < T)[:, None] & in_head, other=0.0)
    q_segment = tl.load(q_ids + b * T + t, mask=t < T, other=0)
    position = t + S - T

    first = 0
    last = S
    if CAUSAL:
        last = tl.minimum(S, first_query + S - T + TILE_SIZE)
    if WINDOW > 0:
        first = tl.maximum(0, first_query + S - T - WINDOW + 1) // TILE_SIZE * TILE_SIZE
    m = tl.full((TILE_SIZE,), -1e30, tl.float32)
    l = tl.zeros((TILE_SIZE,), tl.float32)
    acc = tl.zeros((TILE_SIZE, D_TILE), tl.float32)
    for start in range(first, last, TILE_SIZE):
        key = start + tl.arange(0, TILE_SIZE)
        kv_rows = ((b * S + key) * K + h // (H // K)).to(tl.int64)[:, None] * D + d[None, :]
        in_tile = (key < S)[:, None] & in_head
        k_tile = tl.load(k + kv_rows, mask=in_tile, other=0.0)
        v_tile = tl.load(v + kv_rows, mask=in_tile, other=0.0)
        kv_segment = tl.load(kv_ids + b * S + key, mask=key < S, other=0)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * SCALE
        if CAP > 0:
            s = CAP * (2 * tl.sigmoid(2 * s / CAP) - 1)  # tanh
        visible = (key < S)[None, :] & (t < T)[:, None] & (q_segment[:, None] == kv_segment[None, :])
        if CAUSAL:
            visible = visible & (key[None, :] <= position[:, None])
        if WINDOW > 0:
            visible = visible & (position[:, None] - key[None, :] < WINDOW)
        s = tl.where(visible, s, float("-inf"))
        new_m = tl.maximum(m, tl.max(s, axis=1))
        p = tl.exp(s - new_m[:, None])
        decay = tl.exp(m - new_m)
        m = new_m
        l = decay * l + tl.sum(p, axis=1)
        seen = tl.max(visible.to(tl.int32), axis=0) > 0
        v_tile = tl.where(seen[:, None], v_tile, 0.0)  # other keys may hold NaN, and 0 * NaN is NaN
        acc = decay[:, None] * acc + tl.dot(p.to(v_tile.dtype), v_tile, input_precision="ieee")
    safe_l = tl.where(l == 0.0, 1.0, l)
    acc = acc / safe_l[:, None]  # a query that sees no key gives zeros
    tl.store(lse + (b * T + t) * H + h, tl.where(l == 0.0, float("-inf"), m + tl.log(safe_l)), mask=t < T)
    tl.store(o + q_rows, acc.to(o.dtype.element_ty), mask=(t < T)[:, None] & in_head)
