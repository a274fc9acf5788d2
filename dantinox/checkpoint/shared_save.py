"""Saves and restores of several processes: Orbax writes from all of them, and all learn whether it succeeded.

Threads of a save wait for those of other processes by `agreement.gather`, never by a collective on devices, which would
mix with those of a training step.
"""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dantinox.checkpoint import manifest
from dantinox.distributed import agreement, processes
from dantinox.distributed.agreement import AgreedError

FAILED = f"{agreement.ROOT}/save failed"
FILES = f"{agreement.ROOT}/files"


def reader_options(ocp: Any) -> dict[str, Any]:
    """Return the arguments of a `Checkpointer` of this run, for which Orbax is `ocp`."""
    if processes.count() == 1:
        return {"handler": ocp.PyTreeCheckpointHandler()}
    # Named processes wait for each other by the coordination service, all by a collective.
    options = ocp.options.MultiprocessingOptions(active_processes=set(range(processes.count())))
    return {
        "handler": ocp.PyTreeCheckpointHandler(multiprocessing_options=options),
        "multiprocessing_options": options,
    }


def writer_options(ocp: Any) -> dict[str, Any]:
    """Return the arguments of an `AsyncCheckpointer` of this run, for which Orbax is `ocp`."""
    if processes.count() == 1:
        return {"handler": ocp.PyTreeCheckpointHandler()}

    def wait_for_others(*, key: str, timeout_ms: int) -> None:
        agreement.gather(f"orbax/{key}", None, timeout_ms / 1000, abort_key=FAILED)

    return reader_options(ocp) | {"async_options": ocp.options.AsyncOptions(barrier_sync_fn=wait_for_others)}


def finish(
    writer: Any, partial: Path, publish: Callable[[manifest.Checksums], None], error: Exception | None
) -> str | None:
    """Wait for the writes of all processes, let process 0 publish the checkpoint, and return why that failed.

    Args:
        writer: Orbax's.
        partial: folder of the checkpoint.
        publish: called in process 0 with the checksums, which each process computes of what it wrote.
        error: what this process has failed with already.

    Raises:
        AgreedError: another process has ended.
    """
    own: manifest.Checksums = {}
    reason = None
    try:
        if error is not None:
            raise error
        writer.wait_until_finished()
        own = manifest.checksums(partial, _is_own)
    except Exception as caught:
        if agreement.failure is not None:
            raise agreement.failure from None
        if not isinstance(caught, AgreedError):  # of another process
            reason = describe_error(caught)
        processes.client().key_value_set(FAILED, reason or "", allow_overwrite=True)
        own = {}
    store = processes.client()
    # Only process 0 reads them: of many processes they are too long for a message to all.
    store.key_value_set(f"{FILES}/{processes.index()}", json.dumps(own), allow_overwrite=True)
    outcomes = agreement.gather("save", [bool(own), reason])
    failed = next((index for index, (has_files, reason) in enumerate(outcomes) if reason or not has_files), None)
    failed = next((index for index, (_, reason) in enumerate(outcomes) if reason), failed)
    if failed is not None:
        return f"{agreement.describe(failed)}: {outcomes[failed][1] or 'no files were written'}"
    reason = None
    if processes.is_first():
        try:
            parts = [json.loads(store.key_value_try_get(f"{FILES}/{index}")) for index in range(processes.count())]
            publish({name: checksum for files in parts for name, checksum in files.items()})
        except Exception as caught:
            reason = describe_error(caught)
    return agreement.gather("publish", reason)[0]


def describe_error(error: Exception) -> str:
    """Return the message of an error in one line: those of TensorStore are long, with the system's at their end."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    return os.strerror(errno.ENOSPC) if os.strerror(errno.ENOSPC) in text else text[:300]


def _is_own(name: str) -> bool:
    """Return whether this process has written a file: each has a folder of its own, and process 0 has the rest."""
    writer = next((part for part in Path(name).parts if part.startswith("ocdbt.process_")), "ocdbt.process_0")
    return writer == f"ocdbt.process_{processes.index()}"
