"""One training step and one evaluation step as pure jitted functions of named arrays."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dantinox.checkpoint.train_state import TrainState
from dantinox.config import Config
from dantinox.distributed.collectives import per_device, separate_copies, sum_over_copies, sum_over_tokens
from dantinox.distributed.mesh import batch_sharding, batch_spec, parameter_shardings, replicated
from dantinox.model.lora import split_trained
from dantinox.model.moe import move_selection_biases, router_metrics
from dantinox.model.params import ModelDef, Params, param_axes

Array = jax.Array


def mean_over_targets(losses: Array, targets: Array, count: Array | float | None = None) -> Array:
    """Return the mean of the losses over targets >= 0; 0 if there are none.

    Args:
        losses: [...] float32; 0 where the target is negative.
        targets: [...] int32.
        count: divisor instead of the number of targets, such as the targets of a batch per micro-batch.
    """
    total = sum_over_tokens(jnp.sum(losses))
    return total / jnp.maximum(sum_over_tokens(jnp.sum(targets >= 0)) if count is None else count, 1)


def compute_loss(
    model_def: ModelDef,
    config: Config,
    params: Params,
    inputs: Array,
    targets: Array,
    key: Array | None,
    count: Array | float | None = None,
    segment_ids: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Compute the training loss of one micro-batch.

    Args:
        model_def: definition of the model.
        config: the settings.
        params: the parameters.
        inputs: [B, T] int32.
        targets: [B, T] int32.
        key: random key of dropout; None turns dropout off.
        count: as in `mean_over_targets`.
        segment_ids: as in `Transformer.hidden`.

    Returns:
        (objective, metrics). The metric loss is the cross-entropy without auxiliary losses; a sparse model adds balance
        and router_z, means over its layers, those of `router_metrics`, and the load [layers, E] that moves selection
        biases.
    """
    model = model_def.merge(params)
    h, router_stats = model.hidden(inputs, key=key, segment_ids=segment_ids)
    loss = mean_over_targets(model.token_losses(h, targets), targets, count)
    metrics = {"loss": loss}
    total = loss
    if router_stats is not None:
        metrics |= {"balance": router_stats.balance, "router_z": router_stats.z} | router_metrics(
            router_stats, config.model.experts_per_token, config.model.n_dense_layers
        )
        if config.model.selection_bias:
            metrics["load"] = router_stats.load
        total = (
            total
            + config.model.router_aux_loss_coef * router_stats.balance
            + config.model.router_z_loss_coef * router_stats.z
        )
    return total, metrics


