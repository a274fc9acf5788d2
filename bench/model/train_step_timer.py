"""Time the model's own training step on random tokens."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dantinox.checkpoint.train_state import TrainState
from dantinox.config import Config
from dantinox.model.params import split_params
from dantinox.model.transformer import Transformer
from dantinox.training.optimizer import make_optimizer
from dantinox.training.train_step import make_train_step


class TrainStepTimer:
    """A compiled training step of one config; each call runs one step and returns its seconds.

    The learning rate is so small that the parameters hardly change: the experts' work must not depend on how training
    on random tokens changes their router.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        model_def, params = split_params(Transformer(config.model, rngs=nnx.Rngs(0)))
        optimizer = make_optimizer(dataclasses.replace(config.optim, lr=1e-12), 1000)
        self._state = TrainState(params, jax.jit(optimizer.init)(params))
        self._rng, self._number = np.random.default_rng(0), 0
        self._compiled = make_train_step(model_def, config, optimizer).lower(self._state, *self._inputs()).compile()
        self()

    def _inputs(self) -> tuple[np.ndarray, np.ndarray, jax.Array]:
        train = self.config.train
        shape = (train.grad_accum, train.batch_size // train.grad_accum, train.seq_len)
        x, y = (self._rng.integers(0, self.config.model.vocab_size, shape, dtype=np.int32) for _ in range(2))
        return x, y, jnp.int32(self._number)

    def __call__(self) -> float:
        """Run one step and return its seconds."""
        inputs = self._inputs()
        start = time.perf_counter()
        self._state, _ = self._compiled(self._state, *inputs)
        jax.block_until_ready(self._state)
        self._number += 1
        return time.perf_counter() - start

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.config.train.batch_size * self.config.train.seq_len

    @property
    def peak_bytes(self) -> int:
        """Peak memory of the compiled step: arguments, results and temporaries, with donated arrays counted once."""
        memory = self._compiled.memory_analysis()
        total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        return int(total - memory.alias_size_in_bytes)
