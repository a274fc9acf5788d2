"""Tokenized corpora on disk: one folder each in the cache, and what is remembered of the files it came from."""

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dantinox.data.formats import Source
from dantinox.data.packing import PackedRows
from dantinox.data.tokenizer import Tokenizer, load_tokenizer
from dantinox.system.atomic_io import open_atomic
from dantinox.system.paths import cache_roots, explain_cache_error

ABANDONED_SECONDS = 86400
SOURCES_VERSION = 1  # of the keys of remembered files
SETTLED_NS = 2_000_000_000  # a file may change again within the resolution of the clock of its file system
CHECKSUM_BYTES = 1 << 24  # larger files are known by their sizes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stats:
    """Statistics of a corpus; bytes are those of UTF-8, tokens include the end of each document.

    Attributes:
        unigram_entropy: nats per validation token under the add-one-smoothed token frequencies of train, which is the
            loss of a model without context.
        bytes_per_token: bytes per validation token; bits per byte are loss / ln 2 / bytes_per_token.
        duplicates, skipped: number of duplicate documents, and of files that are not text or cannot be read.
    """

    train_docs: int
    val_docs: int
    train_bytes: int
    val_bytes: int
    train_tokens: int
    val_tokens: int
    unigram_entropy: float
    bytes_per_token: float
    duplicates: int = 0
    skipped: int = 0


@dataclass(frozen=True)
class Corpus:
    """A tokenized corpus.

    `train` and `val` are read-only memory maps [N] of uint16, or uint32 above 65536 ids; of examples they are rows.
    """

    train: np.ndarray | PackedRows
    val: np.ndarray | PackedRows
    tokenizer: Tokenizer
    stats: Stats
    path: Path  # its folder, in the cache unless another program made the ids
    given_id: str = ""

    @property
    def content_id(self) -> str:
        """32 hex digits that depend on the documents, in their order, and on how they are split and tokenized.

        Neither the place of the text nor that of the cache changes it. A checkpoint keeps it, to be resumed with the
        same text only; `cached_corpus` finds the corpus again as long as it is cached.
        """
        return self.given_id or self.path.name

    def largest_id(self) -> int:
        """Return the largest id of a token."""
        arrays = [x for part in (self.train, self.val) for x in (part[:2] if isinstance(part, PackedRows) else [part])]
        return max(int(x.max()) for x in arrays)


def cached_corpus(content_id: str, cache_dir: str | os.PathLike[str] | None = None) -> Corpus | None:
    """Return the corpus of a `Corpus.content_id` from the cache, whatever has become of its text; None if it has none.

    Its statistics count no duplicates and no skipped files.
    """
    folders = (root / "corpus" / content_id for root in cache_roots(cache_dir) if content_id.isalnum())
    return next((corpus for folder in folders if (corpus := load_cache(folder))), None)


def load_cache(folder: Path) -> Corpus | None:
    """Return the corpus in `folder`; None if there is none, or, with a warning, if a file is damaged.

    Small files are known by their checksums, large ones by their sizes, so that none is read to its end.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        stats, tokenizer = Stats(**meta["stats"]), load_tokenizer(folder)
        if tokenizer.fingerprint != meta["tokenizer"]:
            raise ValueError("tokenizer.json does not match meta.json")
        maps = {}
        for split, tokens in (("train", stats.train_tokens), ("val", stats.val_tokens)):
            ids = np.memmap(folder / f"{split}.bin", id_dtype(tokenizer.vocab_size), mode="r")
            if len(ids) != tokens:
                raise ValueError(f"{split}.bin has {len(ids)} tokens, not {tokens}")
            if (found := checksum(folder / f"{split}.bin")) and found != meta["sha256"][split]:
                raise ValueError(f"{split}.bin does not match its checksum")
            maps[split] = ids
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, OSError) and error.errno in (None, errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            return None
        log.warning("rebuilding the cache in %s: %s", folder, error)
        return None
    return Corpus(maps["train"], maps["val"], tokenizer, stats, folder)


def checksum(path: Path) -> str | None:
    """Return the SHA-256 of a file; None if it is large, and known by its size."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.stat().st_size <= CHECKSUM_BYTES else None


