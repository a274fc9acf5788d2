"""What an operation must compute and must move, whatever the implementation.

FLOPs count a multiply and an add as two, for the matrix products only; exponentials are counted apart. Bytes count
every array that must be read once and every result written once: an intermediate that a kernel can keep on the chip
(scores, the experts' hidden rows) is free, and so is a key behind every window or an expert without rows. These are
lower bounds: an implementation that moves more has a lower fraction of the roofline. (Keys that only segments hide are
charged: few are, and which they are is known on the device alone.)

Backward passes count what the field counts, so that figures compare: five products a visible pair in attention (scores
recomputed, dV, dP, dQ, dK), two in a matmul.
"""

from typing import NamedTuple

import numpy as np
from jax.experimental import pallas as pl

__all__ = ["Cost", "attention", "decode_attention", "grouped_matmul", "moe_mlp", "num_visible_keys", "visible_pairs"]


class Cost(NamedTuple):
    """FLOPs of the products, bytes to and from memory, transcendental functions."""

    flops: int
    bytes: int
    transcendentals: int = 0

    def __add__(self, other: "Cost") -> "Cost":  # type: ignore[override]
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))

    def scaled(self, fraction: float) -> "Cost":
        """What a kernel costs that does this fraction of the work."""
        return Cost(*(round(fraction * each) for each in self))

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.flops / max(self.bytes, 1)

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The roofline: no machine with these two ceilings takes less."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)

    def to_pallas(self) -> pl.CostEstimate:
        """For `pallas_call(cost_estimate=)`, so that profiles show utilisation."""
        return pl.CostEstimate(flops=self.flops, bytes_accessed=self.bytes, transcendentals=self.transcendentals)


def visible_pairs(
    T: int,
    S: int,
    *,
    causal: bool = True,
    window: int | None = None,
    segment_ids: tuple[np.ndarray, np.ndarray] | None = None,
) -> int:
    """(query, key) pairs that are not masked; query t sits at key S - T + t.

    With `segment_ids` (q_ids [B, T], kv_ids [B, S], host arrays) the sum over the B sequences, else of one sequence.
    """
    if segment_ids is not None:
        return sum(_segment_pairs(q, kv, causal, window) for q, kv in zip(*map(np.asarray, segment_ids), strict=True))
    if not causal:
        return T * S
    # Query at position p = S - T + t sees min(p + 1, window) keys, none where p < 0.
    first = max(0, S - T)
    seen = lambda n: _triangle(n, S if window is None else min(window, S))  # by the queries at positions < n
    return seen(S) - seen(first) if T else 0


def _triangle(n: int, w: int) -> int:
    """sum of min(p + 1, w) over 0 <= p < n."""
    ramp = min(n, w)
    return ramp * (ramp + 1) // 2 + (n - ramp) * w


def _segment_pairs(q_ids: np.ndarray, kv_ids: np.ndarray, causal: bool, window: int | None) -> int:
    """Pairs of one sequence, by the sorted positions of each segment."""
    T, S = len(q_ids), len(kv_ids)
    total = 0
    for segment in np.unique(q_ids):
        keys = np.flatnonzero(kv_ids == segment)
        queries = np.flatnonzero(q_ids == segment) + S - T
        if not causal:
            total += len(keys) * len(queries)
            continue
        low = 0 if window is None else np.searchsorted(keys, queries - window, side="right")
        total += int(np.sum(np.searchsorted(keys, queries, side="right") - low))
    return total


def num_visible_keys(T: int, S: int, window: int | None) -> int:
    """Keys that at least one of the T queries sees: with a window those behind the first query's are never read."""
    if T == 0:
        return 0
    return S if window is None else min(S, T + window - 1)


