"""Checkpoints of a run, written whole or not at all (orbax), and the way back to a model."""

from pathlib import Path
from typing import Any

import jax

from dantinox import state
from dantinox.config import Config
from dantinox.model import Transformer
from dantinox.tokenizer import Tokenizer, load_tokenizer


class Checkpoints:
    """The checkpoints of one run folder: params and optimizer state by step, the newest `keep` of them."""

    def __init__(self, run: Path, keep: int = 3) -> None:
        # Orbax takes seconds to import; --help and --dry-run do without it.
        import orbax.checkpoint as ocp

        self._ocp = ocp
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager((run / "checkpoints").absolute(), options=options)

    def save(self, step: int, params: state.Params, opt_state: Any) -> None:
        """Write in the background; a step that is already there is left alone."""
        if step in self._manager.all_steps():
            return
        save = self._ocp.args.StandardSave
        # The optimizer's own tree of named tuples is rebuilt from the config: only its leaves are stored.
        leaves = {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(opt_state))}
        self._manager.save(step, args=self._ocp.args.Composite(params=save(params), opt=save(leaves)))

    def latest(self) -> int | None:
        """The newest whole step, None where there is none."""
        return self._manager.latest_step()

    def restore_params(self, step: int, like: Any) -> state.Params:
        """The parameters at `step`, with the shapes and shardings of `like`."""
        args = self._ocp.args.Composite(params=self._ocp.args.StandardRestore(like))
        return self._manager.restore(step, args=args)["params"]

    def restore(self, step: int, params: state.Params, opt_state: Any) -> tuple[state.Params, Any]:
        """(params, optimizer state) at `step`, with the shapes and shardings of those given."""
        leaves, tree = jax.tree.flatten(opt_state)
        restore = self._ocp.args.StandardRestore
        args = self._ocp.args.Composite(
            params=restore(params), opt=restore({str(i): leaf for i, leaf in enumerate(leaves)})
        )
        found = self._manager.restore(step, args=args)
        return found["params"], jax.tree.unflatten(tree, [found["opt"][str(i)] for i in range(len(leaves))])

    def close(self) -> None:
        """Wait until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def read_config(run: str | Path) -> Config:
    """The resolved settings of a run.

    Raises:
        FileNotFoundError: there is no such run.
    """
    run = Path(run)
    if not (run / "config.yaml").is_file():
        siblings = sorted(path.parent.name for path in run.parent.glob("*/config.yaml")) if run.parent.is_dir() else []
        known = f"runs in {run.parent}: {', '.join(siblings)}" if siblings else f"no runs in {run.parent}"
        raise FileNotFoundError(f"run {run} does not exist (it has no config.yaml); {known}")
    return Config.from_yaml(run / "config.yaml")


def load(run: str | Path, **overrides: Any) -> tuple[Transformer, Tokenizer]:
    """(model, tokenizer) of a run at its newest checkpoint.

    Args:
        run: the run's folder, such as runs/nano.
        overrides: model settings to change by name, such as decode="xla".

    Raises:
        FileNotFoundError: there is no such run, or it has no checkpoint yet.
    """
    config = read_config(run).replace(**overrides)
    tokenizer = load_tokenizer(run)
    skeleton, shapes = state.abstract(config.model)
    checkpoints = Checkpoints(Path(run), keep=config.train.keep)
    try:
        step = checkpoints.latest()
        if step is None:
            raise FileNotFoundError(f"run {run} has no checkpoint yet")
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        like = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for name, x in shapes.items()}
        return skeleton.join(checkpoints.restore_params(step, like)), tokenizer
    finally:
        checkpoints.close()
