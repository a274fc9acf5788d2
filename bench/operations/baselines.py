"""The public kernels and XLA programs that ours are measured beside, one function an operation.

Each returns, for one row, name -> how to call it, or the reason why it cannot take that row. What a peer lacks and
plain XLA can add after it (the output gate) is added; what would change its algorithm (segments, soft cap) is not.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dantinox.kernels.workloads.types import Attention, Decode, GroupedMatmul, MoE, Workload

Tree = dict[str, Any]
Forward = Callable[[Tree, Tree, Tree], tuple[jax.Array, Tree]]  # (inputs, state, aux) -> (output, state)
Choice = Forward | str


def peers(workload: Workload) -> dict[str, Choice]:
    """The peers of a row's operation."""
    if isinstance(workload, Attention):
        return {
            "jax.nn xla": _jax_nn(workload, "xla"),
            "jax.nn cudnn": _jax_nn(workload, "cudnn"),
            "splash": _splash(workload),
            "tokamax": _tokamax_attention(workload),
        }
    if isinstance(workload, GroupedMatmul):
        return {
            "one dense matmul": _dense(workload),
            "lax.ragged_dot": _ragged_dot(workload),
            "megablox": _megablox(workload),
            "tokamax": _tokamax_ragged_dot(workload),
        }
    if isinstance(workload, MoE):
        return {"lax.ragged_dot": _ragged_moe(workload)}
    if isinstance(workload, Decode):
        return {"jax.nn xla": _jax_nn_decode(workload)}
    return {}


YARDSTICKS = ("one dense matmul",)  # the same FLOPs, another result: no error is given


def _gated(o: jax.Array, inputs: Tree) -> jax.Array:
    return o * jax.nn.sigmoid(inputs["gate"]) if "gate" in inputs else o


def _on(*platforms: str) -> bool:
    return jax.default_backend() in platforms


# --- attention ---


def _jax_nn(workload: Attention, implementation: str) -> Choice:
    if implementation == "cudnn":
        if not _on("gpu"):
            return "cuDNN needs an NVIDIA GPU"
        if workload.D > 256:
            return "cuDNN takes heads of at most 256"
    if workload.softcap is not None or workload.segments is not None:
        return "no soft cap and no segment ids"
    if workload.causal and workload.T != workload.S:
        return "aligns causal masks at the start"

    def forward(inputs: Tree, state: Tree, aux: Tree) -> tuple[jax.Array, Tree]:
        window = None if workload.window is None else (workload.window - 1, 0)
        o = jax.nn.dot_product_attention(
            inputs["q"],
            inputs["k"],
            inputs["v"],
            scale=workload.scale,
            is_causal=workload.causal,
            local_window_size=window,
            implementation=implementation,
        )
        return _gated(o, inputs), state

    return forward


def _splash(workload: Attention) -> Choice:
    if not _on("cpu", "tpu"):
        return "splash runs on TPUs, and interpreted on a CPU"
    if workload.T != workload.S or workload.S % 128:
        return "needs T = S, a multiple of 128"
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    # Measured: on a CPU 256-tiles are the best with a window; on a TPU its own advice is 2048 with 512 inside.
    block = min(workload.S, 256 if workload.window else 512) if _on("cpu") else min(workload.S, 2048)
    inner = min(block, 512)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    sizes = splash_attention_kernel.BlockSizes(
        **dict.fromkeys(names, block), block_kv_compute=inner, block_kv_dkv_compute=inner
    )
    shape = (workload.T, workload.S)
    if not workload.causal:
        one = splash_attention_mask.FullMask(shape)
    elif workload.window is None:
        one = splash_attention_mask.CausalMask(shape)
    else:
        one = splash_attention_mask.LocalMask(shape, (workload.window - 1, 0), 0)
    mask = splash_attention_mask.MultiHeadMask([one] * workload.H)

    def forward(inputs: Tree, state: Tree, aux: Tree) -> tuple[jax.Array, Tree]:
        kernel = splash_attention_kernel.make_splash_mha_single_device(
            mask, block_sizes=sizes, attn_logits_soft_cap=workload.softcap, interpret=_on("cpu")
        )
        scale = workload.D**-0.5 if workload.scale is None else workload.scale
        heads_first = [inputs[name].swapaxes(1, 2) for name in "qkv"]
        heads_first[0] = heads_first[0] * scale
        if workload.segments is None:
            o = jax.vmap(kernel)(*heads_first)
        else:
            ids = aux["segment_ids"]
            q_ids, kv_ids = ids if isinstance(ids, tuple) else (ids, ids)
            segments = splash_attention_kernel.SegmentIds(q=q_ids, kv=kv_ids)
            o = jax.vmap(kernel)(*heads_first, segments)
        return _gated(o.swapaxes(1, 2), inputs), state

    return forward


