"""The Pallas attention of TPUs and CPUs with its derivative; CPUs have separate kernels."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dantinox.kernels import cost
from dantinox.kernels.derivatives import first_order
from dantinox.kernels.dispatch import current_device
from dantinox.kernels.ops.attention.common import (
    AttentionConfig,
    ForwardResult,
    SegmentTables,
    split_small_scale,
    without_keys,
)
from dantinox.kernels.ops.attention.packing import (
    group_queries,
    is_elementwise_gate,
    pack_keys,
    pack_queries,
    pack_rows,
    segment_tables,
    ungroup_queries,
    unpack_queries,
    unpack_rows,
)
from dantinox.kernels.ops.attention.pallas_cpu import block_sizes as cpu_block_sizes
from dantinox.kernels.ops.attention.pallas_cpu import bwd as cpu_bwd
from dantinox.kernels.ops.attention.pallas_cpu import fwd as cpu_fwd
from dantinox.kernels.ops.attention.pallas_tpu import block_sizes as tpu_block_sizes
from dantinox.kernels.ops.attention.pallas_tpu import bwd as tpu_bwd
from dantinox.kernels.ops.attention.pallas_tpu import fwd as tpu_fwd
from dantinox.kernels.ops.attention.segment_ids import zero_unattended_keys
from dantinox.kernels.vma import call_invariant

Array = jax.Array


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    gate: Array | None,
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
    segment_ids: tuple[Array, Array] | None,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """See `dantinox.kernels.attention`, which checks the arguments."""
    B, T, H, D = q.shape
    S, K, Dv = k.shape[1], k.shape[2], v.shape[3]
    dtype = q.dtype
    if S == 0:
        return without_keys(q, Dv, return_lse)
    if dtype == jnp.float16:  # has no room for small weights and large gradients of scores, and neither device uses it
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        gate = None if gate is None else gate.astype(jnp.float32)
    q, k, scale = split_small_scale(q, k, scale)
    k, v, segment_ids = zero_unattended_keys(k, v, segment_ids, T=T, causal=causal, window=window)
    S = k.shape[1]

    G, device = H // K, current_device()
    if device.platform == "cpu":
        sizes = cpu_block_sizes.heuristic_block_sizes(heads=B * K, G=G, T=T, S=S, causal=causal, window=window)
    else:
        sizes = tpu_block_sizes.heuristic_block_sizes(
            device,
            G=G,
            T=T,
            S=S,
            D=max(D, Dv),
            causal=causal,
            window=window,
            itemsize=q.dtype.itemsize,
            num_tables=1 if segment_ids is None else 1 + B,
        )
    config = AttentionConfig(T, S, G, causal, window, scale, softcap, sizes)
    segments = None if segment_ids is None else segment_tables(*segment_ids, K, config)
    pack, unpack = (pack_queries, unpack_queries) if _for_cpu(config) else (group_queries, ungroup_queries)
    if gate is not None:
        gate = pack_queries(gate, config) if gate.shape[-1] == 1 else pack(gate, config)
    q, k, v = pack(q, config), pack_keys(k, config), pack_keys(v, config)
    o, lse = _attention(q, k, v, gate, segments, config, return_lse)
    o = unpack(o, config, B).astype(dtype)
    return o if lse is None else (o, unpack_queries(lse, config, B)[..., 0])


class Residuals(NamedTuple):
    """The residuals of the forward pass; see `ForwardResult`."""

    q: Array
    k: Array
    v: Array
    gate: Array | None
    segments: SegmentTables | None
    o_ungated: Array
    m: Array
    inv_l: Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(
    q: Array,
    k: Array,
    v: Array,
    gate: Array | None,
    segments: SegmentTables | None,
    config: AttentionConfig,
    return_lse: bool,
) -> tuple[Array, Array | None]:
    """Return the output and, if requested, the log-sum-exp of each row: [heads, query subtiles, 1, rows]."""
    run_fwd = functools.partial(_run_fwd, config=config, residuals=False, lse=return_lse)
    result = call_invariant(run_fwd, q, k, v, gate, segments)
    return result.o, _lse(result, config) if return_lse else None


def _attention_fwd(q, k, v, gate, segments, config, return_lse):
    run_fwd = functools.partial(_run_fwd, config=config, residuals=True, lse=True)
    result = _call_kernel(run_fwd, q, k, v, gate, segments)
    residuals = Residuals(q, k, v, gate, segments, result.o_ungated, result.m, result.inv_l)
    return (result.o, _lse(result, config) if return_lse else None), residuals


def _attention_bwd(
    config: AttentionConfig, return_lse: bool, residuals: Residuals, cotangents: tuple[Array, Array | None]
) -> tuple:
    q, k, v, gate, segments, o_ungated, m, inv_l = residuals
    do, dlse = cotangents
    if _for_cpu(config):
        attention_bwd = cpu_bwd.attention_bwd
        do_ungated, dgate, delta = _bwd_preprocess(do, o_ungated, gate, D_axis=-2)
    else:
        attention_bwd = tpu_bwd.attention_bwd
        in_rows = gate is not None and not is_elementwise_gate(gate, do)
        gate_of_queries = unpack_rows(gate, config) if in_rows else gate
        do_ungated, dgate, delta = _bwd_preprocess(do, o_ungated, gate_of_queries, D_axis=-1)
        dgate, delta = pack_rows(dgate, config) if in_rows else dgate, pack_rows(delta, config)
    if dlse is not None:
        delta = delta - dlse  # both reach a score by way of its weight: ds = p (dp - delta + dlse)
    run_bwd = functools.partial(attention_bwd, config=config, cost=_cost(q, k, v, gate, config, backward=True))
    dq, dk, dv = _call_kernel(run_bwd, q, k, v, do_ungated, m, inv_l, delta, segments)
    return dq, dk, dv, dgate, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _call_kernel[R](kernel: Callable[..., R], *args: Any) -> R:
    """Call the forward kernel with residuals or the backward kernel, which have no derivative."""
    return first_order(functools.partial(call_invariant, kernel), "attention")(*args)


def _run_fwd(
    q: Array,
    k: Array,
    v: Array,
    gate: Array | None,
    segments: SegmentTables | None,
    config: AttentionConfig,
    *,
    residuals: bool,
    lse: bool,
) -> ForwardResult:
    attention_fwd = cpu_fwd.attention_fwd if _for_cpu(config) else tpu_fwd.attention_fwd
    kernel_cost = _cost(q, k, v, gate, config)
    return attention_fwd(q, k, v, gate, segments, config, residuals=residuals, lse=lse, cost=kernel_cost)


def _lse(result: ForwardResult, config: AttentionConfig) -> Array:
    """Return the log-sum-exp of each row from its two parts."""
    assert result.m is not None and result.inv_l is not None
    m = result.m if _for_cpu(config) else result.m * math.log(2)  # scores of the TPU kernels are exponents of 2
    return jnp.where(result.inv_l == 0, -jnp.inf, m - jnp.log(jnp.where(result.inv_l == 0, 1, result.inv_l)))


def _for_cpu(config: AttentionConfig) -> bool:
    """Return whether the CPU kernels run; the current device may be another in the backward pass."""
    return isinstance(config.block_sizes, cpu_block_sizes.CpuBlockSizes)


def _bwd_preprocess(do: Array, o_ungated: Array, gate: Array | None, D_axis: int) -> tuple[Array, Array | None, Array]:
    """Return (cotangent of the ungated output, dgate, delta) in one pass, which XLA fuses; delta has a D of 1."""
    do = jax.lax.optimization_barrier(do)  # or XLA copies it to the layout of the kernels in float32
    do_f32, o_ungated = do.astype(jnp.float32), o_ungated.astype(jnp.float32)
    if gate is None:
        return do, None, jnp.sum(do_f32 * o_ungated, axis=D_axis, keepdims=True)
    sigmoid_gate = jax.nn.sigmoid(gate.astype(jnp.float32))
    # 1 - sigmoid rounds to zero from x = 17 on. The product of the sigmoids comes first, because it cannot overflow.
    dgate = do_f32 * (o_ungated * (sigmoid_gate * jax.nn.sigmoid(-gate.astype(jnp.float32))))
    if gate.shape[D_axis] == 1:
        dgate = jnp.sum(dgate, axis=D_axis, keepdims=True)
    do_ungated = do_f32 * sigmoid_gate
    return (
        do_ungated.astype(do.dtype),
        dgate.astype(gate.dtype),
        jnp.sum(do_ungated * o_ungated, axis=D_axis, keepdims=True),
    )


def _cost(
    q: Array, k: Array, v: Array, gate: Array | None, config: AttentionConfig, backward: bool = False
) -> cost.Cost:
    """Return the cost of all heads; packed segments count as one, since their ids are unknown at trace time."""
    num_rows = q.size // k.shape[-1]
    gate_kind = "none" if gate is None else "head" if gate.size == num_rows else "elementwise"
    return cost.attention(
        B=q.shape[0],
        T=config.T,
        S=config.S,
        H=config.G,
        K=1,
        D=k.shape[-1],
        Dv=v.shape[-1],
        causal=config.causal,
        window=config.window,
        gate=gate_kind,
        itemsize=q.dtype.itemsize,
        backward=backward,
    )
