"""Folders of token ids that another program made: train.bin and val.bin as nanoGPT writes them, used where they are.

Their ids are uint16, or uint32 for a vocabulary that needs it, unless a header says otherwise: that of llm.c in a file,
or {"dtype": "uint32"} in meta.json. The vocabulary is that of tokenizer.json in the folder.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dantinox.data.cache import Corpus, Stats, cross_entropy, id_dtype
from dantinox.data.files import printable
from dantinox.data.tokenizer import FILE_NAME, Tokenizer, load_tokenizer
from dantinox.system.paths import expand_user

DTYPES = {"uint16": np.uint16, "uint32": np.uint32}
HEADERS = {(20240520, 1): np.uint16, (20240801, 7): np.uint32}  # (magic number, version) of llm.c
HEADER_BYTES = 1024
RUNS = 64  # parts of a file that are looked at, evenly spread
COUNTED = 1 << 26  # ids of a larger file that are counted
HASHED = 1 << 22


def find(data: str | os.PathLike[str]) -> Path | None:
    """Return the folder that `data` names, if it has token ids."""
    folder = expand_user(data)
    try:
        return folder if all((folder / f"{split}.bin").is_file() for split in ("train", "val")) else None
    except (OSError, ValueError):  # a name that no file can have
        return None


def load(folder: Path, tokenizer: Tokenizer | None = None) -> Corpus:
    """Return the corpus of a folder; of its statistics, those of a large file are estimates.

    Args:
        folder: what `find` returned.
        tokenizer: that of the ids; None: that in the folder.

    Raises:
        ValueError: there is no tokenizer, a file is damaged, or an id is not in the vocabulary.
    """
    if tokenizer is None:
        tokenizer = _tokenizer_of(folder)
    dtype = _dtype_of(folder / "meta.json") or id_dtype(tokenizer.vocab_size)
    train, val = (_map(folder / f"{split}.bin", dtype) for split in ("train", "val"))
    counts = [_count(folder / f"{split}.bin", ids, tokenizer) for split, ids in (("train", train), ("val", val))]
    sizes = [_text_bytes(tokenizer, count) * len(ids) // int(count.sum()) for count, ids in zip(counts, (train, val))]
    docs = [int(count[tokenizer.eos_id]) * len(ids) // int(count.sum()) for count, ids in zip(counts, (train, val))]
    stats = Stats(
        train_docs=docs[0],
        val_docs=docs[1],
        train_bytes=sizes[0],
        val_bytes=sizes[1],
        train_tokens=len(train),
        val_tokens=len(val),
        unigram_entropy=cross_entropy(counts[0], counts[1]),
        bytes_per_token=sizes[1] / len(val),
    )
    digest = hashlib.sha256(json.dumps(["ids", tokenizer.fingerprint]).encode())
    for ids in (train, val):
        digest.update(f"{ids.dtype} {len(ids)} ".encode())
        for part in _runs(ids, HASHED):
            digest.update(part)
    return Corpus(train, val, tokenizer, stats, folder, digest.hexdigest()[:32])


def _tokenizer_of(folder: Path) -> Tokenizer:
    try:
        return load_tokenizer(folder)
    except FileNotFoundError:
        pickled = " (meta.pkl is not read: a pickle may run any program)" if (folder / "meta.pkl").exists() else ""
        text = f"{printable(folder)} has token ids without their vocabulary{pickled}"
        raise ValueError(f"{text}; put the {FILE_NAME} of their tokenizer into the folder") from None


def _dtype_of(path: Path) -> type[np.unsignedinteger] | None:
    if not path.is_file():
        return None
    try:
        name = json.loads(path.read_text("utf-8")).get("dtype")
    except (ValueError, AttributeError):
        raise ValueError(f"{printable(path)} is damaged: not a JSON object") from None
    if name is not None and name not in DTYPES:
        raise ValueError(f"{printable(path)}: dtype is {name!r}; allowed: {', '.join(DTYPES)}")
    return DTYPES.get(name)


def _map(path: Path, dtype: type[np.unsignedinteger]) -> np.ndarray:
    """Return the ids of a file, a read-only memory map [N]."""
    size, offset = path.stat().st_size, 0
    header = np.fromfile(path, "<i4", HEADER_BYTES // 4)
    if len(header) == HEADER_BYTES // 4 and (found := HEADERS.get((int(header[0]), int(header[1])))):
        dtype, offset = found, HEADER_BYTES
    width = np.dtype(dtype).itemsize
    if size <= offset or (size - offset) % width:
        raise ValueError(
            f"{printable(path)} has {size - offset} bytes of ids; allowed: a multiple of {width}, at least 1"
        )
    if offset and (size - offset) // width != int(header[2]):
        raise ValueError(f"{printable(path)} has {(size - offset) // width} ids; its header says {int(header[2])}")
    return np.memmap(path, dtype, mode="r", offset=offset)


def _runs(ids: np.ndarray, total: int) -> Iterator[np.ndarray]:
    """Yield runs of ids, evenly spread, `total` in all, or all of them."""
    length = len(ids) if len(ids) <= total else total // RUNS
    starts = np.linspace(0, len(ids) - length, 1 if length == len(ids) else RUNS).astype(np.int64)
    for start in starts.tolist():
        yield from (ids[i : min(i + (1 << 20), start + length)] for i in range(start, start + length, 1 << 20))


def _count(path: Path, ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Return the count of each id in the runs that are looked at, int64 [V]."""
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for run in _runs(ids, COUNTED):
        if (largest := int(run.max())) >= len(counts):
            raise ValueError(
                f"{printable(path)} has the id {largest}; allowed: 0 to {len(counts) - 1}, the vocabulary of its "
                f'tokenizer (its ids are taken as {ids.dtype}; {{"dtype": ...}} in meta.json says otherwise)'
            )
        counts += np.bincount(run, minlength=len(counts))
    return counts


def _text_bytes(tokenizer: Tokenizer, counts: np.ndarray) -> int:
    seen = np.flatnonzero(counts)
    return sum(len(tokenizer.decode_bytes([i])) * n for i, n in zip(seen.tolist(), counts[seen].tolist()))
