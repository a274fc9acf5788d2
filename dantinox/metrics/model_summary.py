"""Cost of a configuration before it runs: parameters, FLOPs, compiled memory, KV cache."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from dantinox.config import Config, ModelConfig
from dantinox.model import flops
from dantinox.model.lora import split_trained
from dantinox.model.params import abstract_params


def describe(config: Config) -> str:
    """Describe the model in a few aligned lines; nothing is compiled."""
    m, T = config.model, config.train.seq_len
    windows = [m.layer_window(layer) for layer in range(m.n_layers)]
    attention = ", ".join(
        f"{windows.count(w)} x {'full' if w is None else f'window {w}'}" for w in dict.fromkeys(windows)
    )
    dense = "dense" if m.moe == "auto" else f"dense: without n_experts, moe {m.moe!r} serves nothing"
    experts = _experts(m) if m.n_experts else dense
    heads = f"{m.n_heads} heads over {m.n_kv_heads} kv heads of {m.resolved_head_dim}"
    biases = ", biases" if m.attn_out_bias else ", biases of q, k and v"
    extras = "".join(text for on, text in ((m.attn_bias, biases), (m.attn_sinks, ", sinks")) if on)
    rows = {
        "model": f"{m.n_layers} blocks, width {m.dim}, vocabulary {m.vocab_size:,}, {m.resolved_dtype}",
        "attention": f"{heads}; {attention}; gate {m.attn_gate}{extras}",
        "mlp": f"{m.mlp}, hidden {m.hidden}, {experts}",
        "parameters": f"{flops.total_parameters(m):,} total, {flops.active_parameters(m):,} active per token",
        "FLOPs per token": f"{flops.flops_per_token(m, T):,.0f} in training at length {T}",
        "FLOPs per step": f"{flops.flops_per_token(m, T) * config.train.batch_size * T:,.0f}",
        "KV cache": f"{flops.kv_bytes_per_token(m):,} bytes per token; "
        f"{flops.kv_cache_bytes(m, m.max_context, 1):,} bytes per sequence of {m.max_context}",
    }
    if m.lora_rank:
        trained, _ = split_trained(abstract_params(m)[1])
        count = sum(math.prod(x.shape) for x in trained.values())
        rows["LoRA"] = f"{count:,} trained parameters: rank {m.lora_rank} of {m.lora_targets}; the rest is frozen"
    return "\n".join(f"{name:15} {text}" for name, text in rows.items())


def _experts(m: ModelConfig) -> str:
    """Describe the experts of a model and what is beside them."""
    text = f"{m.n_experts} experts, {m.experts_per_token} per token"
    if m.shared_expert:
        text += f", a shared one of hidden {m.shared_hidden}"
    if m.n_dense_layers:
        text += f"; first {m.n_dense_layers} layers dense, hidden {m.dense_hidden}"
    return text + (f"; {m.router} router" if m.router != "softmax" else "")


def compiled_memory(step: Any, state: Any, config: Config) -> str:
    """Compile one training step from shapes alone and report its memory."""
    micro = config.train.batch_size // config.train.grad_accum
    tokens = jax.ShapeDtypeStruct((config.train.grad_accum, micro, config.train.seq_len), jnp.int32)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    batch = (tokens,) * config.data.arrays_per_batch
    memory = step.lower(state, *batch, number).compile().memory_analysis()
    if memory is None:
        return f"{'memory':15} not reported by this backend"
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    peak -= memory.alias_size_in_bytes
    return (
        f"{'memory':15} {peak / 2**20:,.1f} MiB per device at the peak of a step: "
        f"{memory.argument_size_in_bytes / 2**20:,.1f} state and batch, "
        f"{memory.temp_size_in_bytes / 2**20:,.1f} temporary"
    )
