"""How far an implementation is from the truth, on a part of the rows that the reference can afford.

The reference builds every score and asks every expert, which no machine has memory for at the sizes that are timed.
So the cotangent is cleared outside one (sequence, key head) of attention, or outside some rows of a matmul: there the
gradients of the whole call equal those of the part alone, and the part is small.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dantinox.kernels.workloads.types import Attention, GroupedMatmul, MoE, Workload

Tree = dict[str, Any]
SCORES = 2**27  # scores of all pairs that are built at once
ROWS = 64
MANY = 32  # groups above which the reference takes too long to compile


class Part:
    """Part of one row's arguments, as the reference sees them.

    Attributes:
        mask: what the cotangent is multiplied with before it is judged.
        inputs, aux: the part.
        cut: cuts a result of the whole call (by name: o, dq, ...) down to the part.
    """

    def __init__(self, workload: Workload, inputs: Tree, aux: Tree) -> None:
        ones = np.ones(workload.out_shape(), np.float32)
        self.mask, self.inputs, self.aux, self.cut = ones, inputs, aux, lambda name, x: x
        if isinstance(workload, Attention) and workload.B * workload.H * workload.T * workload.S > SCORES:
            self._one_head(workload, inputs, aux)
        elif isinstance(workload, GroupedMatmul | MoE) and workload.N > ROWS:
            self._some_rows(workload, inputs, aux)

    def _one_head(self, workload: Attention, inputs: Tree, aux: Tree) -> None:
        G = workload.H // workload.K
        heads = {"q": G, "gate": G, "o": G, "k": 1, "v": 1}
        self.cut = lambda name, x: x[:1, :, : heads[name.removeprefix("d")]]
        self.mask = np.zeros_like(self.mask)
        self.mask[:1, :, :G] = 1
        self.inputs = {name: self.cut(name, x) for name, x in inputs.items()}
        self.aux = jax.tree.map(lambda ids: ids[:1], aux)

    def _some_rows(self, workload: GroupedMatmul | MoE, inputs: Tree, aux: Tree) -> None:
        rows = np.sort(np.random.default_rng(0).choice(workload.N, ROWS, replace=False))
        of_rows = {"x", "o", "dx", "expert_weights", "dexpert_weights"}
        self.cut = lambda name, x: x[rows] if name in of_rows else x
        self.mask = np.zeros_like(self.mask)
        self.mask[rows] = 1
        self.inputs = {name: self.cut(name, x) for name, x in inputs.items()}
        if isinstance(workload, MoE):
            self.aux = {"expert_ids": aux["expert_ids"][rows]}
        else:  # as many of the rows as each group has of them; they are still sorted by group
            ends = np.concatenate([[0], np.cumsum(aux["group_sizes"])])
            counts = np.searchsorted(rows, ends[1:]) - np.searchsorted(rows, ends[:-1])
            self.aux = {"group_sizes": counts.astype(np.int32)}

    def error(self, results: Tree, truth: Tree) -> float:
        """The largest difference over the largest true value, over the output and every gradient."""
        errors = []
        for name, exact in truth.items():
            scale = float(jnp.max(jnp.abs(exact))) or 1.0
            difference = float(jnp.max(jnp.abs(self.cut(name, results[name]).astype(jnp.float32) - exact)))
            errors.append(difference / scale)
        return float(np.max(errors))  # NaN where one is


def by_row(workload: GroupedMatmul | MoE) -> Callable[[Tree, Tree, Tree], tuple[jax.Array, Tree]]:
    """Each row with matrices of its own, gathered: the reference asks every expert, and hundreds compile too long."""

    def grouped(inputs: Tree, state: Tree, aux: Tree) -> tuple[jax.Array, Tree]:
        ends = jnp.cumsum(aux["group_sizes"])
        row = jnp.arange(inputs["x"].shape[0])
        group = jnp.minimum(jnp.searchsorted(ends, row, side="right"), workload.E - 1)
        y = jnp.einsum("nm,nmf->nf", inputs["x"], inputs["w"][group])
        return jnp.where((row < ends[-1])[:, None], y, 0), state

    def experts(inputs: Tree, state: Tree, aux: Tree) -> tuple[jax.Array, Tree]:
        x, ids = inputs["x"], aux["expert_ids"]
        gate, up = (jnp.einsum("nm,nkmf->nkf", x, inputs[name][ids]) for name in ("w_gate", "w_up"))
        out = jnp.einsum("nkf,nkfm->nkm", jax.nn.silu(gate) * up, inputs["w_down"][ids])
        return jnp.einsum("nkm,nk->nm", out, inputs["expert_weights"]), state

    return grouped if isinstance(workload, GroupedMatmul) else experts


def truth(part: Part, program: Callable[..., tuple[Tree, Tree]], state: Tree, dout: jax.Array) -> Tree:
    """What the reference says in float32, products in full precision.

    Args:
        program: (inputs, state, aux, dout) -> (results, state), of the reference.
    """
    wide = lambda x: x.astype(jnp.float32)
    inputs = jax.tree.map(wide, part.inputs)
    state = state if "k_scale" in state else jax.tree.map(wide, state)  # a ring in 8 bits is what it is
    with jax.default_matmul_precision("highest"):
        return jax.jit(program)(inputs, state, part.aux, part.cut("o", dout).astype(jnp.float32))[0]
