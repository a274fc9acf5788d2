"""Compare the Triton kernels of the mixture of experts, in Triton's interpreter, with NumPy: needs Triton, no GPU.

`python -m tests.helpers.triton_interpreter` prints one line per case and fails if one differs. The interpreter expects
tensors in device memory; a `HostTensor` of the judge has all that it calls on them.
"""

import os
import sys
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from bench.judge.triton_interpreter import HostTensor
from dantinox import reference
from dantinox.kernels.ops.moe import triton as kernels

BF16 = ml_dtypes.bfloat16
CASES = ((1, 8, 1, 4), (5, 300, 8, 16), (37, 256, 2, 4), (64, 17, 3, 3), (100, 520, 4, 256))  # N, M, k, E


def run_kernel(kernel: Any, grid: tuple[int, int], *arrays: np.ndarray, out: np.ndarray, **sizes: Any) -> np.ndarray:
    """Run a kernel that writes to `out`, which is filled with NaN before; returns `out`."""
    out[...] = np.nan
    ins = [HostTensor(np.ascontiguousarray(array)) for array in arrays]
    names = kernel.arg_names
    last = {names[-1]: HostTensor(out)}
    kernel[grid](*ins, **sizes, **last, TILE_ROWS=kernels.BLOCK_M, TILE_COLUMNS=kernels.BLOCK_N)
    return out


def moe_mlp_error(*, biases: bool = False, **options: Any) -> float:
    """Returns the largest relative error of `moe_mlp` and its gradients against the reference."""

    def interpreted(kernel: Any, *arrays: jax.Array, out: jax.ShapeDtypeStruct, grid: tuple[int, int], **sizes: Any):
        on_host = lambda *ins: run_kernel(
            kernel, grid, *map(np.asarray, ins), out=np.empty(out.shape, out.dtype), **sizes
        )
        return jax.pure_callback(on_host, out, *arrays)

    rng = np.random.default_rng(0)
    N, M, F, E, k = 21, 20, 12, 5, 3
    shapes = (N, M), (E, M, F), (E, M, F), (E, F, M), (N, k)
    shapes += ((E, F), (E, F), (E, M)) if biases else ()
    inputs = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]
    names = ("b_gate", "b_up", "b_down")
    ids = jnp.asarray(rng.integers(0, E - 1, (N, k)))  # the last expert gets nothing

    def both(operation: Any) -> tuple[jax.Array, ...]:
        f = lambda *i: operation(*i[:4], ids, i[4], **dict(zip(names, i[5:])), **options)
        y, pull = jax.vjp(f, *inputs)
        return y, *pull(jnp.cos(y))

    with mock.patch.object(kernels, "call_triton", interpreted):
        actual = both(kernels.moe_mlp)
    pairs = zip(actual, both(reference.moe_mlp), strict=True)
    return max(float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))) for a, b in pairs)


def main() -> int:
    """Compare every kernel in every case; returns 1 if any differs, else 0."""
    error = max(moe_mlp_error(), moe_mlp_error(biases=True, activation=("swiglu_clamped", 3.0, 1.702)))
    print(f"moe_mlp and its gradients: {error:.1e}")
    if not error < 1e-4:
        return 1
    worst = 0
    for seed, (N, M, k, E) in enumerate(CASES):
        for dtype in (np.float32, BF16):
            rng = np.random.default_rng(seed)
            x, dout = (rng.standard_normal((N, M)).astype(dtype) for _ in range(2))
            p = rng.random((N, k)).astype(np.float32)
            ids = np.argsort(rng.random((N, E)), axis=1)[:, :k]
            permutation = np.argsort(ids.reshape(-1), kind="stable").astype(np.int32)
            inverse_permutation = np.argsort(permutation).astype(np.int32).reshape(N, k)
            rows, wide = x[permutation // k], np.float32
            y = rng.standard_normal((N * k, M)).astype(dtype)
            moved, back = kernels.launch_grid(N * k, M), kernels.launch_grid(N, M)
            ends = {"WIDTH": M, "K": k}
            gathered = y[inverse_permutation].astype(wide)
            found = {}
            for scaled in (False, True):
                out = np.empty((N * k, M), dtype)
                ends_r = ends | {"N_ROWS": N * k, "SCALED": scaled}
                new = run_kernel(kernels.permute_kernel, moved, x, permutation, p, out=out, **ends_r)
                s = p.reshape(-1)[permutation][:, None] if scaled else 1
                found[f"permute {scaled}"] = new, (rows.astype(wide) * s).astype(dtype)
                out = np.empty((N, M), dtype)
                ends_n = ends | {"TOKENS": N, "SCALED": scaled}
                new = run_kernel(kernels.combine_kernel, back, y, inverse_permutation, p, out=out, **ends_n)
                found[f"combine {scaled}"] = new, (gathered * (p[..., None] if scaled else 1)).sum(1).astype(dtype)
            new = run_kernel(
                kernels.router_weight_grad_kernel,
                (back[0], k),
                dout,
                y,
                inverse_permutation,
                out=np.empty((N, k), wide),
                TOKENS=N,
                **ends,
            )
            found["router_weight_grad"] = new, (gathered * dout.astype(wide)[:, None]).sum(-1)
            for name, (mine, expected) in found.items():
                mine, expected = mine.astype(wide), expected.astype(wide)
                unit = 2.0**-7 if dtype == BF16 and name != "router_weight_grad" else 2.0**-18
                bound = unit * (np.abs(expected) + (np.sqrt(M) if name == "router_weight_grad" else 1))
                worst = max(worst, float(np.max(np.abs(mine - expected) / bound)))
                right = bool(np.all(np.abs(mine - expected) <= bound))
                print(f"N {N} M {M} k {k} E {E} {np.dtype(dtype).name} {name}: {'right' if right else 'WRONG'}")
                if not right:
                    return 1
    print(f"largest difference: {worst:.3f} of what is allowed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
