"""Lossless tokenizers: characters, or byte-level BPE; those of Hugging Face are in `hf_tokenizer`.

Both have one layout of ids: 0 is `<|endoftext|>`, 1..256 are the 256 bytes, the rest is trained (frequent
characters, or byte-pair merges). Every byte has a token, so any text round-trips.

`encode` never returns id 0: the characters `<|endoftext|>` in a text are encoded like other text. Only the code
that concatenates documents writes `eos_id`, which `decode` maps to the empty string.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import ClassVar

import numpy as np
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, pre_tokenizers, trainers

from dantinox.data.tokenizer_protocol import Ids, Tokenizer, check_ids, utf8
from dantinox.system.atomic_io import open_atomic

FILE_NAME = "tokenizer.json"
FORMAT = 1
FIRST_TRAINED_ID = 257  # after the end of document and the 256 bytes
MIN_COUNT = 3  # the embedding of a rarer character would hardly be trained
DEFAULT_VOCAB = {"char": 4096, "bpe": 2048}
MAX_CACHED_WORDS = 1 << 18
MAX_CACHED_LENGTH = 32  # longer words hardly repeat
# Training takes time in proportion to the text and to the length of its longest word. Ordinary text has shorter words;
# DNA, base64, minified programs and text in scripts without spaces do not.
MAX_WORD = 128
PIECE = 1 << 20


@dataclass(frozen=True)
class CharTokenizer:
    """One token per character: ASCII characters and those of `chars` have an id each, others are encoded as bytes.

    Attributes:
        chars: distinct non-ASCII characters in code point order, with ids from 257. ValueError otherwise.
    """

    chars: str
    kind: ClassVar[str] = "char"
    eos_id: int = field(default=0, init=False, repr=False)
    stop_ids: tuple[int, ...] = field(default=(0,), init=False, repr=False)
    prefix: tuple[int, ...] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        utf8(self.chars)
        if sorted(set(self.chars)) != list(self.chars) or min(self.chars, default="\x80") < "\x80":
            raise ValueError(f"chars is {self.chars!r:.60}; allowed: distinct non-ASCII characters in code point order")

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self._tokens)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of a hash of the content; equal if and only if the ids have the same meaning."""
        return _fingerprint(self.kind, self.chars)

    @cached_property
    def _tokens(self) -> list[bytes]:
        return [*_BASE_TOKENS, *(char.encode() for char in self.chars)]

    @cached_property
    def _id_of_codepoint(self) -> np.ndarray:
        table = np.full(0x110000, -1, np.int32)
        table[:128] = np.arange(1, 129)
        table[_codepoints(self.chars)] = np.arange(FIRST_TRAINED_ID, self.vocab_size)
        return table

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text`, int32 [N], without an end of document. ValueError on a lone surrogate."""
        codepoints = _codepoints(text)
        ids = self._id_of_codepoint[codepoints]
        has_id = ids >= 0
        if has_id.all():
            return ids
        # A character without an id is encoded as its 2 to 4 UTF-8 bytes.
        num_ids = np.where(has_id, 1, 2 + (codepoints >= 0x800) + (codepoints >= 0x10000))
        end = np.cumsum(num_ids)
        out = np.zeros(end[-1], np.int32)
        out[end[has_id] - 1] = ids[has_id]
        utf8_bytes = codepoints[~has_id].tobytes().decode("utf-32-le").encode()
        out[out == 0] = np.frombuffer(utf8_bytes, np.uint8).astype(np.int32) + 1
        return out

    def decode(self, ids: Ids) -> str:
        """Return the text of `ids` [N]; bytes that are not UTF-8 become U+FFFD. ValueError on an id out of range."""
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Ids) -> bytes:
        """Return the UTF-8 of `ids` [N], which may end inside a character. ValueError on an id out of range."""
        return _concatenate_tokens(self._tokens, ids)

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write `directory`/tokenizer.json atomically and return its path."""
        return _save(directory, {"kind": self.kind, "chars": self.chars, "fingerprint": self.fingerprint})


@dataclass(frozen=True)
class BPETokenizer:
    """Byte-level byte-pair encoding (Radford et al. 2019), trained and applied by Hugging Face `tokenizers`.

    Attributes:
        merges: pairs of ids in the order of training; each pair with new bytes has the next id, from 257. ValueError if
            a pair has the end of document or an id that is not yet defined.
        max_word: a longer run of letters, digits, signs or spaces is encoded in parts of this many characters; None, as
            in files of earlier versions: as a whole. Ids mean the same, so the fingerprint does not depend on it.
    """

    merges: tuple[tuple[int, int], ...]
    max_word: int | None = None
    kind: ClassVar[str] = "bpe"
    eos_id: int = field(default=0, init=False, repr=False)
    stop_ids: tuple[int, ...] = field(default=(0,), init=False, repr=False)
    prefix: tuple[int, ...] = field(default=(), init=False, repr=False)
    _ids_of_word: dict[str, list[int]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _ = self._tokens  # raises if the merges are invalid
        if self.max_word is not None and (type(self.max_word) is not int or self.max_word < 1):
            raise ValueError(f"max_word is {self.max_word!r}; allowed: 1 or more, or None")

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self._tokens)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of a hash of the content; equal if and only if the ids have the same meaning."""
        return _fingerprint(self.kind, self.merges)

    @cached_property
    def _tokens(self) -> list[bytes]:
        tokens = list(_BASE_TOKENS)
        seen = set(tokens)
        for left, right in self.merges:
            if not (0 < left < len(tokens) and 0 < right < len(tokens)):
                raise ValueError(f"merge is ({left}, {right}); allowed: two of the ids 1..{len(tokens) - 1}")
            joined = tokens[left] + tokens[right]
            if joined not in seen:  # two merges may have the same bytes, "a"+"bc" and "ab"+"c"
                seen.add(joined)
                tokens.append(joined)
        return tokens

    @property
    def token_strings(self) -> list[str]:
        """Each token with a printable character per byte."""
        return [token.decode("latin-1").translate(BYTE_CHARS) for token in self._tokens]

    @cached_property
    def _hf(self) -> HFTokenizer:
        # Without the end of document, so that no text is encoded as its id.
        token_strings = self.token_strings
        vocab = {token: i for i, token in enumerate(token_strings) if i}
        hf = HFTokenizer(
            models.BPE(vocab, [(token_strings[left], token_strings[right]) for left, right in self.merges])
        )
        hf.pre_tokenizer = _byte_level()
        return hf

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text`, int32 [N], without an end of document. ValueError on a lone surrogate."""
        utf8(text)
        words = _word_pattern(self.max_word).findall(text)
        cache = self._ids_of_word
        # Words repeat, so each is encoded once: three times as fast as encoding the text directly.
        new_words = list(dict.fromkeys(word for word in words if word not in cache))
        new_ids = {w: e.ids for w, e in zip(new_words, self._hf.encode_batch_fast(new_words), strict=True)}
        if len(cache) < MAX_CACHED_WORDS:
            cache.update((word, ids) for word, ids in new_ids.items() if len(word) <= MAX_CACHED_LENGTH)
        ids = chain.from_iterable(cache.get(word) or new_ids[word] for word in words)
        return np.fromiter(ids, np.int32)

    def decode(self, ids: Ids) -> str:
        """Return the text of `ids` [N]; bytes that are not UTF-8 become U+FFFD. ValueError on an id out of range."""
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Ids) -> bytes:
        """Return the UTF-8 of `ids` [N], which may end inside a character. ValueError on an id out of range."""
        return _concatenate_tokens(self._tokens, ids)

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write `directory`/tokenizer.json atomically and return its path."""
        record = {"kind": self.kind, "merges": self.merges, "fingerprint": self.fingerprint}
        return _save(directory, record if self.max_word is None else {**record, "max_word": self.max_word})


