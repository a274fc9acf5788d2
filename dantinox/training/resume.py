"""Resume a run: restore its state and check which settings changed."""

import shlex
from pathlib import Path

from dantinox.checkpoint.manager import Checkpoints
from dantinox.checkpoint.train_state import TrainState
from dantinox.config import Config, ConfigError, TrainConfig
from dantinox.metrics import logger as metrics_log
from dantinox.training.loop import LoopState
from dantinox.training.trainer import Trainer


def check_restart_from_scratch(run: Path, config: Config) -> None:
    """Check that a run without a checkpoint may restart: it was killed before its first save.

    Raises:
        FileNotFoundError: the run got past its first checkpoint, so restarting would overwrite its metrics.
    """
    last_step = max((row["step"] for row in metrics_log.read_metrics(run / "metrics.jsonl")), default=0)
    if last_step > (config.train.save_every or config.train.steps):
        raise FileNotFoundError(f"run {run} has no checkpoint, although it reached step {last_step}")
    print(f"run {run} has no checkpoint yet; starting from scratch")


def restore_run(trainer: Trainer, run: Path) -> tuple[TrainState, int, LoopState]:
    """Restore a run from its latest valid checkpoint and quarantine newer, corrupt ones.

    Returns:
        (state, step, loop state).

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: all checkpoints are corrupt, or the text is not the one that the run was trained on.
    """
    checkpoints = Checkpoints(run, trainer.config.train.max_checkpoints)
    step, metadata, errors = checkpoints.latest_valid()
    if metadata["corpus"] != trainer.corpus.path.name:
        raise ValueError(
            f"data {trainer.config.data.data!r} is not the text that run {run} was trained on; "
            "restore the text, or start another run"
        )
    state = checkpoints.restore(step, trainer.abstract_state())
    for error in errors:
        print(f"{error}; resuming from step {step}")
    for newer_step in [other for other in checkpoints.steps() if other > step]:
        print(f"moved it to {checkpoints.quarantine(newer_step)}")
    return state, step, LoopState(**metadata["loop"])


def resume_command(config: Config) -> str:
    """Return the command that resumes a run."""
    words = ["python", "-m", "dantinox.train", "--run", config.train.run]
    if config.train.runs_dir != TrainConfig().runs_dir:
        words += ["--runs-dir", config.train.runs_dir]
    return shlex.join([*words, "--resume"])


def diff_settings(config: Config, saved: Config) -> str:
    """Return the settings that differ from the saved run, as `name old -> new; ...`; "" if there are none.

    Raises:
        ConfigError: naming each changed setting that the weights, the optimizer state or the text depend on.
    """
    changeable = {
        "attn",
        "moe",
        "decode",
        "kv_cache_dtype",
        "remat",
        "dropout",
        "router_aux_loss_coef",
        "router_z_loss_coef",
    }
    if config.model.pos_encoding != "learned":
        changeable.add("max_context")
    new, old = config.flat(), saved.flat()
    differ = {name: f"{name} {old[name]!r} -> {new[name]!r}" for name in new if new[name] != old[name]}
    fixed = {*vars(config.model), *vars(config.data), "optimizer"} - changeable
    if bool(config.optim.ema_decay) != bool(saved.optim.ema_decay):
        fixed.add("ema_decay")
    if refused := [text for name, text in differ.items() if name in fixed]:
        raise ConfigError(f"--resume cannot change {'; '.join(refused)}")
    # Settings that do not affect the numerics.
    no_effect_on_numerics = {
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
    return "; ".join(text for name, text in differ.items() if name not in no_effect_on_numerics)
