"""An index of the documents of a corpus: which are duplicates, and which of them are training or validation text.

It keeps 48 bytes per document in a file, and one byte per document in memory.
"""

import hashlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dantinox.data.blocks import SKIP

RECORD = np.dtype([("digest", "u1", 32), ("size", "<i8"), ("chars", "<i8")])
CHUNK = 1 << 18  # records
BUCKET = 1 << 19  # records that are sorted at a time
DROPPED, TRAIN, VAL = 0, 1, 2


def records_of(texts: dict[int, str], n: int) -> np.ndarray:
    """Return the records [n] of documents by their number; others have no text."""
    records = np.zeros(n, RECORD)
    for index, text in texts.items():
        raw = text.encode()
        records[index] = (np.frombuffer(hashlib.sha256(raw).digest(), np.uint8), len(raw), len(text))
    return records


@dataclass(frozen=True)
class Sizes:
    """Size of a split: documents, bytes of UTF-8, characters."""

    docs: int
    bytes: int
    chars: int


class Index:
    """The documents of a corpus, in their order; those without text are dropped.

    Args:
        path: the file of its records, which outlasts the object.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.duplicates = path, 0
        self.kinds = np.zeros(path.stat().st_size // RECORD.itemsize, np.uint8)
        self.cut: tuple[int, int] | None = None  # a document and its number of training characters, if it is divided

    def chunks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield the records by chunks, each with its place."""
        with open(self.path, "rb") as file:
            for start in range(0, len(self.kinds), CHUNK):
                records = np.fromfile(file, RECORD, CHUNK)
                yield slice(start, start + len(records)), records

    def drop_duplicates(self) -> None:
        """Keep the last of equal documents."""
        kept = sum(int((records["size"] > 0).sum()) for _, records in self.chunks())
        for rows, _ in self._by_digest():
            self.kinds[rows] = TRAIN
            kept -= len(rows)
        self.duplicates = kept

    def _by_digest(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (numbers, sizes) of the distinct documents in the order of their digests, by buckets."""
        count = 1 + len(self.kinds) // BUCKET
        for bucket in range(count):
            rows, records = np.zeros(0, np.int64), np.zeros(0, RECORD)
            for place, chunk in self.chunks():
                prefix = np.ascontiguousarray(chunk["digest"][:, :4]).view(">u4")[:, 0].astype(np.uint64)
                taken = np.flatnonzero(((prefix * count) >> 32 == bucket) & (chunk["size"] > 0))
                rows = np.append(rows, taken + place.start)
                records = np.append(records, chunk[taken])
                if len(rows) > 2 * BUCKET:
                    rows, records = _last_of_equal(rows, records)
            rows, records = _last_of_equal(rows, records)
            yield rows, records["size"]

    def kept_digests(self) -> Iterator[bytes]:
        """Yield the digests of the documents that are kept, in their order, by chunks."""
        for place, records in self.chunks():
            yield records["digest"][self.kinds[place] != DROPPED].tobytes()

    def split(self, val_fraction: float) -> None:
        """Split the documents into train and validation, by their content and without overlap.

        Documents are assigned to validation in the order of their hash, small ones if they suffice, until validation
        has val_fraction of the bytes, plus or minus half of that. If none fit (one document, or a few large ones), the
        end of the text becomes validation, and the document in which it starts is divided.

        Raises:
            ValueError: a split would be empty.
        """
        kept = self._sizes(self.kinds == TRAIN)
        target_bytes = val_fraction * kept.bytes
        max_bytes = min(1.5 * target_bytes, (target_bytes + kept.bytes) / 2)
        # Small documents first: one large document should not be most of the validation.
        for max_document_bytes in (target_bytes / 8, max_bytes):
            chosen, val_bytes = [], 0
            for rows, sizes in self._by_digest():
                for row, size in zip(rows.tolist(), sizes.tolist()):
                    if val_bytes >= target_bytes:
                        break
                    if size <= min(max_document_bytes, max_bytes - val_bytes):
                        chosen.append(row)
                        val_bytes += size
                if val_bytes >= target_bytes:
                    break
            if val_bytes >= target_bytes / 2:
                self.kinds[np.asarray(chosen, np.int64)] = VAL
                return
        if kept.chars < 2:
            raise ValueError(f"the corpus has {kept.chars} character(s); allowed: at least 2, to train and validate")
        self._cut_at(min(max(kept.chars - round(val_fraction * kept.chars), 1), kept.chars - 1))

    def _cut_at(self, cut: int) -> None:
        """Make validation text of all characters from `cut` on."""
        before = 0
        for place, records in self.chunks():
            kinds = self.kinds[place]
            chars = np.where(kinds != DROPPED, records["chars"], 0)
            ends = before + np.cumsum(chars)
            kinds[(kinds != DROPPED) & (ends - chars >= cut)] = VAL
            divided = np.flatnonzero((ends - chars < cut) & (cut < ends))
            if divided.size:
                row = int(divided[0])
                self.cut = (place.start + row, int(cut - (ends - chars)[row]))
            before = int(ends[-1])

    def sizes(self) -> tuple[Sizes, Sizes]:
        """Return the sizes of train and validation; of a divided document both count all bytes and characters."""
        train, val = self.kinds == TRAIN, self.kinds == VAL
        if self.cut:
            val[self.cut[0]] = True
        return self._sizes(train), self._sizes(val)

    def _sizes(self, chosen: np.ndarray) -> Sizes:
        totals = np.zeros(3, np.int64)
        for place, records in self.chunks():
            part = records[chosen[place]]
            totals += [len(part), part["size"].sum(), part["chars"].sum()]
        return Sizes(*totals.tolist())


def _last_of_equal(rows: np.ndarray, records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the last of equal documents, in the order of their digests; `rows` increase."""
    words = np.ascontiguousarray(records["digest"]).view(">u8").astype(np.uint64)
    order = np.lexsort(words.T[::-1])  # stable, by the first word first
    words = words[order]
    is_last = np.append((words[1:] != words[:-1]).any(1), True)[: len(order)]
    order = order[is_last]
    return rows[order], records[order]


class IndexPlan:
    """A `Plan` of an index.

    Args:
        index: the index, after its split.
        sample: plan to take about this many bytes of the training text, evenly spread, and no validation text; None:
            all of both.
    """

    def __init__(self, index: Index, sample: int | None = None) -> None:
        self._index, self._next = index, 0
        self._rest = np.zeros(0, RECORD)
        self._chunks = index.chunks()
        total = index.sizes()[0].bytes
        self.sample = Sample(total, total if sample is None else sample)
        self._is_sample, self._offset = sample is not None, 0
        self.offsets: deque[int] = deque()

    def take(self, n: int) -> np.ndarray:
        """Return for each of the next n documents the characters that are training text, or `SKIP`.

        For a sample, `offsets` receives the bytes of training text before each document that is not skipped.
        """
        while len(self._rest) < n:
            self._rest = np.append(self._rest, next(self._chunks)[1])
        records, self._rest = self._rest[:n], self._rest[n:]
        kinds = self._index.kinds[self._next : self._next + n]
        plan = np.where(kinds == TRAIN, records["chars"], np.where(kinds == VAL, 0, SKIP))
        if (cut := self._index.cut) and 0 <= cut[0] - self._next < n:
            plan[cut[0] - self._next] = cut[1]
        self._next += n
        if self._is_sample:
            sizes = np.where(kinds == TRAIN, records["size"], 0)
            offsets = self._offset + np.cumsum(sizes) - sizes
            self._offset += int(sizes.sum())
            plan[(kinds != TRAIN) | ~self.sample.overlaps(offsets, sizes)] = SKIP
            self.offsets += offsets[plan != SKIP].tolist()
        return plan


class Sample:
    """Windows of a text of `total` bytes, evenly spread, that hold about `size` bytes, or all of a smaller text."""

    WINDOWS = 64

    def __init__(self, total: int, size: int) -> None:
        self.every = max(1, total // self.WINDOWS)
        self.length = self.every if total <= size else size // self.WINDOWS

    def overlaps(self, offsets: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Return whether texts that begin at `offsets` [n] have a byte in a window, bool [n]."""
        into = offsets % self.every
        return (into < self.length) | (into + sizes > self.every)

    def has(self, offset: int) -> bool:
        """Return whether a byte is in a window."""
        return offset % self.every < self.length
