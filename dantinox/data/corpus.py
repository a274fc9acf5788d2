"""From text files to batches of token ids.

find_documents -> drop exact duplicates -> split into train and validation -> train a tokenizer on train
-> two flat files of ids, cached under a hash of their inputs -> batches, pure functions of the step.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import secrets
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from dantinox.data.documents import Document, find_documents, read_documents
from dantinox.data.files import STDLIB, find_files
from dantinox.data.tokenizer import DEFAULT_VOCAB, Tokenizer, load_tokenizer, split_text, train_tokenizer
from dantinox.system.paths import cache_roots, explain_cache_error, make_cache_folder
from dantinox.system.progress import Progress, megabytes

__all__ = [
    "STDLIB",
    "Corpus",
    "Document",
    "Stats",
    "cached_corpus",
    "eval_batches",
    "find_documents",
    "find_files",
    "get_batch",
    "load_corpus",
    "train_val_split",
]

CONTENT_VERSION = 1  # part of content ids; another number would disown every checkpoint
ABANDONED_SECONDS = 86400

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
    """A tokenized corpus: `train` and `val` are read-only memory maps [N] of uint16, or uint32 above 65536 ids."""

    train: np.ndarray
    val: np.ndarray
    tokenizer: Tokenizer
    stats: Stats
    path: Path  # folder in the cache

    @property
    def content_id(self) -> str:
        """32 hex digits that depend on the documents, in their order, and on how they are split and tokenized.

        Neither the place of the text nor that of the cache changes it. A checkpoint keeps it, to be resumed with the
        same text only; `cached_corpus` finds the corpus again as long as it is cached.
        """
        return self.path.name


def load_corpus(
    data: str | os.PathLike[str],
    *,
    tokenizer: str = "char",
    bpe_vocab_size: int = DEFAULT_VOCAB["bpe"],
    val_fraction: float = 0.1,
    seq_len: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
    existing_tokenizer: Tokenizer | None = None,
) -> Corpus:
    """Tokenize a text, or load it from the cache if the same text was tokenized with the same options.

    Args:
        data: as `spec` of `find_documents`.
        tokenizer: "char" or "bpe", trained on the training split.
        bpe_vocab_size: vocabulary size of the BPE tokenizer.
        val_fraction: fraction of the text held out for validation, 0 < val_fraction < 1.
        seq_len: if positive, both splits must have a window of this length.
        cache_dir: folder of the cache, which runs share; None: $DANTINOX_CACHE, dantinox in $XDG_CACHE_HOME, or
            ~/.cache/dantinox, or a folder for temporary files if these cannot be written.
        existing_tokenizer: used instead of training one.

    Raises:
        ValueError: an option is invalid, or the corpus is too small.
        FileNotFoundError: no file matches.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}; allowed: between 0 and 1, exclusive")
    if tokenizer not in DEFAULT_VOCAB:
        raise ValueError(f"tokenizer is {tokenizer!r}; allowed: char, bpe")
    all_documents, skipped = read_documents(data)
    documents = list({document.digest: document for document in reversed(all_documents)}.values())[::-1]
    vocab_size = bpe_vocab_size if tokenizer == "bpe" else DEFAULT_VOCAB["char"]
    tokenizer_key = existing_tokenizer.fingerprint if existing_tokenizer else [tokenizer, vocab_size]
    content_id = _content_id(documents, tokenizer_key, val_fraction)
    corpus = cached_corpus(content_id, cache_dir)
    if corpus is None:
        start = time.perf_counter()
        train, val = train_val_split(documents, val_fraction)
        trained_tokenizer = existing_tokenizer or _train_tokenizer(tokenizer, train, vocab_size)
        corpus = _add_to_cache(content_id, cache_dir, train, val, trained_tokenizer)
        log.info("tokenized %s in %.1f s into %s", data, time.perf_counter() - start, corpus.path)
    if seq_len:
        _require_length(corpus.train, seq_len, f"the training split of {data}")
        _require_length(corpus.val, seq_len, f"the validation split of {data}")
    # Not cached: the same unique text may come from other files.
    stats = replace(corpus.stats, duplicates=len(all_documents) - len(documents), skipped=skipped)
    return replace(corpus, stats=stats)


def cached_corpus(content_id: str, cache_dir: str | os.PathLike[str] | None = None) -> Corpus | None:
    """Return the corpus of a `Corpus.content_id` from the cache, whatever has become of its text; None if it has none.

    Its statistics count no duplicates and no skipped files.
    """
    folders = (root / "corpus" / content_id for root in cache_roots(cache_dir) if content_id.isalnum())
    return next((corpus for folder in folders if (corpus := _load_cache(folder))), None)


