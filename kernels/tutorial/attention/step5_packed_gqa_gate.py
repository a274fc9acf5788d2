"""Step 5, packed GQA and the gate: the G query heads of a key head share a tile; the gate is fused into its epilogue.

Math      as step 4, then o = sigmoid(gate) acc / l before the tile is written
Tiling    grid (B, K, visible tiles). A tile is G heads x q_tile queries against k_tile keys:

              keys ->     k_tile k_tile k_tile k_tile
              G x q_tile    ▞      ░      ░      ░       ▞ computed, then masked
              G x q_tile    █      ▞      ░      ░       █ interior, no mask is computed
              G x q_tile    ▞      █      ▞      ░       ░ not in the grid
              G x q_tile    ░      ▞      █      ▞

State     m and l [G q_tile, 1] and acc [G q_tile, D] in float32, from the first visible tile of a query tile to its
          last.
Traffic   q, gate and o once; k and v once per query tile for all G heads: 2 G q_tile FLOPs per element fetched, G
          times as many as in step 4 with the same q_tile. A gate after the kernel would read and write o once more.
Limits    float32, bfloat16; float16 only interpreted. Any T, S, H, K, D. Gate [B, T, H, D] or [B, T, H, 1], causal,
          window, scale; NotImplementedError: softcap, segment_ids. ValueError: other shapes and dtypes; rows or a
          k_tile that are not multiples of 16.
Source    Ainslie et al., GQA (arXiv:2305.13245); Qiu et al., Gated Attention (arXiv:2505.06708).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dantinox.kernels import validation
from dantinox.kernels.tutorial.attention.common import M_INIT, NN, NT, call_options, check, dot, heads_first, iota
from dantinox.kernels.tutorial.attention.step4_tile_skipping import FIRST, LAST, MASKED, visible_tiles

Array = jax.Array


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    gate: Array | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    rows: int = 512,
    k_tile: int = 256,
    **unsupported: None,
) -> Array:
    """Attend as `dantinox.kernels.attention`; a tile has at most `rows` rows, but at least 16 per head."""
    mask, scale = check(q, k, v, causal, window, scale, {"rows": rows, "k_tile": k_tile}, **unsupported)
    (B, T, H, D), K = q.shape, k.shape[2]
    G = H // K
    if 0 in (q.size, k.size):
        return jnp.zeros_like(q)
    q_tile = max(16, rows // G // 16 * 16)
    tables = visible_tiles(mask, q_tile, k_tile)
    q_index = lambda b, h, n, i, j, flags: (b, h, i[n], 0)
    q_spec = pl.BlockSpec((None, G, q_tile, D), q_index)
    kv_spec = pl.BlockSpec((None, None, k_tile, D), lambda b, h, n, i, j, flags: (b, h, j[n], 0))
    inputs, in_specs = [q, k, v], [q_spec, kv_spec, kv_spec]
    if gate is not None:
        validation.check_floating(q=q, gate=gate)
        validation.check_shape("gate", gate, (B, T, H, D), (B, T, H, 1))
        inputs, in_specs = [*inputs, gate], [*in_specs, pl.BlockSpec((None, G, q_tile, gate.shape[-1]), q_index)]
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(tables),
        grid=(B, K, len(tables[0])),
        in_specs=in_specs,
        out_specs=q_spec,
        scratch_shapes=[pltpu.VMEM((G * q_tile, n), jnp.float32) for n in (1, 1, D)],
    )
    kernel = pl.pallas_call(
        functools.partial(forward_kernel, mask=mask, scale=scale),
        out_shape=jax.ShapeDtypeStruct((B, H, T, D), q.dtype),
        grid_spec=grid_spec,
        name="packed_gqa_gate",
        **call_options(),
    )
    return heads_first(kernel(*tables, *map(heads_first, inputs)))


def forward_kernel(i_ref, j_ref, flag_ref, q_ref, k_ref, v_ref, *refs, mask, scale) -> None:
    """Process one tile; the next steps use this kernel too."""
    *gate_ref, o_ref, m_ref, l_ref, acc_ref = refs
    G, q_tile, D = q_ref.shape
    n = pl.program_id(2)
    i, j, flag = i_ref[n], j_ref[n], flag_ref[n]

    @pl.when(flag & FIRST != 0)
    def init_state() -> None:
        m_ref[...] = jnp.full(m_ref.shape, M_INIT, jnp.float32)
        l_ref[...] = jnp.zeros(l_ref.shape, jnp.float32)
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

    def process_tile(masked: bool) -> None:
        s = dot(q_ref[...].reshape(G * q_tile, D), k_ref[...], NT) * scale  # [G q_tile, k_tile]
        v = v_ref[...]
        if masked:
            query = mask.S - mask.T + i * q_tile + iota((G, q_tile, s.shape[1]), 1).reshape(s.shape)
            s = mask.apply(s, query, j * s.shape[1] + iota(s.shape, 1))
            v = mask.zero_unseen(v, j * s.shape[1])
        m = jnp.maximum(jnp.max(s, axis=1, keepdims=True), m_ref[...])
        p = jnp.exp(s - m)
        decay = jnp.exp(m_ref[...] - m)  # rescales what was accumulated under a smaller maximum
        m_ref[...] = m
        l_ref[...] = decay * l_ref[...] + jnp.sum(p, axis=1, keepdims=True)
        acc_ref[...] = decay * acc_ref[...] + dot(p.astype(v.dtype), v, NN)

    pl.when(flag & MASKED != 0)(functools.partial(process_tile, masked=True))
    pl.when(flag & MASKED == 0)(functools.partial(process_tile, masked=False))

    @pl.when(flag & LAST != 0)
    def epilogue() -> None:
        l = l_ref[...]
        o = (acc_ref[...] / jnp.where(l == 0, 1, l)).reshape(o_ref.shape)  # l is 0 where a query sees no key
        for ref in gate_ref:
            o = o * jax.nn.sigmoid(ref[...].astype(jnp.float32))
        o_ref[...] = o.astype(o_ref.dtype)
