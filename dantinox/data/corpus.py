"""From text files to batches of token ids.

find_documents -> drop exact duplicates -> split into train and validation -> tokenizer (learnt from train)
-> two flat files of ids, cached under a hash of all that shaped them -> batches, pure functions of the step.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import math
import os
import sysconfig
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from dantinox.data.tokenizer import DEFAULT_VOCAB, Tokenizer, load_tokenizer, train_tokenizer
from dantinox.system.atomic_io import open_atomic

CACHE_FORMAT = 1  # raise it when the same text and options would give other ids
STDLIB = "stdlib"
NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Document:
    """One text: `name` is its path as found, `text` its whole content, line ends untouched."""

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


@dataclass(frozen=True)
class Stats:
    """What a corpus holds; bytes are of UTF-8 text, tokens count the end of each document.

    unigram_entropy: nats a validation token costs under the add-one-smoothed token frequencies of train: the
    loss of a model blind to context. bytes_per_token: of validation; bits a byte are loss / ln 2 / it.
    duplicates, skipped: documents and files that were left out.
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
    """A tokenized corpus: `train` and `val` are read-only maps [N] of uint16, or uint32 past 65536 ids."""

    train: np.ndarray
    val: np.ndarray
    tokenizer: Tokenizer
    stats: Stats
    path: Path  # the cache folder it lies in


