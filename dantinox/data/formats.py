"""Files of a corpus as streams: bytes of plain, .gz and .zst files, and rows of .parquet."""

import errno
import gzip
import importlib
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dantinox.data.files import printable
from dantinox.data.utf8 import NotTextError

CHUNK = 1 << 19
ZSTD_CHUNK = 1 << 14  # compressed bytes, which may become many more
PARQUET_ROWS = 64  # decoded at once
TEXT_COLUMN = "text"
INSTALL = "run pip install -c constraints.txt -e '.[data]'"
Stamp = tuple[int, int, int, int]


@dataclass(slots=True)
class Source:
    """A file of a corpus.

    Attributes:
        name: its name in messages.
        path: its path.
        stamp: size, times of change and inode, which tell without reading it that its content is another one; None: it
            cannot be found.
        position: bytes of it that have been read.
    """

    name: str
    path: str
    stamp: Stamp | None = None
    position: int = 0
    _counted: int = 0

    @classmethod
    def at(cls, name: str, path: Path) -> "Source":
        """Return the source of a file as it is now."""
        try:
            return cls(name, os.fspath(path), stamp_of(os.stat(path)))
        except OSError:
            return cls(name, os.fspath(path))

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return self.stamp[0] if self.stamp else 0

    @property
    def kind(self) -> str:
        """How documents are found in the file: "lines" of JSON, "rows" of a table, or all of it is a "text"."""
        name = self.path.lower()
        if name.endswith(".parquet"):
            return "rows"
        return "lines" if name.removesuffix(".gz").removesuffix(".zst").endswith(".jsonl") else "text"

    def advance(self, end: bool = False) -> int:
        """Return the bytes that were read since the last call, at the `end` of the file all that are left."""
        reached = self.size if end else self.position
        cost, self._counted = reached - self._counted, reached
        return cost


class DamagedError(ValueError):
    """The compressed data of a file is damaged or ends early."""


def stamp_of(status: os.stat_result) -> Stamp:
    """Return the stamp of a file; the time of the last change of its inode cannot be set by a program."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def open_source(source: Source, *, is_known: bool) -> IO[bytes]:
    """Open a file.

    Args:
        source: the file, whose stamp becomes that of the open file.
        is_known: the file has been read before, and must be the same.

    Raises:
        NotTextError: it is a FIFO or a device.
        ValueError: it has changed.
        OSError: it cannot be read.
    """
    # What was a file when it was found may be a FIFO now, which would block.
    descriptor = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    file = open(descriptor, "rb", buffering=0)  # noqa: SIM115 - the caller closes it
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        file.close()
        raise NotTextError("not a regular file")
    if is_known and stamp_of(status) != source.stamp:
        file.close()
        raise ValueError(f"{printable(source.path)} changed while it was read; start again")
    source.stamp, source.position, source._counted = stamp_of(status), 0, 0
    return file


def read_chunks(source: Source, *, is_known: bool = False) -> Iterator[bytes]:
    """Yield the content of a file, decompressed, in chunks of about `CHUNK` bytes, none of which is empty.

    Raises:
        NotTextError: it is not a regular file, or not compressed as its name says.
        DamagedError: its compressed data is damaged or ends early.
        OSError, ValueError: it cannot be read, or has changed.
    """
    name = source.path.lower()
    with open_source(source, is_known=is_known) as file:
        try:
            if name.endswith(".gz"):
                unzipped = gzip.GzipFile(fileobj=file)
                chunks: Iterator[bytes] = _read_ahead(iter(lambda: unzipped.read(CHUNK), b""))
            elif name.endswith(".zst"):
                chunks = _read_ahead(_zstd_chunks(source, file))
            else:
                chunks = iter(lambda: file.read(CHUNK), b"")
            for chunk in chunks:
                source.position = file.tell()
                yield chunk
        except EOFError:
            raise DamagedError("its compressed data ends early") from None
        except zlib.error as error:
            raise DamagedError(f"its compressed data is damaged ({error})") from None
        except gzip.BadGzipFile as error:
            if "Not a gzipped file" in str(error):
                raise NotTextError("not gzip data") from None
            raise DamagedError(f"its compressed data is damaged ({error})") from None


def _read_ahead(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield chunks while a thread decompresses the next one, which does not hold Python's lock."""
    with ThreadPoolExecutor(1, "decompress") as executor:
        following = executor.submit(next, chunks, None)
        while (chunk := following.result()) is not None:
            following = executor.submit(next, chunks, None)
            yield chunk


