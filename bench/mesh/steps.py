"""Compile the training step of a configuration for a mesh, from shapes alone."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bench.mesh.collectives import Collective, collectives, totals
from dantinox.checkpoint.train_state import TrainState
from dantinox.config import Config
from dantinox.distributed.mesh import batch_sharding, make_mesh, replicated
from dantinox.model.params import abstract_params
from dantinox.training.optimizer import make_optimizer
from dantinox.training.train_step import make_train_step, state_shardings


def lower_train_step(config: Config, devices: Sequence[jax.Device] | None = None) -> Any:
    """Lower the training step of `config` for its mesh.

    Args:
        config: the settings; the vocabulary is `config.model.vocab_size`.
        devices: the devices of the mesh, which need not exist; None: those of this machine.
    """
    mesh = make_mesh(config.train.mesh_axes(), devices)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):  # nothing runs on a device that does not exist
        model_def, params = abstract_params(config.model)
        optimizer = make_optimizer(config.optim, config.train.steps)
        ema = params if config.optim.ema_decay else None
        state = TrainState(params, jax.eval_shape(optimizer.init, params), ema)
        shardings = None if mesh is None else state_shardings(config, mesh, state)
        step = make_train_step(model_def, config, optimizer, mesh, shardings)
    A, B, T = config.train.grad_accum, config.train.batch_size, config.train.seq_len
    tokens, number = jax.ShapeDtypeStruct((A, B // A, T), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    if mesh is None or shardings is None:
        return step.lower(state, tokens, tokens, number)

    def laid(shapes: Any, sharding: Any) -> Any:
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, sharding)

    batch = batch_sharding(mesh)
    return step.lower(laid(state, shardings), laid(tokens, batch), laid(tokens, batch), laid(number, replicated(mesh)))


class StepCost(NamedTuple):
    """What a compiled training step costs one device.

    Attributes:
        temporary: bytes of temporary memory.
        arguments: bytes of the train state and the batch.
        exchanged: its collectives.
    """

    temporary: int
    arguments: int
    exchanged: list[Collective]

    def exchanged_text(self) -> str:
        """Return the count, the bytes and the largest array of each kind of collective."""
        parts = []
        for kind, (count, size) in sorted(totals(self.exchanged).items()):
            largest = max(one.largest for one in self.exchanged if one.kind == kind)
            parts.append(f"{kind} {count}, {size / 2**20:.1f} ({largest / 2**20:.2f})")
        return "; ".join(parts)


def step_cost(config: Config, devices: Sequence[jax.Device] | None = None) -> StepCost:
    """Compile the training step of `config` for its mesh and return what it costs; arguments as `lower_train_step`."""
    compiled = lower_train_step(config, devices).compile()
    memory = compiled.memory_analysis()
    return StepCost(memory.temp_size_in_bytes, memory.argument_size_in_bytes, collectives(compiled.as_text()))
