"""The public kernels that ours are compared with, behind one signature: (inputs, aux) -> output.

A builder takes a workload and returns that function, or raises `NotImplementedError` with the features that the kernel
lacks. Each builder imports its library, so that a worker loads only those that it compiles.
"""

import functools
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from bench.aot import hardware
from dantinox.kernels import workloads

Function = Callable[[dict[str, jax.Array], dict[str, Any]], Any]
Builder = Callable[[Any], Function]


@dataclass(frozen=True)
class Baseline:
    """A library's kernels.

    Attributes:
        targets: the accelerators that they run on.
        build: a builder for each operation that the library has.
        dtypes: supported dtypes; the first is the one to measure.
        extra_dtypes: further dtypes by operation.
    """

    targets: tuple[str, ...]
    build: dict[str, Builder]
    dtypes: tuple[str, ...] = ("bfloat16", "float16")
    extra_dtypes: Mapping[str, tuple[str, ...]] = MappingProxyType({})

    def dtypes_of(self, op: str) -> tuple[str, ...]:
        """The dtypes that an operation supports."""
        return (*self.dtypes, *self.extra_dtypes.get(op, ()))


def _check_features(workload: Any, **supported: bool) -> None:
    """Raise if a workload has features that a kernel does not support.

    Args:
        workload: the workload.
        **supported: gate, segments, softcap, window: whether the kernel supports it (default: no).

    Raises:
        NotImplementedError: the message lists the missing features.
    """
    required = {
        "gate": getattr(workload, "gate", "none") != "none",
        "segments": getattr(workload, "segments", None) is not None,
        "softcap": getattr(workload, "softcap", None) is not None,
        "window": getattr(workload, "window", None) is not None,
        "sinks": getattr(workload, "sinks", False),
        "several tokens": getattr(workload, "new_tokens", 1) > 1,
    }
    missing = [name for name, needed in required.items() if needed and not supported.get(name, False)]
    if missing:
        raise NotImplementedError(f"no {' and no '.join(missing)}")


def _check_divides(axis: str, size: int, block: int) -> None:
    if size % block:
        raise NotImplementedError(f"{axis} is {size}, no multiple of {block}")


# --- attention ---


def _jax_mgpu_attention(workload: workloads.Attention) -> Function:
    _check_features(workload)
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    block_q = 64
    block_kv = 64 if workload.D >= 256 else 128
    _check_divides("T", workload.T, 2 * block_q)
    _check_divides("S", workload.S, block_kv)
    _check_divides("D", workload.D, 64)
    config = attention_mgpu.TuningConfig(
        block_q=block_q,
        block_kv=block_kv,
        max_concurrent_steps=2,
        causal=workload.causal,
        block_q_dkv=64,
        block_kv_dkv=64,
        block_q_dq=64,
        block_kv_dq=64,
    )
    # It applies no scale, so the queries are scaled before.
    scale = workload.D**-0.5 if workload.scale is None else workload.scale

    def call(inputs: dict[str, jax.Array], aux: dict[str, Any]) -> jax.Array:
        q = inputs["q"] * jnp.asarray(scale, inputs["q"].dtype)
        return attention_mgpu.attention(q, inputs["k"], inputs["v"], config)

    return call


def _tokamax_attention(workload: workloads.Attention) -> Function:
    _check_features(workload, window=True, softcap=True)
    import tokamax

    return _dot_product(
        workload, tokamax.dot_product_attention, logits_soft_cap=workload.softcap, implementation="mosaic"
    )


def _jax_nn_attention(workload: workloads.Attention) -> Function:
    _check_features(workload, window=True)
    return _dot_product(workload, jax.nn.dot_product_attention, implementation="xla")


def _dot_product(workload: workloads.Attention, attention: Callable[..., Any], **options: Any) -> Function:
    """Call a function with the signature of `jax.nn.dot_product_attention`."""
    window = None if workload.window is None else (workload.window - 1, 0)
    options |= {"is_causal": workload.causal, "local_window_size": window, "scale": workload.scale}
    return lambda inputs, aux: attention(inputs["q"], inputs["k"], inputs["v"], **options)


def _splash_512(workload: workloads.Attention) -> Function:
    if workload.window is None:
        raise NotImplementedError("blocks of 1024 take fewer bundles without a window")
    return _splash(workload, 512)


def _splash_fused(workload: workloads.Attention) -> Function:
    """One kernel for dq, dk and dv; it writes a part of dq per block of keys, and XLA adds the parts up."""
    return _splash(workload, 1024 if workload.window is None else 512, fused=True)