def make_train_step(
    model_def: ModelDef,
    config: Config,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None = None,
    shardings: TrainState | None = None,
) -> Callable[[TrainState, Array, Array, Array], tuple[TrainState, dict[str, Array]]]:
    """Return the jitted function step(state, inputs, targets, step_number) -> (state, metrics); it donates the state.

    inputs and targets are [A, B, T] int32: A micro-batches, whose gradients a scan accumulates; negative targets are
    ignored. With examples for data, the segment of each token, [A, B, T] int32, comes after them. Dropout keys
    depend only on the seed, the step number and the micro-batch. If the loss or the norm of the gradient is not finite,
    the new state equals the old one, bit for bit.
    """
    A, num_arrays = config.train.grad_accum, config.data.arrays_per_batch
    root = jax.random.key(config.train.seed + 1)

    def micro_batch_gradients(
        params: Params, frozen: Params, inputs: Array, targets: Array, key: Array | None, count: Array, *segments: Array
    ) -> tuple[dict, Params]:
        def objective(params: Params) -> tuple[Array, dict[str, Array]]:
            return compute_loss(model_def, config, params | frozen, inputs, targets, key, count, *segments)

        (_, metrics), grads = jax.value_and_grad(objective, has_aux=True)(params)
        return metrics, grads

    def gradients(
        params: Params, frozen: Params, inputs: Array, targets: Array, key: Array | None, count: Array, *segments: Array
    ) -> tuple[dict, Params]:
        """Return metrics and gradients, averaged over the micro-batches; on a mesh, of one device's share."""
        with per_device(mesh, ragged=config.train.expert_exchange == "ragged"):
            params = separate_copies(params)  # their gradients are summed over the axis data once, at the end
            first = inputs[0], targets[0], key, count, *[x[0] for x in segments]
            if A == 1:
                metrics, grads = micro_batch_gradients(params, frozen, *first)
                return metrics, sum_over_copies(grads)

            def accumulate(total: Any, batch: tuple) -> tuple[Any, None]:
                x, y, i, *of_batch = batch
                micro_key = None if key is None else jax.random.fold_in(key, i)
                found = micro_batch_gradients(params, frozen, x, y, micro_key, count, *of_batch)
                return jax.tree.map(jnp.add, total, found), None

            shapes, _ = jax.eval_shape(micro_batch_gradients, params, frozen, *first)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), jax.tree.map(jnp.zeros_like, params)
            totals, _ = jax.lax.scan(accumulate, zeros, (inputs, targets, jnp.arange(A), *segments))
            metrics, grads = jax.tree.map(lambda x: x / A, totals)
            return metrics, sum_over_copies(grads)

    if mesh is not None and shardings is not None:
        trained_specs, frozen_specs = split_trained(jax.tree.map(lambda sharding: sharding.spec, shardings.params))
        tokens, everywhere = batch_spec(mesh, 1), PartitionSpec()
        gradients = jax.shard_map(
            gradients,
            mesh=mesh,
            in_specs=(
                trained_specs,
                frozen_specs,
                tokens,
                tokens,
                everywhere,
                everywhere,
                *[tokens] * (num_arrays - 2),
            ),
            out_specs=(everywhere, trained_specs),
        )

    def step(state: TrainState, inputs: Array, targets: Array, *rest: Array) -> tuple[TrainState, dict]:
        *segments, number = rest
        key = jax.random.fold_in(root, number) if config.model.dropout else None
        count = jnp.sum(targets >= 0, dtype=jnp.float32) / A
        trained, frozen = split_trained(state.params)
        metrics, grads = gradients(trained, frozen, inputs, targets, key, count, *segments)
        with jax.named_scope("optimizer"):
            grad_norm = optax.tree.norm(grads)
            finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
            with jax.numpy_dtype_promotion("standard"):  # Optax relies on it
                updates, opt_state = optimizer.update(grads, state.opt_state, trained)
            params = frozen | optax.apply_updates(trained, updates)
            if (load := metrics.pop("load", None)) is not None and not frozen:
                params = move_selection_biases(params, load, config.model)
            ema = state.ema
            if ema is not None:
                # A smaller decay in the first steps, so that the initial weights fade quickly.
                steps = number.astype(jnp.float32)
                decay = jnp.minimum(config.optim.ema_decay, (1 + steps) / (10 + steps))
                ema = optax.incremental_update(params, ema, 1 - decay)
            new = TrainState(params, opt_state, ema)
            new = jax.tree.map(lambda updated, old: jnp.where(finite, updated, old), new, state)
        return new, metrics | {"grad_norm": grad_norm, "finite": finite}

    if mesh is None:
        return jax.jit(step, donate_argnums=0)
    batch, replicated_sharding = batch_sharding(mesh), replicated(mesh)
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings, *[batch] * num_arrays, replicated_sharding),
        out_shardings=(shardings, replicated_sharding),
    )


def make_eval_step(
    model_def: ModelDef, config: Config, mesh: Mesh | None = None, shardings: Params | None = None
) -> Callable[[Params, Array, Array], Array]:
    """Return the jitted function evaluate(params, inputs, targets) -> cross-entropy per token, without dropout.

    inputs and targets are [B, T] int32; negative targets are ignored. Segments are one more argument, as in training.
    """

    def evaluate(params: Params, inputs: Array, targets: Array, segment_ids: Array | None = None) -> Array:
        with per_device(mesh, ragged=config.train.expert_exchange == "ragged"):
            model = model_def.merge(params)
            return mean_over_targets(
                model.token_losses(model.hidden(inputs, segment_ids=segment_ids)[0], targets), targets
            )

    if mesh is None:
        return jax.jit(evaluate)
    param_specs, tokens = jax.tree.map(lambda sharding: sharding.spec, shardings), batch_spec(mesh)
    num_arrays = config.data.arrays_per_batch
    in_specs = (param_specs, *[tokens] * num_arrays)
    sharded = jax.shard_map(evaluate, mesh=mesh, in_specs=in_specs, out_specs=PartitionSpec())
    batch = NamedSharding(mesh, tokens)
    return jax.jit(sharded, in_shardings=(shardings, *[batch] * num_arrays), out_shardings=replicated(mesh))


def state_shardings(config: Config, mesh: Mesh, state: TrainState) -> TrainState:
    """Return the shardings of a train state: the average and the moments are sharded like their parameters.

    Arrays of another shape (Adafactor's factors, counters) are replicated.
    """
    params = parameter_shardings(param_axes(config.model), state.params, mesh)
    replicated_sharding = replicated(mesh)

    trained, _ = split_trained(params)

    def has_param_names(node: Any) -> bool:
        return isinstance(node, dict) and node.keys() in (params.keys(), trained.keys())

    def param_sharding(name: str, arrays: Any) -> Any:
        shape = state.params[name].shape
        return jax.tree.map(lambda x: params[name] if x.shape == shape else replicated_sharding, arrays)

    def node_sharding(node: Any) -> Any:
        if not has_param_names(node):
            return replicated_sharding
        return {name: param_sharding(name, arrays) for name, arrays in node.items()}

    return TrainState(*jax.tree.map(node_sharding, tuple(state), is_leaf=has_param_names))
