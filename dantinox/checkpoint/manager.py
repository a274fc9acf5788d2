"""Atomic, checksummed checkpoints of a run."""

import errno
import logging
import math
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import jax

from dantinox.checkpoint import log_filters, manifest, params
from dantinox.checkpoint.manifest import CorruptCheckpointError
from dantinox.training.train_step import TrainState

PARTIAL = ".partial-"
log = logging.getLogger(__name__)


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; those before it are as they were."""


class Checkpoints:
    """The checkpoints of one run folder, by step: checkpoints/STEP holds Orbax's state/ and manifest.json.

    A checkpoint is written beside the others, its checksums last, and gets its name in one rename. Only then are
    older ones deleted: `keep` of those that were due stay, and the one of the best validation loss. Nothing in them is
    ever unpickled: arrays are raw bytes, the rest is JSON.
    """

    def __init__(self, run: Path, keep: int = 3) -> None:
        # Orbax takes seconds to import; --help and --dry-run do without it.
        import orbax.checkpoint as ocp

        log_filters.install_log_filters()
        self._ocp, self.keep = ocp, keep
        self.display_path = run / "checkpoints"  # in messages, as the user named it
        self.folder = self.display_path.absolute()
        self._writer: Any = None
        self._thread: threading.Thread | None = None
        self._failure: CheckpointWriteError | None = None

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, damaged or not, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit())

    def best(self) -> int | None:
        """The step of the lowest validation loss among those kept; None where none was evaluated."""
        losses = {step: metadata["val_loss"] for step, metadata in self._all_metadata().items()}
        known = {step: loss for step, loss in losses.items() if loss is not None and math.isfinite(loss)}
        return min(known, key=known.get, default=None)

    def save(self, step: int, current: TrainState, metadata: dict[str, Any], due: bool = True) -> None:
        """Copy the state and write it in the background; returns before it is on disk (see `wait`).

        A step that has its checkpoint already is left alone.

        Args:
            metadata: stored with it as JSON; `val_loss` is the validation loss of this step, or None.
            due: False for one that is kept only while its validation loss is the best.

        Raises:
            CheckpointWriteError: there is not room enough, or an earlier save has failed.
        """
        self.wait()
        if step in self.steps():
            return
        if self._writer is None:
            self._writer = self._ocp.AsyncCheckpointer(self._ocp.PyTreeCheckpointHandler())
        partial = self.folder / f"{PARTIAL}{step}"
        try:
            for old in self.folder.glob(f"{PARTIAL}*"):  # of a run that was killed
                shutil.rmtree(old)
            partial.mkdir(parents=True)
            needed, free = _bytes(current), shutil.disk_usage(self.folder).free
            if free < needed:
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {_mb(needed)} needed, {_mb(free)} free")
            self._writer.save(partial / "state", args=self._ocp.args.PyTreeSave(_tree(current)))
        except Exception as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise self._not_saved(step, error) from error
        metadata = {"step": step, "val_loss": None, "due": due} | metadata
        self._thread = threading.Thread(target=self._finish, args=(step, partial, metadata), name=f"save {step}")
        self._thread.start()

    def _finish(self, step: int, partial: Path, metadata: dict[str, Any]) -> None:
        try:
            self._writer.wait_until_finished()
            manifest.write(partial, metadata)
            partial.rename(self.folder / str(step))
            _sync(self.folder)
            self._prune()
        except Exception as error:
            shutil.rmtree(partial, ignore_errors=True)
            self._failure = self._not_saved(step, error)

    def _not_saved(self, step: int, error: Exception) -> CheckpointWriteError:
        # Tensorstore's errors are long and begin with its own words; the system's stand last in them.
        text = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        if os.strerror(errno.ENOSPC) in text and not isinstance(error, OSError):
            text = os.strerror(errno.ENOSPC)
        kept = [kept for kept in self.steps() if kept != step]
        intact = f"the checkpoint of step {kept[-1]} is as it was" if kept else "there is no earlier checkpoint"
        return CheckpointWriteError(f"step {step} could not be saved in {self.display_path}: {text[:300]}; {intact}")

    def _prune(self) -> None:
        metadata = self._all_metadata()
        stay = set(sorted(step for step, told in metadata.items() if told["due"])[-self.keep :])
        stay |= {self.best()}
        for step in metadata.keys() - stay:
            shutil.rmtree(self.folder / str(step))

    def update_metadata(self, step: int, metadata: dict[str, Any]) -> None:
        """Merge into the metadata of a valid checkpoint."""
        self.wait()
        folder = self.folder / str(step)
        manifest.write(folder, self.verify(step) | metadata)

    def _all_metadata(self) -> dict[int, dict[str, Any]]:
        """The metadata of each checkpoint with a valid manifest; its other files are not verified."""
        found = {}
        for step in self.steps():
            try:
                found[step] = manifest.read(self.folder / str(step))["about"]
            except CorruptCheckpointError:
                continue
        return found

    def wait(self) -> None:
        """Until the save under way is on disk.

        Raises:
            CheckpointWriteError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def verify(self, step: int) -> dict[str, Any]:
        """Verify every file of a checkpoint and return its metadata.

        Raises:
            CorruptCheckpointError: it is not; the message is one line.
        """
        try:
            return manifest.verify(self.folder / str(step))
        except CorruptCheckpointError as error:
            raise CorruptCheckpointError(f"checkpoint {self.display_path / str(step)} is damaged: {error}") from None

    def latest_valid(self) -> tuple[int, dict[str, Any], list[CorruptCheckpointError]]:
        """The latest checkpoint that verifies: (step, its metadata, the errors of newer ones).

        Raises:
            FileNotFoundError: there is no checkpoint.
            CorruptCheckpointError: none is intact; the message names them all.
        """
        wrong: list[CorruptCheckpointError] = []
        for step in reversed(self.steps()):
            try:
                return step, self.verify(step), wrong
            except CorruptCheckpointError as error:
                wrong.append(error)
        if wrong:
            raise CorruptCheckpointError("; ".join(map(str, wrong)) + "; no other checkpoint is left")
        raise FileNotFoundError(f"run {self.display_path.parent} has no checkpoint yet")

    def quarantine(self, step: int) -> Path:
        """Move a corrupt checkpoint to damaged/STEP beside checkpoints/ and return its new path."""
        folder = self.display_path.parent / "damaged"
        folder.mkdir(exist_ok=True)
        names = (folder / (f"{step}.{number}" if number else str(step)) for number in range(1000))
        kept = next(path for path in names if not path.exists())
        return (self.folder / str(step)).rename(kept)

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state at `step`, which must be valid, with the shapes, dtypes and shardings of `like`."""
        found = self._restore(step, _tree(like))
        leaves, tree = jax.tree.flatten(like.opt_state)
        opt_state = jax.tree.unflatten(tree, [found["opt"][str(i)] for i in range(len(leaves))])
        return TrainState(found["params"], opt_state, found.get("ema"))

    def restore_weights(self, step: int, like: params.Params, averaged: bool) -> params.Params:
        """The parameters at `step`, or their running average, and nothing else of it."""
        name = "ema" if averaged else "params"
        return self._restore(step, {name: like})[name]

    def _restore(self, step: int, like: Any) -> Any:
        ocp = self._ocp
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            arguments = ocp.checkpoint_utils.construct_restore_args(like)
            return reader.restore(
                self.folder / str(step) / "state",
                args=ocp.args.PyTreeRestore(item=like, restore_args=arguments, partial_restore=True),
            )

    def close(self) -> None:
        """Wait until everything is on disk.

        Raises:
            CheckpointWriteError: the last save could not be written.
        """
        try:
            self.wait()
        finally:
            if self._writer is not None:
                self._writer.close()
                self._writer = None


def _tree(current: TrainState) -> dict[str, Any]:
    """The stored tree. Only the leaves of the optimizer state: its structure follows from the config."""
    opt = {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(current.opt_state))}
    return {"params": current.params, "opt": opt} | ({} if current.ema is None else {"ema": current.ema})


def _bytes(current: TrainState) -> int:
    """An upper bound of the size of a checkpoint on disk."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(current)) * 21 // 20 + (1 << 18)


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
