"""The interface of tokenizers, and what all of them check."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

Ids = Sequence[int] | np.ndarray


class Tokenizer(Protocol):
    """Interface of a tokenizer."""

    kind: ClassVar[str]  # "char", "bpe" or "hf"

    @property
    def eos_id(self) -> int:
        """The id that ends a document."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end a generated text, the end of document first."""

    @property
    def prefix(self) -> tuple[int, ...]:
        """The ids that begin a document; often none."""

    @property
    def vocab_size(self) -> int:
        """V, the number of ids; each of 0..V-1 can be decoded."""

    @property
    def fingerprint(self) -> str:
        """16 hex digits of a hash of the content; equal if and only if the ids have the same meaning."""

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text`, int32 [N], without an end of document. ValueError on a lone surrogate."""

    def decode(self, ids: Ids) -> str:
        """Return the text of `ids` [N]; bytes that are not UTF-8 become U+FFFD. ValueError on an id out of range."""

    def decode_bytes(self, ids: Ids) -> bytes:
        """Return the UTF-8 of `ids` [N], which may end inside a character. ValueError on an id out of range."""

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write `directory`/tokenizer.json atomically and return its path."""


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a document that begins with `text`; an empty one still has an id to start from."""
    return [*tokenizer.prefix, *tokenizer.encode(text).tolist()] or [tokenizer.eos_id]


def utf8(text: str) -> bytes:
    """Return the UTF-8 of a text. ValueError on a lone surrogate."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        surrogate = f"lone surrogate U+{ord(text[error.start]):04X} at index {error.start}"
        raise ValueError(f"text has a {surrogate}, which UTF-8 cannot encode") from None


def check_ids(ids: Ids, size: int | None) -> np.ndarray:
    """Return the ids [N] as an array. ValueError on other shapes, and ids outside 0..size-1; None: only below 0."""
    array = np.asarray(ids)
    if array.size == 0:
        return np.zeros(0, np.int32)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"ids are {array.dtype} of shape {array.shape}; allowed: a 1-D array of integers")
    bad = array < 0 if size is None else (array < 0) | (array >= size)
    if bad.any():
        raise ValueError(f"token id is {array[bad][0]}; allowed: 0 {'or more' if size is None else f'to {size - 1}'}")
    return array
