"""The public kernels we measure ourselves against, behind the same signature: (inputs, aux) -> output.

A builder takes a row and returns that function, or raises `NotImplementedError` with what the peer lacks for the row.
Peers are imported inside their builders: a worker pays for the ones it compiles.
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

Call = Callable[[dict[str, jax.Array], dict[str, Any]], Any]
Builder = Callable[[Any], Call]


@dataclass(frozen=True)
class Peer:
    """Where a peer runs, and its builder for each operation it has."""

    targets: tuple[str, ...]
    build: dict[str, Builder]
    dtypes: tuple[str, ...] = ("bfloat16", "float16")
    """What it takes, the one to measure it at first."""
    also: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    """What it takes besides, by operation."""

    def takes(self, op: str) -> tuple[str, ...]:
        """The dtypes of an operation."""
        return (*self.dtypes, *self.also.get(op, ()))


def _refuse(workload: Any, **limits: bool) -> None:
    """Raise with the names of the row's features that a peer does not have; keywords are feature=has it."""
    wanted = {
        "gate": getattr(workload, "gate", "none") != "none",
        "segments": getattr(workload, "segments", None) is not None,
        "softcap": getattr(workload, "softcap", None) is not None,
        "window": getattr(workload, "window", None) is not None,
    }
    lacks = [name for name, there in wanted.items() if there and not limits.get(name, False)]
    if lacks:
        raise NotImplementedError(f"no {' and no '.join(lacks)}")


def _divides(what: str, size: int, block: int) -> None:
    if size % block:
        raise NotImplementedError(f"{what} is {size}, no multiple of {block}")


# --- attention ---


def _jax_mgpu_attention(workload: workloads.Attention) -> Call:
    _refuse(workload)
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    block_q = 64
    block_kv = 64 if workload.D >= 256 else 128
    _divides("T", workload.T, 2 * block_q)
    _divides("S", workload.S, block_kv)
    _divides("D", workload.D, 64)
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
    # It has no scale of its own: neither 1 / sqrt(D) nor any other, so the queries bring it.
    scale = workload.D**-0.5 if workload.scale is None else workload.scale
    return lambda i, aux: attention_mgpu.attention(i["q"] * jnp.asarray(scale, i["q"].dtype), i["k"], i["v"], config)


def _tokamax_attention(workload: workloads.Attention) -> Call:
    _refuse(workload, window=True, softcap=True)
    import tokamax

    return _dot_product(
        workload, tokamax.dot_product_attention, logits_soft_cap=workload.softcap, implementation="mosaic"
    )


def _jax_nn_attention(workload: workloads.Attention) -> Call:
    _refuse(workload, window=True)
    return _dot_product(workload, jax.nn.dot_product_attention, implementation="xla")


def _dot_product(workload: workloads.Attention, attend: Callable[..., Any], **options: Any) -> Call:
    """A function of the signature of `jax.nn.dot_product_attention`."""
    window = None if workload.window is None else (workload.window - 1, 0)
    options |= {"is_causal": workload.causal, "local_window_size": window, "scale": workload.scale}
    return lambda i, aux: attend(i["q"], i["k"], i["v"], **options)


def _splash_512(workload: workloads.Attention) -> Call:
    if workload.window is None:
        raise NotImplementedError("blocks of 1024 take fewer bundles without a window")
    return _splash(workload, 512)


def _splash_fused(workload: workloads.Attention) -> Call:
    """dq, dk and dv in one kernel, which leaves a part of dq for each block of keys; XLA adds them up."""
    return _splash(workload, 1024 if workload.window is None else 512, fused=True)


