"""Pictures of the tiles of a result with the wrong ones marked, as in the headers of the kernels.

Attention is drawn as queries against keys. A value that is one-hot in its block of keys makes the output the weight
that each query gives to each block; a cotangent that is one-hot in its block of queries does the same to dv. So two
runs show which tile a kernel gets wrong, although its results have summed over the tiles.
"""

from typing import Any

import numpy as np

from bench.judge import forms
from bench.judge.cases import Case, Problem, axes_of
from bench.judge.forms import Results
from dantinox.kernels import workloads

LEGEND = "█ all seen  ▞ some seen  ░ none seen  X wrong"
MAX_TILES = 16  # of an axis
TOLERANCE = {"float32": 1e-3}  # of weights, which sum to 1


def draw(
    op: str, implementation: str, form: str, case: Case, problem: Problem, name: str, actual: Results, exact: Results
) -> str:
    """Draw where a case is wrong.

    Args:
        op: the operation.
        implementation: the implementation that is wrong.
        form: the form in which it is wrong.
        case: the case.
        problem: its arrays.
        name: the first result that is wrong.
        actual: the results.
        exact: what they should be.
    """
    if isinstance(case.workload, workloads.Attention) and name in ("o", "dv"):
        try:
            return _attention_tiles(implementation, form, case, problem, by_query=name == "dv")
        except Exception:
            pass  # a picture is a help, and the verdict stands without it
    return _blocks(axes_of(op, name, exact[name].ndim), actual[name], exact[name])


def _attention_tiles(implementation: str, form: str, case: Case, problem: Problem, *, by_query: bool) -> str:
    row = case.workload
    assert isinstance(row, workloads.Attention)
    length = row.T if by_query else row.S
    tile = max(1, -(-length // min(MAX_TILES, row.D)))
    if tile > 8:
        tile = -(-tile // 64) * 64 if tile > 32 else -(-tile // 8) * 8
    probe = _one_hot((row.B, length, row.H if by_query else row.K, row.D), tile).astype(case.dtype)
    if by_query:
        problem = problem._replace(cotangent=probe)
    else:
        problem = problem._replace(inputs=problem.inputs | {"v": probe}, clean=problem.clean | {"v": probe})
    result = "dv" if by_query else "o"
    weights = forms.run("attention", implementation, form, case, problem, gradients=by_query)[result]
    exact = forms.expected("attention", case, problem, gradients=by_query)[1][result]
    # [rows, tiles of the other axis]: the weights of all sequences and heads next to each other.
    weights, exact = (np.moveaxis(x.astype(np.float64), 2, 0).reshape(-1, *x.shape[1::2]) for x in (weights, exact))
    allowed = TOLERANCE.get(case.dtype, 3e-2)
    wrong = _missing_tiles(weights, exact, allowed) if by_query else _wrong_tiles(weights, exact, allowed)
    rows = range(0, weights.shape[1], tile)
    columns = -(-length // tile)
    seen = _visible(row, problem)
    marks = []
    for i in rows:
        marks.append("")
        for j in range(columns):
            q, k = (j * tile, i) if by_query else (i, j * tile)
            part = seen[:, q : q + tile, k : k + tile]
            marks[-1] += "X" if wrong[:, i : i + tile, j].any() else "█" if part.all() else "▞" if part.any() else "░"
    if by_query:  # queries from top to bottom in any case
        marks = ["".join(line) for line in zip(*marks)]
    lines = [f"    T {i * tile:<6} {'  '.join(line)}" for i, line in enumerate(marks)]
    return "\n".join([f"    tiles of {tile} queries, downwards, and {tile} keys: {LEGEND}", *lines])


def _wrong_tiles(weights: np.ndarray, exact: np.ndarray, allowed: float) -> np.ndarray:
    """Mark the tiles to blame: a softmax that misses a tile gives all others of the row more weight, by one factor."""
    with np.errstate(all="ignore"):
        ratios = np.where(exact > 1e-6, weights / exact, np.nan)
        ratios = np.where(ratios > 1e-3, ratios, np.nan)
        known = ~np.isnan(ratios).all(axis=-1, keepdims=True)
        factor = np.where(known, np.nanmedian(np.where(known, ratios, 1.0), axis=-1, keepdims=True), 1.0)
        to_blame = ~(np.abs(weights - factor * exact) <= allowed)
        different = ~(np.abs(weights - exact) <= allowed)
    return np.where(to_blame.any(axis=-1, keepdims=True), to_blame, different)


def _missing_tiles(weights: np.ndarray, exact: np.ndarray, allowed: float) -> np.ndarray:
    """Mark the tiles that are missing or should not be there; where all are there, those with another weight."""
    to_blame = ((exact > allowed) & (np.abs(weights) < 1e-3 * exact)) | ((exact == 0) & (np.abs(weights) > allowed))
    return to_blame if to_blame.any() else ~(np.abs(weights - exact) <= allowed)


def _one_hot(shape: tuple[int, ...], tile: int) -> np.ndarray:
    block = np.arange(shape[1]) // tile
    return np.broadcast_to((block[:, None] == np.arange(shape[3]))[None, :, None], shape)


def _visible(row: workloads.Attention, problem: Problem) -> np.ndarray:
    """[B, T, S]: which keys each query sees."""
    distance = row.S - row.T + np.arange(row.T)[:, None] - np.arange(row.S)
    seen = (distance >= 0) | (not row.causal)
    if row.window is not None:
        seen &= distance < row.window
    seen = np.broadcast_to(seen, (row.B, *seen.shape))
    ids = problem.aux.get("segment_ids")
    if ids is not None:
        q_ids, kv_ids = ids if isinstance(ids, tuple) else (ids, ids)
        seen = seen & (q_ids[:, :, None] == kv_ids[:, None])
    return seen


def _blocks(axes: str, actual: Any, exact: Any) -> str:
    """Draw a result as blocks of its longest axis and of its last one; blocks of all other axes are laid over it."""
    actual, exact = (np.asarray(x).astype(np.float64) for x in (actual, exact))
    if actual.ndim < 2 or actual.shape != exact.shape:
        return ""
    scale = float(np.abs(exact).max(initial=0)) or 1.0
    wrong = ~(np.abs(actual - exact) <= 1e-3 * scale)
    row_axis = int(np.argmax(actual.shape[:-1]))
    wrong = np.moveaxis(wrong, row_axis, 0).any(axis=tuple(range(1, actual.ndim - 1)))
    steps = [max(1, -(-size // MAX_TILES)) for size in wrong.shape]
    steps = [-(-step // 8) * 8 if step > 4 else step for step in steps]
    lines = []
    for i in range(0, wrong.shape[0], steps[0]):
        marks = (wrong[i : i + steps[0], j : j + steps[1]].any() for j in range(0, wrong.shape[1], steps[1]))
        lines.append(f"    {axes[row_axis : row_axis + 1]} {i:<6} " + "  ".join("X" if mark else "█" for mark in marks))
    size = " x ".join(f"{step} {letter}" for step, letter in zip(steps, (axes[row_axis : row_axis + 1], axes[-1:])))
    return "\n".join([f"    blocks of {size}: █ right  X wrong", *lines])
