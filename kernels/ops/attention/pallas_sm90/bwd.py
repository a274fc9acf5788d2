"""The gradients of attention on Hopper: one kernel for dq, one for dk and dv, each over the visible tiles alone.

Math      s = q k^T scale, or softcap tanh(q k^T scale / softcap);  p = 2^(s log2(e) - lse);  dv = p^T do
          ds = p (do v^T - delta), with a soft cap times 1 - (s / softcap)^2;  dq = scale ds k;  dk = scale ds^T q
Tiling    a block owns 128 queries (dq) or keys (dk, dv), 64 a warpgroup, and walks over what they see; a third
          warpgroup loads the next tiles meanwhile:

              keys ->                          keys ->
              128 queries  ▞ ░ ░ ░ ░           ▞ ░ ░ ░ ░
              128 queries  █ ▞ ░ ░ ░           █ ▞ ░ ░ ░       ▞ masked
              128 queries  ▞ █ ▞ ░ ░  -> dq    ▞ █ ▞ ░ ░       █ interior: no mask
              128 queries  ░ ▞ █ ▞ ░           ░ ▞ █ ▞ ░       ░ neither loaded nor computed
                                               |   v
                                                 dk, dv        of all G heads of the key head, one after the other

          At D = 256 dk and dv of 64 keys fill the registers of two warpgroups: one owns dv and makes p, the other owns
          dk and gets p through shared memory.
State     sums in float32, in registers. Scores of dk and dv stand transposed, keys down, so that p and ds go from
          registers into the next product. No block writes what another does: no atomics, bit-equal from run to run.
Traffic   with n tiles visible: dq reads q and do once and n tiles of k and v; dk and dv read k and v once and n tiles
          of q and do. 14 D FLOPs a visible pair; one kernel would take 10 D and add dq up in memory, in any order.
Limits    bfloat16 and float16; D 64, 128 or 256. Any T and S: odd lengths are padded to whole rows of 8 tokens.
          Ids in any order; where they ascend, tiles of foreign segments are skipped and those of one apply no mask.
          What keys hold that no query sees must be finite: the caller clears them.
Source    Dao, FlashAttention-2 (arXiv:2307.08691), algorithm 2; Shah et al., FlashAttention-3 (arXiv:2407.08608).
"""

import jax
import jax.numpy as jnp

from dantinox.kernels.ops.attention import segment_ids as packed
from dantinox.kernels.ops.attention.pallas_sm90 import common, dkv_kernel, dq_kernel
from dantinox.kernels.ops.attention.pallas_sm90.common import Segments, Static

Array = jax.Array

PAD = 128  # the numbers of a row are padded to whole tiles


def backward(
    q: Array, k: Array, v: Array, do: Array, lse: Array, delta: Array, segments: Segments | None, static: Static
) -> tuple[Array, Array, Array]:
    """(dq, dk, dv), as q, k and v.

    Args:
        q, do: [B, T, H, D]; do is the cotangent of the ungated output. k, v: [B, S, K, D].
        lse: [B, H, T] float32, log2 of the sum of a row's 2^(s log2(e)); +inf where a row sees no key.
        delta: [B, H, T] float32, rowsum(do * o), o the ungated output.
        segments: (q_ids [B, T], kv_ids [B, S]) int32.
    """
    q, do, k, v = (_whole(x, 1, 8) for x in (q, do, k, v))
    lse, delta = _whole(lse, 2, PAD, jnp.inf), _whole(delta, 2, PAD)
    for_dq = for_dkv = ()
    if segments is not None:
        q_ids, k_ids = ids = tuple(packed.pad_ids_to_block(x.astype(jnp.int32), PAD) for x in segments)
        tiles, D = common.TILES[q.shape[-1]], q.shape[-1]
        for_dq = *ids, packed.kv_block_ranges(q_ids, common.OWN, k_ids, tiles.keys)
        for_dkv = *ids, packed.kv_block_ranges(k_ids, dkv_kernel.own(D), q_ids, tiles.queries)
    dq = dq_kernel.dq(q, k, v, do, lse, delta, for_dq, static)
    dk, dv = dkv_kernel.dkv(q, k, v, do, lse, delta, for_dkv, static)
    return dq[:, : static.T], dk[:, : static.S], dv[:, : static.S]


def _whole(x: Array, axis: int, tile: int, fill: float = 0) -> Array:
    missing = -x.shape[axis] % tile
    widths = [(0, missing if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=fill) if missing else x
