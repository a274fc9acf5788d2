"""Documents: the text of files, and what is said of files that are not UTF-8 text."""

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from dantinox.data.blocks import Failed, Lines, Part, Texts, read_blocks
from dantinox.data.files import STDLIB, Skipped, find_files, printable
from dantinox.data.formats import Source
from dantinox.data.utf8 import NotTextError
from dantinox.system.paths import expand_user
from dantinox.system.progress import Progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Document:
    """One text: `name` is its path, with its line or row, `text` its content with line ends unchanged."""

    name: str
    text: str

    @cached_property
    def size(self) -> int:
        """Length in bytes of UTF-8."""
        return len(self.text.encode())


class Sources:
    """The files of a corpus, and what is skipped of them.

    Args:
        spec: as `spec` of `find_documents`.

    Raises:
        FileNotFoundError: no file matches.
    """

    def __init__(self, spec: str | os.PathLike[str]) -> None:
        self.spec, self.skipped = spec, Skipped()
        with Progress("finding files"):
            self.files = [Source.at(name, path) for name, path in find_files(spec, self.skipped)]
        self._is_single = spec != STDLIB and [file.path for file in self.files] == [os.fspath(expand_user(spec))]

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(file.size for file in self.files)

    def reading(self) -> Progress:
        """Return the progress of a pass over the files."""
        return Progress(f"reading {len(self.files):,} file(s)", self.size)

    def skip(self, block: Texts | Lines | Failed, index: int = 0, error: Exception | None = None) -> None:
        """Count a document that has no text, or, with an error, is not text.

        Raises:
            ValueError, OSError: it is the only one.
        """
        error = block.error if isinstance(block, Failed) else error
        is_file = isinstance(block, Failed) or (isinstance(block, Texts) and block.names is not None)
        name = block.place(index)
        if error is None:
            self.skipped.add(Skipped.EMPTY if is_file else Skipped.BLANK, name)
        elif isinstance(error, NotTextError):
            if is_file and self._is_single:
                raise ValueError(f"no text in {printable(self.spec)}: it is {error}; allowed: UTF-8 text") from None
            self.skipped.add(Skipped.NOT_TEXT if is_file else Skipped.NOT_TEXT_DOCUMENT, name, str(error))
        else:
            if self._is_single:
                raise error
            self.skipped.add(Skipped.UNREADABLE, name, str(getattr(error, "strerror", error)))

    def check_text(self, has_text: bool) -> None:
        """Raise ValueError if no file has text; log what was skipped."""
        if not has_text:
            reason = str(self.skipped) or (
                "its files have no documents" if self.files else "the folder has no files (hidden ones do not count)"
            )
            raise ValueError(f"no text in {printable(self.spec)}: {reason}")
        if warning := self.warning:
            log.warning("%s", warning)

    @property
    def warning(self) -> str:
        """What was skipped, in one line; "" if that is no news."""
        is_news = len(self.skipped) or (self.skipped.has_empty_files and self.spec != STDLIB)
        return f"{printable(self.spec)}: skipped {self.skipped}" if is_news else ""


def find_documents(spec: str | os.PathLike[str]) -> list[Document]:
    """Return the documents of `spec`, in an order that depends only on the names of its files and links.

    A file is a document without its byte order mark of UTF-8, but each line of a .jsonl and each row of a .parquet file
    is one: its `text`. Files may be compressed (.gz, .zst). In a folder, files that are empty, unreadable or not UTF-8
    text are skipped with a warning that names the first of them, and links to folders are followed.

    Args:
        spec: a file; a folder, searched recursively without hidden names; a glob (`**` crosses folders); or "stdlib",
            the Python source of the running interpreter's standard library without its tests ("./stdlib" is a folder of
            that name).

    Raises:
        FileNotFoundError: no file matches.
        ValueError: no file has text, or lines of JSON or a table are damaged.
    """
    sources, documents = Sources(spec), []

    def add(block: Texts | Lines, found: Iterable[tuple[int, str | NotTextError]]) -> None:
        for index, text in found:
            if isinstance(text, NotTextError) or not text:
                sources.skip(block, index, text or None)
            else:
                documents.append(Document(block.place(index), text))

    with sources.reading() as progress:
        for block in read_blocks(sources.files, in_parts=False):
            if isinstance(block, Failed):
                sources.skip(block)
            elif isinstance(block, Part):
                documents.append(Document(block.name, block.text))
            else:
                add(block, block.documents())
            progress.advance(block.cost)
    sources.check_text(bool(documents))
    return documents
