"""The text of files as a stream of blocks of about half a megabyte, in an order that depends on the files only.

A block has whole documents, which the process that works on it finds and checks, or a part of a long one:

    Texts    files that are a document each, or rows of a table
    Lines    lines of JSON, a document each
    Part     a part of a file that is one long document; it ends before a space, where a token ends
    Failed   a file that cannot be read, or is not text
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Protocol

import numpy as np

from dantinox.data.files import printable
from dantinox.data.formats import TEXT_COLUMN, DamagedError, Source, read_chunks, read_rows
from dantinox.data.tokenizer import split_text
from dantinox.data.utf8 import NotTextError, decode
from dantinox.system.malloc import release_freed_memory

BLOCK = 1 << 19  # bytes or characters
BLOCKS_PER_RELEASE = 16  # of memory, which takes some milliseconds
MAX_DOCUMENTS = 4096  # of a block
MAX_LINE = 1 << 28
SKIP = -1  # in a plan

Found = tuple[int, str | NotTextError]  # number in its block, text


class Plan(Protocol):
    """What to do with the documents of a corpus, in their order."""

    def take(self, n: int) -> np.ndarray:
        """Return for each of the next n documents the characters that are training text, int64 [n], or `SKIP`."""


@dataclass
class Block:
    """What all blocks have.

    Attributes:
        name: of the file.
        cost: bytes of files that were read for it, for progress.
        plan: of its documents [n]; None: all are wanted.
    """

    name: str
    cost: int = field(default=0, kw_only=True)
    plan: np.ndarray | None = field(default=None, kw_only=True)

    def wanted(self, index: int) -> bool:
        """Return whether a document is wanted."""
        return self.plan is None or bool(self.plan[index] != SKIP)


@dataclass
class Texts(Block):
    """Documents as bytes: files if `names` has their names, else rows of a table, from number `first`."""

    contents: list[bytes | None]
    names: list[str] | None = None
    first: int = 1

    def __len__(self) -> int:
        return len(self.contents)

    def place(self, index: int) -> str:
        """Return the name of a document."""
        return self.names[index] if self.names else f"{printable(self.name)}: row {self.first + index}"

    def documents(self) -> Iterator[Found]:
        """Yield the documents that are wanted."""
        for index in filter(self.wanted, range(len(self))):
            content = self.contents[index] or b""
            try:
                yield index, "".join(decode([content])) if self.names else _checked(content.decode())
            except NotTextError as error:
                yield index, error
            except UnicodeDecodeError:
                yield index, NotTextError("not UTF-8")


@dataclass
class Lines(Block):
    """Lines of JSON from line number `first`; without text is a line of white space, or one of empty text."""

    content: bytes
    first: int = 1

    def __len__(self) -> int:
        return self.content.count(b"\n") + (not self.content.endswith(b"\n"))

    def place(self, index: int) -> str:
        """Return the name of a document."""
        return f"{printable(self.name)}: line {self.first + index}"

    def documents(self) -> Iterator[Found]:
        """Yield the documents that are wanted.

        Raises:
            ValueError: a line is not JSON, or has no text.
        """
        content = self.content.removeprefix(b"\xef\xbb\xbf") if self.first == 1 else self.content
        for index, line in enumerate(content.removesuffix(b"\n").split(b"\n")):
            if not self.wanted(index):
                continue
            try:
                yield index, _text_of_line(line)
            except NotTextError as error:
                yield index, error
            except _LineError as error:
                raise ValueError(f"{self.place(index)} {error}") from None


@dataclass
class Part(Block):
    """A part of a long document: `text`, the first `start` characters of which came before."""

    text: str
    start: int
    is_last: bool

    def __len__(self) -> int:
        return 1


@dataclass
class Failed(Block):
    """A file that cannot be read, or is not text."""

    error: Exception

    def __len__(self) -> int:
        return 1

    def place(self, index: int) -> str:
        """Return the name of the file."""
        return self.name


class _LineError(Exception):
    """A line is not an object with a text."""


def _text_of_line(line: bytes) -> str:
    if not line or line.isspace():
        return ""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _LineError(f"is not UTF-8: byte {line[error.start]:#04x} at offset {error.start} of the line") from None
    except json.JSONDecodeError as error:
        raise _LineError(f"is not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number of very many digits, very deep lists
        raise _LineError(f"is not JSON that can be read ({error})") from None
    if not isinstance(record, dict):
        raise _LineError(f"is not a JSON object; allowed: {{{json.dumps(TEXT_COLUMN)}: ...}}")
    if not isinstance(text := record.get(TEXT_COLUMN), str):
        found = f"its {TEXT_COLUMN!r} is not a string" if TEXT_COLUMN in record else f"it has no {TEXT_COLUMN!r}"
        raise _LineError(f"is refused: {found}; allowed: {{{json.dumps(TEXT_COLUMN)}: ...}}")
    return _checked(text)


def _checked(text: str) -> str:
    if "\0" in text:
        raise NotTextError("a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise NotTextError(f"a lone surrogate U+{ord(text[error.start]):04X}") from None
    return text


def read_blocks(
    sources: Iterable[Source], plan: Plan | None = None, *, in_parts: bool = True
) -> Iterator[Texts | Lines | Part | Failed]:
    """Yield the text of files as blocks.

    Args:
        sources: the files.
        plan: of the documents of an earlier pass; the files must not have changed since. A block without a document
            that is wanted is left out.
        in_parts: a long document comes in parts, not in one.

    Raises:
        ValueError: a table or lines of JSON are damaged, or a file has changed.
        OSError: a table or lines of JSON cannot be read.
    """
    for number, block in enumerate(_read_blocks(sources, plan, in_parts)):
        yield block
        if number % BLOCKS_PER_RELEASE == BLOCKS_PER_RELEASE - 1:
            release_freed_memory()


def _read_blocks(
    sources: Iterable[Source], plan: Plan | None, in_parts: bool
) -> Iterator[Texts | Lines | Part | Failed]:
    small, size = Texts("", [], []), 0  # files that are gathered in a block
    for source in sources:
        if source.kind == "text":
            for block in _read_text(source, plan, in_parts):
                if not isinstance(block, Texts):
                    if small.contents:
                        yield small
                        small, size = Texts("", [], []), 0
                    yield block
                else:
                    small = _joined(small, block)
                    size += sum(len(content or b"") for content in block.contents)
                    if size >= BLOCK or len(small) == MAX_DOCUMENTS:
                        yield small
                        small, size = Texts("", [], []), 0
            continue
        if small.contents:
            yield small
            small, size = Texts("", [], []), 0
        for block in _read_lines(source, plan) if source.kind == "lines" else _read_rows(source, plan):
            if plan is not None:
                block.plan = plan.take(len(block))
            if block.plan is None or (block.plan != SKIP).any():
                yield block
    if small.contents:
        yield small


def _joined(small: Texts, block: Texts) -> Texts:
    assert small.names is not None and block.names is not None
    small.contents += block.contents
    small.names += block.names
    small.cost += block.cost
    if block.plan is not None:
        small.plan = block.plan if small.plan is None else np.append(small.plan, block.plan)
    return small


def _read_text(source: Source, plan: Plan | None, in_parts: bool) -> Iterator[Texts | Part | Failed]:
    """Yield the blocks of a file that is one document."""
    wanted = None if plan is None else plan.take(1)
    if wanted is not None and wanted[0] == SKIP:
        return
    try:
        content, chunks = bytearray(), read_chunks(source, is_known=plan is not None)
        for chunk in chunks:
            content += chunk
            if len(content) > BLOCK:
                break
        else:
            yield Texts(source.name, [bytes(content)], [source.name], cost=source.advance(True), plan=wanted)
            return
        start = 0
        for text, is_last in _cut(decode(chain([bytes(content)], chunks)), in_parts):
            yield Part(source.name, text, start, is_last, cost=source.advance(is_last), plan=wanted)
            start += len(text)
    except DamagedError as error:
        raise ValueError(f"{printable(source.path)}: {error}") from None
    except (NotTextError, OSError) as error:
        yield Failed(source.name, error, cost=source.advance(True), plan=wanted)


def _cut(texts: Iterable[str], in_parts: bool) -> Iterator[tuple[str, bool]]:
    """Yield (part, whether it is the last) of a text; the last part may be empty."""
    held: list[str] = []
    length, limit = 0, BLOCK
    for text in texts:
        held.append(text)
        length += len(text)
        if in_parts and length > limit:
            *parts, last = split_text("".join(held), BLOCK)
            for part in parts:
                yield part, False
            held, length = [last], len(last)
            limit = max(BLOCK, 2 * length)  # twice, so that text without a space is not searched again and again
    yield "".join(held), True


def _read_lines(source: Source, plan: Plan | None) -> Iterator[Lines]:
    line, held, length = 1, [], 0
    try:
        for chunk in read_chunks(source, is_known=plan is not None):
            end = chunk.rfind(b"\n") + 1
            if end:
                block = Lines(source.name, b"".join([*held, chunk[:end]]), line, cost=source.advance())
                yield block
                line += len(block)
                held, length = [], 0
            held.append(chunk[end:])
            length += len(chunk) - end
            if length > MAX_LINE:
                raise DamagedError(f"it is longer than {MAX_LINE >> 20} MB; allowed: one JSON object per line")
        if length:
            yield Lines(source.name, b"".join(held), line, cost=source.advance(True))
    except (NotTextError, DamagedError) as error:
        raise ValueError(f"{printable(source.path)}: line {line}: {error}") from None


def _read_rows(source: Source, plan: Plan | None) -> Iterator[Texts]:
    block = Texts(source.name, [])
    size = 0
    for values, cost in read_rows(source, is_known=plan is not None):
        block.contents += values
        block.cost += cost
        size += sum(len(value or b"") for value in values)
        if size >= BLOCK or len(block) >= MAX_DOCUMENTS:
            yield block
            block, size = Texts(source.name, [], first=block.first + len(block)), 0
    if block.contents:
        yield block
