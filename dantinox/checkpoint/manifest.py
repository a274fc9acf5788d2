"""What a checkpoint's folder must hold, byte for byte: Orbax restores flipped bits without a word."""

import hashlib
import json
from pathlib import Path
from typing import Any

from dantinox.system.atomic_io import open_atomic

NAME = "manifest.json"


class CorruptCheckpointError(ValueError):
    """A checkpoint is not what was written; the message says what is wrong with it."""


def write(folder: Path, metadata: dict[str, Any]) -> None:
    """Write the manifest: `about`, and the size and SHA-256 of every file in the folder."""
    files = {name: [path.stat().st_size, _sha256(path)] for name, path in _files(folder).items()}
    body = {"about": metadata, "files": files}
    with open_atomic(folder / NAME) as file:
        file.write(json.dumps(body | {"sha256": _own(body)}, indent=1).encode())


def read(folder: Path) -> dict[str, Any]:
    """The manifest's `about` and `files`, themselves unharmed.

    Raises:
        CorruptCheckpointError: there is no manifest, or it is not as it was written.
    """
    try:
        body = json.loads((folder / NAME).read_bytes())
        told = body.pop("sha256")
    except FileNotFoundError:
        raise CorruptCheckpointError(f"{NAME} is missing") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise CorruptCheckpointError(f"{NAME} is not as it was written") from None
    if told != _own(body):
        raise CorruptCheckpointError(f"{NAME} is not as it was written")
    return body


def verify(folder: Path) -> dict[str, Any]:
    """The manifest's `about`, once every file it names has been read and is as it was written.

    Raises:
        CorruptCheckpointError: naming the first file that is not.
    """
    body, found = read(folder), _files(folder)
    for name, (size, digest) in body["files"].items():
        if name not in found:
            raise CorruptCheckpointError(f"{name} is missing")
        if (now := found[name].stat().st_size) != size:
            raise CorruptCheckpointError(f"{name} has {now} bytes of {size}")
        if _sha256(found[name]) != digest:
            raise CorruptCheckpointError(f"{name} is not as it was written (SHA-256)")
    return body["about"]


def _files(folder: Path) -> dict[str, Path]:
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in found.items() if name != NAME}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _own(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
