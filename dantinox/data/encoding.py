"""The second pass over a corpus: the text that a tokenizer is trained on, and the ids of all text."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dantinox.data.blocks import Failed, Lines, Part, Texts, read_blocks
from dantinox.data.cache import id_dtype
from dantinox.data.files import printable
from dantinox.data.formats import Source
from dantinox.data.index import Index, IndexPlan
from dantinox.data.tokenizer import DEFAULT_VOCAB, Tokenizer, split_text
from dantinox.data.utf8 import NotTextError

SAMPLE_PIECE = 1 << 16  # characters


class Piece(NamedTuple):
    """A document, or a part of one.

    Attributes:
        place: the name of the document.
        text: characters of it, the first of which is number `start`.
        is_last: it ends the document.
        train_chars: characters of the document that are training text; the others are validation text.
    """

    place: str
    text: str
    start: int
    is_last: bool
    train_chars: int


def pieces_of(block: Texts | Lines | Part | Failed) -> Iterator[Piece]:
    """Yield the wanted documents of a block, or its part of one.

    Raises:
        ValueError: there was text when the block was read before.
    """
    if isinstance(block, Failed):
        raise ValueError(f"{printable(block.name)} changed while it was read ({block.error}); start again")
    assert block.plan is not None
    if isinstance(block, Part):
        yield Piece(block.name, block.text, block.start, block.is_last, int(block.plan[0]))
        return
    for index, text in block.documents():
        if isinstance(text, NotTextError):
            raise ValueError(f"{printable(block.place(index))} changed while it was read; start again")
        yield Piece(block.place(index), text, 0, True, int(block.plan[index]))


def training_texts(files: Sequence[Source], index: Index, size: int) -> Iterator[str]:
    """Yield all training text, or a sample of about `size` bytes, evenly spread."""
    plan = IndexPlan(index, size)
    offset = 0
    for block in read_blocks(files, plan):
        for piece in pieces_of(block):
            offset = plan.offsets.popleft() if piece.start == 0 else offset
            for part in split_text(piece.text[: max(0, piece.train_chars - piece.start)], SAMPLE_PIECE):
                if plan.sample.has(offset):
                    yield part
                offset += len(part.encode())


class Encoded(NamedTuple):
    """The training text of a block, or its validation text.

    Attributes:
        ids: the ids, uint16 or uint32 [N].
        counts: how often each id occurs, int32 [vocab_size].
        text_bytes: bytes of the text.
    """

    ids: np.ndarray
    counts: np.ndarray
    text_bytes: int


class Encoder:
    """The work of encoding a block.

    Args:
        tokenizer: of the ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self._dtype = tokenizer, id_dtype(tokenizer.vocab_size)
        self.takes_parts = tokenizer.kind in DEFAULT_VOCAB  # others may have tokens with a space inside
        self._prefix = np.array(tokenizer.prefix, np.int32)

    def __call__(self, block: Texts | Lines | Part | Failed) -> list[Encoded]:
        """Return the training and the validation text of a block."""
        ids: list[list[np.ndarray]] = [[], []]
        sizes = [0, 0]
        for place, text, start, is_last, train_chars in pieces_of(block):
            cut, end = max(0, min(train_chars - start, len(text))), start + len(text)
            begins = start == 0 < train_chars, start <= train_chars < end
            ends = start < train_chars <= end, is_last and train_chars < end
            for split, part in enumerate((text[:cut], text[cut:])):
                if begins[split]:
                    ids[split].append(self._prefix)
                ids[split] += self._encode(place, part)
                if ends[split]:
                    ids[split].append(np.array([self.tokenizer.eos_id]))
                sizes[split] += len(part.encode())
        return [self._join(parts, size) for parts, size in zip(ids, sizes, strict=True)]

    def _join(self, parts: list[np.ndarray], text_bytes: int) -> Encoded:
        ids = np.concatenate([np.zeros(0, self._dtype), *parts], dtype=self._dtype, casting="unsafe")
        counts = np.bincount(ids, minlength=self.tokenizer.vocab_size).astype(np.int32)
        return Encoded(ids, counts, text_bytes)

    def _encode(self, place: str, text: str) -> list[np.ndarray]:
        try:
            return [self.tokenizer.encode(part) for part in (split_text(text) if self.takes_parts else [text]) if part]
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"{printable(place)} cannot be tokenized ({reason})") from error
