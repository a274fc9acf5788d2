"""How a run is taken up again: what is restored, and what may have changed."""

import shlex
from pathlib import Path

from dantinox.checkpoint.manager import Checkpoints
from dantinox.config import Config, ConfigError, TrainConfig
from dantinox.metrics import logger as metrics_log
from dantinox.training.loop import Progress
from dantinox.training.train_step import TrainState
from dantinox.training.trainer import Trainer


def began_anew(run: Path, config: Config) -> None:
    """A run that was killed before it saved: its start is a function of its settings, so no checkpoint keeps it.

    Raises:
        FileNotFoundError: it must have had a checkpoint, and its metrics are not to be lost too.
    """
    told = max((row["step"] for row in metrics_log.read_metrics(run / "metrics.jsonl")), default=0)
    if told > (config.train.save_every or config.train.steps):
        raise FileNotFoundError(f"run {run} has no checkpoint, though it came to step {told}")
    print(f"run {run} has no checkpoint yet: it begins anew")


def restore(trainer: Trainer, run: Path) -> tuple[TrainState, int, Progress]:
    """(state, step, what the loop knew) of a run's newest intact checkpoint; damaged ones are moved out of the way.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: none is intact, or the text is not the one that the run was trained on.
    """
    checkpoints = Checkpoints(run, trainer.config.train.max_checkpoints)
    step, about, wrong = checkpoints.newest_intact()
    if about["corpus"] != trainer.corpus.path.name:
        raise ValueError(
            f"data {trainer.config.data.data!r} is not the text that run {run} was trained on: it has changed since; "
            "bring it back, or start another run"
        )
    current = checkpoints.restore(step, trainer.like())
    for error in wrong:
        print(f"{error}; going on from step {step}")
    for newer in [kept for kept in checkpoints.steps() if kept > step]:
        print(f"kept as {checkpoints.set_aside(newer)}")
    return current, step, Progress(**about["loop"])


def resume_command(config: Config) -> str:
    """What a user types to go on with a run."""
    words = ["python", "-m", "dantinox.train", "--run", config.train.run]
    if config.train.runs_dir != TrainConfig().runs_dir:
        words += ["--runs-dir", config.train.runs_dir]
    return shlex.join([*words, "--resume"])


def changes(config: Config, saved: Config) -> str:
    """Settings that a resumed run has otherwise, as `name old -> new; ...`; "" where it has none.

    Raises:
        ConfigError: naming each setting that cannot be another: it shapes the weights, the optimizer's state or the
            text.
    """
    free = {"attn", "moe", "decode", "kv_cache_dtype", "remat", "dropout", "router_aux_loss_coef", "router_z_loss_coef"}
    if config.model.pos_encoding != "learned":
        free.add("max_context")
    new, old = config.flat(), saved.flat()
    differ = {name: f"{name} {old[name]!r} -> {new[name]!r}" for name in new if new[name] != old[name]}
    fixed = {*vars(config.model), *vars(config.data), "optimizer"} - free
    if bool(config.optim.ema_decay) != bool(saved.optim.ema_decay):
        fixed.add("ema_decay")
    if wrong := [text for name, text in differ.items() if name in fixed]:
        raise ConfigError(f"--resume cannot change {'; '.join(wrong)}")
    # How often things are done, and with what, changes no number.
    quiet = {
        "runs_dir",
        "attn",
        "moe",
        "decode",
        "kv_cache_dtype",
        "max_checkpoints",
        "save_every",
        "profile_steps",
        "on_nan",
        "patience",
        "wandb",
    }
    return "; ".join(text for name, text in differ.items() if name not in quiet)
