"""Decode attention for Hopper GPUs in Pallas, simulated on a CPU: one launch appends to the cache and attends.

Math      s = cap(scale q k^T), o = softmax(s) v over the visible tokens and the head's sink, by an online softmax that
          starts with the sink and the new token; o *= sigmoid(gate), which XLA computes.
Tiling    grid (KV heads, sequences), one warpgroup each. It goes through the blocks of 64 slots from that of the oldest
          visible token to that of the new one, around the end of the ring. C = 256, length 500, window 140:

              slots     0      64     128    192    256
              blocks    ░░░░░░░|--1---|--2---|--3---|      the first and the last have masked slots
                                    ^oldest       ^new

          TMA loads a block of keys and one of values; wgmma multiplies the G = H / K query heads, filled up to 64 rows.
          The new token is multiplied in registers, so the loads need not find it in its slot.
State     maximum and sum of the weights [64], and the output [64, D], in float32 registers.
Traffic   reads the visible blocks of keys and values once, and writes one slot of each ring. The 64 rows multiply
          faster than the blocks arrive.
Limits    bfloat16, float16, with a cache of q's dtype; D 64 or 128; G up to 64; C a multiple of 8, for TMA. One program
          per KV head and sequence fills a GPU only with many of them; Flash-Decoding splits the tokens between more.
Source    Dao, Flash-Decoding (2023); kernels/ops/decode_attention/pallas_sm90/ overlaps the steps and splits.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dantinox.kernels.dispatch import current_device, on_hopper
from dantinox.kernels.ops.decode_attention.kv_cache import append_token
from dantinox.kernels.vma import call_invariant, varying_shape

TILE = 64  # slots per block, and rows of a wgmma
MATRIX = plgpu.Layout.WGMMA  # how the registers of a warpgroup hold a tile
ROW, COLUMN = MATRIX.reduce(0), MATRIX.reduce(1)  # and a number per column, or per row


def decode_attention(q, k, v, cache, *, gate, window, scale, softcap, sinks=None):
    """See `dantinox.kernels.decode_attention`, which has checked the arguments."""
    if q.ndim == 4:
        raise NotImplementedError("my decode attention takes one new token per sequence")
    platform, kind = current_device()
    if platform not in ("cpu", "gpu") or (platform == "gpu" and not on_hopper()):
        raise NotImplementedError(f"my Hopper decode attention runs on Hopper, and simulated on a CPU; this is {kind}")
    (_, H, D), (_, K, C, _) = q.shape, cache.k.shape
    if q.dtype not in (jnp.bfloat16, jnp.float16) or D not in (64, 128) or H // K > TILE or C % 8:
        raise NotImplementedError(
            "my Hopper decode attention takes bfloat16 and float16, D 64 and 128, H / K up to 64, C in multiples of 8"
        )
    if (cache.k.dtype, cache.v.dtype) != (q.dtype, q.dtype):
        raise NotImplementedError(f"my cache is {q.dtype} as q is; this one is {cache.k.dtype} and {cache.v.dtype}")
    if 0 in q.shape:
        return jnp.zeros_like(q), append_token(cache, k, v)
    # A sink is one more key, without a value; without sinks it has no weight.
    sinks = jnp.full(H, -1e30) if sinks is None else jnp.maximum(sinks, -1e30)
    o, new_k, new_v = call_invariant(run, q, k, v, sinks, *cache[:3], window=window, scale=scale, softcap=softcap)
    if gate is not None:
        o *= jax.nn.sigmoid(gate.astype(jnp.float32))
    return o.astype(q.dtype), cache._replace(k=new_k, v=new_v, length=cache.length + 1)


def run(q, k, v, sinks, cache_k, cache_v, length, *, window, scale, softcap):
    """Attend without a gate -> (o [B, H, D] float32, the new keys, the new values)."""
    (B, H, D), (_, K, C, _) = q.shape, cache_k.shape
    q = jnp.pad(q.reshape(B, K, H // K, D), ((0, 0), (0, 0), (0, TILE - H // K), (0, 0)))
    sinks = jnp.pad(sinks.astype(jnp.float32).reshape(K, H // K), ((0, 0), (0, TILE - H // K)))
    token = jnp.stack([k, v], axis=2).astype(q.dtype)  # [B, K, 2, D]
    # Tables: the slot of the new token, the number of visible ones, the first block and the number of blocks.
    newest = length % C
    visible = jnp.minimum(length + 1, C if window is None else min(C, window))
    oldest = (newest - visible + 1) % C
    blocks = pl.cdiv(C, TILE)
    count = newest // TILE - oldest // TILE + 1
    count = jnp.where(oldest > newest, count + blocks, count)  # one block more, where both ends are in the same
    tables = [x.astype(jnp.int32) for x in (newest, visible, oldest // TILE, jnp.minimum(count, blocks))]

    def kernel(q_gmem, token_gmem, sinks_gmem, *refs):
        newest_gmem, visible_gmem, first_gmem, count_gmem, k_gmem, v_gmem, o_gmem, *scratch = refs
        q_smem, k_smem, v_smem, o_smem, p_smem, token_smem, token_full, k_full, v_full = scratch
        b, head = lax.axis_index("batch"), lax.axis_index("head")
        newest, visible, first, count = (x[b] for x in (newest_gmem, visible_gmem, first_gmem, count_gmem))
        plgpu.copy_gmem_to_smem(q_gmem.at[b, head], q_smem, token_full)
        plgpu.copy_gmem_to_smem(token_gmem.at[b, head], token_smem, token_full)
        plgpu.barrier_wait(token_full)

        def cap(s):
            return s * scale if softcap is None else softcap * jnp.tanh(s * scale / softcap)

        def is_stored(block, shape, axis):  # the slots of the other visible tokens
            slot = block * TILE + plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=MATRIX)
            age = jnp.where(slot <= newest, newest - slot, newest - slot + C)
            return (age > 0) & (age < visible) & (slot < C)

        def add_block(i, carry):
            acc, m, l = carry
            block = lax.rem(first + i, jnp.int32(blocks))
            slots = pl.ds(block * TILE, TILE)
            plgpu.copy_gmem_to_smem(k_gmem.at[b, head, slots], k_smem, k_full)
            plgpu.copy_gmem_to_smem(v_gmem.at[b, head, slots], v_smem, v_full)
            plgpu.barrier_wait(k_full)

            def multiply_keys(s_ref):
                plgpu.wgmma(s_ref, q_smem, k_smem.transpose((1, 0)))
                return s_ref[...]  # waits for the product

            s = cap(pl.run_scoped(multiply_keys, plgpu.ACC((TILE, TILE), jnp.float32)))
            s = jnp.where(is_stored(block, s.shape, 1), s, -jnp.inf)
            new_m = jnp.maximum(m, jnp.max(s, axis=1))
            p = jnp.exp(s - lax.broadcast_in_dim(new_m, s.shape, [0]))
            decay = jnp.exp(m - new_m)
            p_smem[...] = p.astype(p_smem.dtype)
            plgpu.barrier_wait(v_full)
            for d in range(0, D, TILE):  # the other slots may hold NaN, and 0 * NaN is NaN
                part = v_smem.at[:, pl.ds(d, TILE)]
                values = plgpu.load(part, layout=MATRIX)
                part[...] = jnp.where(is_stored(block, values.shape, 0), values, 0)
            plgpu.commit_smem()  # makes the writes visible to wgmma

            def multiply_values(pv_ref):
                plgpu.wgmma(pv_ref, p_smem, v_smem)
                return pv_ref[...]

            pv = pl.run_scoped(multiply_values, plgpu.ACC((TILE, D), jnp.float32))
            acc = acc * lax.broadcast_in_dim(decay, acc.shape, [0]) + pv
            return acc, new_m, decay * l + jnp.sum(p, axis=1)

        def new_token(i):
            row = plgpu.load(token_smem.at[i], layout=ROW).astype(jnp.float32)
            return lax.broadcast_in_dim(row, (TILE, D), [1])

        s = cap(jnp.sum(plgpu.load(q_smem, layout=MATRIX).astype(jnp.float32) * new_token(0), axis=1))
        sink = plgpu.load(sinks_gmem.at[head], layout=COLUMN, optimized=False)
        m = jnp.maximum(s, sink)
        p = jnp.exp(s - m)
        acc = new_token(1) * lax.broadcast_in_dim(p, (TILE, D), [0])
        acc, _, l = lax.fori_loop(0, count, add_block, (acc, m, p + jnp.exp(sink - m)))
        o_smem[...] = acc / lax.broadcast_in_dim(l, acc.shape, [0])
        plgpu.commit_smem()  # makes the write visible to the copy
        plgpu.copy_smem_to_gmem(o_smem, o_gmem.at[b, head])
        for i, ring in enumerate((k_gmem, v_gmem)):  # after the loads of its block
            plgpu.copy_smem_to_gmem(token_smem.at[i], ring.at[b, head, newest])
        plgpu.wait_smem_to_gmem(0)

    def smem(columns, dtype=q.dtype):  # in the layout that wgmma reads
        tiling = plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize))
        return plgpu.SMEM((TILE, columns), dtype, transforms=(tiling, plgpu.SwizzleTransform(128)))

    new_k, new_v = jax.new_ref(cache_k), jax.new_ref(cache_v)  # the kernel writes to them in place
    o = plgpu.kernel(
        kernel,
        out_type=varying_shape(q.shape, jnp.float32),
        scratch_types=(
            *[smem(D), smem(D), smem(D), smem(D, jnp.float32), smem(TILE), plgpu.SMEM((2, D), q.dtype)],
            *[plgpu.Barrier(num_arrivals=2), plgpu.Barrier(), plgpu.Barrier()],
        ),
        grid=(K, B),
        grid_names=("head", "batch"),
        interpret=plgpu.InterpretGPUParams() if current_device().platform == "cpu" else False,
        kernel_name="my_decode_attention_hopper",
    )(q, token, sinks, *tables, new_k, new_v)
    return o[:, :, : H // K].reshape(B, H, D), jax.freeze(new_k), jax.freeze(new_v)
