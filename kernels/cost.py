"""The least work of each operation: FLOPs, bytes and exponentials that every implementation needs.

A multiply and an add are two FLOPs; only matrix products count. Every input that is needed is read once and every
result is written once. Intermediates that a kernel can keep on the chip (scores, the experts' hidden rows) cost no
bytes, nor do keys behind every window and experts without rows. An implementation that moves more bytes reaches a lower
fraction of the roofline. Keys that only segment ids mask count as read: they are few, and only the device knows them.

Backward passes count what the literature counts, so that figures are comparable: five products per visible pair in
attention (recomputed scores, dV, dP, dQ, dK), two in a matmul, three in a linear cross-entropy (recomputed logits, dh,
dw).
"""

from typing import NamedTuple

import numpy as np
from jax.experimental import pallas as pl

__all__ = [
    "Cost",
    "attention",
    "decode_attention",
    "grouped_matmul",
    "linear_cross_entropy",
    "moe_mlp",
    "num_visible_keys",
    "visible_pairs",
]


class Cost(NamedTuple):
    """FLOPs of the matrix products, bytes to and from memory, transcendental functions."""

    flops: int
    bytes: int
    transcendentals: int = 0

    def __add__(self, other: "Cost") -> "Cost":  # type: ignore[override]
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))

    def scaled(self, fraction: float) -> "Cost":
        """Return the cost of this fraction of the work."""
        return Cost(*(round(fraction * amount) for amount in self))

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / max(self.bytes, 1)

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Return the least seconds on a machine with these two ceilings (the roofline)."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)

    def to_pallas(self) -> pl.CostEstimate:
        """Return the estimate for `pallas_call(cost_estimate=)`, from which profiles compute utilization."""
        return pl.CostEstimate(flops=self.flops, bytes_accessed=self.bytes, transcendentals=self.transcendentals)


def visible_pairs(
    T: int,
    S: int,
    *,
    causal: bool = True,
    window: int | None = None,
    segment_ids: tuple[np.ndarray, np.ndarray] | None = None,
) -> int:
    """Count the (query, key) pairs that are not masked; query t is at position S - T + t of the keys.

    Args:
        T: number of queries.
        S: number of keys.
        causal: whether a query sees no later key.
        window: number of keys that a query sees, its own included; None: no limit.
        segment_ids: (q_ids [B, T], kv_ids [B, S]) on the host; the count is the sum over the B sequences. None: one
            sequence without segments.

    Returns:
        The number of pairs.
    """
    if segment_ids is not None:
        return sum(_segment_pairs(q, kv, causal, window) for q, kv in zip(*map(np.asarray, segment_ids), strict=True))
    if not causal:
        return T * S
    # The query at position p = S - T + t attends to min(p + 1, window) keys, to none if p < 0.
    width = S if window is None else min(window, S)
    return _triangle(S, width) - _triangle(max(0, S - T), width) if T else 0


def _triangle(n: int, w: int) -> int:
    """Return the sum of min(p + 1, w) over 0 <= p < n."""
    ramp = min(n, w)
    return ramp * (ramp + 1) // 2 + (n - ramp) * w


def _segment_pairs(q_ids: np.ndarray, kv_ids: np.ndarray, causal: bool, window: int | None) -> int:
    """Count the pairs of one sequence from the sorted positions of each segment."""
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
    """Count the keys that at least one query attends to: none before the first query's window."""
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
    Dv: int | None = None,
    causal: bool = True,
    window: int | None = None,
    gate: str = "none",
    segment_ids: tuple[np.ndarray, np.ndarray] | None = None,
    itemsize: int = 2,
    backward: bool = False,
) -> Cost:
    """Return the cost of the forward pass of `dantinox.kernels.attention`, or of its backward pass.

    Args:
        B: number of sequences.
        T: queries per sequence.
        S: keys per sequence.
        H: query heads.
        K: key/value heads.
        D: head dim of queries and keys.
        Dv: head dim of values; None: D.
        causal: whether a query sees no later key.
        window: number of keys that a query sees, its own included; None: no limit.
        gate: none, head ([B, T, H, 1]) or elementwise ([B, T, H, Dv]).
        segment_ids: (q_ids [B, T], kv_ids [B, S]) on the host, or None.
        itemsize: bytes per element of q, k, v, gate and o. Row sums (log-sum-exp) count as float32.
        backward: whether to count the backward pass instead of the forward pass.

    Returns:
        The cost of all sequences and heads.
    """
    pairs = visible_pairs(T, S, causal=causal, window=window, segment_ids=segment_ids)
    pairs *= H if segment_ids is not None else B * H
    Dv = D if Dv is None else Dv
    kv = B * num_visible_keys(T, S, window if causal else None) * K * (D + Dv)
    rows = B * T * H
    gates = {"none": 0, "head": rows, "elementwise": rows * Dv}[gate]
    ids = 4 * B * (T + S) if segment_ids is not None else 0
    if not backward:  # read q, k, v, gate; write o
        return Cost(2 * (D + Dv) * pairs, itemsize * (rows * (D + Dv) + kv + gates) + ids, pairs + gates)
    # Read q, o, do, k, v, gate and the log-sum-exp; write dq, dk, dv (for every key) and dgate.
    moved = itemsize * (2 * rows * (D + Dv) + kv + B * S * K * (D + Dv) + 2 * gates)
    return Cost(2 * (3 * D + 2 * Dv) * pairs, moved + 4 * rows + ids, pairs + gates)


