"""Text to token ids and back, exactly.

Two tokenizers with one layout of ids: 0 is `<|endoftext|>`, 1..256 are the 256 bytes, the rest is what
training found (frequent characters, or byte-pair merges). As every byte has a token, any text round-trips.

`encode` never gives id 0: the characters `<|endoftext|>` in a text are text like any other. Only the code
that joins documents writes `eos_id`, and `decode` shows it as nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, pre_tokenizers, trainers

from dantinox.system.atomic_io import open_atomic

FILE_NAME = "tokenizer.json"
FORMAT = 1
FIRST_FREE = 257  # after the end of document and the 256 bytes
MIN_COUNT = 3  # a rarer character would have an embedding that is hardly ever trained
DEFAULT_VOCAB = {"char": 4096, "bpe": 2048}
MAX_CACHED_WORDS = 1 << 18
Ids = Sequence[int] | np.ndarray


class Tokenizer(Protocol):
    """What the rest of the program may ask of a tokenizer."""

    kind: ClassVar[str]  # "char" or "bpe"
    eos_id: ClassVar[int]

    @property
    def vocab_size(self) -> int:
        """V, the number of ids: each of 0..V-1 can be decoded."""

    @property
    def fingerprint(self) -> str:
        """16 hex digits of a hash of the content: equal exactly where the ids mean the same."""

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, int32 [N], without an end of document. ValueError on a lone surrogate."""

    def decode(self, ids: Ids) -> str:
        """Text of `ids` [N]; bytes that are not UTF-8 become U+FFFD. ValueError on an id out of range."""

    def decode_bytes(self, ids: Ids) -> bytes:
        """UTF-8 of `ids` [N], perhaps ending inside a character. ValueError on an id out of range."""

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Writes `directory`/tokenizer.json, whole or not at all, and returns its path."""


@dataclass(frozen=True)
class CharTokenizer:
    """One token a character: ASCII by its byte, those of `chars` by an id of their own, others as bytes.

    chars: distinct non-ASCII characters in code point order; ids 257.. in that order. ValueError otherwise.
    """

    chars: str
    kind: ClassVar[str] = "char"
    eos_id: ClassVar[int] = 0

    def __post_init__(self) -> None:
        _utf8(self.chars)
        if sorted(set(self.chars)) != list(self.chars) or min(self.chars, default="\x80") < "\x80":
            raise ValueError("chars must be distinct non-ASCII characters in code point order")

    @property
    def vocab_size(self) -> int:
        return len(self._tokens)

    @cached_property
    def fingerprint(self) -> str:
        return _fingerprint(self.kind, self.chars)

    @cached_property
    def _tokens(self) -> list[bytes]:
        return [*_BASE_TOKENS, *(char.encode() for char in self.chars)]

    @cached_property
    def _id_of_codepoint(self) -> np.ndarray:
        table = np.full(0x110000, -1, np.int32)
        table[:128] = np.arange(1, 129)
        table[_codepoints(self.chars)] = np.arange(FIRST_FREE, self.vocab_size)
        return table

    def encode(self, text: str) -> np.ndarray:
        codepoints = _codepoints(text)
        ids = self._id_of_codepoint[codepoints]
        known = ids >= 0
        if known.all():
            return ids
        # A character without an id takes 2..4 places, filled in order with its UTF-8 bytes.
        width = np.where(known, 1, 2 + (codepoints >= 0x800) + (codepoints >= 0x10000))
        end = np.cumsum(width)
        out = np.zeros(end[-1], np.int32)
        out[end[known] - 1] = ids[known]
        spelled = codepoints[~known].tobytes().decode("utf-32-le").encode()
        out[out == 0] = np.frombuffer(spelled, np.uint8).astype(np.int32) + 1
        return out

    def decode(self, ids: Ids) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Ids) -> bytes:
        return _join(self._tokens, ids)

    def save(self, directory: str | os.PathLike[str]) -> Path:
        return _save(directory, {"kind": self.kind, "chars": self.chars, "fingerprint": self.fingerprint})


@dataclass(frozen=True)
class BPETokenizer:
    """Byte-level byte-pair encoding (Radford et al. 2019), trained and applied by Hugging Face `tokenizers`.

    merges: pairs of ids in the order learnt; each pair that spells new bytes takes the next id, from 257.
    ValueError for a pair that names the end of document or an id that is not defined before it.
    """

    merges: tuple[tuple[int, int], ...]
    kind: ClassVar[str] = "bpe"
    eos_id: ClassVar[int] = 0
    _ids_of_word: dict[str, list[int]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _ = self._tokens  # built here, so that bad merges are told at once

    @property
    def vocab_size(self) -> int:
        return len(self._tokens)

    @cached_property
    def fingerprint(self) -> str:
        return _fingerprint(self.kind, self.merges)

    @cached_property
    def _tokens(self) -> list[bytes]:
        tokens = list(_BASE_TOKENS)
        seen = set(tokens)
        for left, right in self.merges:
            if not (0 < left < len(tokens) and 0 < right < len(tokens)):
                raise ValueError(f"merge ({left}, {right}) must join two of the ids 1..{len(tokens) - 1}")
            joined = tokens[left] + tokens[right]
            if joined not in seen:  # two merges may spell the same bytes, "a"+"bc" and "ab"+"c"
                seen.add(joined)
                tokens.append(joined)
        return tokens

    @cached_property
    def _hf(self) -> HFTokenizer:
        # Without the end of document: no text can then become its id.
        spelled = [token.decode("latin-1").translate(_BYTE_CHARS) for token in self._tokens]
        vocab = {token: i for i, token in enumerate(spelled) if i}
        hf = HFTokenizer(models.BPE(vocab, [(spelled[left], spelled[right]) for left, right in self.merges]))
        hf.pre_tokenizer = _byte_level()
        return hf

    def encode(self, text: str) -> np.ndarray:
        _utf8(text)
        words = _WORD.findall(text)
        known = self._ids_of_word
        # Words repeat, so each is merged once: three times as fast as handing over the whole text.
        new = list(dict.fromkeys(word for word in words if word not in known))
        ids_of_new = {w: e.ids for w, e in zip(new, self._hf.encode_batch_fast(new), strict=True)}
        if len(known) < MAX_CACHED_WORDS:
            known.update(ids_of_new)
        ids = chain.from_iterable(known.get(word) or ids_of_new[word] for word in words)
        return np.fromiter(ids, np.int32)

    def decode(self, ids: Ids) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Ids) -> bytes:
        return _join(self._tokens, ids)

    def save(self, directory: str | os.PathLike[str]) -> Path:
        return _save(directory, {"kind": self.kind, "merges": self.merges, "fingerprint": self.fingerprint})


def train_tokenizer(kind: str, texts: Iterable[str], vocab_size: int | None = None) -> Tokenizer:
    """Learns a tokenizer from `texts`; the same texts in the same order give the same one.

    kind: "char" or "bpe". vocab_size: the most ids it may have, at least 257 (default 4096 for "char",
    2048 for "bpe"); a small corpus gives fewer. ValueError for another kind or a smaller size.
    """
    if kind not in DEFAULT_VOCAB:
        raise ValueError(f'tokenizer must be "char" or "bpe", got {kind!r}')
    vocab_size = DEFAULT_VOCAB[kind] if vocab_size is None else vocab_size
    if vocab_size < FIRST_FREE:
        raise ValueError(f"vocab_size must be at least {FIRST_FREE} (256 bytes and an end), got {vocab_size}")
    texts = [texts] if isinstance(texts, str) else texts
    return _train_char(texts, vocab_size) if kind == "char" else _train_bpe(texts, vocab_size)


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
    """Reads what `save` wrote. FileNotFoundError if it is missing, ValueError if it is damaged."""
    path = Path(directory) / FILE_NAME
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer at {path}")
    try:
        record = json.loads(path.read_text("utf-8"))
        if record["format"] != FORMAT or record["kind"] not in DEFAULT_VOCAB:
            raise ValueError(f"format {record['format']!r}, kind {record['kind']!r}")
        if record["kind"] == "char":
            tokenizer: Tokenizer = CharTokenizer(record["chars"])
        else:
            tokenizer = BPETokenizer(tuple((left, right) for left, right in record["merges"]))
        if tokenizer.fingerprint != record["fingerprint"]:
            raise ValueError("its content does not match its fingerprint")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged or not a DantinoX tokenizer: {error}") from error
    return tokenizer


# Words as GPT-2 splits them, in Python's classes: a merge never crosses from one word into the next.
_WORD = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")
_BASE_TOKENS = (b"", *(bytes([byte]) for byte in range(256)))


def _byte_chars() -> dict[int, str]:
    """The printable character by which byte-level BPE spells each byte."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return {byte: chr(byte if byte in printable else next(others)) for byte in range(256)}


