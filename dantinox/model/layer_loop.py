"""Run the blocks of a model, one after the other or as a loop, and choose what the backward pass recomputes."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dantinox.config import ModelConfig
from dantinox.distributed import collectives
from dantinox.kernels import dispatch
from dantinox.model.moe import RouterStats
from dantinox.model.rope import Ropes

Array = jax.Array
MIN_REPEATS = 4  # of the period in a loop; fewer compile as fast without one

_REMAT: dict[str, Callable[[Any], Any]] = {
    "none": lambda f: f,
    "block": jax.checkpoint,
    "dots": lambda f: jax.checkpoint(f, policy=jax.checkpoint_policies.dots_saveable),
}


def remat(block: nnx.Module, config: ModelConfig) -> Callable[..., Any]:
    """Return a block whose backward pass recomputes what `config.remat` says, and gathers its weights again."""
    if config.remat == "none" and collectives.is_gathering():
        return jax.checkpoint(block, policy=collectives.save_all_but_gathered_weights)
    return _REMAT[config.remat](block)


def runs_as_loop(config: ModelConfig) -> bool:
    """Return whether the training step loops over the period of the patterns of layers instead of repeating its code.

    Compilers of TPUs and GPUs take minutes for many layers. The loop copies a device's share of the parameters, so it
    pays where a mesh cuts them.
    """
    repeats, rest = divmod(config.n_layers - _first_looped(config), config.period)
    return (
        rest == 0
        and repeats >= MIN_REPEATS
        and collectives.cuts_weights()
        and dispatch.current_device().platform != "cpu"  # XLA on a CPU compiles equal layers once
    )


def run_blocks(
    blocks: Sequence[nnx.Module],
    config: ModelConfig,
    h: Array,
    ropes: Ropes,
    key: Array | None,
    past: Sequence[Any] | None,
    segment_ids: Array | None = None,
) -> tuple[Array, list[RouterStats | None], list[tuple[Array, Array]]]:
    """Apply all blocks.

    Args:
        blocks: the blocks.
        config: the settings of the model.
        h: [B, T, M].
        ropes: of the positions.
        key: random key of dropout; None turns dropout off.
        past: per layer, the keys and values of earlier positions.
        segment_ids: [B, T], as in `Attention`.

    Returns:
        (h after the last block, per layer the router statistics, per layer the keys and values).
    """
    all_stats, kv = [], []
    for layer, block in enumerate(blocks):
        if collectives.is_gathering():  # weights are gathered when the block begins, not all of them at the start
            graph, state = nnx.split(block)
            h, state = jax.lax.optimization_barrier((h, state))
            block = nnx.merge(graph, state)
        layer_key = None if key is None else jax.random.fold_in(key, layer)
        with jax.named_scope(f"block{layer}"):
            h, stats, layer_kv = remat(block, config)(h, ropes, layer_key, past and past[layer], segment_ids)
        all_stats.append(stats)
        kv.append(layer_kv)
    return h, all_stats, kv


def loop_over_blocks(
    blocks: Sequence[nnx.Module],
    config: ModelConfig,
    h: Array,
    ropes: Ropes,
    key: Array | None,
    segment_ids: Array | None = None,
) -> tuple[Array, list[RouterStats | None]]:
    """Apply all blocks in a loop whose body is one period of the patterns of layers.

    The periods with a dense layer before those with experts run before it. Args and results are those of `run_blocks`,
    without keys and values.
    """
    period, first = config.period, _first_looped(config)
    h, first_stats, _ = run_blocks(blocks[:first], config, h, ropes, key, None, segment_ids)
    repeats = (len(blocks) - first) // period
    splits = [nnx.split(block) for block in blocks[first:]]
    graphs = [graph for graph, _ in splits[:period]]
    stacked = [
        jax.tree.map(lambda *arrays: jnp.stack(arrays), *[state for _, state in splits[place::period]])
        for place in range(period)
    ]

    def body(h: Array, xs: tuple[Array, list[Any]]) -> tuple[Array, list[RouterStats | None]]:
        repeat, states = xs
        all_stats = []
        for place, (graph, state) in enumerate(zip(graphs, states, strict=True)):
            layer_key = None if key is None else jax.random.fold_in(key, first + repeat * period + place)
            with jax.named_scope(f"block{place}"):
                h, stats, _ = remat(nnx.merge(graph, state), config)(h, ropes, layer_key, None, segment_ids)
            all_stats.append(stats)
        return h, all_stats

    h, all_stats = jax.lax.scan(body, h, (jnp.arange(repeats), stacked))
    looped = [jax.tree.map(lambda x, n=n: x[n // period], all_stats[n % period]) for n in range(repeats * period)]
    return h, first_stats + looped


def _first_looped(config: ModelConfig) -> int:
    """Return the first layer of the loop, after all periods with a dense layer among layers with experts."""
    dense = config.n_dense_layers if config.n_experts else 0
    return -(-dense // config.period) * config.period