def grouped_matmul(
    *, N: int, M: int, F: int, group_sizes: np.ndarray, itemsize: int = 2, backward: bool = False
) -> Cost:
    """Return the cost of `dantinox.kernels.grouped_matmul`, or of its backward pass (dx and dw).

    Only rows that belong to a group and groups that have rows count.
    """
    sizes = np.asarray(group_sizes)
    E, rows, active = len(sizes), int(sizes.sum()), int(np.count_nonzero(sizes))
    if not backward:
        return Cost(2 * rows * M * F, itemsize * (rows * M + active * M * F + N * F))
    # Read x, dy and the matrices of active groups; write dx, and dw of every group (zeros without rows).
    return Cost(4 * rows * M * F, itemsize * (rows * (M + F) + active * M * F + N * M + E * M * F))


def moe_mlp(
    *,
    N: int,
    M: int,
    F: int,
    E: int,
    k: int,
    num_active_experts: int,
    biases: bool = False,
    itemsize: int = 2,
    backward: bool = False,
) -> Cost:
    """Return the cost of `dantinox.kernels.moe_mlp`, or of its backward pass.

    A routed row takes three products forward and six backward. Ids and expert weights have 4 bytes.

    Args:
        N: tokens.
        M: model width.
        F: hidden width of an expert.
        E: number of experts.
        k: experts per token.
        num_active_experts: experts with at least one row.
        biases: whether each of an expert's three projections has biases.
        itemsize: bytes per element of x, y, the matrices and the biases.
        backward: whether to count the backward pass instead of the forward pass.

    Returns:
        The cost of all N tokens.
    """
    rows = N * k
    weights = 3 * M * F + (2 * F + M) * biases
    if not backward:  # read x, the active experts, ids and weights; write y
        return Cost(6 * rows * M * F, itemsize * (2 * N * M + num_active_experts * weights) + 8 * rows, rows * F)
    # Read x, dy, the active experts, ids and weights; write dx, every expert's gradients and the weights' gradient.
    return Cost(12 * rows * M * F, itemsize * (3 * N * M + (num_active_experts + E) * weights) + 12 * rows, rows * F)


def linear_cross_entropy(
    *, N: int, M: int, V: int, num_targets: int, itemsize: int = 2, backward: bool = False
) -> Cost:
    """Return the cost of `dantinox.kernels.linear_cross_entropy`, or of its backward pass.

    Targets, losses and row sums (log-sum-exp) have 4 bytes.

    Args:
        N: rows.
        M: model width.
        V: size of the vocabulary.
        num_targets: rows that take part.
        itemsize: bytes per element of h and w.
        backward: whether to count the backward pass instead of the forward pass.

    Returns:
        The cost of all N rows.
    """
    product, exponentials = 2 * num_targets * M * V, num_targets * V
    read = itemsize * (num_targets * M + (V * M if num_targets else 0))
    if not backward:  # read h, w and the targets; write the losses
        return Cost(product, read + 8 * N, exponentials)
    # Read h, w, the targets, the log-sum-exp and the losses' gradient; write dh and dw.
    return Cost(3 * product, read + itemsize * (N * M + V * M) + 12 * N, exponentials)


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
    T: int = 1,
    sinks: bool = False,
) -> Cost:
    """Return the cost of one `dantinox.kernels.decode_attention` step.

    Args:
        H: query heads.
        K: key/value heads.
        D: head dim.
        C: slots per ring buffer.
        lengths: [B], tokens in the cache of each sequence before the step.
        window: number of keys that a query sees, its own included; None: C.
        gate: none, head ([B, T, H, 1]) or elementwise ([B, T, H, D]).
        itemsize: bytes per element of q, the new k and v, gate and o.
        kv_itemsize: bytes per element of the cache, its share of a scale included; None: itemsize.
        T: new tokens per sequence.
        sinks: whether each head has a sink.

    Returns:
        The cost of the step for all B sequences.
    """
    lengths = np.asarray(lengths).astype(np.int64)
    B = len(lengths)
    most = C if window is None else min(C, window)
    # Query t sees no token that the T new ones overwrite.
    pairs = sum(int(np.minimum(np.minimum(lengths + t + 1, most), C - T + t + 1).sum()) for t in range(T))
    moved_slots = int(np.minimum(lengths + T, min(C, most + T - 1)).sum())
    gates = {"none": 0, "head": B * T * H, "elementwise": B * T * H * D}[gate]
    # Read q, the new k and v, the gate and the visible slots but the new ones; write o and the new slots.
    cache_itemsize = itemsize if kv_itemsize is None else kv_itemsize
    moved = itemsize * (2 * B * T * H * D + gates + 2 * B * T * K * D) + round(cache_itemsize * 2 * K * D * moved_slots)
    return Cost(4 * H * D * pairs, moved + 8 * B + 4 * H * sinks, H * pairs + gates + B * T * H * sinks)
