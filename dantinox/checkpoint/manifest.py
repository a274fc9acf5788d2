"""Checksums of the files of a checkpoint: Orbax does not detect bit flips."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dantinox.system.atomic_io import open_atomic

NAME = "manifest.json"


class CorruptCheckpointError(ValueError):
    """A checkpoint differs from what was written; the message names the file and the difference."""


Checksums = dict[str, list[Any]]  # name -> [size, SHA-256]


def write_manifest(folder: Path, metadata: dict[str, Any], files: Checksums | None = None) -> None:
    """Write the manifest: `about`, and the size and SHA-256 of every file in the folder, or those in `files`."""
    body = {"about": metadata, "files": checksums(folder) if files is None else files}
    with open_atomic(folder / NAME) as file:
        file.write(json.dumps(body | {"sha256": _digest(body)}, indent=1).encode())


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return `about` and `files` of a valid manifest.

    Raises:
        CorruptCheckpointError: the manifest is missing or was modified.
    """
    try:
        body = json.loads((folder / NAME).read_bytes())
        stored_digest = body.pop("sha256")
    except FileNotFoundError:
        raise CorruptCheckpointError(f"{NAME} is missing") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise CorruptCheckpointError(f"{NAME} was modified") from None
    if stored_digest != _digest(body):
        raise CorruptCheckpointError(f"{NAME} was modified")
    return body


def verify_files(folder: Path) -> dict[str, Any]:
    """Verify every file of a manifest and return its `about`.

    Raises:
        CorruptCheckpointError: a file is missing or was modified; the message names the first.
    """
    body, files = read_manifest(folder), _files(folder)
    for name, (size, digest) in body["files"].items():
        if name not in files:
            raise CorruptCheckpointError(f"{name} is missing")
        if (actual_size := files[name].stat().st_size) != size:
            raise CorruptCheckpointError(f"{name} has {actual_size} bytes of {size}")
        if _sha256(files[name]) != digest:
            raise CorruptCheckpointError(f"{name} was modified (SHA-256 differs)")
    return body["about"]


def checksums(folder: Path, choose: Callable[[str], bool] = lambda name: True) -> Checksums:
    """Return the size and SHA-256 of the files in a folder, or of those whose name `choose` takes."""
    return {name: [path.stat().st_size, _sha256(path)] for name, path in _files(folder).items() if choose(name)}


def _files(folder: Path) -> dict[str, Path]:
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in files.items() if name != NAME}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