def _splash(workload: workloads.Attention, block: int = 1024, fused: bool = False) -> Call:
    _refuse(workload, window=True, softcap=True, segments=True)
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    q_block, kv_block, compute = min(block, workload.T), min(block, workload.S), min(512, workload.S)
    _divides("T", workload.T, q_block)
    _divides("S", workload.S, kv_block)
    _divides("T", workload.T, 128)
    _divides("S", workload.S, 128)
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
        one = masks.LocalMask(shape, (workload.window - 1, 0), offset)
    elif workload.causal:
        one = masks.CausalMask(shape, offset)
    else:
        one = masks.FullMask(shape)
    G = workload.H // workload.K
    scale = workload.D**-0.5 if workload.scale is None else workload.scale

    def call(i: dict[str, jax.Array], aux: dict[str, Any]) -> jax.Array:
        run = kernel.make_splash_mqa(
            masks.MultiHeadMask([one] * G),
            block_sizes=blocks,
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=workload.softcap,
        )
        q = (i["q"] * scale).astype(i["q"].dtype)
        q = q.reshape(workload.B, workload.T, workload.K, G, workload.D).transpose(0, 2, 3, 1, 4)
        k, v = (i[name].transpose(0, 2, 1, 3) for name in "kv")
        ids = aux.get("segment_ids")
        if ids is None:
            o = jax.vmap(jax.vmap(run))(q, k, v)
        else:
            pair = ids if isinstance(ids, tuple) else (ids, ids)
            with_ids = lambda q, k, v, a, b: run(q, k, v, kernel.SegmentIds(a, b))
            o = jax.vmap(jax.vmap(with_ids, (0, 0, 0, None, None)))(q, k, v, *pair)
        return o.transpose(0, 3, 1, 2, 4).reshape(workload.out_shape())

    return call


# --- grouped matmul ---

# Of tokamax's kernels, by their KiB of shared memory: what its heuristics take, and what its table of an H100 has for
# some shapes.
TOKAMAX_RAGGED_TILES = {64: (64, 64, 128, 2), 96: (128, 64, 128, 2), 192: (128, 64, 128, 4)}
RAGGED_TILE = (128, 128, 64, 4)  # of jax's kernels: rows, columns, of the contraction, stages; it has no default
GROUPED_TILES = {"tokamax_512": (512, 2048, 1024), "megablox": (512, 1024, 1024)}  # on a TPU: rows, of M, of F at most