def train_tokenizer(kind: str, texts: Iterable[str], vocab_size: int | None = None) -> Tokenizer:
    """Train a tokenizer; the same texts in the same order give the same tokenizer.

    Args:
        kind: "char" or "bpe".
        texts: the training texts.
        vocab_size: maximum number of ids, at least 257; None: 4096 for "char", 2048 for "bpe". A small corpus gives
            fewer.

    Raises:
        ValueError: kind or vocab_size is invalid.
    """
    if kind not in DEFAULT_VOCAB:
        raise ValueError(f"tokenizer is {kind!r}; allowed: char, bpe")
    vocab_size = DEFAULT_VOCAB[kind] if vocab_size is None else vocab_size
    if vocab_size < FIRST_TRAINED_ID:
        raise ValueError(
            f"vocab_size is {vocab_size}; allowed: at least {FIRST_TRAINED_ID} (256 bytes, one special token)"
        )
    texts = [texts] if isinstance(texts, str) else texts
    pieces = (piece for text in texts if utf8(text) for piece in split_text(text))
    return _train_char(pieces, vocab_size) if kind == "char" else _train_bpe(pieces, vocab_size)


def split_text(text: str, size: int = PIECE) -> Iterator[str]:
    """Yield the parts of `text`, of about `size` characters, whose ids joined are those of `text`.

    Every tokenizer ends a word before a space that follows another character; where none does, a part is longer.
    """
    start = 0
    while start < len(text):
        boundary = _BOUNDARY.search(text, start + size)
        end = boundary.start() if boundary else len(text)
        yield text[start:end]
        start = end


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
    """Load a tokenizer that was written by `save`, or one of Hugging Face.

    Args:
        directory: the folder of tokenizer.json, or that file.

    Raises:
        FileNotFoundError: there is no tokenizer.
        ValueError: the file is damaged.
    """
    path = Path(directory)
    if not path.is_file():
        path = path / FILE_NAME
    if not path.is_file():
        sentencepiece = path.with_name("tokenizer.model").is_file()
        raise FileNotFoundError(
            f"no tokenizer at {path}"
            + ("; tokenizer.model alone is not supported, transformers converts it" if sentencepiece else "")
        )
    try:
        record = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged or not a tokenizer: {error}") from None
    if isinstance(record, dict) and "model" in record:
        from dantinox.data.hf_tokenizer import load_hf_tokenizer

        return load_hf_tokenizer(path.parent, path.name)
    try:
        if record["format"] != FORMAT or record["kind"] not in DEFAULT_VOCAB:
            raise ValueError(f"format {record['format']!r}, kind {record['kind']!r}")
        if record["kind"] == "char":
            tokenizer: Tokenizer = CharTokenizer(record["chars"])
        else:
            merges = tuple((left, right) for left, right in record["merges"])
            tokenizer = BPETokenizer(merges, record.get("max_word"))
        if tokenizer.fingerprint != record["fingerprint"]:
            raise ValueError("its content does not match its fingerprint")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged or not a DantinoX tokenizer: {error}") from error
    return tokenizer