_BYTE_CHARS = _byte_chars()


def _byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # _WORD has split already


def _train_char(texts: Iterable[str], vocab_size: int) -> CharTokenizer:
    counts = np.zeros(0x110000, np.int64)
    for text in texts:
        seen = np.bincount(_codepoints(text))
        counts[: seen.size] += seen
    counts[:128] = 0  # ASCII has its byte tokens
    frequent = np.flatnonzero(counts >= MIN_COUNT)
    most = frequent[np.argsort(-counts[frequent], kind="stable")][: vocab_size - FIRST_FREE]
    return CharTokenizer("".join(map(chr, np.sort(most))))


def _train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    hf = HFTokenizer(models.BPE())
    hf.pre_tokenizer = _byte_level()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # the end of document is not the trainer's business
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    hf.train_from_iterator((_WORD.findall(text) for text in texts if _utf8(text)), trainer)
    id_of = {char: byte + 1 for byte, char in _BYTE_CHARS.items()}
    merges = []
    for left, right in json.loads(hf.to_str())["model"]["merges"]:
        merges.append((id_of[left], id_of[right]))
        id_of.setdefault(left + right, len(id_of) + 1)
    return BPETokenizer(tuple(merges))


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        what = f"lone surrogate U+{ord(text[error.start]):04X} at index {error.start}"
        raise ValueError(f"text has a {what}, which no UTF-8 can spell") from None


def _codepoints(text: str) -> np.ndarray:
    try:
        return np.frombuffer(text.encode("utf-32-le"), "<u4")
    except UnicodeEncodeError:
        _utf8(text)  # raises, in our words
        raise


def _join(tokens: list[bytes], ids: Ids) -> bytes:
    array = np.asarray(ids)
    if array.size == 0:
        return b""
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"ids must be a 1-D array of integers, got {array.dtype} of shape {array.shape}")
    bad = (array < 0) | (array >= len(tokens))
    if bad.any():
        raise ValueError(f"token id {array[bad][0]} is out of range: the vocabulary is 0..{len(tokens) - 1}")
    return b"".join(map(tokens.__getitem__, array.tolist()))


def _fingerprint(kind: str, content: object) -> str:
    return hashlib.sha256(json.dumps([FORMAT, kind, content]).encode()).hexdigest()[:16]


def _save(directory: str | os.PathLike[str], record: dict[str, object]) -> Path:
    path = Path(directory) / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_atomic(path) as file:
        file.write(json.dumps({"format": FORMAT, **record}).encode())
    return path
