"""Train a model on text: `python -m dantinox.train`.

Everything a run writes lies in runs/NAME: config.yaml, tokenizer.json, metrics.jsonl, tensorboard/, checkpoints/,
summary.txt, loss.png. Batches are a pure function of (seed, step), so a run is resumed from its step number alone.
"""

import contextlib
import logging
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import kernels
from dantinox import cli, count, data, host, metrics, optim, sharding, state, summary
from dantinox.checkpoint import Checkpoints, read_config
from dantinox.config import Config, ConfigError, presets
from dantinox.generation import generate
from dantinox.model import Transformer
from dantinox.progress import ProgressLine
from dantinox.step import TrainState, make_eval_step, make_train_step, state_shardings

PROG = "dantinox-train"


@dataclass(frozen=True)
class Arguments:
    """Flags beyond the settings."""

    settings: Config
    preset: str | None = None
    """Settings to start from; --config and flags are laid over them."""
    config: str | None = None
    """A YAML file of `name: value` lines, laid over the preset."""
    resume: bool = False
    """Go on from the newest checkpoint of --run, with the settings of that run."""
    dry_run: bool = False
    """Say what the configuration costs (parameters, FLOPs, compiled memory, cache) and stop."""
    verbose: bool = False
    """Say which implementations were chosen, and show tracebacks."""


def parse(argv: Sequence[str]) -> Arguments:
    """Settings from the preset, then --config, then flags; a resumed run starts from its own settings instead."""
    with cli.user_errors(PROG):
        preset, file = cli.value_of(argv, "--preset"), cli.value_of(argv, "--config")
        run = cli.value_of(argv, "--run")
        if "--resume" in argv and run and not preset and not file:
            base = read_config(Path(cli.value_of(argv, "--runs-dir", "--runs_dir") or "runs") / run)
        else:
            base = Config.from_preset(preset or "nano")
            if file is not None:
                base = Config.from_yaml(file, base)
        return cli.parse(
            Arguments,
            argv,
            default=Arguments(base.loose(), preset=preset, config=file),
            prog=PROG,
            description=f"Train a DantinoX model. Presets: {', '.join(presets())} (default: nano).",
        )


@dataclass
class Trainer:
    """One run: its data, model and step functions. Building it checks everything that can be checked early."""

    config: Config
    corpus: data.Corpus = field(init=False)

    def __post_init__(self) -> None:
        c = self.config
        self.mesh = sharding.make_mesh(c.train.mesh_axes())
        self.corpus = data.prepare(
            c.data.data,
            tokenizer=c.data.tokenizer,
            bpe_vocab=c.data.bpe_vocab,
            val_fraction=c.data.val_fraction,
            seq_len=c.train.seq_len,
        )
        self.config = c = c.replace(vocab_size=self.corpus.tokenizer.vocab_size)
        self.skeleton, shapes = state.abstract(c.model)
        self.optimizer = optim.optimizer(c.optim, c.train.steps)
        self.learning_rate = optim.schedule(c.optim, c.train.steps)
        self.shapes = TrainState(shapes, jax.eval_shape(self.optimizer.init, shapes))
        self.shardings = None if self.mesh is None else state_shardings(c, self.mesh, self.shapes)
        self.step = make_train_step(self.skeleton, c, self.optimizer, self.mesh, self.shardings)
        self.evaluate = make_eval_step(
            self.skeleton, c, self.mesh, None if self.shardings is None else self.shardings.params
        )
        self.eval_set = data.eval_batches(
            self.corpus.val, batch_size=c.train.batch_size, seq_len=c.train.seq_len, n=c.train.eval_batches
        )
        self.check_implementations()

    def check_implementations(self) -> None:
        """A named implementation that cannot serve this model is refused before anything is written."""
        jax.eval_shape(self.evaluate, self.shapes.params, *self.eval_set[0])
        reason = kernels.implementations("decode_attention").get(self.config.model.decode)
        if reason is not None:
            raise NotImplementedError(f"decode_attention: implementation={self.config.model.decode!r}: {reason}")

    def initial(self) -> TrainState:
        """Fresh parameters and optimizer state, laid over the mesh."""

        def build() -> TrainState:
            _, params = state.split(Transformer(self.config.model, rngs=nnx.Rngs(self.config.train.seed)))
            return TrainState(params, self.optimizer.init(params))

        return jax.jit(build, out_shardings=self.shardings)()

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, targets), each [A, B, T] int32: the batch of a step, cut into micro-batches."""
        t = self.config.train
        pair = data.batch(self.corpus.train, seed=t.seed, step=step, batch_size=t.batch_size, seq_len=t.seq_len)
        return tuple(x.reshape(t.grad_accum, -1, t.seq_len) for x in pair)

    def validation_loss(self, params: state.Params) -> float:
        """Token-mean cross-entropy over the fixed evaluation set, in nats."""
        losses = [(self.evaluate(params, x, y), x.size) for x, y in self.eval_set]
        return sum(float(loss) * n for loss, n in losses) / sum(n for _, n in losses)

    def sample(self, params: state.Params, tokens: int) -> str:
        """Text that the model writes from the start of a document."""
        model, tokenizer = self.skeleton.join(params), self.corpus.tokenizer
        room = self.config.model.max_context - 1
        ids = generate(
            model, [[tokenizer.eos_id]], max_new_tokens=min(tokens, room), temperature=0.8, top_p=0.95, seed=0
        )
        return tokenizer.decode(ids[0])


def prepare_run(config: Config, resume: bool) -> Path:
    """The run's folder. An older run of that name is kept beside it as NAME.1, NAME.2, ..."""
    run = Path(config.train.runs_dir) / config.train.run
    if run.exists() and not resume:
        number = 1
        while (kept := run.with_name(f"{run.name}.{number}")).exists():
            number += 1
        run.rename(kept)
        print(f"{run} was there already; it is now {kept}")
    run.mkdir(parents=True, exist_ok=True)
    return run