def train_val_split(documents: list[Document], val_fraction: float) -> tuple[list[Document], list[Document]]:
    """Split distinct documents into train and validation, by their content and without overlap.

    Documents are assigned to validation in the order of their hash, small ones if they suffice, until validation has
    val_fraction of the bytes, plus or minus half of that. If none fit (one document, or a few large ones), the end of
    the text becomes validation, and the document in which it starts is divided.

    Raises:
        ValueError: a split would be empty.
    """
    total_bytes = sum(document.size for document in documents)
    target_bytes = val_fraction * total_bytes
    max_bytes = min(1.5 * target_bytes, (target_bytes + total_bytes) / 2)
    # Small documents first: one large document should not be most of the validation.
    for max_document_bytes in (target_bytes / 8, max_bytes):
        val_digests, val_bytes = set(), 0
        for document in sorted(documents, key=lambda document: document.digest):
            if val_bytes < target_bytes and document.size <= min(max_document_bytes, max_bytes - val_bytes):
                val_digests.add(document.digest)
                val_bytes += document.size
        if val_bytes >= target_bytes / 2:
            train = [document for document in documents if document.digest not in val_digests]
            return train, [document for document in documents if document.digest in val_digests]
    length = sum(len(document.text) for document in documents)
    if length < 2:
        raise ValueError(f"the corpus has {length} character(s); allowed: at least 2, to train and validate")
    cut = min(max(length - round(val_fraction * length), 1), length - 1)
    train, val = [], []
    for document in documents:
        train_length = max(0, min(cut, len(document.text)))
        for split, text in ((train, document.text[:train_length]), (val, document.text[train_length:])):
            if text:
                split.append(Document(document.name, text))
        cut -= len(document.text)
    return train, val