def cross_entropy(train_counts: np.ndarray, val_counts: np.ndarray) -> float:
    """Return the nats per validation token under the add-one-smoothed frequencies of train; counts are [V]."""
    log_total = math.log(train_counts.sum() + train_counts.size)
    return float((val_counts * (log_total - np.log1p(train_counts))).sum() / val_counts.sum())


def id_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """Return the type of the ids of a vocabulary in files."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def publish(partial: Path, folder: Path) -> None:
    """Rename `partial` to `folder`, in place of a damaged corpus but not of one that another process has finished."""
    for _ in range(10):  # processes that replace the same damaged corpus may disturb each other
        try:
            partial.rename(folder)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if load_cache(folder):
            return
        with contextlib.suppress(FileNotFoundError):
            folder.rename(damaged := partial.with_suffix(".damaged"))
            shutil.rmtree(damaged, ignore_errors=True)


def remove_abandoned(folder: Path) -> None:
    """Remove what processes that were killed have left."""
    for partial in [*folder.glob(".*.partial"), *folder.glob(".*.damaged")]:
        with contextlib.suppress(OSError):
            if time.time() - partial.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(partial, ignore_errors=True)


class Remembered(NamedTuple):
    """What is remembered of files: the corpus that they make, and what was not read."""

    content_id: str
    duplicates: int
    skipped: int
    warning: str


def sources_key(files: Sequence[Source], settings: object, now_ns: int) -> str | None:
    """Return a key of files as they are, which is found without reading them, and of the settings of a corpus.

    Args:
        files: the files.
        settings: a JSON value.
        now_ns: the time; files that changed just before may change again without a sign of it.

    Returns:
        The key; None if a file may change without a sign of it.
    """
    digest = hashlib.sha256(json.dumps([SOURCES_VERSION, settings]).encode())
    for file in files:
        if file.stamp is None or max(file.stamp[1:3]) > now_ns - SETTLED_NS:
            return None
        digest.update(json.dumps([file.name, *file.stamp]).encode())
    return digest.hexdigest()[:32]


def recall(key: str | None, cache_dir: str | os.PathLike[str] | None) -> Remembered | None:
    """Return what is remembered under a key, or None."""
    for root in cache_roots(cache_dir) if key else ():
        with contextlib.suppress(OSError, ValueError, TypeError):
            remembered = Remembered(**json.loads((root / "sources" / f"{key}.json").read_text("utf-8")))
            if list(map(type, remembered)) == [str, int, int, str]:
                return remembered
    return None


def remember(key: str, remembered: Remembered, root: Path) -> None:
    """Write what `recall` returns to the cache; one that cannot be written does without."""
    with contextlib.suppress(OSError):
        (root / "sources").mkdir(exist_ok=True)
        with open_atomic(root / "sources" / f"{key}.json") as file:
            file.write(json.dumps(remembered._asdict()).encode())


@contextlib.contextmanager
def cache_errors(folder: Path) -> Iterator[None]:
    """Turn errors of writing to the cache into those of one line that say what to change."""
    try:
        yield
    except OSError as error:
        raise explain_cache_error(error, folder.parent) from error


@contextlib.contextmanager
def cache_file(path: Path, *, sync: bool) -> Iterator[Callable[[bytes | np.ndarray], None]]:
    """Create a file of the cache and return the function that appends to it.

    Args:
        path: the file, which must not exist.
        sync: at the end it is on the disk.
    """

    def write(raw: bytes | np.ndarray) -> None:
        with cache_errors(path.parent):
            file.write(raw)

    with cache_errors(path.parent):
        file = open(path, "xb")  # noqa: SIM115 - closing it may fail, too
    try:
        yield write
        with cache_errors(path.parent):
            file.flush()
            if sync:
                os.fsync(file.fileno())
    finally:
        with cache_errors(path.parent):
            file.close()