def _tokamax_attention(workload: Attention) -> Choice:
    if not importlib.util.find_spec("tokamax"):
        return "tokamax is not installed (make setup EXTRAS=peers)"
    if workload.segments is not None:
        return "no segment ids"
    if workload.causal and workload.T != workload.S:
        return "aligns causal masks at the start"

    def forward(inputs: Tree, state: Tree, aux: Tree) -> tuple[jax.Array, Tree]:
        import tokamax

        o = tokamax.dot_product_attention(
            inputs["q"],
            inputs["k"],
            inputs["v"],
            scale=workload.scale,
            is_causal=workload.causal,
            local_window_size=None if workload.window is None else (workload.window - 1, 0),
            logits_soft_cap=workload.softcap,
        )
        return _gated(o, inputs), state

    return forward


# --- grouped matmul and experts ---


def _dense(workload: GroupedMatmul) -> Choice:
    return lambda inputs, state, aux: (inputs["x"] @ inputs["w"][0], state)


def _ragged_dot(workload: GroupedMatmul) -> Choice:
    return lambda inputs, state, aux: (jax.lax.ragged_dot(inputs["x"], inputs["w"], aux["group_sizes"]), state)


def _megablox(workload: GroupedMatmul) -> Choice:
    if not _on("cpu", "tpu"):
        return "megablox runs on TPUs, and interpreted on a CPU"
    if workload.N % 128 or workload.M % 128 or workload.F % 128:
        return "needs N, M and F to be multiples of 128"
    if _on("cpu") and workload.sweep:
        return "interpreted, it is left out of the sweeps"
    if not _on("cpu") and workload.M > 8192:
        return "its tiles would not fit"
    from jax.experimental.pallas.ops.tpu.megablox import ops

    tiling = (512, min(workload.M, 1024), min(workload.F, 1024))

    def forward(inputs: Tree, state: Tree, aux: Tree) -> tuple[jax.Array, Tree]:
        x, w, sizes = inputs["x"], inputs["w"], aux["group_sizes"]
        return ops.gmm(x, w, sizes, x.dtype, tiling, interpret=_on("cpu")), state

    return forward


def _tokamax_ragged_dot(workload: GroupedMatmul) -> Choice:
    if not importlib.util.find_spec("tokamax"):
        return "tokamax is not installed (make setup EXTRAS=peers)"

    def forward(inputs: Tree, state: Tree, aux: Tree) -> tuple[jax.Array, Tree]:
        import tokamax

        return tokamax.ragged_dot(inputs["x"], inputs["w"], jnp.asarray(aux["group_sizes"])), state

    return forward


def _ragged_moe(workload: MoE) -> Choice:
    """What a user of plain JAX writes: sort, gather, three ragged_dots, weight, sum the k rows of a token."""

    def forward(inputs: Tree, state: Tree, aux: Tree) -> tuple[jax.Array, Tree]:
        x, ids = inputs["x"], aux["expert_ids"]
        order = jnp.argsort(ids.reshape(-1), stable=True)
        sizes = jnp.bincount(ids.reshape(-1), length=workload.E).astype(jnp.int32)
        rows = x[order // workload.k]
        hidden = jax.nn.silu(jax.lax.ragged_dot(rows, inputs["w_gate"], sizes))
        hidden = hidden * jax.lax.ragged_dot(rows, inputs["w_up"], sizes)
        out = jax.lax.ragged_dot(hidden, inputs["w_down"], sizes)[jnp.argsort(order)]
        weights = inputs["expert_weights"].astype(x.dtype)
        return jnp.einsum("nkm,nk->nm", out.reshape(workload.N, workload.k, workload.M), weights), state

    return forward


# --- decoding ---


def _jax_nn_decode(workload: Decode) -> Choice:
    if workload.softcap is not None:
        return "no soft cap"
    if workload.kv_dtype is not None:
        return "no rings in 8 bits"
    if workload.window is not None or max(workload.lengths) >= workload.C:
        return "no ring: only sequences that have not filled the cache"

    def forward(inputs: Tree, state: Tree, aux: Tree) -> tuple[jax.Array, Tree]:
        rows, length = np.arange(workload.B), aux["length"]
        keys = state["k"].at[rows, :, length].set(inputs["k"])
        values = state["v"].at[rows, :, length].set(inputs["v"])
        o = jax.nn.dot_product_attention(
            inputs["q"][:, None],
            keys.swapaxes(1, 2),
            values.swapaxes(1, 2),
            scale=workload.scale,
            key_value_seq_lengths=length + 1,
            implementation="xla",
        )
        return _gated(o[:, 0], inputs), {"k": keys, "v": values}

    return forward