def get_batch(
    tokens: np.ndarray, *, seed: int, step: int, batch_size: int, seq_len: int, rows: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return random windows of `tokens` [N] as (inputs, targets), int32 [B, T]; targets are one token later.

    A pure function of (seed, step), so there is no state to save; row b does not depend on batch_size. Documents are
    concatenated, so windows are never padded. Callers that pad sequences use any input id and a negative target, which
    the loss ignores.

    Args:
        tokens: the text.
        seed: of the run; it and the step decide about the windows.
        step: from 0.
        batch_size: B.
        seq_len: T.
        rows: numbers of the rows to return, by default all.

    Raises:
        ValueError: an argument is negative, or N < seq_len + 1.
    """
    _require_length(tokens, seq_len, "the data")
    if seed < 0 or step < 0 or batch_size < 1:
        raise ValueError(f"seed, step, batch_size are {seed}, {step}, {batch_size}; allowed: at least 0, 0, 1")
    # NumPy guarantees that the raw bits of a counter-based generator are the same in every version.
    bits = np.random.Philox(key=np.array([seed, step], np.uint64)).random_raw(batch_size)
    bits = bits if rows is None else bits[rows]
    return _gather_windows(tokens, (bits % np.uint64(len(tokens) - seq_len)).astype(np.int64), seq_len)


def eval_batches(tokens: np.ndarray, *, batch_size: int, seq_len: int, n: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return `n` fixed batches of evenly spaced windows of `tokens` [N]; no token is predicted twice.

    Each batch is (inputs, targets), int32 [B, T]. If N is too small, there are fewer batches, at least one, which may
    have fewer rows.

    Raises:
        ValueError: n or batch_size is less than 1, or N < seq_len + 1.
    """
    _require_length(tokens, seq_len, "the validation data")
    if n < 1 or batch_size < 1:
        raise ValueError(f"n, batch_size are {n}, {batch_size}; allowed: at least 1, 1")
    available = (len(tokens) - 1) // seq_len
    rows = min(batch_size, available)
    count = min(n, available // rows) * rows
    starts = np.arange(count) * ((len(tokens) - 1) // count)
    return [_gather_windows(tokens, starts[i : i + rows], seq_len) for i in range(0, count, rows)]


def _require_length(tokens: np.ndarray, seq_len: int, subject: str) -> None:
    if seq_len < 1:
        raise ValueError(f"seq_len is {seq_len}; allowed: 1 or more")
    if len(tokens) < seq_len + 1:
        raise ValueError(
            f"{subject} has {len(tokens)} tokens, but seq_len {seq_len} needs at least {seq_len + 1}: "
            "use more text, a smaller seq_len, or another val_fraction"
        )


def _gather_windows(tokens: np.ndarray, starts: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    windows = np.asarray(tokens[starts[:, None] + np.arange(seq_len + 1)]).astype(np.int32)
    return windows[:, :-1], windows[:, 1:]


def _content_id(documents: list[Document], tokenizer_key: object, val_fraction: float) -> str:
    digest = hashlib.sha256(json.dumps([CONTENT_VERSION, tokenizer_key, val_fraction]).encode())
    for document in documents:
        digest.update(document.digest)
    return digest.hexdigest()[:32]


def _train_tokenizer(kind: str, documents: list[Document], vocab_size: int) -> Tokenizer:
    size = sum(document.size for document in documents)
    with Progress(f"training a tokenizer ({kind}) on {megabytes(size)}"):
        return train_tokenizer(kind, (document.text for document in documents), vocab_size)


def _add_to_cache(
    content_id: str,
    cache_dir: str | os.PathLike[str] | None,
    train: list[Document],
    val: list[Document],
    tokenizer: Tokenizer,
) -> Corpus:
    """Write a corpus to the cache and return it.

    It is written to a folder of its own, which is renamed when it is complete: no process reads half of it, and of two
    that write the same corpus the second leaves that of the first.

    Raises:
        OSError: the cache cannot be written.
    """
    partial = make_cache_folder(f"corpus/.{content_id}.{secrets.token_hex(8)}.partial", cache_dir)
    try:
        _write_cache(partial, train, val, tokenizer)
        corpus = _load_cache(partial)  # its maps outlast the names of the files
        if corpus is None:
            raise OSError(errno.EIO, "a file is damaged after it was written", str(partial))
        _publish(partial, partial.with_name(content_id))
        _remove_abandoned(partial.parent)
    except OSError as error:
        raise explain_cache_error(error, partial.parent) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return replace(corpus, path=partial.with_name(content_id))


def _publish(partial: Path, folder: Path) -> None:
    """Rename `partial` to `folder`, in place of a damaged corpus but not of one that another process has finished."""
    for _ in range(10):  # processes that replace the same damaged corpus may disturb each other
        try:
            partial.rename(folder)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if _load_cache(folder):
            return
        with contextlib.suppress(FileNotFoundError):
            folder.rename(damaged := partial.with_suffix(".damaged"))
            shutil.rmtree(damaged, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """Remove what processes that were killed have left."""
    for partial in [*folder.glob(".*.partial"), *folder.glob(".*.damaged")]:
        with contextlib.suppress(OSError):
            if time.time() - partial.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(partial, ignore_errors=True)


def _write_cache(folder: Path, train: list[Document], val: list[Document], tokenizer: Tokenizer) -> None:
    """Write a corpus to `folder`, with its checksums in meta.json."""
    tokenizer.save(folder)
    sha, counts = {}, {}
    size = sum(document.size for document in train + val)
    with Progress(f"tokenizing {megabytes(size)}", sum(len(document.text) for document in train + val)) as progress:
        for split, documents in (("train", train), ("val", val)):
            sha[split], counts[split] = _write_tokens(folder / f"{split}.bin", documents, tokenizer, progress)
    val_bytes = sum(document.size for document in val)
    val_tokens = int(counts["val"].sum())
    stats = Stats(
        train_docs=len(train),
        val_docs=len(val),
        train_bytes=sum(document.size for document in train),
        val_bytes=val_bytes,
        train_tokens=int(counts["train"].sum()),
        val_tokens=val_tokens,
        unigram_entropy=_cross_entropy(counts["train"], counts["val"]),
        bytes_per_token=val_bytes / val_tokens,
    )
    meta = {"sha256": sha, "tokenizer": tokenizer.fingerprint, "stats": asdict(stats)}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), "utf-8")


def _dtype(vocab_size: int) -> type[np.unsignedinteger]:
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def _write_tokens(
    path: Path, documents: list[Document], tokenizer: Tokenizer, progress: Progress
) -> tuple[str, np.ndarray]:
    """Write each document and an end of document; return the SHA-256 of the file and the count of each id [V]."""
    sha, counts = hashlib.sha256(), np.zeros(tokenizer.vocab_size, np.int64)
    with open(path, "xb") as file:

        def write(ids: np.ndarray) -> None:
            raw = ids.astype(_dtype(tokenizer.vocab_size)).tobytes()
            sha.update(raw)
            file.write(raw)

        for document in documents:
            for piece in split_text(document.text):
                ids = tokenizer.encode(piece)
                counts += np.bincount(ids, minlength=tokenizer.vocab_size)
                write(ids)
                progress.advance(len(piece))
            counts[tokenizer.eos_id] += 1
            write(np.array([tokenizer.eos_id]))
    return sha.hexdigest(), counts


def _cross_entropy(train_counts: np.ndarray, val_counts: np.ndarray) -> float:
    log_total = math.log(train_counts.sum() + train_counts.size)
    return float((val_counts * (log_total - np.log1p(train_counts))).sum() / val_counts.sum())


def _load_cache(folder: Path) -> Corpus | None:
    """Return the corpus in `folder`; None if there is none, or, with a warning, if a file is damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        stats, tokenizer = Stats(**meta["stats"]), load_tokenizer(folder)
        if tokenizer.fingerprint != meta["tokenizer"]:
            raise ValueError("tokenizer.json does not match meta.json")
        maps = {}
        for split, tokens in (("train", stats.train_tokens), ("val", stats.val_tokens)):
            maps[split] = np.memmap(folder / f"{split}.bin", _dtype(tokenizer.vocab_size), mode="r")
            if len(maps[split]) != tokens or hashlib.sha256(maps[split]).hexdigest() != meta["sha256"][split]:
                raise ValueError(f"{split}.bin does not match its checksum")
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, OSError) and error.errno in (None, errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            return None
        log.warning("rebuilding the cache in %s: %s", folder, error)
        return None
    return Corpus(maps["train"], maps["val"], tokenizer, stats, folder)
