"""Documents: the text of files, and what is said of files that are not UTF-8 text."""

import codecs
import contextlib
import hashlib
import itertools
import logging
import os
import stat
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from dantinox.data.files import STDLIB, Skipped, find_files, printable
from dantinox.system.paths import expand_user
from dantinox.system.progress import Progress

CHUNK = 1 << 20
SAMPLE = 1 << 12
BOMS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}

log = logging.getLogger(__name__)


class NotTextError(ValueError):
    """A file is not UTF-8 text; the message says what it is instead."""


@dataclass(frozen=True)
class Document:
    """One text: `name` is its path, `text` its content with line ends unchanged."""

    name: str
    text: str

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the text."""
        return hashlib.sha256(self.text.encode()).digest()

    @cached_property
    def size(self) -> int:
        """Length in bytes of UTF-8."""
        return len(self.text.encode())


def find_documents(spec: str | os.PathLike[str]) -> list[Document]:
    """Return the documents of `spec`, in an order that depends only on the names of its files and links.

    A byte order mark of UTF-8 is dropped. In a folder, files that are empty, unreadable or not UTF-8 text are skipped
    with a warning that names the first of them, and links to folders are followed.

    Args:
        spec: a text file; a folder, searched recursively without hidden names; a glob (`**` crosses folders); or
            "stdlib", the Python source of the running interpreter's standard library without its tests ("./stdlib" is
            a folder of that name).

    Raises:
        FileNotFoundError: no file matches.
        ValueError: no file has text.
    """
    return read_documents(spec)[0]


def read_documents(spec: str | os.PathLike[str]) -> tuple[list[Document], int]:
    """Return the documents of `spec` and the number of files that were skipped, empty ones not counted."""
    skipped = Skipped()
    with Progress("finding files"):
        files = list(find_files(spec, skipped))
    is_single = spec != STDLIB and [path for _, path in files] == [expand_user(spec)]
    documents = []
    with Progress(f"reading {len(files):,} file(s)", len(files)) as progress:
        for name, path in files:
            try:
                text = read_text(path)
            except NotTextError as error:
                if is_single:
                    raise ValueError(f"no text in {printable(spec)}: it is {error}; allowed: UTF-8 text") from None
                skipped.add(Skipped.NOT_TEXT, name, str(error))
            except OSError as error:
                if is_single:
                    raise
                skipped.add(Skipped.UNREADABLE, name, str(error.strerror))
            else:
                if text:
                    documents.append(Document(name, text))
                else:
                    skipped.add(Skipped.EMPTY, name)
            progress.advance()
    if not documents:
        raise ValueError(
            f"no text in {printable(spec)}: {str(skipped) or 'the folder has no files (hidden ones do not count)'}"
        )
    if len(skipped) or (skipped.names and spec != STDLIB):  # empty modules of the standard library are no news
        log.warning("%s: skipped %s", printable(spec), skipped)
    return documents, len(skipped)


def read_text(path: Path) -> str:
    """Return the text of a file of UTF-8, without a byte order mark; what is not text is read up to where that shows.

    Raises:
        NotTextError: it is something else.
        OSError: it cannot be read.
    """
    # What was a file when it was found may be a FIFO now, which would block.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise NotTextError("not a regular file")
        return "".join(_decode(iter(lambda: file.read(CHUNK), b"")))


def _decode(chunks: Iterable[bytes]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    start = 0  # offset of what the decoder has not returned yet
    for chunk in itertools.chain(chunks, [b""]):
        if start == 0 and (encoding := _wide_encoding(chunk[:SAMPLE])):
            raise NotTextError(f"{encoding} text")
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            if b"\0" not in error.object[: error.start]:
                byte, offset = error.object[error.start], start + error.start
                raise NotTextError(f"not UTF-8: byte {byte:#04x} at offset {offset}") from None
            text = error.object[: error.start].decode()
        if "\0" in text:  # valid in UTF-8, but not in text
            raise NotTextError(f"binary: a NUL byte at offset {start + len(text.partition('\0')[0].encode())}")
        yield text.removeprefix("\ufeff") if start == 0 else text
        start += len(text.encode())


def _wide_encoding(sample: bytes) -> str | None:
    """Return "UTF-16" or "UTF-32" if the start of a file looks like that, with or without a byte order mark."""
    for mark, encoding in BOMS.items():
        if sample.startswith(mark):
            return encoding
    for codec in ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be"):
        width = int(codec[4:6]) // 8
        units = np.frombuffer(sample[: len(sample) // width * width], np.uint8).reshape(-1, width)
        high, low = (units[:, -1], units[:, 0]) if codec.endswith("le") else (units[:, 0], units[:, -1])
        # Any text has ASCII characters, spaces at least, whose high byte is zero; hardly any has a low byte of zero.
        if len(units) < 4 or (high == 0).mean() < 0.05 or (low == 0).mean() > 0.3:
            continue
        with contextlib.suppress(UnicodeDecodeError):
            text = codecs.getincrementaldecoder(codec)().decode(units.tobytes())  # it may end inside a character
            if all(char.isspace() or unicodedata.category(char) not in ("Cc", "Cn", "Co") for char in text):
                return codec[:6].upper()
    return None
