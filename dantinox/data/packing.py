"""Pack examples of different lengths into rows of one length, each a segment that attends to itself alone.

    row 0    a a a a a b b b .      segments 0 0 0 0 0 1 1 1 -1: queries of b see keys of b; the padding has no target
    row 1    c c c c d d d e e      positions 0 1 2 3 0 1 2 0 1: each example starts at position 0

Without padding to the longest example a step wastes few tokens; the attention kernels skip the tiles of other
segments.
"""

import bisect
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

PADDING = -1  # the segment of padding; also the target of tokens without a loss


class Example(NamedTuple):
    """A text of which some tokens are learned.

    Attributes:
        ids: [N] int32.
        learned: [N] bool, whether the loss counts the prediction of each token.
    """

    ids: np.ndarray
    learned: np.ndarray


class PackedRows(NamedTuple):
    """Rows of examples, each [R, T] int32.

    Attributes:
        inputs: token ids.
        targets: the next token of the same example where that is learned, else -1.
        segments: number of the example in its row, from 0; -1 for padding.
    """

    inputs: np.ndarray
    targets: np.ndarray
    segments: np.ndarray


def pack(examples: Iterable[Example], seq_len: int, pad_id: int = 0) -> tuple[PackedRows, int]:
    """Pack examples into rows of `seq_len` tokens, each into the fullest row that has room, longest first.

    Args:
        examples: the examples; one of N tokens takes N - 1 places, since its last token is only predicted. Those
            without a learned token after the first are left out.
        seq_len: T.
        pad_id: token id of the padding.

    Returns:
        (the rows, the number of examples that were longer than T + 1 tokens and lost their end).

    Raises:
        ValueError: no example has a learned token.
    """
    kept, num_cut = [], 0
    for ids, learned in examples:
        num_cut += len(ids) > seq_len + 1
        ids, learned = ids[: seq_len + 1], learned[: seq_len + 1]
        if learned[1:].any():
            kept.append(Example(ids, learned))
    if not kept:
        raise ValueError(f"no example has a learned token among its first {seq_len + 1}; allowed: at least one")
    rows = [[kept[i] for i in row] for row in _fullest_first([len(ids) - 1 for ids, _ in kept], seq_len)]
    packed = PackedRows(
        np.full((len(rows), seq_len), pad_id, np.int32),
        np.full((len(rows), seq_len), PADDING, np.int32),
        np.full((len(rows), seq_len), PADDING, np.int32),
    )
    for r, row in enumerate(rows):
        start = 0
        for segment, (ids, learned) in enumerate(row):
            places = slice(start, start + len(ids) - 1)
            packed.inputs[r, places] = ids[:-1]
            packed.targets[r, places] = np.where(learned[1:], ids[1:], PADDING)
            packed.segments[r, places] = segment
            start = places.stop
    return packed, num_cut


def _fullest_first(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return rows of indices whose lengths sum to at most `capacity` each (best fit, decreasing)."""
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room, row), sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect.bisect_left(free, (lengths[i], -1))
        if place == len(free):
            room, row = capacity, len(rows)
            rows.append([])
        else:
            room, row = free.pop(place)
        rows[row].append(i)
        bisect.insort(free, (room - lengths[i], row))
    return rows


def get_rows(
    packed: PackedRows, *, seed: int, step: int, batch_size: int, rows: np.ndarray | None = None
) -> PackedRows:
    """Return the rows of a step, each [B, T]: every row once an epoch, in an order that the seed and the epoch decide.

    A pure function of (seed, step), so there is no state to save.

    Args:
        packed: all rows.
        seed: of the run.
        step: from 0.
        batch_size: B.
        rows: numbers of the rows of the batch to return, by default all.
    """
    num_rows = len(packed.inputs)
    numbers = step * batch_size + (np.arange(batch_size) if rows is None else rows)
    chosen = np.empty(len(numbers), np.int64)
    for epoch in np.unique(numbers // num_rows):
        here = numbers // num_rows == epoch
        # NumPy guarantees that the raw bits of a counter-based generator are the same in every version.
        order = np.argsort(np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(num_rows), kind="stable")
        chosen[here] = order[numbers[here] % num_rows]
    return PackedRows(*(x[chosen] for x in packed))


def first_rows(packed: PackedRows, *, batch_size: int, n: int) -> list[PackedRows]:
    """Return the first rows in at most `n` batches of `batch_size`, at least one; a batch may have fewer rows.

    Every batch has the same number of rows, so that one program serves them; the last rows may be left out.
    """
    size = min(batch_size, len(packed.inputs))
    count = min(n, len(packed.inputs) // size)
    return [PackedRows(*(x[i * size : (i + 1) * size] for x in packed)) for i in range(count)]
