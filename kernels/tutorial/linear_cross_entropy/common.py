"""Shared by all steps: argument checks, the state of a row, small operations and the derivative's frame."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dantinox.kernels import integers, validation
from dantinox.kernels.precision import matmul_precision
from dantinox.kernels.tutorial.common import call_options as call_options
from dantinox.kernels.tutorial.common import iota as iota
from dantinox.kernels.tutorial.common import refuse

Array = jax.Array
NT, NN, TN = ((1,), (1,)), ((1,), (0,)), ((0,), (0,))  # a b^T, a b and a^T b


class Tiles(NamedTuple):
    """Rows of h and rows of w whose logits a kernel computes at a time."""

    n: int
    v: int


class RowStats(NamedTuple):
    """Of each row, float32 [N, 1]: its largest logit m, the sum of exp(s - m), and its target's logit."""

    row_max: Array
    total: Array
    target: Array

    def loss(self, targets: Array) -> Array:
        """[N]: logsumexp minus the target's logit; 0 in rows that take no part."""
        return jnp.where(targets >= 0, self.row_max + jnp.log(self.total) - self.target, 0)[:, 0]


def dot(a: Array, b: Array, contract: tuple[tuple[int], tuple[int]]) -> Array:
    """Multiply two tiles in their own dtype and accumulate in float32, the fast mode of the MXU."""
    return jax.lax.dot_general(
        a, b, (contract, ((), ())), precision=matmul_precision(a, b), preferred_element_type=jnp.float32
    )


def zero_past(w: Array, first: Any, V: int) -> Array:
    """Rows of w from `first` on, with zeros past the vocabulary: memory there may hold NaN, and 0 * NaN is NaN."""
    return jnp.where(first + iota((w.shape[0], 1), 0) < V, w, jnp.zeros_like(w))


def pad_rows(x: Array, n_tile: int, value: float = 0) -> Array:
    """Rows up to a multiple of a tile."""
    return jnp.pad(x, ((0, -x.shape[0] % n_tile), (0, 0)), constant_values=value)


def active_tiles(targets: Array, n_tile: int) -> Array:
    """Int32: 1 for each tile of rows in which a row takes part, else 0."""
    return jnp.any(pad_rows(targets, n_tile, -1).reshape(-1, n_tile) >= 0, axis=1).astype(jnp.int32)


def check(h: Array, w: Array, targets: Array, tiles: Tiles, **unsupported: Any) -> Array:
    """Check the arguments of a step.

    Args:
        h: rows [N, M].
        w: projection [V, M].
        targets: index of each row's target [N], integers; below 0: the row takes no part.
        tiles: sizes of tiles.
        **unsupported: arguments that the step does not support; each must be None, or 0 for z_loss.

    Returns:
        The targets in int32, [N, 1]; -1 in rows that take no part. A TPU has no one-dimensional registers.

    Raises:
        ValueError: a shape, dtype or value is not allowed.
        NotImplementedError: the step does not support an argument.
    """
    N, M = validation.as_array("h", h, "NM").shape
    V = validation.as_array("w", w, "VM").shape[0]
    ids = integers.as_integers("targets", targets, "N")
    validation.check_floating(h=h, w=w)
    validation.check_shape("w", w, (V, M))
    validation.check_shape("targets", ids, (N,))
    for name, size in (("n_tile", tiles.n), ("v_tile", tiles.v)):
        if size < 16 or size % 16:  # 16 rows of bfloat16 are one register
            raise ValueError(f"{name} is {size}; allowed: a multiple of 16")
    refuse({name: None if name == "z_loss" and value == 0 else value for name, value in unsupported.items()})
    if h.dtype == jnp.float64:
        raise NotImplementedError("float64 is not supported: the kernels accumulate in float32")
    return integers.targets_within(ids, V)[:, None]


def operation(
    row_stats: Callable[..., RowStats],
    save_residuals: Callable[..., tuple[Array, Any]] | None = None,
    backward: Callable[..., tuple[Array, Array, None]] | None = None,
) -> Callable[..., Array]:
    """Make a `linear_cross_entropy` from its kernels.

    Args:
        row_stats: (h [N, M], w [V, M], targets [N, 1], tiles) -> the state of each row after the last tile.
        save_residuals: (h, w, targets, tiles) -> (losses [N], residuals), where gradients are asked for.
        backward: (tiles, residuals, gradient of the losses [N]) -> (dh, dw, None).
    """

    def losses(h: Array, w: Array, targets: Array, tiles: Tiles) -> Array:
        return row_stats(h, w, targets, tiles).loss(targets)

    if save_residuals and backward:
        losses = jax.custom_vjp(losses, nondiff_argnums=(3,))
        losses.defvjp(save_residuals, backward)

    def linear_cross_entropy(
        h: Array, w: Array, targets: Array, *, n_tile: int = 256, v_tile: int = 512, **unsupported: None
    ) -> Array:
        """[N] float32, as `dantinox.kernels.linear_cross_entropy`: h [N, M], w [V, M], targets [N]."""
        tiles = Tiles(n_tile, v_tile)
        targets = check(h, w, targets, tiles, **unsupported)
        if 0 in (h.shape[0], w.shape[0]):
            return jnp.zeros(h.shape[0], jnp.float32)
        if h.shape[1] == 0:  # every logit is 0
            h, w = (jnp.zeros((x.shape[0], 1), x.dtype) for x in (h, w))
        return losses(h, w, targets, tiles)

    return linear_cross_entropy
