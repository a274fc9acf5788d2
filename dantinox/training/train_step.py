"""One training step and one evaluation step as pure jitted functions of named arrays."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dantinox.checkpoint.params import ModelDef, Params
from dantinox.config import Config
from dantinox.distributed.mesh import batch_sharding, parameter_shardings, replicated
from dantinox.distributed.shard_map import batch_sharded_mesh
from dantinox.model.moe import router_metrics

Array = jax.Array


class TrainState(NamedTuple):
    """Everything that a step changes.

    Attributes:
        params: float32 arrays by dotted path.
        opt_state: optax's state.
        ema: the running average of params; None where `config.optim.ema_decay` is 0.
    """

    params: Params
    opt_state: Any
    ema: Params | None = None

    @property
    def weights(self) -> Params:
        """What is evaluated, sampled and loaded: the average where there is one."""
        return self.params if self.ema is None else self.ema


@jax.named_scope("loss")
def cross_entropy(logits: Array, targets: Array, count: Array | float | None = None) -> Array:
    """Mean of -log softmax(logits)[target] over the targets that count, in nats; 0 where none does.

    Args:
        logits: [..., V] float32.
        targets: [...] int32; those below 0 are padding and left out.
        count: divide by this many instead: of a micro-batch, its share of the targets of the whole batch.
    """
    # A masked sum, not a gather: its gradient needs no scatter, and XLA fuses both passes.
    V, counts = logits.shape[-1], targets >= 0
    right = jnp.sum(jnp.where(jnp.arange(V) == targets[..., None], logits, 0), axis=-1)
    nats = jnp.where(counts, jax.nn.logsumexp(logits, axis=-1) - right, 0)
    return jnp.sum(nats) / jnp.maximum(jnp.sum(counts) if count is None else count, 1)


def compute_loss(
    model_def: ModelDef,
    config: Config,
    params: Params,
    inputs: Array,
    targets: Array,
    key: Array | None,
    count: Array | float | None = None,
) -> tuple[Array, dict[str, Array]]:
    """(what is minimised, its parts) for one micro-batch [B, T]; loss is the cross-entropy alone.

    Parts of a sparse model: balance and router_z, means over its layers, and of each layer router/KIND.LAYER (see
    `moe.figures`). `count` as in `cross_entropy`.
    """
    model = model_def.merge(params)
    h, losses = model.hidden(inputs, key=key)
    loss = cross_entropy(model.logits(h), targets, count)
    metrics = {"loss": loss}
    total = loss
    if losses is not None:
        metrics |= {"balance": losses.balance, "router_z": losses.z} | router_metrics(
            losses, config.model.experts_per_token
        )
        total = total + config.model.router_aux_loss_coef * losses.balance + config.model.router_z_loss_coef * losses.z
    return total, metrics


def make_train_step(
    model_def: ModelDef,
    config: Config,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None = None,
    shardings: TrainState | None = None,
) -> Callable[[TrainState, Array, Array, Array], tuple[TrainState, dict[str, Array]]]:
    """step(state, inputs, targets, step_number) -> (state, metrics), jitted, the old state donated.

    inputs and targets are [A, B, T] int32: A micro-batches, walked by a scan that adds up their gradients; targets
    below 0 are left out. Dropout keys depend on (seed, step number, micro-batch) alone. Where the loss or the norm of
    the gradient is not finite, the new state is the old one, bit for bit.
    """
    A = config.train.grad_accum
    root = jax.random.key(config.train.seed + 1)

    def gradients(
        params: Params, inputs: Array, targets: Array, key: Array | None, count: Array
    ) -> tuple[dict, Params]:
        def objective(params: Params) -> tuple[Array, dict[str, Array]]:
            with batch_sharded_mesh(mesh, sharded=True):
                return compute_loss(model_def, config, params, inputs, targets, key, count)

        (_, metrics), grads = jax.value_and_grad(objective, has_aux=True)(params)
        return metrics, grads

    def step(state: TrainState, inputs: Array, targets: Array, number: Array) -> tuple[TrainState, dict]:
        key = jax.random.fold_in(root, number) if config.model.dropout else None
        count = jnp.sum(targets >= 0) / A
        if A == 1:
            metrics, grads = gradients(state.params, inputs[0], targets[0], key, count)
        else:

            def add(total: Any, batch: tuple) -> tuple[Any, None]:
                x, y, i = batch
                found = gradients(state.params, x, y, None if key is None else jax.random.fold_in(key, i), count)
                return jax.tree.map(jnp.add, total, found), None

            shapes = jax.eval_shape(gradients, state.params, inputs[0], targets[0], key, count)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            summed, _ = jax.lax.scan(add, zeros, (inputs, targets, jnp.arange(A)))
            metrics, grads = jax.tree.map(lambda x: x / A, summed)
        with jax.named_scope("optimizer"):
            grad_norm = optax.global_norm(grads)
            finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            ema = state.ema
            if ema is not None:
                # The first steps forget faster: the initial weights are no part of the average for long.
                decay = jnp.minimum(config.optim.ema_decay, (1 + number) / (10 + number))
                ema = optax.incremental_update(params, ema, 1 - decay)
            new = TrainState(params, opt_state, ema)
            new = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)
        return new, metrics | {"grad_norm": grad_norm, "finite": finite}

    if mesh is None:
        return jax.jit(step, donate_argnums=0)
    batch, whole = batch_sharding(mesh), replicated(mesh)
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings, batch, batch, whole),
        out_shardings=(shardings, whole),
    )


def make_eval_step(
    model_def: ModelDef, config: Config, mesh: Mesh | None = None, shardings: Params | None = None
) -> Callable[[Params, Array, Array], Array]:
    """evaluate(params, inputs, targets [B, T]) -> token-mean cross-entropy, dropout off, without auxiliary losses.

    Targets below 0 are left out.
    """

    def evaluate(params: Params, inputs: Array, targets: Array) -> Array:
        with batch_sharded_mesh(mesh, sharded=False):
            return cross_entropy(model_def.merge(params)(inputs), targets)

    if mesh is None:
        return jax.jit(evaluate)
    whole = replicated(mesh)
    return jax.jit(evaluate, in_shardings=(shardings, whole, whole), out_shardings=whole)


def state_shardings(config: Config, mesh: Mesh, state: TrainState) -> TrainState:
    """Shardings of a whole train state: an average and an optimizer's moments lie like their parameters.

    What has not the shape of its parameter (Adafactor's factors, counters) is whole on every device.
    """
    params = parameter_shardings(config.model, mesh)
    whole = replicated(mesh)

    def like_params(node: Any) -> bool:
        return isinstance(node, dict) and node.keys() == params.keys()

    def like(name: str, held: Any) -> Any:
        return jax.tree.map(lambda x: params[name] if x.shape == state.params[name].shape else whole, held)

    def lay(node: Any) -> Any:
        return {name: like(name, held) for name, held in node.items()} if like_params(node) else whole

    return TrainState(*jax.tree.map(lay, tuple(state), is_leaf=like_params))
