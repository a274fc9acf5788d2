"""Atomic, checksummed checkpoints of a run."""

import errno
import logging
import math
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from dantinox.checkpoint import log_filters, manifest, shared_save
from dantinox.checkpoint.manifest import CorruptCheckpointError
from dantinox.checkpoint.train_state import TrainState
from dantinox.distributed import processes
from dantinox.distributed.agreement import AgreedError, ask_first, everywhere
from dantinox.model import params

PARTIAL = ".partial-"
log = logging.getLogger(__name__)


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; earlier ones are intact."""


class Checkpoints:
    """The checkpoints of one run: the folder checkpoints/STEP contains Orbax's state/ and manifest.json.

    A checkpoint is written to a temporary folder, its checksums last, and then renamed. Afterwards older ones are
    deleted, except the newest `keep` of those that were due and the one with the best validation loss. Loading never
    unpickles: arrays are raw bytes, everything else is JSON.
    """

    def __init__(self, run: Path, keep: int = 3, check_lock: Callable[[], None] = lambda: None) -> None:
        """Open the checkpoints of a run.

        Args:
            run: folder of the run.
            keep: number of due checkpoints to keep.
            check_lock: raises unless this process may write; called before each write.
        """
        # Importing Orbax takes seconds; --help and --dry-run do not need it.
        import orbax.checkpoint as ocp

        log_filters.install_log_filters()
        self._ocp, self.keep, self._check_lock = ocp, keep, check_lock
        self.display_path = run / "checkpoints"  # for messages, as given by the user
        self.folder = self.display_path.absolute()
        self._writer: Any = None
        self._thread: threading.Thread | None = None
        self._failure: CheckpointWriteError | AgreedError | None = None

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, also corrupt ones, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isascii() and path.name.isdigit())

    def has(self, step: int) -> bool:
        """Return whether there is a checkpoint of this step; all processes call it at the same time."""
        return ask_first("is it saved", lambda: step in self.steps())

    def best(self) -> int | None:
        """Return the step with the lowest validation loss; None if no checkpoint has one."""
        losses = {step: metadata["val_loss"] for step, metadata in self._all_metadata().items()}
        finite_losses = {step: loss for step, loss in losses.items() if loss is not None and math.isfinite(loss)}
        return min(finite_losses, key=lambda step: finite_losses[step], default=None)

    def save(self, step: int, state: TrainState, metadata: dict[str, Any], due: bool = True) -> None:
        """Copy the state and write it in the background; `wait` blocks until it is on disk.

        An existing checkpoint of this step is not overwritten.

        Args:
            step: the step.
            state: the train state.
            metadata: stored as JSON; `val_loss` is the validation loss of this step, or None.
            due: False to keep the checkpoint only as long as its validation loss is the best.

        Raises:
            CheckpointWriteError: the disk is too full, or the previous save failed.
            LockLostError: another process writes the run.
        """
        self.wait()
        if self.has(step):
            return
        if self._writer is None:
            self._writer = self._ocp.AsyncCheckpointer(**shared_save.writer_options(self._ocp))
        partial = self.folder / f"{PARTIAL}{step}"
        ask_first("a folder to save in", lambda: self._make_folder(step, partial, _max_bytes(state)))
        error = None
        try:
            self._writer.save(partial / "state", args=self._ocp.args.PyTreeSave(_tree(state)))
        except Exception as caught:
            if processes.count() == 1:
                shutil.rmtree(partial, ignore_errors=True)
                raise self._write_error(step, shared_save.describe_error(caught)) from caught
            error = caught  # of which the thread tells the others
        metadata = {"step": step, "val_loss": None, "due": due} | metadata
        finish = self._finish_save if processes.count() == 1 else self._finish_shared_save
        self._thread = threading.Thread(target=finish, args=(step, partial, metadata, error), name=f"save {step}")
        self._thread.start()

    def _make_folder(self, step: int, partial: Path, needed: int) -> None:
        self._check_lock()
        try:
            for old in self.folder.glob(f"{PARTIAL}*"):  # from a killed run
                shutil.rmtree(old)
            partial.mkdir(parents=True)
            free = shutil.disk_usage(self.folder).free
            if free < needed:
                raise OSError(
                    errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {_format_mb(needed)} needed, {_format_mb(free)} free"
                )
        except Exception as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise self._write_error(step, shared_save.describe_error(error)) from error

    def _finish_save(self, step: int, partial: Path, metadata: dict[str, Any], _: Exception | None) -> None:
        try:
            self._writer.wait_until_finished()
            self._publish(step, partial, metadata)
        except Exception as error:
            shutil.rmtree(partial, ignore_errors=True)
            self._failure = self._write_error(step, shared_save.describe_error(error))

    def _finish_shared_save(self, step: int, partial: Path, metadata: dict[str, Any], error: Exception | None) -> None:
        """Do as `_finish_save` in each of several processes, all of which succeed or fail."""

        def publish(files: manifest.Checksums) -> None:
            self._publish(step, partial, metadata, files)

        try:
            failure = shared_save.finish(self._writer, partial, publish, error)
        except AgreedError as ended:  # another process
            self._failure = ended
            return
        if failure is not None:
            if processes.is_first():
                shutil.rmtree(partial, ignore_errors=True)
            self._failure = everywhere(self._write_error(step, failure))

    def _publish(
        self, step: int, partial: Path, metadata: dict[str, Any], files: manifest.Checksums | None = None
    ) -> None:
        manifest.write_manifest(partial, metadata, files)
        self._check_lock()
        partial.rename(self.folder / str(step))
        _fsync_folder(self.folder)
        self._prune()

    def _write_error(self, step: int, reason: str) -> CheckpointWriteError:
        others = [other for other in self.steps() if other != step]
        status = f"the checkpoint of step {others[-1]} is intact" if others else "there is no earlier checkpoint"
        return CheckpointWriteError(f"step {step} could not be saved in {self.display_path}: {reason[:300]}; {status}")

    def _prune(self) -> None:
        metadata = self._all_metadata()
        retained = set(sorted(step for step, entry in metadata.items() if entry["due"])[-self.keep :])
        retained |= {self.best()}
        for step in metadata.keys() - retained:
            shutil.rmtree(self.folder / str(step))

    def update_metadata(self, step: int, metadata: dict[str, Any]) -> None:
        """Update the metadata of a valid checkpoint."""
        self.wait()
        ask_first("metadata", lambda: self._update_metadata(step, metadata))

    def _update_metadata(self, step: int, metadata: dict[str, Any]) -> None:
        self._check_lock()
        manifest.write_manifest(self.folder / str(step), self.verify(step) | metadata)

    def _all_metadata(self) -> dict[int, dict[str, Any]]:
        """Return the metadata of each checkpoint with a valid manifest; other files are not verified."""
        metadata = {}
        for step in self.steps():
            try:
                metadata[step] = manifest.read_manifest(self.folder / str(step))["about"]
            except CorruptCheckpointError:
                continue
        return metadata

    def wait(self) -> None:
        """Wait until the current save is on disk.

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
            CorruptCheckpointError: a file differs from the one that was written; the message is one line.
        """
        try:
            return manifest.verify_files(self.folder / str(step))
        except CorruptCheckpointError as error:
            raise CorruptCheckpointError(f"checkpoint {self.display_path / str(step)} is damaged: {error}") from None

    def latest_valid(self) -> tuple[int, dict[str, Any], list[CorruptCheckpointError]]:
        """Return the latest valid checkpoint as (step, metadata, errors of newer ones).

        Raises:
            FileNotFoundError: there is no checkpoint.
            CorruptCheckpointError: all are corrupt; the message names each.
        """
        errors: list[CorruptCheckpointError] = []
        for step in reversed(self.steps()):
            try:
                return step, self.verify(step), errors
            except CorruptCheckpointError as error:
                errors.append(error)
        if errors:
            raise CorruptCheckpointError("; ".join(map(str, errors)) + "; there is no other checkpoint")
        raise FileNotFoundError(f"run {self.display_path.parent} has no checkpoint yet")

    def quarantine(self, step: int) -> Path:
        """Move a corrupt checkpoint to damaged/STEP beside checkpoints/ and return its new path."""
        folder = self.display_path.parent / "damaged"
        folder.mkdir(exist_ok=True)
        names = (folder / (f"{step}.{number}" if number else str(step)) for number in range(1000))
        target = next(path for path in names if not path.exists())
        return (self.folder / str(step)).rename(target)

    def restore(self, step: int, abstract_state: TrainState) -> TrainState:
        """Restore the state of a valid checkpoint with the shapes, dtypes and shardings of `abstract_state`.

        Raises:
            ValueError: the checkpoint has other arrays, so it belongs to other settings.
        """
        tree = self._restore(step, _tree(abstract_state), whole=True)
        leaves, structure = jax.tree.flatten(abstract_state.opt_state)
        opt_state = jax.tree.unflatten(structure, [tree["opt"][str(i)] for i in range(len(leaves))])
        return TrainState(tree["params"], opt_state, tree.get("ema"))

    def restore_weights(self, step: int, abstract_params: params.Params, averaged: bool) -> params.Params:
        """Restore only the parameters of a valid checkpoint, or their moving average.

        Raises:
            ValueError: the checkpoint has other parameters, so it belongs to other settings.
        """
        name = "ema" if averaged else "params"
        return self._restore(step, {name: abstract_params})[name]

    def _restore(self, step: int, abstract_tree: Any, whole: bool = False) -> Any:
        ocp, folder = self._ocp, self.folder / str(step) / "state"
        with ocp.Checkpointer(**shared_save.reader_options(ocp)) as reader:
            # Orbax reports other arrays with an error of many lines, or fills or truncates them.
            stored = _array_types(reader.metadata(folder).item_metadata.tree)
            self._check_arrays(step, stored, _array_types(abstract_tree), whole)
            arguments = ocp.checkpoint_utils.construct_restore_args(abstract_tree)
            return reader.restore(
                folder,
                args=ocp.args.PyTreeRestore(item=abstract_tree, restore_args=arguments, partial_restore=True),
            )

    def _check_arrays(self, step: int, stored: dict[str, str], expected: dict[str, str], whole: bool) -> None:
        names = [*expected, *(stored if whole else [])]
        if different := next((name for name in names if stored.get(name) != expected.get(name)), None):
            raise ValueError(
                f"checkpoint {self.display_path / str(step)} does not fit the settings in config.yaml: {different} is "
                f"{stored.get(different, 'missing')}, the settings make it {expected.get(different, 'superfluous')}"
            )

    def close(self) -> None:
        """Wait until all saves are on disk.

        Raises:
            CheckpointWriteError: the last save could not be written.
        """
        try:
            self.wait()
        finally:
            if self._writer is not None:
                self._writer.close()
                self._writer = None


def _tree(state: TrainState) -> dict[str, Any]:
    """Return the stored tree. It has the leaves of the optimizer state, whose structure follows from the config."""
    opt = {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(state.opt_state))}
    return {"params": state.params, "opt": opt} | ({} if state.ema is None else {"ema": state.ema})


def _array_types(tree: Any) -> dict[str, str]:
    """Return the dtype and shape of each array by its name, such as params.embedding."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {".".join(key.key for key in path): f"{leaf.dtype} {list(leaf.shape)}" for path, leaf in leaves}


def _max_bytes(state: TrainState) -> int:
    """Return an upper bound of the size of a checkpoint on disk."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state)) * 21 // 20 + (1 << 18)


def _format_mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
