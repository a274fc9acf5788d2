"""Measure the error of a candidate on a sample of the output that the reference can afford.

The reference computes every score and evaluates every expert, for which no machine has the memory at the sizes that
are timed. So the cotangent is zeroed outside one (sequence, key head) of attention, or outside some rows of a matmul.
There, the gradients of the full call equal those of the sample alone, and the sample is small.

The benchmark reports the error and passes no verdict: the error rule of the tests (`bench/verification/error_bound.py`)
decides what is wrong, and on a GPU `bench/gpu/smoke.py` applies it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dantinox.kernels.workloads.types import Attention, GroupedMatmul, LinearCrossEntropy, MoE, Workload

Tree = dict[str, Any]
MAX_SCORES = 2**27  # the most scores of attention that the reference computes
NUM_ROWS = 64  # rows of the sample of a matmul
MAX_REFERENCE_GROUPS = 32  # with more groups, the reference takes too long to compile


class CheckedSample:
    """The sample of a workload's arguments on which candidates are compared with the reference.

    Attributes:
        mask: the factor of the cotangent: 1 in the sample, 0 elsewhere.
        inputs, aux: the arguments of the sample.
        restrict: takes the name (o, dq, ...) and value of a result of the full call; returns the part in the sample.
    """

    def __init__(self, workload: Workload, inputs: Tree, aux: Tree) -> None:
        ones = np.ones(workload.out_shape(), np.float32)
        self.mask, self.inputs, self.aux, self.restrict = ones, inputs, aux, lambda name, x: x
        if isinstance(workload, Attention) and workload.B * workload.H * workload.T * workload.S > MAX_SCORES:
            self._take_one_head(workload, inputs, aux)
        elif isinstance(workload, GroupedMatmul | MoE | LinearCrossEntropy) and workload.N > NUM_ROWS:
            self._take_rows(workload, inputs, aux)

    def _take_one_head(self, workload: Attention, inputs: Tree, aux: Tree) -> None:
        G = workload.H // workload.K
        heads = {"q": G, "gate": G, "o": G, "k": 1, "v": 1}
        self.restrict = lambda name, x: x[:1, :, : heads[name.removeprefix("d")]]
        self.mask = np.zeros_like(self.mask)
        self.mask[:1, :, :G] = 1
        self.inputs = {name: self.restrict(name, x) for name, x in inputs.items()}
        self.aux = jax.tree.map(lambda ids: ids[:1], aux)

    def _take_rows(self, workload: GroupedMatmul | MoE | LinearCrossEntropy, inputs: Tree, aux: Tree) -> None:
        rows = np.sort(np.random.default_rng(0).choice(workload.N, NUM_ROWS, replace=False))
        row_arrays = {"x", "h", "o", "dx", "dh", "expert_weights", "dexpert_weights"}
        self.restrict = lambda name, x: x[rows] if name in row_arrays else x
        self.mask = np.zeros_like(self.mask)
        self.mask[rows] = 1
        self.inputs = {name: self.restrict(name, x) for name, x in inputs.items()}
        if isinstance(workload, MoE):
            self.aux = {"expert_ids": aux["expert_ids"][rows]}
        elif isinstance(workload, LinearCrossEntropy):
            self.aux = {"targets": aux["targets"][rows]}
        else:  # the sampled rows are still sorted by group
            ends = np.concatenate([[0], np.cumsum(aux["group_sizes"])])
            counts = np.searchsorted(rows, ends[1:]) - np.searchsorted(rows, ends[:-1])
            self.aux = {"group_sizes": counts.astype(np.int32)}

    def error(self, results: Tree, expected: Tree) -> float:
        """Largest difference over the largest expected value, of the output and every gradient; NaN if one is NaN.

        Args:
            results: the results of the full call, by name.
            expected: the results of the sample.
        """
        errors = []
        for name, exact in expected.items():
            scale = float(jnp.max(jnp.abs(exact))) or 1.0
            difference = float(jnp.max(jnp.abs(self.restrict(name, results[name]).astype(jnp.float32) - exact)))
            errors.append(difference / scale)
        return float(np.max(errors))


def gathered_reference(workload: GroupedMatmul | MoE) -> Callable[[Tree, Tree, Tree], tuple[jax.Array, Tree]]:
    """Return a reference that gathers the matrix of each row instead of looping over the groups."""

    def grouped_matmul(inputs: Tree, state: Tree, aux: Tree) -> tuple[jax.Array, Tree]:
        ends = jnp.cumsum(aux["group_sizes"])
        row = jnp.arange(inputs["x"].shape[0])
        group = jnp.minimum(jnp.searchsorted(ends, row, side="right"), workload.E - 1)
        y = jnp.einsum("nm,nmf->nf", inputs["x"], inputs["w"][group])
        return jnp.where((row < ends[-1])[:, None], y, 0), state

    def moe_mlp(inputs: Tree, state: Tree, aux: Tree) -> tuple[jax.Array, Tree]:
        x, ids = inputs["x"], aux["expert_ids"]
        gate, up = (jnp.einsum("nm,nkmf->nkf", x, inputs[name][ids]) for name in ("w_gate", "w_up"))
        out = jnp.einsum("nkf,nkfm->nkm", jax.nn.silu(gate) * up, inputs["w_down"][ids])
        return jnp.einsum("nkm,nk->nm", out, inputs["expert_weights"]), state

    return grouped_matmul if isinstance(workload, GroupedMatmul) else moe_mlp


def float32_reference(
    sample: CheckedSample, program: Callable[..., tuple[Tree, Tree]], state: Tree, dout: jax.Array
) -> Tree:
    """Compute the expected results of a sample in float32, with products in full precision.

    Args:
        sample: the sample.
        program: (inputs, state, aux, dout) -> (results, state), of the reference.
        state: the cache of decoding, else empty.
        dout: the cotangent of the full call.
    """

    def widen(x: jax.Array) -> jax.Array:
        return x.astype(jnp.float32)

    inputs = jax.tree.map(widen, sample.inputs)
    state = state if "k_scale" in state else jax.tree.map(widen, state)  # an 8-bit cache stays as it is
    with jax.default_matmul_precision("highest"):
        return jax.jit(program)(inputs, state, sample.aux, widen(sample.restrict("o", dout)))[0]
