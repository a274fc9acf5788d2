"""Describe where an array is wrong: how many elements, the worst one, and the blocks of rows and columns they are in.

    error 1.2 (allowed 0.03), 4096 of 65536 wrong, 0 NaN, worst at (0, 77, 1, 5): 1.9, not 0.7;
    rows 64-127 of each 128: 100%, others 0; columns: 50% everywhere; axis 2: only at 1 (of 0-3)

A warpgroup, a tile or a head with wrong results shows as blocks of its own. This module needs only NumPy.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

BLOCK = 64  # rows of a warpgroup's product; the tile sizes of every kernel divide it or are multiples of it
SPREAD = 0.2  # blocks whose wrong shares differ by no more than this are one level
# The most that are listed: indices of an axis, levels, ranges of a level, blocks of a period.
FEW, LEVELS, RANGES, PERIOD = 4, 3, 4, 8


def describe(actual: Any, expected: Any, allowed: float, row_axis: int | None = None, axes: str = "") -> str:
    """Describe where `actual` differs from `expected` by more than `allowed`; NaN is wrong.

    Args:
        actual: the array to check, which NumPy can convert to float64.
        expected: the right array, of the same shape.
        allowed: the largest error that counts as right.
        row_axis: the axis of rows; None: the longest axis but the last, which is that of columns.
        axes: the letters of the axes, by which the worst element is named; "": by position.

    Returns:
        One line: the error, counts, the worst element, and the wrong share of blocks of 64 rows and columns.
    """
    x, y = (np.asarray(a).astype(np.float64) for a in (actual, expected))
    if x.shape != y.shape:
        return f"shape {x.shape}, not {y.shape}"
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.abs(x - y)
    wrong = ~(error <= allowed)
    text = f"error {error.max(initial=0):.3g} (allowed {allowed:.3g}), {np.sum(wrong)} of {x.size} wrong"
    text += f", {np.sum(np.isnan(x))} NaN"
    if not wrong.any():
        return text
    worst = np.unravel_index(np.argmax(error), x.shape)  # the first NaN, if there is one
    place = ", ".join(f"{a} {i}" for a, i in zip(axes, worst)) if axes else str(_index(worst))
    text += f", worst at {place}: {x[worst]:.4g}, not {y[worst]:.4g}"
    return "; ".join([text, *_where(wrong, row_axis)])


def different_bits(actual: Any, expected: Any, row_axis: int | None = None) -> str:
    """Describe where the bits of two arrays differ, in the form of `describe`; "" if they are equal."""
    x, y = np.asarray(actual), np.asarray(expected)
    if (x.dtype, x.shape) != (y.dtype, y.shape):
        return f"{x.dtype}{list(x.shape)}, not {y.dtype}{list(y.shape)}"
    x_bytes, y_bytes = (np.ascontiguousarray(a).reshape(-1).view(np.uint8).reshape(*a.shape, -1) for a in (x, y))
    wrong = (x_bytes != y_bytes).any(axis=-1)
    if not wrong.any():
        return ""
    first = np.unravel_index(np.argmax(wrong), x.shape)
    text = f"{np.sum(wrong)} of {x.size} places differ, first at {_index(first)}: {x[first]}, not {y[first]}"
    return "; ".join([text, *_where(wrong, row_axis)])


def _index(index: Sequence[Any]) -> tuple[int, ...]:
    return tuple(map(int, index))


def _where(wrong: np.ndarray, row_axis: int | None) -> Iterator[str]:
    """Yield a phrase for the rows, for the columns, and for each other axis with only some wrong indices."""
    axes = range(wrong.ndim)
    if row_axis is None and wrong.ndim > 1:
        row_axis = int(np.argmax(wrong.shape[:-1]))
    for axis, name in ((row_axis, "rows"), (wrong.ndim - 1, "columns")):
        if axis is not None and axis >= 0 and wrong.shape[axis] > 1:
            shares = wrong.mean(axis=tuple(a for a in axes if a != axis))
            few = np.count_nonzero(shares) <= FEW < len(shares)
            yield f"{name}: {_few_indices(shares)}" if few else _blocks(shares, name)
    for axis in axes[:-1]:
        has_wrong = wrong.any(axis=tuple(a for a in axes if a != axis))
        if axis != row_axis and not has_wrong.all():
            yield f"axis {axis}: {_few_indices(has_wrong)}"


def _few_indices(shares: np.ndarray) -> str:
    """List the indices with a wrong element."""
    indices = np.flatnonzero(shares)
    more = f" and {len(indices) - FEW} more" if len(indices) > FEW else ""
    return f"only at {', '.join(map(str, indices[:FEW]))}{more} (of 0-{len(shares) - 1})"


def _blocks(line_shares: np.ndarray, name: str) -> str:
    """Group blocks of rows or columns with similar wrong shares into levels, and describe each level.

    Args:
        line_shares: the wrong share of each row or column.
        name: "rows" or "columns".
    """
    starts = np.arange(0, len(line_shares), BLOCK)
    shares = np.add.reduceat(line_shares, starts) / np.diff([*starts, len(line_shares)])
    order, levels = np.argsort(-shares, kind="stable"), []
    for block in order:
        largest = shares[levels[-1][0]] if levels else 2.0
        if len(levels) <= LEVELS and (largest - shares[block] > SPREAD or shares[block] == 0 < largest):
            levels.append([])
        levels[-1].append(block)
    *named, others = levels
    if not named:
        return f"{name}: {_share(shares)} everywhere"
    members = [np.isin(np.arange(len(shares)), level) for level in named]
    parts = [f"{_ranges(member, len(line_shares))}: {_share(shares[member])}" for member in members]
    return f"{name} {', '.join(parts)}, others {_share(shares[others])}"


def _ranges(member: np.ndarray, length: int) -> str:
    """List blocks by their rows: "64-127 of each 128" if they recur, else as ranges."""
    blocks = np.arange(len(member))
    for period in range(2, min(PERIOD, len(member) // 2) + 1):
        if (member == member[blocks % period]).all():
            return f"{_ranges(member[:period], period * BLOCK)} of each {period * BLOCK}"
    edges = np.flatnonzero(np.diff([False, *member, False])).reshape(-1, 2) * BLOCK
    shown = ", ".join(f"{start}-{min(stop, length) - 1}" for start, stop in edges[:RANGES])
    return shown + (f" and {len(edges) - RANGES} more" if len(edges) > RANGES else "")


def _share(shares: np.ndarray) -> str:
    """Format the smallest and the largest of some shares, in percent."""

    def percent(share: float) -> str:
        if share in (0, 1):
            return "100%" if share else "0"
        return "<1%" if share < 0.01 else ">99%" if share > 0.99 else f"{100 * share:.0f}%"

    low, high = percent(shares.min()), percent(shares.max())
    return low if low == high else f"{low} to {high}"