def _jax_mgpu_ragged_dot(workload: workloads.GroupedMatmul) -> Call:
    _divides("M", workload.M, 128)
    _divides("F", workload.F, 128)
    if workload.E > 32:
        raise NotImplementedError(f"it unrolls a loop over the groups, and {workload.E} are too many")
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu, transposed_ragged_dot_mgpu

    tiles = dict(zip(("block_m", "block_n", "block_k", "max_concurrent_steps"), RAGGED_TILE), grid_block_n=8)

    # It has no derivative: the two products of the backward pass are written out.
    @jax.custom_vjp
    def product(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        return ragged_dot_mgpu.ragged_dot(x, w, group_sizes=sizes, **tiles)

    def forward(x: jax.Array, w: jax.Array, sizes: jax.Array) -> tuple[jax.Array, Any]:
        return product(x, w, sizes), (x, w, sizes)

    def backward(kept: Any, dy: jax.Array) -> tuple[Any, ...]:
        x, w, sizes = kept
        dx = ragged_dot_mgpu.ragged_dot(dy, w, group_sizes=sizes, transpose_rhs=True, **tiles)
        # It takes the number of SMs from the first device of this machine, which is no GPU.
        h100 = types.SimpleNamespace(core_count=hardware.get("h100").cores)
        with mock.patch.object(jax, "devices", lambda: [h100]):
            dw = transposed_ragged_dot_mgpu.transposed_ragged_dot(x, dy, group_sizes=sizes, **tiles)
        return dx, dw.astype(w.dtype), None

    product.defvjp(forward, backward)
    return lambda i, aux: product(i["x"], i["w"], aux["group_sizes"])


def _tokamax_ragged_dot(workload: workloads.GroupedMatmul) -> Call:
    import tokamax

    return lambda i, aux: tokamax.ragged_dot(i["x"], i["w"], aux["group_sizes"], implementation="mosaic")


def _tokamax_tiles(workload: workloads.GroupedMatmul) -> Call:
    """Its TPU kernels at large tiles: its autotuner needs the TPU, and its heuristics take small ones."""
    from tokamax._src.ops.ragged_dot import pallas_mosaic_tpu_kernel as kernel

    rows, M, F = grouped_tile(workload, "tokamax_512")
    for name, tile in (("N", rows == 512), ("M", M), ("F", F)):
        if not tile:
            raise NotImplementedError(f"{name} does not divide into its tiles")
    options = {"precision": jax.lax.Precision.DEFAULT, "out_dtype": jnp.bfloat16}

    @jax.custom_vjp
    def product(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        return kernel.gmm(x, w, group_sizes=sizes, tiling=(512, M, F), **options)

    def backward(kept: Any, dy: jax.Array) -> tuple[Any, ...]:
        x, w, sizes = kept
        dx = kernel.gmm(dy, w, group_sizes=sizes, tiling=(512, F, M), transpose_rhs=True, **options)
        return dx, kernel.tgmm(x.swapaxes(0, 1), dy, group_sizes=sizes, tiling=(512, M, F), **options), None

    product.defvjp(lambda *kept: (product(*kept), kept), backward)
    return lambda i, aux: product(i["x"], i["w"], aux["group_sizes"])


def _lax_ragged_dot(workload: workloads.GroupedMatmul) -> Call:
    return lambda i, aux: jax.lax.ragged_dot(i["x"], i["w"], aux["group_sizes"])


def _megablox(workload: workloads.GroupedMatmul) -> Call:
    from jax.experimental.pallas.ops.tpu.megablox import ops

    tiling = grouped_tile(workload, "megablox")
    for name, size, tile in zip("NMF", (workload.N, workload.M, workload.F), tiling):
        if not tile:
            raise NotImplementedError(f"{name} is {size}, no multiple of 128")
    return lambda i, aux: ops.gmm(i["x"], i["w"], aux["group_sizes"], i["x"].dtype, tiling)


def grouped_tile(workload: workloads.GroupedMatmul, implementation: str) -> tuple[int, int, int]:
    """(rows, of M, of F) of a tile of one of `GROUPED_TILES`; 0 where nothing divides the size."""
    rows, M, F = map(_tile, (workload.N, workload.M, workload.F), GROUPED_TILES[implementation])
    return rows, M, F


def _tile(size: int, most: int) -> int:
    """The largest multiple of 128 up to `most` that divides the size; 0 where there is none."""
    return next((tile for tile in range(most, 0, -128) if size % tile == 0), 0)


# --- decoding ---


def _jax_decode(workload: workloads.Decode) -> Call:
    _refuse(workload, window=True)
    if workload.kv_dtype is not None:
        raise NotImplementedError("no rings in 8 bits")
    from jax.experimental.pallas.ops.gpu import decode_attention

    def call(i: dict[str, jax.Array], aux: dict[str, Any]) -> jax.Array:
        # It attends to a plain cache and appends nothing: the ring is taken as full up to its length.
        cache = aux["cache"]
        stop = jnp.minimum(cache.length + 1, workload.C)
        start = None if workload.window is None else jnp.maximum(stop - workload.window, 0)
        k, v = (x.swapaxes(1, 2) for x in (cache.k, cache.v))
        return decode_attention.gqa(i["q"], k, v, start_idx=start, kv_seq_len=stop, sm_scale=workload.scale)

    return call


GPUS = ("h100", "b200", "a100")
TPUS = ("v5e", "v6e", "tpu7x")

PEERS: dict[str, Peer] = {
    "tokamax": Peer(
        (*GPUS, *TPUS), {"attention": _tokamax_attention, "grouped_matmul": _tokamax_ragged_dot}
    ),  # Mosaic GPU or Mosaic TPU
    "jax_mgpu": Peer(
        ("h100",),
        {"attention": _jax_mgpu_attention, "grouped_matmul": _jax_mgpu_ragged_dot},
        ("float16",),
        {"grouped_matmul": ("bfloat16",)},
    ),
    "splash": Peer(TPUS, {"attention": _splash}),
    "splash_512": Peer(TPUS, {"attention": _splash_512}),
    "splash_fused": Peer(TPUS, {"attention": _splash_fused}),
    "tokamax_512": Peer(TPUS, {"grouped_matmul": _tokamax_tiles}, ("bfloat16",)),
    "megablox": Peer(TPUS, {"grouped_matmul": _megablox}),
    "jax_nn": Peer((*GPUS, *TPUS), {"attention": _jax_nn_attention}),
    "lax": Peer((*GPUS, *TPUS), {"grouped_matmul": _lax_ragged_dot}),
    "jax_decode": Peer(GPUS, {"decode_attention": _jax_decode}),
}


@functools.cache
def names(op: str, target: str) -> tuple[str, ...]:
    """The peers that have the operation on the target."""
    return tuple(name for name, peer in PEERS.items() if op in peer.build and target in peer.targets)