def find_documents(spec: str | os.PathLike[str]) -> list[Document]:
    """The documents that `spec` names, in an order that depends on names alone.

    spec: a text file; a folder, searched recursively but for hidden names; a glob (`**` crosses folders); or
    "stdlib", the Python source of the running interpreter's standard library without its tests ("./stdlib"
    is a folder of that name). Files that are empty or not UTF-8 text are left out, the latter with a warning.
    FileNotFoundError where nothing has that name; ValueError where no text is left.
    """
    return _read(spec)[0]


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
    """Tokenizes `data` (see find_documents), or maps what an earlier call made of the same text and options.

    tokenizer: "char" or "bpe" (of bpe_vocab_size ids), learnt from the training part; existing_tokenizer, if
    given, is used instead. val_fraction: share of the text kept for validation, 0..1. seq_len: if given, both
    parts must hold a window of it. cache_dir: default $DANTINOX_CACHE, else ~/.cache/dantinox; runs share it.
    ValueError for bad options and for a corpus too small; FileNotFoundError as find_documents.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction must lie between 0 and 1, got {val_fraction}")
    if tokenizer not in DEFAULT_VOCAB:
        raise ValueError(f'tokenizer must be "char" or "bpe", got {tokenizer!r}')
    found, skipped = _read(data)
    documents = list({document.digest: document for document in reversed(found)}.values())[::-1]
    vocab_size = bpe_vocab_size if tokenizer == "bpe" else DEFAULT_VOCAB["char"]
    made_by = existing_tokenizer.fingerprint if existing_tokenizer else [tokenizer, vocab_size]
    folder = _cache_root(cache_dir) / "corpus" / _tokenized_key(documents, made_by, val_fraction)
    corpus = _load(folder)
    if corpus is None:
        start = time.perf_counter()
        train, val = train_val_split(documents, val_fraction)
        learnt = existing_tokenizer or train_tokenizer(tokenizer, (d.text for d in train), vocab_size)
        _build(folder, train, val, learnt)
        corpus = _load(folder)
        if corpus is None:
            raise OSError(f"the cache in {folder} cannot be read back: is the disk full?")
        log.info("tokenized %s in %.1f s into %s", data, time.perf_counter() - start, folder)
    if seq_len:
        _require_length(corpus.train, seq_len, f"the training part of {data}")
        _require_length(corpus.val, seq_len, f"the validation part of {data}")
    # Not in the cache: the same unique text may come from other files.
    stats = replace(corpus.stats, duplicates=len(found) - len(documents), skipped=skipped)
    return replace(corpus, stats=stats)


def train_val_split(documents: list[Document], val_fraction: float) -> tuple[list[Document], list[Document]]:
    """Divides distinct documents into train and validation, by content alone and without overlap.

    Whole documents go to validation in the order of their hash, small ones if they suffice, until it has
    val_fraction of the bytes, give or take a half. Where none fit (one document, or a few large ones), the
    tail of the text is taken, and the document it starts in is cut. ValueError if a part would be empty.
    """
    total = sum(document.size for document in documents)
    wanted = val_fraction * total
    most = min(1.5 * wanted, (wanted + total) / 2)
    for largest in (wanted / 8, most):  # one large document should not be most of the validation
        chosen, filled = set(), 0
        for document in sorted(documents, key=lambda document: document.digest):
            if filled < wanted and document.size <= min(largest, most - filled):
                chosen.add(document.digest)
                filled += document.size
        if filled >= wanted / 2:
            train = [document for document in documents if document.digest not in chosen]
            return train, [document for document in documents if document.digest in chosen]
    length = sum(len(document.text) for document in documents)
    if length < 2:
        raise ValueError(f"the corpus has {length} character(s): at least 2 are needed to train and validate")
    cut = min(max(length - round(val_fraction * length), 1), length - 1)
    train, val = [], []
    for document in documents:
        at = max(0, min(cut, len(document.text)))
        for part, text in ((train, document.text[:at]), (val, document.text[at:])):
            if text:
                part.append(Document(document.name, text))
        cut -= len(document.text)
    return train, val


def get_batch(
    tokens: np.ndarray, *, seed: int, step: int, batch_size: int, seq_len: int
) -> tuple[np.ndarray, np.ndarray]:
    """Random windows of `tokens` [N]: inputs and targets, int32 [B,T], the targets one token later.

    Documents follow each other in one stream, so windows are never padded and every target counts. Whoever pads
    sequences of their own gives the padding any input id and a target below 0, which the loss leaves out.
    A pure function of (seed, step), both >= 0, with no state to save; row b does not depend on batch_size.
    ValueError if N < seq_len + 1.
    """
    _require_length(tokens, seq_len, "the data")
    if seed < 0 or step < 0 or batch_size < 1:
        raise ValueError(f"need seed >= 0, step >= 0, batch_size >= 1, got {seed}, {step}, {batch_size}")
    # Raw bits of a counter-based generator: NumPy keeps them the same from version to version.
    bits = np.random.Philox(key=np.array([seed, step], np.uint64)).random_raw(batch_size)
    return _windows(tokens, (bits % np.uint64(len(tokens) - seq_len)).astype(np.int64), seq_len)


def eval_batches(tokens: np.ndarray, *, batch_size: int, seq_len: int, n: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """`n` batches of evenly spaced windows that predict no token twice: the same on every call.

    Each is (inputs, targets), int32 [B,T]. Where `tokens` [N] has too few windows there are fewer batches, at
    least one, which may then have fewer rows. ValueError if N < seq_len + 1.
    """
    _require_length(tokens, seq_len, "the validation data")
    if n < 1 or batch_size < 1:
        raise ValueError(f"need n >= 1 and batch_size >= 1, got {n} and {batch_size}")
    available = (len(tokens) - 1) // seq_len
    rows = min(batch_size, available)
    count = min(n, available // rows) * rows
    starts = np.arange(count) * ((len(tokens) - 1) // count)
    return [_windows(tokens, starts[i : i + rows], seq_len) for i in range(0, count, rows)]


def _require_length(tokens: np.ndarray, seq_len: int, what: str) -> None:
    if seq_len < 1:
        raise ValueError(f"seq_len must be at least 1, got {seq_len}")
    if len(tokens) < seq_len + 1:
        raise ValueError(
            f"{what} has {len(tokens)} tokens, but seq_len {seq_len} needs at least {seq_len + 1}: "
            "use more text, a smaller seq_len, or another val_fraction"
        )


def _windows(tokens: np.ndarray, starts: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    windows = np.asarray(tokens[starts[:, None] + np.arange(seq_len + 1)]).astype(np.int32)
    return windows[:, :-1], windows[:, 1:]


def _read(spec: str | os.PathLike[str]) -> tuple[list[Document], int]:
    """The documents, and how many files were skipped as not text."""
    documents, skipped = [], 0
    for name, path in find_files(spec):
        raw = path.read_bytes()
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            text = "\0"
        if "\0" in text:  # valid UTF-8, but no text has it
            skipped += 1
        elif text:
            documents.append(Document(name, text))
    if skipped:
        log.warning("%s: skipped %d file(s) that are not UTF-8 text", spec, skipped)
    if not documents:
        raise ValueError(f"no text in {spec}: {skipped} file(s) are not UTF-8 text, the others are empty")
    return documents, skipped


def find_files(spec: str | os.PathLike[str]) -> Iterator[tuple[str, Path]]:
    """(name, path) of each file that `spec` names: a file, a folder, a glob or "stdlib".

    Raises:
        FileNotFoundError: there is none. PermissionError: a folder cannot be read.
    """
    if spec == STDLIB:
        return _walk(Path(sysconfig.get_path("stdlib")), NOT_STDLIB, ".py")
    path = Path(spec).expanduser()
    if path.is_dir():
        return _walk(path, set(), "")
    if path.is_file():
        return iter([(path.name, path)])
    matches = sorted(match for match in glob.glob(str(path), recursive=True) if os.path.isfile(match))
    if not matches:
        raise FileNotFoundError(f'no file, folder or match of a pattern at {spec} ("{STDLIB}" needs no file)')
    return ((match, Path(match)) for match in matches)


def _walk(root: Path, excluded: set[str], suffix: str) -> Iterator[tuple[str, Path]]:
    def refuse(error: OSError) -> None:  # os.walk leaves out what it cannot read, and says nothing
        raise error

    for folder, subfolders, names in os.walk(root, onerror=refuse):
        subfolders[:] = sorted(s for s in subfolders if s not in excluded and not s.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            if name.endswith(suffix) and not name.startswith(".") and path.is_file():
                yield str(path.relative_to(root)), path


def _cache_root(cache_dir: str | os.PathLike[str] | None) -> Path:
    return Path(cache_dir or os.environ.get("DANTINOX_CACHE") or "~/.cache/dantinox").expanduser()


def _tokenized_key(documents: list[Document], made_by: object, val_fraction: float) -> str:
    digest = hashlib.sha256(json.dumps([CACHE_FORMAT, made_by, val_fraction]).encode())
    for document in documents:
        digest.update(document.digest)
    return digest.hexdigest()[:32]


def _build(folder: Path, train: list[Document], val: list[Document], tokenizer: Tokenizer) -> None:
    """Writes the cache, meta.json last: without it, or not as it says, the rest does not count.

    Two runs at once write the same bytes, and each file appears whole, so either may win.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    sha, counts = {}, {}
    for part, documents in (("train", train), ("val", val)):
        ids = (tokenizer.encode(document.text) for document in documents)
        sha[part], counts[part] = _write_tokens(folder / f"{part}.bin", ids, tokenizer)
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
    with open_atomic(folder / "meta.json") as file:
        file.write(json.dumps(meta, indent=1).encode())


