"""Packing of examples: every token once, its targets and segments, the order of the rows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dantinox.data.packing import Example, get_rows, pack


def example(length: int, first_learned: int, start: int = 0) -> Example:
    return Example(np.arange(start, start + length, dtype=np.int32), np.arange(length) >= first_learned)


def unpack(rows) -> list[tuple[list[int], list[int]]]:
    """Return (inputs, targets) of each segment, in no order."""
    found = []
    for inputs, targets, segments in zip(*rows, strict=True):
        for segment in range(segments.max() + 1):
            places = np.flatnonzero(segments == segment)
            assert np.array_equal(places, np.arange(places[0], places[-1] + 1)), "a segment is contiguous"
            found.append((inputs[places].tolist(), targets[places].tolist()))
        padding = segments == -1
        assert (inputs[padding] == 7).all() and (targets[padding] == -1).all()
        assert not padding.any() or padding.argmax() + padding.sum() == len(padding), "padding comes last"
    return sorted(found)


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1), st.integers(1, 10))
def test_packed_rows_hold_each_example_once(sizes, seq_len):
    examples = [example(n, learned, 100 * i) for i, (n, learned) in enumerate(sizes)]
    wanted = []
    for ids, learned in examples:
        ids, learned = ids[: seq_len + 1].tolist(), learned[: seq_len + 1].tolist()
        targets = [token if is_learned else -1 for token, is_learned in zip(ids, learned)][1:]
        if any(target >= 0 for target in targets):
            wanted.append((ids[:-1], targets))
    if not wanted:
        with pytest.raises(ValueError, match=f"first {seq_len + 1}; allowed: at least one"):
            pack(examples, seq_len)
        return
    rows, num_cut = pack(examples, seq_len, pad_id=7)
    assert unpack(rows) == sorted(wanted)
    assert num_cut == sum(n > seq_len + 1 for n, _ in sizes)
    places = sum(len(inputs) for inputs, _ in wanted)
    assert len(rows.inputs) <= 2 * -(-places // seq_len), "no two rows are both less than half full"


def test_long_examples_lie_with_short_ones():
    rows, _ = pack([example(n + 1, 0) for n in (2, 9, 5, 1, 8, 3, 5, 7)], 10)
    assert len(rows.inputs) == 4 and (rows.segments >= 0).sum() == 40, "40 places fill 4 rows"


@given(st.integers(1, 20), st.integers(1, 7), st.integers(0, 2**31))
def test_every_epoch_has_each_row_once(num_rows, batch_size, seed):
    rows, _ = pack([example(3, 0, 10 * i) for i in range(num_rows)], 2)
    steps = -(-2 * num_rows // batch_size)
    first = np.concatenate(
        [get_rows(rows, seed=seed, step=s, batch_size=batch_size).inputs[:, 0] for s in range(steps)]
    )
    for epoch in range(2):
        assert sorted(first[epoch * num_rows : (epoch + 1) * num_rows]) == sorted(rows.inputs[:, 0])
    whole = get_rows(rows, seed=seed, step=1, batch_size=batch_size)
    some = get_rows(rows, seed=seed, step=1, batch_size=batch_size, rows=np.array([batch_size - 1]))
    assert np.array_equal(whole.inputs[-1:], some.inputs)
