"""The public kernels and XLA programs that ours are compared with, one function per baseline.

A builder takes a workload and returns how to call the baseline, or raises `NotImplementedError` with the reason why it
cannot run it. What a baseline lacks and plain XLA can do after it (the output gate) is added; what would change its
algorithm (segments, softcap) is not.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dantinox.kernels.workloads.types import Attention, Decode, GroupedMatmul, LinearCrossEntropy, MoE, Workload

Tree = dict[str, Any]
Forward = Callable[[Tree, Tree, Tree], tuple[jax.Array, Tree]]  # (inputs, state, aux) -> (output, state)


@dataclass(frozen=True)
class Candidate:
    """What takes part in a benchmark case: one of our implementations, or a baseline.

    Attributes:
        name: its name in the reports.
        function: how to call it.
        unsupported_reason: why it cannot run the workload, or None.
    """

    name: str
    function: Forward | None
    unsupported_reason: str | None = None


def for_workload(workload: Workload) -> list[Candidate]:
    """List the baselines of a workload's operation."""
    baselines = []
    for name, build in BUILDERS[workload.op].items():
        try:
            baselines.append(Candidate(name, build(workload)))
        except NotImplementedError as error:
            baselines.append(Candidate(name, None, str(error)))
    return baselines


YARDSTICKS = ("one dense matmul",)  # they compute something else with the same FLOPs, and have no error


def _apply_gate(o: jax.Array, inputs: Tree) -> jax.Array:
    return o * jax.nn.sigmoid(inputs["gate"]) if "gate" in inputs else o


def _runs_on(*platforms: str) -> bool:
    return jax.default_backend() in platforms


# --- attention ---


def _jax_nn_cudnn(workload: Attention) -> Forward:
    if not _runs_on("gpu"):
        raise NotImplementedError("cuDNN needs an NVIDIA GPU")
    if workload.D > 256:
        raise NotImplementedError("cuDNN supports head dims up to 256")
    return _jax_nn(workload, "cudnn")


def _jax_nn_xla(workload: Attention) -> Forward:
    return _jax_nn(workload, "xla")


def _jax_nn(workload: Attention, implementation: str) -> Forward:
    if workload.softcap is not None or workload.segments is not None:
        raise NotImplementedError("no softcap and no segment ids")
    if workload.causal and workload.T != workload.S:
        raise NotImplementedError("aligns causal masks top-left")

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
        return _apply_gate(o, inputs), state

    return forward


