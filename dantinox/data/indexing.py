"""The first pass over a corpus: read and check all documents, and index them."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dantinox.data.blocks import Block, Failed, Lines, Part, Texts, read_blocks
from dantinox.data.cache import cache_file
from dantinox.data.documents import Sources
from dantinox.data.index import Index, records_of
from dantinox.data.pool import Pool, process_count
from dantinox.data.utf8 import NotTextError
from dantinox.system.progress import Progress


def index_documents(sources: Sources, path: Path) -> Index:
    """Read all documents and return their index, in a file at `path`, without duplicates.

    Raises:
        ValueError: there is no text, or lines of JSON or a table are damaged.
    """
    has_text = False
    with (
        sources.reading() as progress,
        Pool(index_block, process_count(sources.size)) as pool,
        cache_file(path, sync=False) as write,
    ):
        for block, (records, errors) in pool.map(_join_parts(read_blocks(sources.files), progress)):
            write(records.tobytes())
            has_text |= bool(records["size"].any())
            if isinstance(block, Failed):
                sources.skip(block)
            elif isinstance(block, Texts | Lines):
                for i in np.flatnonzero(records["size"] == 0).tolist():
                    sources.skip(block, i, errors.get(i))
            progress.advance(block.cost)
    sources.check_text(has_text)
    index = Index(path)
    index.drop_duplicates()
    return index


@dataclass
class _Indexed(Block):
    """A long document whose parts have been read."""

    records: np.ndarray


def _join_parts(
    blocks: Iterator[Texts | Lines | Part | Failed], progress: Progress
) -> Iterator[Texts | Lines | Failed | _Indexed]:
    """Yield blocks, but a long document as its record: its parts are hashed one after another."""
    digest, size, chars = hashlib.sha256(), 0, 0
    for block in blocks:
        if isinstance(block, Part):
            raw = block.text.encode()
            digest.update(raw)
            size += len(raw)
            chars += len(block.text)
            progress.advance(block.cost)
            if block.is_last:
                record = records_of({}, 1)
                record[0] = (np.frombuffer(digest.digest(), np.uint8), size, chars)
                yield _Indexed(block.name, record)
        else:
            yield block
        if not isinstance(block, Part) or block.is_last:
            digest, size, chars = hashlib.sha256(), 0, 0


def index_block(block: Texts | Lines | Failed | _Indexed) -> tuple[np.ndarray, dict[int, NotTextError]]:
    """Return the records of the documents of a block, and why some of them are not text."""
    if isinstance(block, _Indexed):
        return block.records, {}
    if isinstance(block, Failed):
        return records_of({}, 1), {}
    found = dict(block.documents())
    errors = {index: text for index, text in found.items() if isinstance(text, NotTextError)}
    texts = {index: text for index, text in found.items() if isinstance(text, str)}
    return records_of(texts, len(block)), errors