def attention(
    *,
    B: int,
    T: int,
    S: int,
    H: int,
    K: int,
    D: int,
    causal: bool = True,
    window: int | None = None,
    gate: str = "none",
    segment_ids: tuple[np.ndarray, np.ndarray] | None = None,
    itemsize: int = 2,
    backward: bool = False,
) -> Cost:
    """One pass of `dantinox.kernels.attention`: the forward one, or with `backward` the backward one alone.

    Args:
        gate: none, head ([B, T, H, 1]) or elementwise ([B, T, H, D]).
        itemsize: bytes of one element of q, k, v, gate and o. Row sums (log-sum-exp) count as float32.
    """
    pairs = visible_pairs(T, S, causal=causal, window=window, segment_ids=segment_ids)
    pairs *= H if segment_ids is not None else B * H
    kv = 2 * B * num_visible_keys(T, S, window if causal else None) * K * D
    rows = B * T * H
    gates = {"none": 0, "head": rows, "elementwise": rows * D}[gate]
    ids = 4 * B * (T + S) if segment_ids is not None else 0
    if not backward:  # read q, k, v, gate; write o
        return Cost(4 * D * pairs, itemsize * (2 * rows * D + kv + gates) + ids, pairs + gates)
    # Read q, o, do, k, v, gate and the log-sum-exp; write dq, dk, dv (for every key) and dgate.
    moved = itemsize * (4 * rows * D + kv + 2 * B * S * K * D + 2 * gates)
    return Cost(10 * D * pairs, moved + 4 * rows + ids, pairs + gates)


def grouped_matmul(
    *, N: int, M: int, F: int, group_sizes: np.ndarray, itemsize: int = 2, backward: bool = False
) -> Cost:
    """`dantinox.kernels.grouped_matmul`; with `backward` dx and dw together. Only rows of a group and groups with rows
    count."""
    sizes = np.asarray(group_sizes)
    E, rows, busy = len(sizes), int(sizes.sum()), int(np.count_nonzero(sizes))
    if not backward:
        return Cost(2 * rows * M * F, itemsize * (rows * M + busy * M * F + N * F))
    # Read x, dy and the busy matrices; write dx, and dw of every group (zeros where there are no rows).
    return Cost(4 * rows * M * F, itemsize * (rows * (M + F) + busy * M * F + N * M + E * M * F))


def moe_mlp(*, N: int, M: int, F: int, E: int, k: int, busy: int, itemsize: int = 2, backward: bool = False) -> Cost:
    """`dantinox.kernels.moe_mlp`: three products a routed row forward, six backward (hidden rows are kept, or nothing
    is).

    Args:
        busy: experts with at least one row. Ids count 4 bytes, expert weights 4.
    """
    rows = N * k
    weights = 3 * M * F
    if not backward:  # read x, the busy experts, ids and weights; write y
        return Cost(6 * rows * M * F, itemsize * (2 * N * M + busy * weights) + 8 * rows, rows * F)
    # Read x, dy, the busy experts, ids and weights; write dx, every expert's gradients and the weights' gradient.
    return Cost(12 * rows * M * F, itemsize * (3 * N * M + (busy + E) * weights) + 12 * rows, rows * F)


def decode_attention(
    *,
    H: int,
    K: int,
    D: int,
    C: int,
    lengths: np.ndarray,
    window: int | None = None,
    gate: str = "none",
    itemsize: int = 2,
    kv_itemsize: float | None = None,
) -> Cost:
    """One step of `dantinox.kernels.decode_attention` for sequences that hold `lengths` tokens before it.

    `kv_itemsize`: bytes a number of the rings takes, its part of a scale included; None: itemsize.
    """
    lengths = np.asarray(lengths).astype(np.int64)
    B = len(lengths)
    visible = int(np.minimum(lengths + 1, C if window is None else min(C, window)).sum())
    gates = {"none": 0, "head": B * H, "elementwise": B * H * D}[gate]
    # Read q, the new k and v, the gate and the visible slots but the new one; write o and the new slot.
    kept = itemsize if kv_itemsize is None else kv_itemsize
    moved = itemsize * (2 * B * H * D + gates + 2 * B * K * D) + round(kept * 2 * K * D * visible) + 8 * B
    return Cost(4 * H * D * visible, moved, H * visible + gates)