def _splash(workload: Attention) -> Forward:
    if not _runs_on("cpu", "tpu"):
        raise NotImplementedError("splash runs on TPUs, and interpreted on a CPU")
    if workload.T != workload.S or workload.S % 128:
        raise NotImplementedError("needs T = S, a multiple of 128")
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    # On a CPU, blocks of 256 are the fastest with a window (measured). On a TPU, splash recommends 2048, 512 inside.
    block = min(workload.S, 256 if workload.window else 512) if _runs_on("cpu") else min(workload.S, 2048)
    inner = min(block, 512)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    sizes = splash_attention_kernel.BlockSizes(
        **dict.fromkeys(names, block), block_kv_compute=inner, block_kv_dkv_compute=inner
    )
    shape = (workload.T, workload.S)
    if not workload.causal:
        head_mask = splash_attention_mask.FullMask(shape)
    elif workload.window is None:
        head_mask = splash_attention_mask.CausalMask(shape)
    else:
        head_mask = splash_attention_mask.LocalMask(shape, (workload.window - 1, 0), 0)
    mask = splash_attention_mask.MultiHeadMask([head_mask] * workload.H)

    def forward(inputs: Tree, state: Tree, aux: Tree) -> tuple[jax.Array, Tree]:
        kernel = splash_attention_kernel.make_splash_mha_single_device(
            mask, block_sizes=sizes, attn_logits_soft_cap=workload.softcap, interpret=_runs_on("cpu")
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
        return _apply_gate(o.swapaxes(1, 2), inputs), state

    return forward


def _tokamax_attention(workload: Attention) -> Forward:
    if not importlib.util.find_spec("tokamax"):
        raise NotImplementedError("tokamax is not installed (make setup EXTRAS=peers)")
    if workload.segments is not None:
        raise NotImplementedError("no segment ids")
    if workload.causal and workload.T != workload.S:
        raise NotImplementedError("aligns causal masks top-left")

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
        return _apply_gate(o, inputs), state

    return forward


# --- grouped matmul and experts ---


def _dense(workload: GroupedMatmul) -> Forward:
    """One matmul with the first group's matrix: as many FLOPs, another result."""
    return lambda inputs, state, aux: (inputs["x"] @ inputs["w"][0], state)


def _ragged_dot(workload: GroupedMatmul) -> Forward:
    return lambda inputs, state, aux: (jax.lax.ragged_dot(inputs["x"], inputs["w"], aux["group_sizes"]), state)


def _megablox(workload: GroupedMatmul) -> Forward:
    if not _runs_on("cpu", "tpu"):
        raise NotImplementedError("megablox runs on TPUs, and interpreted on a CPU")
    if workload.N % 128 or workload.M % 128 or workload.F % 128:
        raise NotImplementedError("needs N, M and F to be multiples of 128")
    if _runs_on("cpu") and workload.sweep:
        raise NotImplementedError("left out of the sweeps when it is interpreted")
    if not _runs_on("cpu") and workload.M > 8192:
        raise NotImplementedError("its tiles would not fit into VMEM")
    from jax.experimental.pallas.ops.tpu.megablox import ops

    tiling = (512, min(workload.M, 1024), min(workload.F, 1024))

    def forward(inputs: Tree, state: Tree, aux: Tree) -> tuple[jax.Array, Tree]:
        x, w, sizes = inputs["x"], inputs["w"], aux["group_sizes"]
        return ops.gmm(x, w, sizes, x.dtype, tiling, interpret=_runs_on("cpu")), state

    return forward


def _tokamax_ragged_dot(workload: GroupedMatmul) -> Forward:
    if not importlib.util.find_spec("tokamax"):
        raise NotImplementedError("tokamax is not installed (make setup EXTRAS=peers)")

    def forward(inputs: Tree, state: Tree, aux: Tree) -> tuple[jax.Array, Tree]:
        import tokamax

        return tokamax.ragged_dot(inputs["x"], inputs["w"], jnp.asarray(aux["group_sizes"])), state

    return forward


def _ragged_moe(workload: MoE) -> Forward:
    """The plain JAX form: sort, gather, three ragged_dots, weight, sum the k rows of each token."""

    def forward(inputs: Tree, state: Tree, aux: Tree) -> tuple[jax.Array, Tree]:
        x, ids = inputs["x"], aux["expert_ids"]
        permutation = jnp.argsort(ids.reshape(-1), stable=True)
        sizes = jnp.bincount(ids.reshape(-1), length=workload.E).astype(jnp.int32)
        rows = x[permutation // workload.k]
        hidden = jax.nn.silu(jax.lax.ragged_dot(rows, inputs["w_gate"], sizes))
        hidden = hidden * jax.lax.ragged_dot(rows, inputs["w_up"], sizes)
        out = jax.lax.ragged_dot(hidden, inputs["w_down"], sizes)[jnp.argsort(permutation)]
        weights = inputs["expert_weights"].astype(x.dtype)
        return jnp.einsum("nkm,nk->nm", out.reshape(workload.N, workload.k, workload.M), weights), state

    return forward


# --- decoding ---


def _jax_nn_decode(workload: Decode) -> Forward:
    if workload.softcap is not None:
        raise NotImplementedError("no softcap")
    if workload.kv_dtype is not None:
        raise NotImplementedError("no 8-bit cache")
    if workload.window is not None or max(workload.lengths) >= workload.C:
        raise NotImplementedError("no ring buffer: only sequences that have not filled the cache")

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
        return _apply_gate(o[:, 0], inputs), {"k": keys, "v": values}

    return forward


# --- linear cross-entropy ---


def _all_logits(workload: LinearCrossEntropy) -> Forward:
    """All logits in memory, as optax.softmax_cross_entropy_with_integer_labels takes them."""

    def forward(inputs: Tree, state: Tree, aux: Tree) -> tuple[jax.Array, Tree]:
        s = jnp.einsum("NM,VM->NV", inputs["h"], inputs["w"], preferred_element_type=jnp.float32)
        if workload.softcap is not None:
            s = workload.softcap * jnp.tanh(s / workload.softcap)
        takes_part = aux["targets"] >= 0
        lse = jax.nn.logsumexp(s, axis=1)
        target = jnp.take_along_axis(s, jnp.where(takes_part, aux["targets"], 0)[:, None], axis=1)[:, 0]
        return jnp.where(takes_part, lse - target + workload.z_loss * lse**2, 0), state

    return forward


BUILDERS: dict[str, dict[str, Callable[[Any], Forward]]] = {
    "attention": {
        "jax.nn xla": _jax_nn_xla,
        "jax.nn cudnn": _jax_nn_cudnn,
        "splash": _splash,
        "tokamax": _tokamax_attention,
    },
    "grouped_matmul": {
        "one dense matmul": _dense,
        "lax.ragged_dot": _ragged_dot,
        "megablox": _megablox,
        "tokamax": _tokamax_ragged_dot,
    },
    "moe_mlp": {"lax.ragged_dot": _ragged_moe},
    "decode_attention": {"jax.nn xla": _jax_nn_decode},
    "linear_cross_entropy": {"all logits": _all_logits},
}