def _splash(workload: workloads.Attention, block: int = 1024, fused: bool = False) -> Function:
    _check_features(workload, window=True, softcap=True, segments=True)
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    q_block, kv_block, compute = min(block, workload.T), min(block, workload.S), min(512, workload.S)
    _check_divides("T", workload.T, q_block)
    _check_divides("S", workload.S, kv_block)
    _check_divides("T", workload.T, 128)
    _check_divides("S", workload.S, 128)
    blocks = kernel.BlockSizes(
        block_q=q_block,
        block_kv=kv_block,
        block_kv_compute=compute,
        block_q_dkv=q_block,
        block_kv_dkv=kv_block,
        block_kv_dkv_compute=compute,
        block_q_dq=None if fused else q_block,
        block_kv_dq=None if fused else kv_block,
        use_fused_bwd_kernel=fused,
    )
    shape, offset = (workload.T, workload.S), workload.S - workload.T
    if workload.window is not None:
        mask = masks.LocalMask(shape, (workload.window - 1, 0), offset)
    elif workload.causal:
        mask = masks.CausalMask(shape, offset)
    else:
        mask = masks.FullMask(shape)
    G = workload.H // workload.K
    scale = workload.D**-0.5 if workload.scale is None else workload.scale

    def call(inputs: dict[str, jax.Array], aux: dict[str, Any]) -> jax.Array:
        run = kernel.make_splash_mqa(
            masks.MultiHeadMask([mask] * G),
            block_sizes=blocks,
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=workload.softcap,
        )
        q = (inputs["q"] * scale).astype(inputs["q"].dtype)
        q = q.reshape(workload.B, workload.T, workload.K, G, workload.D).transpose(0, 2, 3, 1, 4)
        k, v = (inputs[name].transpose(0, 2, 1, 3) for name in "kv")
        ids = aux.get("segment_ids")
        if ids is None:
            o = jax.vmap(jax.vmap(run))(q, k, v)
        else:
            pair = ids if isinstance(ids, tuple) else (ids, ids)

            def run_with_ids(q: Any, k: Any, v: Any, q_ids: Any, kv_ids: Any) -> Any:
                return run(q, k, v, kernel.SegmentIds(q_ids, kv_ids))

            o = jax.vmap(jax.vmap(run_with_ids, (0, 0, 0, None, None)))(q, k, v, *pair)
        return o.transpose(0, 3, 1, 2, 4).reshape(workload.out_shape())

    return call


# --- grouped matmul ---

# KiB of shared memory of tokamax's kernels -> (rows, columns, contraction, stages) of their tile: the tiles of its
# heuristics, and those that its table for an H100 has for some shapes.
TOKAMAX_RAGGED_TILES = {64: (64, 64, 128, 2), 96: (128, 64, 128, 2), 192: (128, 64, 128, 4)}
RAGGED_TILE = (128, 128, 64, 4)  # the same of jax's kernels, which have no default
GROUPED_TILES = {"tokamax_512": (512, 2048, 1024), "megablox": (512, 1024, 1024)}  # largest (rows, M, F) on a TPU


