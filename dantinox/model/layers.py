"""Parameters that know their axes, and the small parts of a block: dense, RMSNorm, dropout, MLP."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from dantinox.config import ModelConfig
from dantinox.kernels.einsum import einsum

Array = jax.Array


def parameter(key: Array, axes: str, shape: tuple[int, ...], std: float) -> nnx.Param:
    """A float32 parameter drawn from N(0, std^2); `axes` names each axis by its letter in the legend."""
    assert len(axes) == len(shape)
    return nnx.Param(jax.random.normal(key, shape, jnp.float32) * std, axes=tuple(axes))


def filled_parameter(value: float, axes: str, shape: tuple[int, ...]) -> nnx.Param:
    """A float32 parameter filled with one value."""
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=tuple(axes))


def dense(x: Array, w: nnx.Param | Array, out_dtype: jnp.dtype | None = None) -> Array:
    """x [..., M] times w [M, ...] in x's dtype, as one two-dimensional matmul."""
    w = w[...]
    y = einsum("NM,MF->NF", x.reshape(-1, x.shape[-1]), w.reshape(w.shape[0], -1), out_dtype)
    return y.reshape(*x.shape[:-1], *w.shape[1:])


@jax.named_scope("norm")
def rms_norm(x: Array, scale: nnx.Param, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, computed in float32."""
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * inverse * scale[...]).astype(x.dtype)


@jax.named_scope("dropout")
def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Zero a share `rate` of x and scale up the rest; without a key (evaluation) x unchanged."""
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


@jax.custom_vjp
def swiglu(g: Array, u: Array) -> Array:
    """silu(g) * u, any shape; its backward shares one sigmoid."""
    return _swiglu(g, u)[0]


def _swiglu(g: Array, u: Array) -> tuple[Array, tuple[Array, Array]]:
    wide = g.astype(jnp.float32)
    return (wide * jax.nn.sigmoid(wide) * u).astype(g.dtype), (g, u)


def _swiglu_backward(saved: tuple[Array, Array], dh: Array) -> tuple[Array, Array]:
    g, u = (a.astype(jnp.float32) for a in saved)
    s = jax.nn.sigmoid(g)
    dg, du = dh * u * s * (1 + g * (1 - s)), dh * g * s
    return dg.astype(saved[0].dtype), du.astype(saved[1].dtype)


swiglu.defvjp(_swiglu, _swiglu_backward)


class MLP(nnx.Module):
    """SwiGLU or GELU feed-forward: [..., M] -> [..., F] -> [..., M]."""

    def __init__(self, config: ModelConfig, key: Callable[[], Array], out_std: float) -> None:
        M, F = config.dim, config.hidden
        self.kind = config.mlp
        if self.kind == "swiglu":
            self.gate = parameter(key(), "MF", (M, F), 0.02)
        self.up = parameter(key(), "MF", (M, F), 0.02)
        self.down = parameter(key(), "FM", (F, M), out_std)

    def __call__(self, x: Array) -> Array:
        if self.kind == "swiglu":
            return dense(swiglu(dense(x, self.gate), dense(x, self.up)), self.down)
        return dense(jax.nn.gelu(dense(x, self.up)), self.down)
