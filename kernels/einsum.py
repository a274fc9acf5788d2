"""A two-operand einsum whose gradient stays in the compute dtype and needs no transposed copy.

Autodiff of a bfloat16 matmul with a float32 result multiplies the float32 cotangent, at a fraction of the speed. It
writes a weight gradient as (dy^T x)^T, for which XLA on CPU makes transposed copies of the activations (a third of a
training step there). This einsum casts the cotangent to the compute dtype first and computes each gradient as one
contraction in its final layout.

In float16 the cotangent keeps float32: its values, such as those of a scaled loss, need not fit float16. A GPU's TF32
multiplies them with float16's 10 bits.
"""

import functools

import jax
import jax.numpy as jnp

from dantinox.kernels.dispatch import current_device

Array = jax.Array


def accumulation_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Return float32, or float64 for float64."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def einsum(spec: str, a: Array, b: Array, out_dtype: jnp.dtype | None = None) -> Array:
    """Compute jnp.einsum(spec, a, b) with b cast to a's dtype, accumulated in float32 or wider.

    Args:
        spec: such as "NM,MF->NF"; each letter is in exactly two of the three terms, or in all three.
        a: first operand; its dtype is the compute dtype.
        b: second operand of any floating dtype, such as a float32 parameter; its gradient keeps that dtype.
        out_dtype: dtype of the result; None: a's.

    Returns:
        The array that the third term of the spec describes, in `out_dtype`.
    """
    wide = accumulation_dtype(a.dtype)
    # XLA for CPUs converts a bfloat16 matrix to float32 to multiply one row with it, and reads it as it is for two.
    is_doubled = (
        spec in ("NM,MF->NF", "NM,VM->NV")
        and a.shape[0] == 1
        and a.dtype == jnp.bfloat16
        and current_device().platform == "cpu"
    )
    rows = jnp.concatenate([a, a]) if is_doubled else a
    z = jnp.einsum(spec, rows, b.astype(a.dtype), preferred_element_type=wide)
    return (z[:1] if is_doubled else z).astype(out_dtype or a.dtype)


def _einsum_fwd(spec: str, a: Array, b: Array, out_dtype: jnp.dtype | None) -> tuple[Array, tuple[Array, Array]]:
    return einsum(spec, a, b, out_dtype), (a, b)


def _einsum_bwd(
    spec: str, out_dtype: jnp.dtype | None, residuals: tuple[Array, Array], dz: Array
) -> tuple[Array, Array]:
    a, b = residuals
    terms, z = spec.split("->")
    x, y = terms.split(",")
    wide = accumulation_dtype(a.dtype)
    narrow = dz if a.dtype == jnp.float16 else dz.astype(a.dtype)

    def gradient(operand: Array, operand_term: str, target: str) -> Array:
        operand = operand.astype(narrow.dtype)
        # The operand that owns the target's first free axis goes first, so that the product needs no transposing.
        free = "".join(c for c in target if not (c in z and c in operand_term))
        # Of several summed axes (G and T) one is left to the matmul: shorter sums, and grouped heads in parallel.
        summed = "".join(c for c in z if c in operand_term and c not in target)[:-1]
        batch = "".join(c for c in target if c not in free)
        out = batch + summed + free if summed else target
        if free[:1] in z:
            spec, lhs, rhs = f"{z},{operand_term}->{out}", narrow, operand
        else:
            spec, lhs, rhs = f"{operand_term},{z}->{out}", operand, narrow
        grad = jnp.einsum(spec, lhs, rhs, preferred_element_type=wide)
        return grad.sum(axis=[out.index(c) for c in summed]) if summed else grad

    da = gradient(b.astype(a.dtype), y, x).astype(a.dtype)
    return da, gradient(a, x, y).astype(b.dtype)


einsum.defvjp(_einsum_fwd, _einsum_bwd)
