"""The simple way to prepare a corpus, all of it in memory, which the stream must equal."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dantinox.data.tokenizer import Tokenizer, train_tokenizer


@dataclass(frozen=True)
class Document:
    name: str
    text: str

    @cached_property
    def digest(self) -> bytes:
        return hashlib.sha256(self.text.encode()).digest()

    @cached_property
    def size(self) -> int:
        return len(self.text.encode())


def distinct(texts: list[str]) -> list[Document]:
    """Return the documents, of equal ones the last."""
    found = [Document(str(i), text) for i, text in enumerate(texts) if text]
    return list({document.digest: document for document in reversed(found)}.values())[::-1]


def prepare(
    texts: list[str], val_fraction: float, kind: str, vocab_size: int, tokenizer: Tokenizer | None = None
) -> tuple[list[np.ndarray], Tokenizer, int]:
    """Return the ids of train and validation, the tokenizer and the number of duplicates."""
    documents = distinct(texts)
    splits = train_val_split(documents, val_fraction)
    tokenizer = tokenizer or train_tokenizer(kind, [document.text for document in splits[0]], vocab_size)
    ids = [[np.append(tokenizer.encode(document.text), tokenizer.eos_id) for document in split] for split in splits]
    return [np.concatenate(split) for split in ids], tokenizer, sum(map(bool, texts)) - len(documents)


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
