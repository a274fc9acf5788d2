"""Flash attention for Hopper GPUs in Pallas, simulated on a CPU: one warpgroup per 64 queries of one head.

It loads a tile of keys and values, waits, multiplies, and turns to the next tile; nothing overlaps yet. The backward
pass is that of plain XLA, which computes its own forward pass again: right, but not yet fast.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dantinox.kernels.dispatch import current_device, on_hopper
from dantinox.kernels.ops.attention import xla
from dantinox.kernels.vma import call_invariant, varying_shape

TILE = 64
M_INIT = -1e30  # finite, so that exp(-inf - M_INIT) is 0 while a row has seen no key
MATRIX = plgpu.Layout.WGMMA  # how the registers of a warpgroup hold a tile
COLUMN = MATRIX.reduce(1)  # and a number per row


def attention(q, k, v, *, gate, causal, window, scale, softcap, segment_ids, return_lse=False):
    """See `dantinox.kernels.attention`, which has checked the arguments."""
    platform, kind = current_device()
    if platform not in ("cpu", "gpu") or (platform == "gpu" and not on_hopper()):
        raise NotImplementedError(f"my Hopper attention runs on Hopper, and simulated on a CPU; this is {kind}")
    if q.dtype not in (jnp.bfloat16, jnp.float16) or q.shape[-1] not in (64, 128):
        raise NotImplementedError("my Hopper attention takes bfloat16 and float16, with heads of 64 or 128")
    if segment_ids is not None:
        raise NotImplementedError("my Hopper attention has no segment_ids")
    options = {"causal": causal, "window": window, "scale": scale, "softcap": softcap}

    def forward(q, k, v, gate):
        o, lse = call_invariant(run, q, k, v, **options)
        return o if gate is None else (o * jax.nn.sigmoid(gate.astype(jnp.float32))).astype(q.dtype), lse

    def backward(inputs, cotangents):
        plain = lambda q, k, v, gate: xla.attention(q, k, v, gate=gate, segment_ids=None, return_lse=True, **options)
        return jax.vjp(plain, *inputs)[1](cotangents)

    mine = jax.custom_vjp(forward)
    mine.defvjp(lambda *inputs: (forward(*inputs), inputs), backward)
    o, lse = mine(q, k, v, gate)
    return (o, lse) if return_lse else o


def run(q, k, v, *, causal, window, scale, softcap):
    """Attention without a gate [B, T, H, D], and the log-sum-exp [B, T, H]."""
    (B, T, H, D), (_, S, K, _) = q.shape, k.shape
    if S == 0:
        return jnp.zeros_like(q), jnp.full((B, T, H), -jnp.inf)
    if window is not None:  # keys before every window may hold NaN, and 0 * NaN is NaN
        seen = (jnp.arange(S) > S - T - window)[:, None, None]
        k, v = jnp.where(seen, k, 0), jnp.where(seen, v, 0)
    q, k, v = (jnp.pad(x, ((0, 0), (0, -x.shape[1] % TILE), (0, 0), (0, 0))) for x in (q, k, v))

    def kernel(q_gmem, k_gmem, v_gmem, o_gmem, lse_gmem, q_smem, k_smem, v_smem, p_smem, lse_smem, *barriers):
        q_full, k_full, v_full = barriers
        b, h = lax.axis_index("batch"), lax.axis_index("head")
        first_query = lax.axis_index("tile") * TILE
        rows = pl.ds(first_query, TILE)
        plgpu.copy_gmem_to_smem(q_gmem.at[b, rows, h], q_smem, q_full)
        plgpu.barrier_wait(q_full)
        query = S - T + first_query + plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), 0, layout=MATRIX)
        column = plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), 1, layout=MATRIX)

        def add_tile(j, carry):
            acc, m, l = carry
            keys, kv_head = pl.ds(j * TILE, TILE), lax.div(h, jnp.int32(H // K))
            plgpu.copy_gmem_to_smem(k_gmem.at[b, keys, kv_head], k_smem, k_full)
            plgpu.copy_gmem_to_smem(v_gmem.at[b, keys, kv_head], v_smem, v_full)
            plgpu.barrier_wait(k_full)

            def multiply_keys(s_ref):
                plgpu.wgmma(s_ref, q_smem, k_smem.transpose((1, 0)))
                return s_ref[...]  # waits for the product

            s = pl.run_scoped(multiply_keys, plgpu.ACC((TILE, TILE), jnp.float32)) * scale
            if softcap is not None:
                s = softcap * jnp.tanh(s / softcap)
            key = j * TILE + column
            mask = key < S
            if causal:
                mask &= key <= query
            if window is not None:
                mask &= query - key < window
            s = jnp.where(mask, s, -jnp.inf)
            new_m = jnp.maximum(m, jnp.max(s, axis=1))
            p = jnp.exp(s - lax.broadcast_in_dim(new_m, s.shape, [0]))
            decay = jnp.exp(m - new_m)
            acc = acc * lax.broadcast_in_dim(decay, acc.shape, [0])
            l = decay * l + jnp.sum(p, axis=1)
            p_smem[...] = p.astype(p_smem.dtype)
            plgpu.commit_smem()  # makes the write visible to wgmma
            plgpu.barrier_wait(v_full)

            def multiply_values(pv_ref):
                plgpu.wgmma(pv_ref, p_smem, v_smem)
                return pv_ref[...]

            return acc + pl.run_scoped(multiply_values, plgpu.ACC((TILE, D), jnp.float32)), new_m, l

        last_query = S - T + first_query + TILE - 1
        end = pl.cdiv(S, TILE)
        if causal:
            end = lax.min(end, lax.div(lax.max(0, last_query + TILE), TILE))
        start = 0
        if window is not None:
            start = lax.div(lax.max(0, S - T + first_query - window + 1), TILE)
        carry = (
            plgpu.layout_cast(jnp.zeros((TILE, D), jnp.float32), MATRIX),
            plgpu.layout_cast(jnp.full((TILE,), M_INIT, jnp.float32), COLUMN),
            plgpu.layout_cast(jnp.zeros((TILE,), jnp.float32), COLUMN),
        )
        acc, m, l = lax.fori_loop(start, end, add_tile, carry)
        sees_no_key = l == 0
        l = jnp.where(sees_no_key, 1, l)  # a query that sees no key gives zeros
        lse_smem[...] = jnp.where(sees_no_key, -jnp.inf, m + jnp.log(l))
        q_smem[...] = (acc / lax.broadcast_in_dim(l, acc.shape, [0])).astype(q_smem.dtype)
        plgpu.commit_smem()  # makes the write visible to the copy
        plgpu.copy_smem_to_gmem(q_smem, o_gmem.at[b, rows, h])
        plgpu.copy_smem_to_gmem(lse_smem, lse_gmem.at[b, h, rows])
        plgpu.wait_smem_to_gmem(0)

    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # the layout that wgmma reads
    o, lse = plgpu.kernel(
        kernel,
        out_type=(varying_shape(q.shape, q.dtype), varying_shape((B, H, q.shape[1]), jnp.float32)),
        scratch_types=(
            *[plgpu.SMEM((TILE, columns), q.dtype, transforms=transforms) for columns in (D, D, D, TILE)],
            plgpu.SMEM((TILE,), jnp.float32),
            *[plgpu.Barrier()] * 3,
        ),
        grid=(q.shape[1] // TILE, H, B),
        grid_names=("tile", "head", "batch"),
        interpret=plgpu.InterpretGPUParams() if current_device().platform == "cpu" else False,
        kernel_name="my_attention_hopper",
    )(q, k, v)
    return o[:, :T], lse[..., :T].swapaxes(1, 2)
