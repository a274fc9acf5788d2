"""The mixture of experts composed of a grouped matmul and plain XLA.

    rows = x, sorted by expert            permute
    gate, up = rows w_gate, rows w_up     two grouped matmuls  ┐ up_proj
    h = silu(gate) up                     swiglu               ┘
    y = h w_down                          a grouped matmul
    out = weighted sum of y by token      combine

Every result passes through memory, which is what a fused kernel saves. Each piece is replaced on its own, so a kernel
that computes one piece already runs inside a whole layer, or a model.
"""

from collections.abc import Callable

import jax

from dantinox.kernels.einsum import accumulation_dtype
from dantinox.kernels.ops.grouped_matmul.group_metadata import zero_unassigned_rows
from dantinox.kernels.ops.moe.routing import Routing, combine_rows, permute_rows, sort_by_expert
from dantinox.kernels.ops.moe.wide import widen_float16

Array = jax.Array


def compose_moe_mlp(
    grouped_matmul: Callable[[Array, Array, Array], Array],
    *,
    permute: Callable[[Array, Routing], Array] | None = None,
    up_proj: Callable[[Array, Array, Array, Array], Array] | None = None,
    swiglu: Callable[[Array, Array], Array] | None = None,
    combine: Callable[[Array, Array, Routing], Array] | None = None,
) -> Callable[..., Array]:
    """Return an implementation of `moe_mlp`, for `register`, that is made of these pieces.

    It is differentiable in all but the ids if its pieces are. `routing` has `permutation` [N k], the routed row
    n * k + j of each sorted row, `inverse_permutation` [N k], and `group_sizes` [E]; the last rows, past the sum of the
    sizes, are those of ids outside [0, E). Their values and gradients do not count, whatever the pieces make of them.
    float16 is computed in float32, because hidden rows may exceed float16.

    Args:
        grouped_matmul: (x [R, M], w [E, M, F], group_sizes [E]) -> y [R, F], as an implementation of `grouped_matmul`.
        permute: (x [N, M], routing) -> x's rows sorted by expert [N k, M]; None: a gather.
        up_proj: (rows [R, M], w_gate, w_up [E, M, F], group_sizes [E]) -> h [R, F], in place of two grouped matmuls and
            `swiglu`; None: those.
        swiglu: (gate [R, F], up [R, F]) -> h = silu(gate) * up [R, F]; None: plain jnp, in float32.
        combine: (y [N k, M], expert_weights [N, k], routing) -> [N, M], the sum of each token's rows of y times their
            weights; None: a gather and a sum, in float32.

    Raises:
        ValueError: a piece is not a function, or both `up_proj` and `swiglu` are given.
    """
    pieces = {"permute": permute, "up_proj": up_proj, "swiglu": swiglu, "combine": combine}
    if not callable(grouped_matmul):
        raise ValueError(f"grouped_matmul is {grouped_matmul!r}; allowed: a function")
    for name, piece in pieces.items():
        if piece is not None and not callable(piece):
            raise ValueError(f"{name} is {piece!r}; allowed: a function or None")
    if up_proj is not None and swiglu is not None:
        raise ValueError("up_proj and swiglu are both given; allowed: one of them, because up_proj includes swiglu")
    to_rows, activate, to_tokens = permute or permute_rows, swiglu or _swiglu, combine or combine_rows

    def multiply(x: Array, w: Array, group_sizes: Array) -> Array:
        # XLA fuses both masks with what is around them: the first stops gradients, the second one values.
        y = grouped_matmul(zero_unassigned_rows(x, group_sizes), w, group_sizes)
        return zero_unassigned_rows(y, group_sizes)

    def multiply_and_activate(rows: Array, w_gate: Array, w_up: Array, group_sizes: Array) -> Array:
        return activate(multiply(rows, w_gate, group_sizes), multiply(rows, w_up, group_sizes))

    to_hidden = up_proj or multiply_and_activate

    @widen_float16
    def moe_mlp(x: Array, w_gate: Array, w_up: Array, w_down: Array, expert_ids: Array, expert_weights: Array) -> Array:
        routing = sort_by_expert(expert_ids, w_gate.shape[0])
        sizes = routing.group_sizes
        h = to_hidden(zero_unassigned_rows(to_rows(x, routing), sizes), w_gate, w_up, sizes)
        return to_tokens(multiply(h, w_down, sizes), expert_weights, routing)

    return moe_mlp


def _swiglu(gate: Array, up: Array) -> Array:
    dtype = accumulation_dtype(gate.dtype)
    return (jax.nn.silu(gate.astype(dtype)) * up.astype(dtype)).astype(gate.dtype)
