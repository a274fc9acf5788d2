"""From text files to token ids, as a stream over processes; memory does not grow with the text.

read blocks of documents -> index them, drop exact duplicates, split into train and validation -> train a tokenizer on
a sample of train -> two flat files of ids, cached under a hash of their inputs.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dantinox.data import token_folder
from dantinox.data.batches import eval_batches, get_batch, require_length
from dantinox.data.blocks import read_blocks
from dantinox.data.cache import (
    Corpus,
    Remembered,
    Stats,
    cache_errors,
    cache_file,
    cached_corpus,
    checksum,
    cross_entropy,
    load_cache,
    publish,
    recall,
    remember,
    remove_abandoned,
    sources_key,
)
from dantinox.data.documents import Document, Sources, find_documents
from dantinox.data.encoding import Encoder, training_texts
from dantinox.data.files import STDLIB, find_files, printable
from dantinox.data.formats import Source
from dantinox.data.index import Index, IndexPlan
from dantinox.data.indexing import index_documents
from dantinox.data.pool import Pool, process_count
from dantinox.data.tokenizer import DEFAULT_VOCAB, Tokenizer, load_tokenizer_at, train_tokenizer
from dantinox.system import streams
from dantinox.system.paths import make_cache_folder
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
]

CONTENT_VERSION = 1  # part of content ids; another number would disown every checkpoint
SAMPLE = 1 << 25  # bytes of text that a tokenizer is trained on

log = logging.getLogger(__name__)


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

    Files that have not changed since are not read again.

    Args:
        data: as `spec` of `find_documents`, or a folder with train.bin and val.bin, ids as nanoGPT writes them.
        tokenizer: "char" or "bpe", trained on the training split, or on 34 MB evenly spread over a larger one; or the
            path of a tokenizer.json or of its folder.
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
    if tokenizer not in DEFAULT_VOCAB and existing_tokenizer is None:
        existing_tokenizer = load_tokenizer_at(tokenizer)
    if data != STDLIB and (folder := token_folder.find(data)):
        corpus = token_folder.load(folder, existing_tokenizer)
    else:
        vocab_size = bpe_vocab_size if tokenizer == "bpe" else DEFAULT_VOCAB["char"]
        corpus = _load_text(data, _Options(tokenizer, vocab_size, val_fraction, existing_tokenizer), cache_dir)
    if seq_len:
        require_length(corpus.train, seq_len, f"the training split of {data}")
        require_length(corpus.val, seq_len, f"the validation split of {data}")
    return corpus


class _Options(NamedTuple):
    """How a text is split and tokenized."""

    kind: str
    vocab_size: int
    val_fraction: float
    tokenizer: Tokenizer | None

    @property
    def key(self) -> list[object]:
        """What ids depend on, besides the documents."""
        tokenizer_key = self.tokenizer.fingerprint if self.tokenizer else [self.kind, self.vocab_size]
        return [CONTENT_VERSION, tokenizer_key, self.val_fraction]


def _load_text(data: str | os.PathLike[str], options: _Options, cache_dir: str | os.PathLike[str] | None) -> Corpus:
    """Return the corpus of text files: of files that are known without reading them, or of their content."""
    sources = Sources(data)
    key = sources_key(sources.files, options.key, time.time_ns())
    remembered = recall(key, cache_dir)
    corpus = cached_corpus(remembered.content_id, cache_dir) if remembered else None
    if corpus is None or remembered is None:
        corpus = _read_text(sources, options, cache_dir)
        stats = corpus.stats
        remembered = Remembered(corpus.content_id, stats.duplicates, stats.skipped, sources.warning)
        if key and key == sources_key(sources.files, options.key, time.time_ns()):  # none has changed meanwhile
            remember(key, remembered, corpus.path.parents[1])
    elif remembered.warning:
        log.warning("%s", remembered.warning)
    # Not cached with the corpus: the same unique text may come from other files.
    stats = replace(corpus.stats, duplicates=remembered.duplicates, skipped=remembered.skipped)
    return replace(corpus, stats=stats)


def _read_text(sources: Sources, options: _Options, cache_dir: str | os.PathLike[str] | None) -> Corpus:
    """Return the corpus of text files, from the cache if it has their content.

    It is written to a folder of its own, which is renamed when it is complete: no process reads half of it, and of two
    that write the same corpus the second leaves that of the first.

    Raises:
        OSError: the cache cannot be written.
    """
    start, failure = time.perf_counter(), None
    try:
        partial = make_cache_folder(f"corpus/.{secrets.token_hex(8)}.partial", cache_dir)
    except OSError as error:  # the corpus may be in a cache that can be read only
        partial, failure = Path(tempfile.mkdtemp(prefix="dantinox-")), error
    try:
        index = index_documents(sources, partial / "documents")
        content_id = _content_id(index, options)
        corpus = cached_corpus(content_id, cache_dir)
        if corpus is None:
            if failure:
                raise failure
            index.split(options.val_fraction)
            corpus = _add_to_cache(partial, content_id, sources.files, index, options)
            log.info("tokenized %s in %.1f s into %s", sources.spec, time.perf_counter() - start, corpus.path)
    except KeyboardInterrupt:
        streams.report(f"interrupted while preparing the text of {printable(sources.spec)}; nothing of it is kept")
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    stats = replace(corpus.stats, duplicates=index.duplicates, skipped=len(sources.skipped))
    return replace(corpus, stats=stats)


def _content_id(index: Index, options: _Options) -> str:
    digest = hashlib.sha256(json.dumps(options.key).encode())
    for digests in index.kept_digests():
        digest.update(digests)
    return digest.hexdigest()[:32]


def _add_to_cache(partial: Path, content_id: str, files: Sequence[Source], index: Index, options: _Options) -> Corpus:
    """Write a corpus to the folder `partial`, rename that, and return the corpus."""
    tokenizer = options.tokenizer or _train_tokenizer(files, index, options)
    _write_cache(partial, files, index, tokenizer)
    index.path.unlink()
    with cache_errors(partial):
        corpus = load_cache(partial)  # its maps outlast the names of the files
        if corpus is None:
            raise OSError(errno.EIO, "a file is damaged after it was written", str(partial))
        publish(partial, partial.with_name(content_id))
        remove_abandoned(partial.parent)
    return replace(corpus, path=partial.with_name(content_id))


@dataclass(frozen=True)
class _Training:
    """The training of a tokenizer, which may be done in a process whose memory is freed at its end."""

    kind: str
    vocab_size: int

    def __call__(self, text: tuple[Sequence[Source], Index]) -> Tokenizer:
        return train_tokenizer(self.kind, training_texts(*text, SAMPLE), self.vocab_size)


def _train_tokenizer(files: Sequence[Source], index: Index, options: _Options) -> Tokenizer:
    size = min(index.sizes()[0].bytes, SAMPLE)
    processes = min(1, process_count(sum(file.size for file in files)))
    with (
        Progress(f"training a tokenizer ({options.kind}) on {megabytes(size)}"),
        Pool(_Training(options.kind, options.vocab_size), processes) as pool,
    ):
        return pool.call((files, index))


def _write_cache(folder: Path, files: Sequence[Source], index: Index, tokenizer: Tokenizer) -> None:
    """Write a corpus to `folder`, with its checksums in meta.json."""
    splits, totals = ("train", "val"), index.sizes()
    with cache_errors(folder):
        tokenizer.save(folder)
    encoder, size = Encoder(tokenizer), sum(file.size for file in files)
    counts, sizes = np.zeros((2, tokenizer.vocab_size), np.int64), np.zeros(2, np.int64)
    text_size = sum(split.bytes for split in totals)
    with (
        Progress(f"tokenizing {megabytes(text_size)}", size) as progress,
        Pool(encoder, process_count(size)) as pool,
        cache_file(folder / "train.bin", sync=True) as write_train,
        cache_file(folder / "val.bin", sync=True) as write_val,
    ):
        writers = write_train, write_val
        blocks = read_blocks(files, IndexPlan(index), in_parts=encoder.takes_parts)
        for block, encoded in pool.map(blocks):
            for i, text in enumerate(encoded):
                sizes[i] += text.text_bytes
                counts[i] += text.counts
                writers[i](text.ids)
            os.utime(folder)  # not abandoned
            progress.advance(block.cost)
    stats = Stats(
        train_docs=totals[0].docs,
        val_docs=totals[1].docs,
        train_bytes=int(sizes[0]),
        val_bytes=int(sizes[1]),
        train_tokens=int(counts[0].sum()),
        val_tokens=int(counts[1].sum()),
        unigram_entropy=cross_entropy(*counts),
        bytes_per_token=int(sizes[1]) / int(counts[1].sum()),
    )
    with cache_errors(folder):
        checksums = {split: checksum(folder / f"{split}.bin") for split in splits}
        meta = {"sha256": checksums, "tokenizer": tokenizer.fingerprint, "stats": asdict(stats)}
        (folder / "meta.json").write_text(json.dumps(meta, indent=1), "utf-8")
