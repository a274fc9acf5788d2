"""Log to Weights & Biases (`--wandb`), if the extra is installed.

Environment variables of W&B choose the destination: WANDB_MODE=offline writes to the folder of the run only;
WANDB_PROJECT, WANDB_ENTITY and WANDB_RUN_GROUP are used as usual.
"""

import importlib.util
import math
import os
from pathlib import Path
from typing import Any

from dantinox.config import Config, ConfigError

ID_FILE = "wandb-id"  # in the folder of the run, which resumes under the same id


def require_wandb() -> None:
    """Raise `ConfigError` if the package is missing."""
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError("wandb is not installed; run pip install -c constraints.txt -e '.[wandb]', or omit --wandb")


class WandbLogger:
    """Context manager of one run at W&B: logs its settings, each row of metrics, and samples."""

    def __init__(self, run: Path, config: Config, resumed: bool) -> None:
        """Start a run at W&B.

        Args:
            run: folder of the run.
            config: the settings.
            resumed: resume the W&B run whose id is in the folder, if there is one.

        Raises:
            ConfigError: W&B raised an error, such as a missing login.
        """
        import wandb

        previous_id = (run / ID_FILE).read_text("utf-8").strip() if resumed and (run / ID_FILE).is_file() else None
        try:
            self._wandb = wandb
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "dantinox"),
                name=run.name,
                id=None if "WANDB_RUN_ID" in os.environ else previous_id,
                resume="allow" if previous_id else None,
                dir=str(run),
                config=config.flat() | {"folder": str(run)},
                settings=wandb.Settings(console="off", silent=True),
            )
        except (wandb.Error, OSError) as error:
            raise ConfigError(f"wandb: {' '.join(str(error).split())}") from None
        (run / ID_FILE).write_text(self._run.id + "\n", "utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Log a row of metrics; steps that a killed run has logged before are skipped."""
        if row["step"] >= self._run.step:
            self._run.log({name: math.nan if value is None else value for name, value in row.items()}, step=row["step"])

    def write_text(self, tag: str, text: str, step: int) -> None:
        """Log a generated text."""
        self._run.log({tag: self._wandb.Html(f"<pre>{_escaped(text)}</pre>")}, step=max(step, self._run.step))

    def __enter__(self) -> "WandbLogger":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Flush, and mark the run as finished or failed."""
        self._run.finish(exit_code=0 if kind is None else 1)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