def _dtype(vocab_size: int) -> type[np.unsignedinteger]:
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def _write_tokens(path: Path, pieces: Iterable[np.ndarray], tokenizer: Tokenizer) -> tuple[str, np.ndarray]:
    """Writes each piece and an end of document; returns the file's SHA-256 and the count of each id [V]."""
    sha, counts = hashlib.sha256(), np.zeros(tokenizer.vocab_size, np.int64)
    with open_atomic(path) as file:
        for piece in pieces:
            ids = np.append(piece, tokenizer.eos_id)
            counts += np.bincount(ids, minlength=tokenizer.vocab_size)
            raw = ids.astype(_dtype(tokenizer.vocab_size)).tobytes()
            sha.update(raw)
            file.write(raw)
    return sha.hexdigest(), counts


def _cross_entropy(train_counts: np.ndarray, val_counts: np.ndarray) -> float:
    log_total = math.log(train_counts.sum() + train_counts.size)
    return float((val_counts * (log_total - np.log1p(train_counts))).sum() / val_counts.sum())


def _load(folder: Path) -> Corpus | None:
    """The corpus in `folder`; None, with a warning, where a file is damaged, and where there is none."""
    try:
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        stats, tokenizer = Stats(**meta["stats"]), load_tokenizer(folder)
        if tokenizer.fingerprint != meta["tokenizer"]:
            raise ValueError("tokenizer.json is another one")
        maps = {}
        for part, tokens in (("train", stats.train_tokens), ("val", stats.val_tokens)):
            maps[part] = np.memmap(folder / f"{part}.bin", _dtype(tokenizer.vocab_size), mode="r")
            if len(maps[part]) != tokens or hashlib.sha256(maps[part]).hexdigest() != meta["sha256"][part]:
                raise ValueError(f"{part}.bin is not what was written")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        log.warning("rebuilding the cache in %s: %s", folder, error)
        return None
    return Corpus(maps["train"], maps["val"], tokenizer, stats, folder)
