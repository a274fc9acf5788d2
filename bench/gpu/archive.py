"""Pack all results into one archive of limited size."""

import os
import tarfile
from pathlib import Path

LIMIT_BYTES = 15 * 2**20  # size of the archive: the limit for downloads may be 16 MiB
RAW_TRACES = (".xplane.pb", ".trace.json.gz")


def write(archive: Path, folder: Path) -> list[str]:
    """Pack a folder's files into a compressed archive, small files first, until it is full.

    The archive is replaced in one step, so an interrupted run leaves the previous one.

    Args:
        archive: path of the .tar.gz file.
        folder: the folder to pack; an archive inside it is left out.

    Returns:
        The files that did not fit, as paths below `folder`.
    """
    archive.parent.mkdir(parents=True, exist_ok=True)
    partial = archive.with_name(f".{archive.name}.partial")
    skipped = {archive.resolve(), partial.resolve()}
    files = [path for path in folder.rglob("*") if path.is_file() and path.resolve() not in skipped]
    files.sort(key=lambda path: (path.name.endswith(RAW_TRACES), path.stat().st_size, path))
    left_out = []
    try:
        with partial.open("wb") as raw, tarfile.open(fileobj=raw, mode="w:gz") as tar:
            for path in files:
                # Text packs to a fifth or less; a raw trace may not shrink at all.
                worst = path.stat().st_size // (1 if path.name.endswith(RAW_TRACES) else 3)
                raw.flush()
                if raw.tell() + worst > LIMIT_BYTES:
                    left_out.append(str(path.relative_to(folder)))
                else:
                    tar.add(path, arcname=str(path.relative_to(folder)), recursive=False)
        os.replace(partial, archive)
    finally:
        partial.unlink(missing_ok=True)
    return left_out
