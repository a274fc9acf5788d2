"""The mixture of experts composed of a grouped matmul and plain XLA.

    rows = x, sorted by expert            permute
    gate, up = rows w_gate, rows w_up     two grouped matmuls  ┐ up_proj
    h = silu(gate) up                     swiglu               ┘
    y = h w_down                          a grouped matmul
    out = weighted sum of y by token      combine

Biases are added to the results of the grouped matmuls. A mixture with an `up_proj` of its own refuses biases of gate
and up, and one with that or with a `swiglu` of its own refuses other activations.

Every result passes through memory, which is what a fused kernel saves. Each piece is replaced on its own, so a kernel
that computes one piece already runs inside a whole layer, or a model.
"""

from collections.abc import Callable

import jax

from dantinox.kernels.einsum import accumulation_dtype
from dantinox.kernels.ops.grouped_matmul.group_metadata import zero_unassigned_rows
from dantinox.kernels.ops.moe.biases import add_bias
from dantinox.kernels.ops.moe.routing import Routing, combine_rows, permute_rows, sort_by_expert
from dantinox.kernels.ops.moe.swiglu import Activation, clamped_swiglu
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
    to_rows, to_tokens = permute or permute_rows, combine or combine_rows

    def multiply(x: Array, w: Array, group_sizes: Array, b: Array | None = None) -> Array:
        # XLA fuses both masks with what is around them: the first stops gradients, the second one values.
        y = grouped_matmul(zero_unassigned_rows(x, group_sizes), w, group_sizes)
        return add_bias(zero_unassigned_rows(y, group_sizes), b, group_sizes)

    @widen_float16
    def moe_mlp(
        x: Array,
        w_gate: Array,
        w_up: Array,
        w_down: Array,
        expert_ids: Array,
        expert_weights: Array,
        *,
        b_gate: Array | None = None,
        b_up: Array | None = None,
        b_down: Array | None = None,
        activation: Activation = "swiglu",
    ) -> Array:
        given = {"b_gate": b_gate is not None, "b_up": b_up is not None, "activation": activation != "swiglu"}
        for piece, refused in (("up_proj", given), ("swiglu", {"activation": given["activation"]})):
            if pieces[piece] is not None and any(refused.values()):
                names = ", ".join(name for name, is_given in refused.items() if is_given)
                raise NotImplementedError(
                    f"moe_mlp: this implementation's {piece} does not take {names}; implementation='xla' runs here"
                )
        routing = sort_by_expert(expert_ids, w_gate.shape[0])
        sizes = routing.group_sizes
        rows = zero_unassigned_rows(to_rows(x, routing), sizes)
        if up_proj is not None:
            h = up_proj(rows, w_gate, w_up, sizes)
        else:
            gate, up = multiply(rows, w_gate, sizes, b_gate), multiply(rows, w_up, sizes, b_up)
            h = swiglu(gate, up) if swiglu is not None else _activate(gate, up, activation)
        return to_tokens(multiply(h, w_down, sizes, b_down), expert_weights, routing)

    return moe_mlp


def _activate(gate: Array, up: Array, activation: Activation) -> Array:
    dtype = accumulation_dtype(gate.dtype)
    if activation == "swiglu":
        return (jax.nn.silu(gate.astype(dtype)) * up.astype(dtype)).astype(gate.dtype)
    return clamped_swiglu(gate.astype(dtype), up.astype(dtype), *activation[1:]).astype(gate.dtype)