def _zstd_chunks(source: Source, file: IO[bytes]) -> Iterator[bytes]:
    error_type, new = _zstd_package(source)
    decompressor, started = new(), False
    for chunk in iter(lambda: file.read(ZSTD_CHUNK), b""):
        while chunk:
            if decompressor.eof:  # a file may have several frames
                decompressor, started = new(), False
            try:
                text = decompressor.decompress(chunk)
            except error_type as error:
                if file.tell() <= ZSTD_CHUNK and not started:
                    raise NotTextError("not zstd data") from None
                raise DamagedError(f"its compressed data is damaged ({error})") from None
            started, chunk = True, decompressor.unused_data
            yield from (text[i : i + CHUNK] for i in range(0, len(text), CHUNK))
    if started and not decompressor.eof:
        raise EOFError


def _zstd_package(source: Source) -> tuple[type[Exception], Callable[[], Any]]:
    """Return the error and the decompressor of a package for zstd: of Python 3.14, or of the package zstandard."""
    try:
        zstd = importlib.import_module("compression.zstd")
    except ImportError:
        pass
    else:
        return zstd.ZstdError, zstd.ZstdDecompressor
    try:
        zstandard = importlib.import_module("zstandard")
    except ImportError:
        raise ValueError(f"{printable(source.name)} needs the package zstandard: {INSTALL}") from None
    return zstandard.ZstdError, lambda: zstandard.ZstdDecompressor().decompressobj()


def read_rows(source: Source, *, is_known: bool = False) -> Iterator[tuple[list[bytes | None], int]]:
    """Yield the column `text` of a Parquet file in lists of UTF-8, each with its bytes of the file, about.

    Raises:
        ValueError: pyarrow is missing, the file is damaged or has changed, or has no such column of text.
        OSError: it cannot be read.
    """
    name = printable(source.name)
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError(f"{name} needs the package pyarrow: {INSTALL}") from None
    with open_source(source, is_known=is_known) as file:
        try:
            table = pq.ParquetFile(file, buffer_size=CHUNK, pre_buffer=False)
            schema, rows = table.schema_arrow, table.metadata.num_rows
            if TEXT_COLUMN not in schema.names:
                found = ", ".join(schema.names[:5]) + (", ..." if len(schema.names) > 5 else "")
                raise ValueError(f"{name} has no column {TEXT_COLUMN!r}; it has {found or 'none'}")
            kind = schema.field(TEXT_COLUMN).type
            value_kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not (pa.types.is_string(value_kind) or pa.types.is_large_string(value_kind)):
                raise ValueError(f"{name}: column {TEXT_COLUMN!r} is {kind}; allowed: string")
            for batch in table.iter_batches(PARQUET_ROWS, columns=[TEXT_COLUMN], use_threads=False):
                values = batch.column(0).cast(value_kind).cast(pa.large_binary()).to_pylist()
                yield values, source.size * len(values) // rows
        except pa.ArrowException as error:
            raise ValueError(f"{name} is damaged or no Parquet file: {' '.join(str(error).split())[:200]}") from None
        except OSError as error:  # also a file that ends early
            if error.errno in (None, errno.EINVAL):
                text = f"{name} is damaged or no Parquet file: {' '.join(str(error).split())[:200]}"
                raise ValueError(text) from None
            raise