def train(config: Config, resume: bool = False) -> Path:
    """Run the training that `config` describes and return its folder.

    Raises:
        ConfigError, ValueError, FileNotFoundError: a setting, the data or the run to resume is not fit.
        KeyboardInterrupt: after Ctrl-C, once the state is saved.
    """
    trainer = Trainer(config)
    config = trainer.config
    folder = Path(config.train.runs_dir) / config.train.run
    if resume:
        check_same_model(config, read_config(folder))
    run = prepare_run(config, resume)
    checkpoints = Checkpoints(run, config.train.keep)
    with contextlib.closing(checkpoints):
        current, first = trainer.initial(), 0
        if resume:
            first = checkpoints.latest()
            if first is None:
                raise FileNotFoundError(f"run {run} has no checkpoint to resume from")
            current = TrainState(*checkpoints.restore(first, *current))
        text = summary.describe(config)
        print(text)
        stats = trainer.corpus.stats
        print(
            f"{'data':14} {config.data.data}: {len(trainer.corpus.train):,} tokens to train on, "
            f"{len(trainer.corpus.val):,} held out; unigram entropy {stats.unigram_entropy:.3f} nats a token"
        )
        (run / "summary.txt").write_text(text + "\n")
        (run / "config.yaml").write_text(config.to_yaml())
        trainer.corpus.tokenizer.save(run)
        log = metrics.MetricsLog(run, resume_at=first)
        with contextlib.closing(log):
            Loop(trainer, run, checkpoints, log).run(current, first)
    metrics.plot_loss(run, config.train.run, stats.unigram_entropy)
    return run


