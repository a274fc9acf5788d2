"""Load the settings, or the model and the tokenizer, of a run."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax

from dantinox.checkpoint.manager import Checkpoints
from dantinox.config import Config, ConfigError, read_settings
from dantinox.data.tokenizer import Tokenizer, load_tokenizer
from dantinox.distributed.inference import inference_shardings
from dantinox.model import params
from dantinox.model.transformer import Transformer

log = logging.getLogger(__name__)


def find_run(run: str) -> Path:
    """Return the folder of a run given as a path or a name."""
    path = Path(run)
    return path if path.is_dir() or len(path.parts) != 1 else Path("runs") / run


def read_config(run: str | Path) -> Config:
    """Return the settings of a run.

    Raises:
        FileNotFoundError: the run does not exist.
        ConfigError: its settings are damaged, or a newer version wrote them.
    """
    run = Path(run)
    if not (run / "config.yaml").is_file():
        if (run / "config.json").is_file():
            raise FileNotFoundError(f"{run} is not a run but a model in the format of Hugging Face; give --from {run}")
        names = sorted(_run_names(run.parent))
        listing = f"runs in {run.parent}: {', '.join(names)}" if names else f"no runs in {run.parent}"
        raise FileNotFoundError(f"run {run} does not exist (it has no config.yaml); {listing}")
    path = run / "config.yaml"
    names = read_settings(path).keys()
    if not names:
        raise ConfigError(f"config {path}: has no settings; the file is damaged")
    if unknown := [name for name in names if name not in Config().flat()]:
        raise ConfigError(f"config {path}: unknown setting {unknown[0]!r}; a newer version may have written it")
    return Config.from_yaml(path, Config().replace(dtype="float32"))  # the default of runs that do not name theirs


def _run_names(folder: Path) -> Iterator[str]:
    return (path.parent.name for path in folder.glob("*/config.yaml") if path.is_file())


def load(
    run: str | Path,
    *,
    checkpoint: int | str = "last",
    mesh: str = "",
    param_dtype: Literal["float32", "bfloat16"] = "float32",
    **overrides: Any,
) -> tuple[Transformer, Tokenizer]:
    """Return (model, tokenizer) of a run, with the moving average of the weights if it has one.

    Args:
        run: the run's folder, such as runs/nano.
        checkpoint: "last" (the latest valid one), "best" (lowest validation loss) or a step, such as 400 or "400".
        mesh: devices to lay the model over, such as data=2,tensor=4; "": one device.
        param_dtype: dtype of the matrices; vectors, such as norms, are float32.
        overrides: model settings to change by name, such as decode="xla".

    Raises:
        ConfigError: param_dtype is another word; the mesh needs more devices, has another axis, or does not divide a
            size of the model.
        FileNotFoundError: the run or the checkpoint does not exist.
        ValueError: the checkpoint is corrupt, or for "last", all of them are; or `checkpoint` is another word.
    """
    if param_dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"param_dtype is {param_dtype!r}; allowed: float32, bfloat16")
    config = read_config(run).replace(**overrides)
    tokenizer = load_tokenizer(run)
    model_def, shapes = params.abstract_params(config.model)
    checkpoints = Checkpoints(Path(run), keep=config.train.max_checkpoints)
    if checkpoint == "last":
        step, metadata, errors = checkpoints.latest_valid()
        for error in errors:
            log.warning("%s; using step %d", error, step)
    else:
        step = _find_step(checkpoints, run, checkpoint)
        metadata = checkpoints.verify(step)
    if metadata.get("tokenizer") not in (None, tokenizer.fingerprint):
        raise ValueError(f"{Path(run) / 'tokenizer.json'} is not the tokenizer that the run was trained with")
    shardings = inference_shardings(params.param_axes(config.model), shapes, mesh)
    abstract_params = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[name]) for name, x in shapes.items()
    }
    weights = checkpoints.restore_weights(step, abstract_params, averaged=config.optim.ema_decay > 0)
    if param_dtype == "bfloat16":
        for name in [name for name, x in weights.items() if x.ndim > 1]:
            weights[name] = weights.pop(name).astype("bfloat16")
    return model_def.merge(weights), tokenizer


def _find_step(checkpoints: Checkpoints, run: str | Path, checkpoint: int | str) -> int:
    """Return the step that "best" or a number, as text too, names."""
    steps = checkpoints.steps()
    if not steps:
        raise FileNotFoundError(f"run {run} has no checkpoint yet")
    if checkpoint == "best":
        best = checkpoints.best()
        if best is None:
            raise FileNotFoundError(f"no checkpoint of run {run} has a validation loss; it has {_listing(steps)}")
        return best
    text = str(checkpoint)
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"checkpoint is {checkpoint!r}; allowed: last, best or a step: {_listing(steps)}")
    if int(text) not in steps:
        raise FileNotFoundError(f"run {run} has no checkpoint {text}; it has {_listing(steps)}")
    return int(text)


def _listing(steps: list[int]) -> str:
    return ", ".join(map(str, steps))
