"""Shared by all steps: the mask, argument checks and small operations."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dantinox.kernels import validation
from dantinox.kernels.precision import matmul_precision
from dantinox.kernels.tutorial.common import call_options as call_options
from dantinox.kernels.tutorial.common import iota as iota
from dantinox.kernels.tutorial.common import refuse

Array = jax.Array
M_INIT = -1e30  # start of a running maximum: finite, so that exp(-inf - M_INIT) is 0 in a row that sees no key
NT, NN, TN = ((1,), (1,)), ((1,), (0,)), ((0,), (0,))  # a b^T, a b and a^T b


class Mask(NamedTuple):
    """Which keys a query sees. Query t is at key S - T + t and sees one interval of keys; so do consecutive queries."""

    T: int
    S: int
    causal: bool
    window: int | None

    def visible_keys(self, first: Any, last: Any) -> tuple[Any, Any]:
        """(lowest, highest) key that any query at positions first..last sees; numbers or arrays."""
        low = 0 if self.window is None else first - self.window + 1
        return low, last if self.causal else self.S - 1

    def apply(self, s: Array, query: Array, key: Array) -> Array:
        """Scores with -inf where the query at that position does not see the key."""
        low, high = self.visible_keys(query, query)
        return jnp.where((low <= key) & (key <= high), s, -jnp.inf)

    def zero_unseen(self, v: Array, first_key: Any) -> Array:
        """Values of the keys from first_key on, with zeros for keys that no query sees: 0 * NaN would be NaN."""
        low, high = self.visible_keys(self.S - self.T, self.S - 1)
        if low <= 0 and self.S % v.shape[-2] == 0:
            return v  # the tiles have no padding, and some query sees every key
        key = first_key + iota((v.shape[-2], 1), 0)
        return jnp.where((low <= key) & (key <= high), v, 0)


class Problem(NamedTuple):
    """What is known when a kernel with a derivative is traced: the mask, the scale, and the tiles."""

    mask: Mask
    scale: float
    q_tile: int
    k_tile: int


def dot(a: Array, b: Array, contract: tuple[tuple[int], tuple[int]]) -> Array:
    """Multiply two tiles in their own dtype and accumulate in float32, the fast mode of the MXU."""
    return jax.lax.dot_general(
        a, b, (contract, ((), ())), precision=matmul_precision(a, b), preferred_element_type=jnp.float32
    )


def heads_first(x: Array) -> Array:
    """[B, T, H, D] -> [B, H, T, D] and back: the two axes of a tile must be the last ones."""
    return x.swapaxes(1, 2)


def check(
    q: Array,
    k: Array,
    v: Array,
    causal: bool,
    window: int | None,
    scale: float | None,
    tiles: dict[str, int] | None = None,
    **unsupported: Any,
) -> tuple[Mask, float]:
    """Check the arguments of a step.

    Args:
        q: queries [B, T, H, D].
        k: keys [B, S, K, D].
        v: values [B, S, K, D].
        causal: whether a query sees no later key.
        window: keys that a query sees, or None.
        scale: factor on the scores, or None for D**-0.5.
        tiles: tile sizes by argument name.
        **unsupported: arguments that the step does not support; each must be None.

    Returns:
        The mask and the scale.

    Raises:
        ValueError: a shape, dtype or value is not allowed.
        NotImplementedError: the step does not support an argument.
    """
    B, T, H, D = validation.as_array("q", q, "BTHD").shape
    S, K = validation.as_array("k", k, "BSKD").shape[1:3]
    for name, x in (("k", k), ("v", v)):
        validation.check_shape(name, x, (B, S, K, D))
    validation.check_floating(q=q, k=k, v=v)
    validation.check_heads(H, K)
    causal = validation.check_flag("causal", causal)
    window, scale = validation.check_window(window, causal), validation.check_scale(scale, D)
    for name, size in (tiles or {}).items():
        if size < 16 or size % 16:  # 16 rows of bfloat16 are one register
            raise ValueError(f"{name} is {size}; allowed: a multiple of 16")
    refuse(unsupported)
    if q.dtype == jnp.float64:
        raise NotImplementedError("float64 is not supported: the kernels accumulate in float32")
    return Mask(T, S, causal, window), scale


def differentiable(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Array]:
    """Make an `attention` with gradients from a forward and a backward pass.

    The gate is applied after the kernel, by plain jnp: its derivative needs the ungated output, which is saved anyway.

    Args:
        forward: (q [B, H, T, D], k [B, K, S, D], v, problem) -> (o, lse), o as q.
        backward: (problem, (q, k, v, o, lse), do) -> (dq, dk, dv).
    """
    core = jax.custom_vjp(lambda q, k, v, problem: forward(q, k, v, problem)[0], nondiff_argnums=(3,))

    def save_residuals(q: Array, k: Array, v: Array, problem: Problem) -> tuple[Array, tuple[Array, ...]]:
        o, lse = forward(q, k, v, problem)
        return o, (q, k, v, o, lse)

    core.defvjp(save_residuals, backward)

    def attention(
        q: Array,
        k: Array,
        v: Array,
        *,
        gate: Array | None = None,
        causal: bool = True,
        window: int | None = None,
        scale: float | None = None,
        rows: int = 512,
        k_tile: int = 256,
        **unsupported: None,
    ) -> Array:
        """[B, T, H, D], as `dantinox.kernels.attention`: k and v [B, S, K, D]; a tile has at most `rows` rows."""
        mask, scale = check(q, k, v, causal, window, scale, {"rows": rows, "k_tile": k_tile}, **unsupported)
        if gate is not None:
            validation.check_floating(q=q, gate=gate)
            validation.check_shape("gate", gate, q.shape, (*q.shape[:3], 1))
        if 0 in (q.size, k.size):
            return jnp.zeros_like(q)
        q_tile = max(16, rows // (q.shape[2] // k.shape[2]) // 16 * 16)
        o = heads_first(core(*map(heads_first, (q, k, v)), Problem(mask, scale, q_tile, k_tile)))
        return o if gate is None else (o * jax.nn.sigmoid(gate.astype(jnp.float32))).astype(q.dtype)

    return attention