def _jax_mgpu_ragged_dot(workload: workloads.GroupedMatmul) -> Function:
    _check_divides("M", workload.M, 128)
    _check_divides("F", workload.F, 128)
    if workload.E > 32:
        raise NotImplementedError(f"it unrolls a loop over the groups, and {workload.E} are too many")
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu, transposed_ragged_dot_mgpu

    tiles = dict(zip(("block_m", "block_n", "block_k", "max_concurrent_steps"), RAGGED_TILE), grid_block_n=8)

    # It has no derivative, so the two products of the backward pass are written out.
    @jax.custom_vjp
    def matmul(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        return ragged_dot_mgpu.ragged_dot(x, w, group_sizes=sizes, **tiles)

    def forward(x: jax.Array, w: jax.Array, sizes: jax.Array) -> tuple[jax.Array, Any]:
        return matmul(x, w, sizes), (x, w, sizes)

    def backward(residuals: Any, dy: jax.Array) -> tuple[Any, ...]:
        x, w, sizes = residuals
        dx = ragged_dot_mgpu.ragged_dot(dy, w, group_sizes=sizes, transpose_rhs=True, **tiles)
        # It reads the number of SMs from the first device of this machine, which is not a GPU.
        h100 = types.SimpleNamespace(core_count=hardware.get("h100").num_sms)
        with mock.patch.object(jax, "devices", lambda: [h100]):
            dw = transposed_ragged_dot_mgpu.transposed_ragged_dot(x, dy, group_sizes=sizes, **tiles)
        return dx, dw.astype(w.dtype), None

    matmul.defvjp(forward, backward)
    return lambda inputs, aux: matmul(inputs["x"], inputs["w"], aux["group_sizes"])


def _tokamax_ragged_dot(workload: workloads.GroupedMatmul) -> Function:
    import tokamax

    return lambda inputs, aux: tokamax.ragged_dot(inputs["x"], inputs["w"], aux["group_sizes"], implementation="mosaic")


def _tokamax_large_tiles(workload: workloads.GroupedMatmul) -> Function:
    """Its TPU kernels with large tiles: its autotuner needs a TPU, and its heuristics choose small tiles."""
    from tokamax._src.ops.ragged_dot import pallas_mosaic_tpu_kernel as kernel

    rows, M, F = grouped_tile(workload, "tokamax_512")
    for name, tile in (("N", rows == 512), ("M", M), ("F", F)):
        if not tile:
            raise NotImplementedError(f"{name} does not divide into its tiles")
    options = {"precision": jax.lax.Precision.DEFAULT, "out_dtype": jnp.bfloat16}

    @jax.custom_vjp
    def matmul(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        return kernel.gmm(x, w, group_sizes=sizes, tiling=(512, M, F), **options)

    def backward(residuals: Any, dy: jax.Array) -> tuple[Any, ...]:
        x, w, sizes = residuals
        dx = kernel.gmm(dy, w, group_sizes=sizes, tiling=(512, F, M), transpose_rhs=True, **options)
        return dx, kernel.tgmm(x.swapaxes(0, 1), dy, group_sizes=sizes, tiling=(512, M, F), **options), None

    matmul.defvjp(lambda *inputs: (matmul(*inputs), inputs), backward)
    return lambda inputs, aux: matmul(inputs["x"], inputs["w"], aux["group_sizes"])


def _lax_ragged_dot(workload: workloads.GroupedMatmul) -> Function:
    return lambda inputs, aux: jax.lax.ragged_dot(inputs["x"], inputs["w"], aux["group_sizes"])


def _megablox(workload: workloads.GroupedMatmul) -> Function:
    from jax.experimental.pallas.ops.tpu.megablox import ops

    tiling = grouped_tile(workload, "megablox")
    for name, size, tile in zip("NMF", (workload.N, workload.M, workload.F), tiling):
        if not tile:
            raise NotImplementedError(f"{name} is {size}, no multiple of 128")
    return lambda inputs, aux: ops.gmm(inputs["x"], inputs["w"], aux["group_sizes"], inputs["x"].dtype, tiling)


def grouped_tile(workload: workloads.GroupedMatmul, implementation: str) -> tuple[int, int, int]:
    """(rows, M, F) of a tile of one of `GROUPED_TILES`; 0 for a size without a divisor."""
    rows, M, F = map(_largest_tile, (workload.N, workload.M, workload.F), GROUPED_TILES[implementation])
    return rows, M, F


def _largest_tile(size: int, limit: int) -> int:
    """The largest multiple of 128 up to `limit` that divides the size; 0 if there is none."""
    return next((tile for tile in range(limit, 0, -128) if size % tile == 0), 0)


# --- decoding ---


def _jax_decode(workload: workloads.Decode) -> Function:
    _check_features(workload, window=True)
    if workload.kv_dtype is not None:
        raise NotImplementedError("no rings in 8 bits")
    from jax.experimental.pallas.ops.gpu import decode_attention

    def call(inputs: dict[str, jax.Array], aux: dict[str, Any]) -> jax.Array:
        # It appends nothing and has no ring buffer: the cache counts as full up to its length.
        cache = aux["cache"]
        stop = jnp.minimum(cache.length + 1, workload.C)
        start = None if workload.window is None else jnp.maximum(stop - workload.window, 0)
        k, v = (x.swapaxes(1, 2) for x in (cache.k, cache.v))
        return decode_attention.gqa(inputs["q"], k, v, start_idx=start, kv_seq_len=stop, sm_scale=workload.scale)

    return call


GPUS = ("h100", "b200", "a100")
TPUS = ("v5e", "v6e", "tpu7x")

BASELINES: dict[str, Baseline] = {
    "tokamax": Baseline(
        (*GPUS, *TPUS), {"attention": _tokamax_attention, "grouped_matmul": _tokamax_ragged_dot}
    ),  # Mosaic GPU or Mosaic TPU
    "jax_mgpu": Baseline(
        ("h100",),
        {"attention": _jax_mgpu_attention, "grouped_matmul": _jax_mgpu_ragged_dot},
        ("float16",),
        {"grouped_matmul": ("bfloat16",)},
    ),
    "splash": Baseline(TPUS, {"attention": _splash}),
    "splash_512": Baseline(TPUS, {"attention": _splash_512}),
    "splash_fused": Baseline(TPUS, {"attention": _splash_fused}),
    "tokamax_512": Baseline(TPUS, {"grouped_matmul": _tokamax_large_tiles}, ("bfloat16",)),
    "megablox": Baseline(TPUS, {"grouped_matmul": _megablox}),
    "jax_nn": Baseline((*GPUS, *TPUS), {"attention": _jax_nn_attention}),
    "lax": Baseline((*GPUS, *TPUS), {"grouped_matmul": _lax_ragged_dot}),
    "jax_decode": Baseline(GPUS, {"decode_attention": _jax_decode}),
}


@functools.cache
def names(op: str, target: str) -> tuple[str, ...]:
    """Name the public kernels of an operation on a target."""
    return tuple(name for name, baseline in BASELINES.items() if op in baseline.build and target in baseline.targets)
