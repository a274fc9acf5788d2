"""Where an array is wrong: in how many places, in which the most, and in which blocks of rows and columns they lie.

    error 1.2 (allowed 0.03), 4096 of 65536 wrong, 0 NaN, worst at (0, 77, 1, 5): 1.9, not 0.7;
    rows 64-127 of each 128: 100%, others 0; columns: 50% everywhere; axis 2: only at 1 (of 0-3)

A warpgroup, a tile or a head that computes nonsense shows as blocks of its own. This module needs NumPy alone.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

BLOCK = 64  # rows of a warpgroup's product; tiles of every kernel are multiples of it, or it of them
SPREAD = 0.2  # shares no further apart than this are one level
# How many are named at most: indices of an axis, levels, ranges of a level, blocks of a period.
FEW, LEVELS, RANGES, PERIOD = 4, 3, 4, 8


def describe(actual: Any, expected: Any, allowed: float, row_axis: int | None = None) -> str:
    """Where `actual` is further than `allowed` from `expected`; NaN is wrong.

    Args:
        actual, expected: arrays of one shape, of anything that NumPy takes to float64.
        allowed: the largest error that is right.
        row_axis: the axis of rows; None: the longest but for the last, which is that of columns.

    Returns:
        One line: the error, counts, the worst place, and the share that is wrong in blocks of 64 rows and columns.
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
    at = np.unravel_index(np.argmax(error), x.shape)  # of the first NaN, where there is one
    return "; ".join([f"{text}, worst at {_place(at)}: {x[at]:.4g}, not {y[at]:.4g}", *_where(wrong, row_axis)])


def different_bits(actual: Any, expected: Any, row_axis: int | None = None) -> str:
    """Where the bits of two arrays differ, as `describe` says it; "" where they are the same arrays."""
    x, y = np.asarray(actual), np.asarray(expected)
    if (x.dtype, x.shape) != (y.dtype, y.shape):
        return f"{x.dtype}{list(x.shape)}, not {y.dtype}{list(y.shape)}"
    bits = lambda a: np.ascontiguousarray(a).reshape(-1).view(np.uint8).reshape(*a.shape, -1)
    wrong = (bits(x) != bits(y)).any(axis=-1)
    if not wrong.any():
        return ""
    at = np.unravel_index(np.argmax(wrong), x.shape)
    first = f"{np.sum(wrong)} of {x.size} places differ, first at {_place(at)}: {x[at]}, not {y[at]}"
    return "; ".join([first, *_where(wrong, row_axis)])


def _place(at: Sequence[Any]) -> tuple[int, ...]:
    return tuple(map(int, at))


def _where(wrong: np.ndarray, row_axis: int | None) -> Iterator[str]:
    """A phrase each for rows, columns, and other axes of which only some indices are wrong."""
    axes = range(wrong.ndim)
    if row_axis is None and wrong.ndim > 1:
        row_axis = int(np.argmax(wrong.shape[:-1]))
    for axis, name in ((row_axis, "rows"), (wrong.ndim - 1, "columns")):
        if axis is not None and axis >= 0 and wrong.shape[axis] > 1:
            each = wrong.mean(axis=tuple(a for a in axes if a != axis))
            few = np.count_nonzero(each) <= FEW < len(each)
            yield f"{name}: {_only(each)}" if few else _blocks(each, name)
    for axis in axes[:-1]:
        each = wrong.any(axis=tuple(a for a in axes if a != axis))
        if axis != row_axis and not each.all():
            yield f"axis {axis}: {_only(each)}"


def _only(each: np.ndarray) -> str:
    """The indices at which something is wrong."""
    hit = np.flatnonzero(each)
    more = f" and {len(hit) - FEW} more" if len(hit) > FEW else ""
    return f"only at {', '.join(map(str, hit[:FEW]))}{more} (of 0-{len(each) - 1})"


def _blocks(each: np.ndarray, name: str) -> str:
    """The shares of each row, or column, as those of levels of blocks."""
    starts = np.arange(0, len(each), BLOCK)
    shares = np.add.reduceat(each, starts) / np.diff([*starts, len(each)])
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
    parts = [f"{_ranges(member, len(each))}: {_share(shares[member])}" for member in members]
    return f"{name} {', '.join(parts)}, others {_share(shares[others])}"


def _ranges(member: np.ndarray, length: int) -> str:
    """Blocks by the rows in them: "64-127 of each 128" where they recur, else one range after the other."""
    blocks = np.arange(len(member))
    for period in range(2, min(PERIOD, len(member) // 2) + 1):
        if (member == member[blocks % period]).all():
            return f"{_ranges(member[:period], period * BLOCK)} of each {period * BLOCK}"
    edges = np.flatnonzero(np.diff([False, *member, False])).reshape(-1, 2) * BLOCK
    shown = ", ".join(f"{start}-{min(stop, length) - 1}" for start, stop in edges[:RANGES])
    return shown + (f" and {len(edges) - RANGES} more" if len(edges) > RANGES else "")


def _share(shares: np.ndarray) -> str:
    """The least and the most of some shares, in percent."""

    def percent(share: float) -> str:
        if share in (0, 1):
            return "100%" if share else "0"
        return "<1%" if share < 0.01 else ">99%" if share > 0.99 else f"{100 * share:.0f}%"

    low, high = percent(shares.min()), percent(shares.max())
    return low if low == high else f"{low} to {high}"
