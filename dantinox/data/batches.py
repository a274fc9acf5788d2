"""Batches of windows of a tokenized text."""

import numpy as np


def get_batch(
    tokens: np.ndarray, *, seed: int, step: int, batch_size: int, seq_len: int, rows: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return random windows of `tokens` [N] as (inputs, targets), int32 [B, T]; targets are one token later.

    A pure function of (seed, step), so there is no state to save; row b does not depend on batch_size. Documents are
    concatenated, so windows are never padded. Callers that pad sequences use any input id and a negative target, which
    the loss ignores.

    Args:
        tokens: the text.
        seed: of the run; it and the step decide about the windows.
        step: from 0.
        batch_size: B.
        seq_len: T.
        rows: numbers of the rows to return, by default all.

    Raises:
        ValueError: an argument is negative, or N < seq_len + 1.
    """
    require_length(tokens, seq_len, "the data")
    if seed < 0 or step < 0 or batch_size < 1:
        raise ValueError(f"seed, step, batch_size are {seed}, {step}, {batch_size}; allowed: at least 0, 0, 1")
    # NumPy guarantees that the raw bits of a counter-based generator are the same in every version.
    bits = np.random.Philox(key=np.array([seed, step], np.uint64)).random_raw(batch_size)
    bits = bits if rows is None else bits[rows]
    return _gather_windows(tokens, (bits % np.uint64(len(tokens) - seq_len)).astype(np.int64), seq_len)


def eval_batches(tokens: np.ndarray, *, batch_size: int, seq_len: int, n: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return `n` fixed batches of evenly spaced windows of `tokens` [N]; no token is predicted twice.

    Each batch is (inputs, targets), int32 [B, T]. If N is too small, there are fewer batches, at least one, which may
    have fewer rows.

    Raises:
        ValueError: n or batch_size is less than 1, or N < seq_len + 1.
    """
    require_length(tokens, seq_len, "the validation data")
    if n < 1 or batch_size < 1:
        raise ValueError(f"n, batch_size are {n}, {batch_size}; allowed: at least 1, 1")
    available = (len(tokens) - 1) // seq_len
    rows = min(batch_size, available)
    count = min(n, available // rows) * rows
    starts = np.arange(count) * ((len(tokens) - 1) // count)
    return [_gather_windows(tokens, starts[i : i + rows], seq_len) for i in range(0, count, rows)]


def require_length(tokens: np.ndarray, seq_len: int, subject: str) -> None:
    """Raise ValueError if `tokens` [N] has no window of `seq_len` inputs and targets."""
    if seq_len < 1:
        raise ValueError(f"seq_len is {seq_len}; allowed: 1 or more")
    if len(tokens) < seq_len + 1:
        raise ValueError(
            f"{subject} has {len(tokens)} tokens, but seq_len {seq_len} needs at least {seq_len + 1}: "
            "use more text, a smaller seq_len, or another val_fraction"
        )


def _gather_windows(tokens: np.ndarray, starts: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    windows = np.asarray(tokens[starts[:, None] + np.arange(seq_len + 1)]).astype(np.int32)
    return windows[:, :-1], windows[:, 1:]