@dataclass
class Loop:
    """The steps of a run, and what happens between them."""

    trainer: Trainer
    run_dir: Path
    checkpoints: Checkpoints
    log: metrics.MetricsLog

    def run(self, current: TrainState, first: int) -> None:
        """Train from step `first` to the last one; the last state is always saved, after Ctrl-C too."""
        t = self.trainer.config.train
        self.peak = metrics.matmul_rate(self.trainer.config.model.dtype) * max(1, _devices(self.trainer))
        traced, tracing = t.profile_range(), False
        with stop_request() as stop, ProgressLine(t.steps, first) as self.progress:
            self.mark, self.marked = time.perf_counter(), first
            for step in range(first + 1, t.steps + 1):
                if traced and step == traced[0]:
                    jax.profiler.start_trace(str(self.run_dir / "tensorboard"))
                    tracing = True
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    current, parts = self.trainer.step(current, *self.trainer.batch(step - 1), jnp.int32(step - 1))
                if tracing and (step == min(traced[1], t.steps) or stop):
                    jax.block_until_ready(current)
                    jax.profiler.stop_trace()
                    tracing = False
                self.after(step, current, parts)
                if stop and step < t.steps:
                    self.checkpoints.save(step, *current)
                    self.progress.say(f"interrupted; step {step} is saved. Go on with --run {t.run} --resume")
                    raise KeyboardInterrupt

    def after(self, step: int, current: TrainState, parts: dict[str, jax.Array]) -> None:
        """Log, evaluate, sample and save, each at its own pace and all of them at the last step."""
        t = self.trainer.config.train
        last = step == t.steps

        def due(every: int) -> bool:
            return last or (every > 0 and step % every == 0)

        row = None
        if due(t.log_every) or due(t.eval_every) or step == 1:
            row = {"step": step, "loss": 0.0} | {name: float(value) for name, value in parts.items()}
            row["lr"] = float(self.trainer.learning_rate(step - 1))
            row |= self.rates(step)
            self.progress.update(step, row)
        if due(t.eval_every):
            row["val_loss"] = self.trainer.validation_loss(current.params)
            self.progress.say(f"step {step}: validation loss {row['val_loss']:.4f}")
        if row is not None:
            self.log.write(row)
        if due(t.save_every):
            self.checkpoints.save(step, *current)
        if due(t.sample_every) and t.sample_tokens:
            text = self.trainer.sample(current.params, t.sample_tokens)
            self.progress.say(f"--- sample at step {step} ---\n{text}\n---")
            self.log.text("sample", text, step)
        if row is not None:
            self.mark, self.marked = time.perf_counter(), step

    def rates(self, step: int) -> dict[str, float]:
        """Tokens a second since the last row, and the share of the device's measured matmul rate that makes."""
        c = self.trainer.config
        seconds = time.perf_counter() - self.mark
        tokens = (step - self.marked) * c.train.batch_size * c.train.seq_len / seconds
        return {
            "tokens_per_s": tokens,
            "mfu": tokens * count.flops_per_token(c.model, c.train.seq_len) / self.peak,
        }


@contextlib.contextmanager
def stop_request() -> Iterator[list[int]]:
    """A list that the first Ctrl-C makes non-empty, so that the running step is finished; the second one interrupts."""
    asked: list[int] = []

    def handle(number: int, _: object) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    # Only the main thread may listen; elsewhere Ctrl-C stays with whoever owns it.
    listening = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, handle) if listening else None
    try:
        yield asked
    finally:
        if listening:
            signal.signal(signal.SIGINT, before)


def _devices(trainer: Trainer) -> int:
    # Simulated CPU devices share the cores that the peak was measured on.
    return 1 if trainer.mesh is None or jax.default_backend() == "cpu" else trainer.mesh.size


def check_same_model(config: Config, saved: Config) -> None:
    """A run is resumed with the model and data that it was made of.

    Raises:
        ConfigError: naming each setting that differs.
    """
    free = {"attn", "moe", "decode", "remat", "dropout", "balance_coef", "router_z_coef", "max_context"}
    new, old = config.flat(), saved.flat()
    fixed = [*vars(config.model), *vars(config.data)]
    changed = [f"{n} {old[n]!r} -> {new[n]!r}" for n in fixed if n not in free and new[n] != old[n]]
    if changed:
        raise ConfigError(f"--resume cannot change {'; '.join(changed)}")


def dry_run(config: Config) -> None:
    """Print what the configuration costs; nothing is trained or written to runs/."""
    trainer = Trainer(config)
    print(summary.describe(trainer.config))
    print(summary.compiled_memory(trainer.step, trainer.shapes, trainer.config))


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns the exit code."""
    host.keep_freed_memory()
    arguments = parse(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    if arguments.verbose:
        for name in ("kernels", "dantinox"):
            logging.getLogger(name).setLevel(logging.INFO)
    try:
        with cli.user_errors(PROG, arguments.verbose):
            if arguments.dry_run:
                dry_run(arguments.settings)
            else:
                run = train(arguments.settings, arguments.resume)
                print(f"\nsaved {run}. Let it write: python -m dantinox.generate --run {run} --prompt 'def '")
    except KeyboardInterrupt:
        return 130
    return 0


def program() -> NoReturn:
    """`main` as a console script."""
    cli.console(main)


if __name__ == "__main__":
    program()