def load_tokenizer_at(path: str) -> Tokenizer:
    """Load the tokenizer that the setting `tokenizer` names by a path.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    try:
        return load_tokenizer(path)
    except FileNotFoundError as error:
        allowed = f"char, bpe, or a tokenizer.json or its folder ({error})"
        raise ValueError(f"tokenizer is {path!r}; allowed: {allowed}") from None


_BOUNDARY = re.compile(r"(?<=\S)(?=\s)")
_BASE_TOKENS = (b"", *(bytes([byte]) for byte in range(256)))


@functools.cache
def _word_pattern(max_word: int | None) -> re.Pattern[str]:
    """Return the pattern of a word as in GPT-2, with the character classes of Python, of limited length.

    Merges never cross the boundary of a word.
    """
    n = "+" if max_word is None else f"{{1,{max_word}}}"
    return re.compile(rf"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]{n}| ?\d{n}| ?(?:[^\s\w]|_){n}|\s{n}(?!\S)|\s{n}")


def _byte_chars() -> dict[int, str]:
    """Return the printable character that represents each byte in byte-level BPE."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return {byte: chr(byte if byte in printable else next(others)) for byte in range(256)}


BYTE_CHARS = _byte_chars()


def _byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # _word_pattern splits the text


def _train_char(texts: Iterable[str], vocab_size: int) -> CharTokenizer:
    counts = np.zeros(0x110000, np.int64)
    for text in texts:
        seen = np.bincount(_codepoints(text))
        counts[: seen.size] += seen
    counts[:128] = 0  # ASCII characters have byte tokens
    frequent = np.flatnonzero(counts >= MIN_COUNT)
    most_frequent = frequent[np.argsort(-counts[frequent], kind="stable")][: vocab_size - FIRST_TRAINED_ID]
    return CharTokenizer("".join(map(chr, np.sort(most_frequent))))


def _train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    hf = HFTokenizer(models.BPE())
    hf.pre_tokenizer = _byte_level()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # without the end of document
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    hf.train_from_iterator((_word_pattern(MAX_WORD).findall(text) for text in texts), trainer)
    id_of = {char: byte + 1 for byte, char in BYTE_CHARS.items()}
    merges = []
    for left, right in json.loads(hf.to_str())["model"]["merges"]:
        merges.append((id_of[left], id_of[right]))
        id_of.setdefault(left + right, len(id_of) + 1)
    return BPETokenizer(tuple(merges), MAX_WORD)


def _codepoints(text: str) -> np.ndarray:
    try:
        return np.frombuffer(text.encode("utf-32-le"), "<u4")
    except UnicodeEncodeError:
        utf8(text)  # raises a ValueError with a clearer message
        raise


def _concatenate_tokens(tokens: list[bytes], ids: Ids) -> bytes:
    return b"".join(map(tokens.__getitem__, check_ids(ids, len(tokens)).tolist()))


def _fingerprint(kind: str, content: object) -> str:
    return hashlib.sha256(json.dumps([FORMAT, kind, content]).encode()).hexdigest()[:16]


def _save(directory: str | os.PathLike[str], record: dict[str, object]) -> Path:
    path = Path(directory) / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_atomic(path) as file:
        file.write(json.dumps({"format": FORMAT, **record}).encode())
    return path
