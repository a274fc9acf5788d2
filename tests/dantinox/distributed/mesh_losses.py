"""Train a tiny model on meshes of simulated devices and on one; run as a program with the number of devices set."""

import json
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dantinox import Transformer
from dantinox.checkpoint.train_state import TrainState
from dantinox.config import Config
from dantinox.distributed.mesh import AXES, make_mesh
from dantinox.model import layer_loop
from dantinox.model.lora import init_factors, split_trained
from dantinox.model.params import abstract_params, split_params
from dantinox.training.optimizer import make_optimizer
from dantinox.training.train_step import make_eval_step, make_train_step, state_shardings

TINY = {
    "vocab_size": 64,
    "dim": 32,
    "n_layers": 2,
    "n_heads": 8,
    "n_kv_heads": 8,
    "head_dim": 8,
    "window": 6,
    "window_pattern": "SL",
    "max_context": 16,
    "seq_len": 16,
    "batch_size": 8,
    "lr": 1e-3,
    "attn": "xla",
    "moe": "xla",
}


def all_meshes(devices: int) -> list[str]:
    """Return every mesh over the five axes with this number of devices, a power of two."""

    def spread(devices: int, axes: Sequence[str]) -> list[list[str]]:
        if len(axes) == 1:
            return [[f"{axes[0]}={devices}"]]
        sizes = [1 << bit for bit in range(devices.bit_length())]
        return [[f"{axes[0]}={size}", *rest] for size in sizes for rest in spread(devices // size, axes[1:])]

    return [",".join(part for part in mesh if not part.endswith("=1")) for mesh in spread(devices, AXES)]


def run(mesh: str, settings: dict[str, Any]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return (the losses and metrics of two steps and of evaluations, the gradients of the first step)."""
    config = Config().replace(**(TINY | settings | {"mesh": mesh}))
    model_def, shapes = abstract_params(config.model)
    params = split_params(Transformer(config.model, rngs=nnx.Rngs(0)))[1]
    params |= init_factors({name: x for name, x in shapes.items() if name not in params}, jax.random.key(0))
    optimizer = make_optimizer(config.optim, config.train.steps)
    state = TrainState(params, optimizer.init(split_trained(params)[0]))
    laid = make_mesh(config.train.mesh_axes())
    shardings = None
    if laid is not None:
        shardings = state_shardings(config, laid, state)
        state = jax.device_put(state, shardings)
    step = make_train_step(model_def, config, optimizer, laid, shardings)
    evaluate = make_eval_step(model_def, config, laid, shardings and shardings.params)
    t, numbers, gradients = config.train, [], {}
    for number in range(2):
        rng = np.random.default_rng(number)
        shape = (t.grad_accum, t.batch_size // t.grad_accum, t.seq_len)
        inputs, targets = (rng.integers(0, config.model.vocab_size, shape, dtype=np.int32) for _ in range(2))
        targets[:, 0, : 5 + number] = -1
        numbers.append(float(evaluate(state.params, inputs[0], targets[0])))
        state, metrics = step(state, inputs, targets, jnp.int32(number))
        numbers += [float(metrics[name]) for name in sorted(metrics)]
        if not number:  # Adam's first moment is the gradient times 1 - beta1
            gradients = {name: np.asarray(x) for name, x in state.opt_state[1][0].mu.items()}
    return np.array(numbers), gradients


def main() -> None:
    """Compare the meshes of argv[1] with one device, with the settings of argv[2]; print the differences as JSON."""
    meshes, settings = json.loads(sys.argv[1]), json.loads(sys.argv[2])
    loop = settings.pop("loop", False)
    numbers, gradients = run("", settings)
    differences = {}
    if loop:  # what TPUs and GPUs run for deep models
        layer_loop.runs_as_loop = lambda config: True
    for mesh in meshes:
        other_numbers, other_gradients = run(mesh, settings)
        worst = max(np.abs(other_gradients[name] - g).max() / (np.abs(g).max() + 1e-9) for name, g in gradients.items())
        apart = np.abs(other_numbers - numbers) / np.maximum(np.abs(numbers), 1)
        differences[mesh] = [float(apart.max()), float(worst)]
        jax.clear_caches()
    print(json.dumps(differences))


if __name__ == "__main__":
    main()
