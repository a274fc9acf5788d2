"""Data, model and compiled functions of a run; no files and no loop."""

from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dantinox.checkpoint.train_state import TrainState
from dantinox.config import Config, ConfigError
from dantinox.data.corpus import Corpus, eval_batches, get_batch, load_corpus
from dantinox.data.examples import load_examples
from dantinox.data.packing import PackedRows, first_rows, get_rows
from dantinox.data.tokenizer import DEFAULT_VOCAB, load_tokenizer_at
from dantinox.data.tokenizer_protocol import Tokenizer, prompt_ids
from dantinox.distributed import agreement, global_arrays, mesh, processes
from dantinox.inference import prefill
from dantinox.inference.generate import generate
from dantinox.kernels import first_use
from dantinox.model.lora import init_factors, split_trained
from dantinox.model.params import Params, abstract_params, split_params
from dantinox.model.transformer import Transformer
from dantinox.training.optimizer import make_optimizer, make_schedule
from dantinox.training.pretrained import pretrained_params
from dantinox.training.train_step import make_eval_step, make_train_step, state_shardings


@dataclass
class Trainer:
    """Data, model and step functions of one run; the constructor validates them before training."""

    config: Config
    prepared: Corpus | None = None  # replaces the text that the settings name
    corpus: Corpus = field(init=False)

    def __post_init__(self) -> None:
        c = self.config
        self.mesh = mesh.make_mesh(c.train.mesh_axes())
        processes.check_mesh(self.mesh)
        mesh.check_expert_exchange(c.train.expert_exchange, self.mesh)
        self.corpus = self.prepared or load_data(c)
        self.config = c = c.replace(vocab_size=self.vocab_size(), dtype=c.model.resolved_dtype)
        self.model_def, shapes = abstract_params(c.model)
        self.optimizer = make_optimizer(c.optim, c.train.steps)
        self.learning_rate = make_schedule(c.optim, c.train.steps)
        self.shapes = TrainState(
            shapes,
            jax.eval_shape(self.optimizer.init, split_trained(shapes)[0]),
            shapes if c.optim.ema_decay else None,
        )
        self.shardings = None if self.mesh is None else state_shardings(c, self.mesh, self.shapes)
        self.step = make_train_step(self.model_def, c, self.optimizer, self.mesh, self.shardings)
        self.eval_step = make_eval_step(
            self.model_def, c, self.mesh, None if self.shardings is None else self.shardings.params
        )
        self.eval_set = evaluation_set(self.corpus, c)
        self.check_implementations()

    def vocab_size(self) -> int:
        """Return the number of ids of the model: that of the tokenizer, or of the weights that the run begins with.

        Raises:
            ConfigError: the text has ids that the weights do not have.
        """
        size, corpus = self.corpus.tokenizer.vocab_size, self.corpus
        if not self.config.train.init_from:
            return size
        own = self.config.model.vocab_size
        if size > own and corpus.largest_id() >= own:
            raise ConfigError(f"the tokenizer has {size} ids, the model of {self.config.train.init_from} {own}")
        return own

    def check_implementations(self) -> None:
        """Raise if a named implementation does not support this model, before any file is written."""
        jax.eval_shape(self.eval_step, self.shapes.params, *self.eval_set[0])
        config = self.config.model
        if config.decode == "auto":
            return
        slots = prefill.layer_cache_slots(config, config.max_context)
        jax.eval_shape(
            lambda params: prefill.decode_step(
                self.model_def.merge(params), jnp.zeros(1, jnp.int32), prefill.init_caches(config, 1, slots)
            ),
            self.shapes.params,
        )

    def init_state(self) -> TrainState:
        """Return the initial parameters and optimizer state, sharded over the mesh."""
        seed = self.config.train.seed

        def state_of(params: Params) -> TrainState:
            factors = {name: x for name, x in self.shapes.params.items() if name not in params}
            params |= init_factors(factors, jax.random.key(seed))
            ema = jax.tree.map(jnp.copy, params) if self.config.optim.ema_decay else None
            return TrainState(params, self.optimizer.init(split_trained(params)[0]), ema)

        def init() -> TrainState:
            return state_of(split_params(Transformer(self.config.model, rngs=nnx.Rngs(seed)))[1])

        shardings = self.device_shardings()
        if self.config.train.init_from:
            params = pretrained_params(self.config, shardings.params)
            return jax.jit(state_of, out_shardings=shardings, donate_argnums=0)(params)
        return jax.jit(init, out_shardings=shardings)()

    def device_shardings(self) -> TrainState:
        """Return the sharding of each array of a train state."""
        single_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return self.shardings or jax.tree.map(lambda _: single_device, self.shapes)

    def abstract_state(self) -> TrainState:
        """Return the shapes and shardings of a train state, to restore one."""
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            self.shapes,
            self.device_shardings(),
        )

    def batch(self, step: int) -> tuple[np.ndarray | jax.Array, ...]:
        """Return (inputs, targets) of a step, and segments of examples, each [A, B, T] int32: A micro-batches.

        Of several processes each makes the rows of its own devices.
        """
        if self.mesh is None or processes.count() == 1:
            return self.host_batch(step)
        t = self.config.train
        numbers = np.arange(t.batch_size).reshape(t.grad_accum, -1)

        def rows(of_arrays: int, index: tuple[slice, ...]) -> np.ndarray:
            own = numbers[index[:2]]
            return self._rows(step, own.ravel())[of_arrays].reshape(*own.shape, t.seq_len)[..., index[2]]

        shape, sharding = (*numbers.shape, t.seq_len), mesh.batch_sharding(self.mesh)
        count = self.config.data.arrays_per_batch
        return tuple(jax.make_array_from_callback(shape, sharding, partial(rows, i)) for i in range(count))

    def host_batch(self, step: int) -> tuple[np.ndarray, ...]:
        """Return the whole batch of a step, as `batch` does for one process."""
        t = self.config.train
        return tuple(x.reshape(t.grad_accum, -1, t.seq_len) for x in self._rows(step))

    def _rows(self, step: int, rows: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
        t, train = self.config.train, self.corpus.train
        if isinstance(train, PackedRows):
            return get_rows(train, seed=t.seed, step=step, batch_size=t.batch_size, rows=rows)
        return get_batch(train, seed=t.seed, step=step, batch_size=t.batch_size, seq_len=t.seq_len, rows=rows)

    def validation_loss(self, params: Params) -> float:
        """Return the cross-entropy per token over the evaluation set, in nats."""
        losses = [(self.eval_step(params, *self._on_devices(*x)), int((x[1] >= 0).sum())) for x in self.eval_set]
        return sum(float(loss) * n for loss, n in losses) / sum(n for _, n in losses)

    def _on_devices(self, *arrays: np.ndarray) -> tuple[np.ndarray | jax.Array, ...]:
        if self.mesh is None or processes.count() == 1:
            return arrays
        sharding = jax.sharding.NamedSharding(self.mesh, mesh.batch_spec(self.mesh))
        return tuple(global_arrays.from_host(array, sharding) for array in arrays)

    def sample_text(self, params: Params, tokens: int) -> str:
        """Generate text from the start of a document; of several processes in the first."""
        if self.mesh is not None and processes.count() > 1:
            params = global_arrays.to_local_device(params, self.mesh)

            def generate_alone() -> str:
                with first_use.verdicts_by(None):
                    return self._generate(params, tokens)

            # The others wait here, not in a collective, which has a time limit of its own.
            return agreement.ask_first("a sample", generate_alone)
        # One sequence does not need many devices, and the kernels of TPUs and GPUs cannot be partitioned.
        return self._generate(jax.device_put(params, jax.sharding.SingleDeviceSharding(jax.local_devices()[0])), tokens)

    def _generate(self, params: Params, tokens: int) -> str:
        model, tokenizer = self.model_def.merge(params), self.corpus.tokenizer
        prompt = prompt_ids(tokenizer, "")
        count = min(tokens, self.config.model.max_context - len(prompt))
        ids = generate(model, [prompt], max_new_tokens=count, temperature=0.8, top_p=0.95, seed=0)
        return tokenizer.decode(ids[0])


def load_data(config: Config, tokenizer: Tokenizer | None = None) -> Corpus:
    """Return the text or the examples that the settings name, of a given tokenizer or of that of the settings."""
    data, seq_len = config.data, config.train.seq_len
    if not data.has_segments:
        return load_corpus(
            data.data,
            tokenizer=data.tokenizer,
            bpe_vocab_size=data.bpe_vocab_size,
            val_fraction=data.val_fraction,
            seq_len=seq_len,
            existing_tokenizer=tokenizer,
        )
    if tokenizer is None and data.tokenizer in DEFAULT_VOCAB:
        raise ConfigError(
            f"tokenizer is {data.tokenizer!r} with data_format 'examples'; allowed: the path of a tokenizer.json or of "
            "its folder, or --init-from DIR with one"
        )
    if config.train.mesh_axes().get("context", 1) > 1:
        raise ConfigError("data_format is 'examples', but the mesh cuts sequences; allowed: a mesh without context")
    tokenizer = tokenizer or load_tokenizer_at(data.tokenizer)
    return load_examples(data.data, tokenizer, val_fraction=data.val_fraction, seq_len=seq_len)


def evaluation_set(corpus: Corpus, config: Config) -> list[tuple[np.ndarray, ...]]:
    """Return the batches of the evaluation."""
    size, seq_len, count = config.train.batch_size, config.train.seq_len, config.train.eval_batches
    if isinstance(corpus.val, PackedRows):
        return list(first_rows(corpus.val, batch_size=size, n=count))
    return list(eval_batches(corpus.val, batch_size=size, seq_len=seq_len, n=count))
