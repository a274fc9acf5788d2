"""Weights & Biases beside our own metrics, where the extra is installed: `--wandb`.

W&B decides by its own environment where it goes: WANDB_MODE=offline keeps everything in the run's folder,
WANDB_PROJECT, WANDB_ENTITY and WANDB_RUN_GROUP place it.
"""

import importlib.util
import math
import os
from pathlib import Path
from typing import Any

from dantinox.config import Config, ConfigError

ID = "wandb-id"  # in the run's folder: a run that goes on is the same one at W&B


def require_wandb() -> None:
    """Raise `ConfigError` where the package is missing, before anything is written."""
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError("wandb is not installed; pip install -c constraints.txt -e '.[wandb]', or leave --wandb out")


class WandbLogger:
    """One run at W&B: its config and folder, each row of metrics at its step, and samples. A context manager."""

    def __init__(self, run: Path, config: Config, resumed: bool) -> None:
        """`resumed`: go on with the W&B run whose id lies in the folder, if there is one.

        Raises:
            ConfigError: W&B refused, for want of a login for instance.
        """
        import wandb

        known = (run / ID).read_text().strip() if resumed and (run / ID).is_file() else None
        try:
            self._wandb = wandb
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "dantinox"),
                name=run.name,
                id=None if "WANDB_RUN_ID" in os.environ else known,
                resume="allow" if known else None,
                dir=str(run),
                config=config.flat() | {"folder": str(run)},
                settings=wandb.Settings(console="off", silent=True),
            )
        except (wandb.Error, OSError) as error:
            raise ConfigError(f"wandb: {' '.join(str(error).split())}") from None
        (run / ID).write_text(self._run.id + "\n")

    def write(self, row: dict[str, Any]) -> None:
        """A row of metrics. Steps that a killed run told of before are the same numbers, and are left out."""
        if row["step"] >= self._run.step:
            self._run.log({name: math.nan if value is None else value for name, value in row.items()}, step=row["step"])

    def text(self, tag: str, text: str, step: int) -> None:
        """A text that the model wrote."""
        self._run.log({tag: self._wandb.Html(f"<pre>{_escaped(text)}</pre>")}, step=max(step, self._run.step))

    def __enter__(self) -> "WandbLogger":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Send or write what is left, and whether the run came to its end."""
        self._run.finish(exit_code=0 if kind is None else 1)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
