"""Parameters annotated with their axes, and the small layers of a block: dense, RMSNorm, dropout, MLP."""

import math
from collections.abc import Callable
from typing import overload

import jax
import jax.numpy as jnp
from flax import nnx

from dantinox.config import ModelConfig
from dantinox.distributed import collectives
from dantinox.kernels.einsum import einsum
from dantinox.kernels.ops.moe.swiglu import clamped_swiglu
from dantinox.kernels.vma import match_vma

Array = jax.Array


def parameter(key: Array, axes: str, shape: tuple[int, ...], std: float) -> nnx.Param:
    """Return a float32 parameter drawn from N(0, std^2).

    Args:
        key: random key.
        axes: one letter per axis, as in the legend of axes.
        shape: one size per axis.
        std: standard deviation.
    """
    assert len(axes) == len(shape)
    return nnx.Param(jax.random.normal(key, shape, jnp.float32) * std, axes=tuple(axes))


def filled_parameter(value: float, axes: str, shape: tuple[int, ...]) -> nnx.Param:
    """Return a float32 parameter filled with `value`; `axes` as in `parameter`."""
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=tuple(axes))


def zero_bias(enabled: bool, axes: str, shape: tuple[int, ...]) -> nnx.Param | None:
    """Return a bias of zeros if a setting enables it; `axes` as in `parameter`."""
    return filled_parameter(0, axes, shape) if enabled else None


@overload
def value_of(param: nnx.Param, dtype: jnp.dtype = ...) -> Array: ...
@overload
def value_of(param: None, dtype: jnp.dtype = ...) -> None: ...
@overload
def value_of(param: nnx.Param | None, dtype: jnp.dtype = ...) -> Array | None: ...
def value_of(param: nnx.Param | None, dtype: jnp.dtype = jnp.float32) -> Array | None:
    """Return the array of a parameter in `dtype`; None for a parameter that the settings leave out.

    On a mesh its heads, hidden width and experts are those of this device.
    """
    return None if param is None else collectives.whole_weight(param[...], param.axes, dtype)


def dense(
    x: Array,
    w: nnx.Param,
    out_dtype: jnp.dtype | None = None,
    *,
    bias: nnx.Param | None = None,
    num_summed: int = 1,
) -> Array:
    """Multiply x by w in the dtype of x, as one two-dimensional matmul, and add the bias.

    Args:
        x: [..., the summed axes].
        w: [the summed axes, the axes of the result].
        out_dtype: dtype of the result; None: that of x.
        bias: [the axes of the result].
        num_summed: number of summed axes.
    """
    matrix = value_of(w, x.dtype)
    x, matrix = match_vma(x, matrix), match_vma(matrix, x)
    leading, out = x.shape[: x.ndim - num_summed], matrix.shape[num_summed:]
    summed = math.prod(matrix.shape[:num_summed])
    y = einsum("NM,MF->NF", x.reshape(-1, summed), matrix.reshape(summed, -1), out_dtype)
    y = collectives.sum_partial_products(y, w.axes[:num_summed])
    if bias is not None:
        y = y + value_of(bias, y.dtype).reshape(1, -1)
    return y.reshape(*leading, *out)


@jax.named_scope("norm")
def rms_norm(x: Array, scale: nnx.Param, eps: float, offset: bool = False) -> Array:
    """Compute x / sqrt(mean(x^2) + eps) * scale over the axes of the scale, the last of x, in float32.

    With `offset`, one is added to the scale.
    """
    x_f32, weight = x.astype(jnp.float32), scale[...] + 1 if offset else scale[...]
    mean = jnp.mean(x_f32 * x_f32, axis=tuple(range(-weight.ndim, 0)), keepdims=True)
    inv_rms = jax.lax.rsqrt(collectives.mean_of_shares(mean, scale.axes) + eps)
    return (x_f32 * inv_rms * jnp.expand_dims(weight, tuple(range(x.ndim - weight.ndim)))).astype(x.dtype)


def norm(x: Array, scale: nnx.Param | None, config: ModelConfig) -> Array:
    """Apply an RMSNorm; return x unchanged if the settings leave it out, so that it has no scale."""
    return x if scale is None else rms_norm(x, scale, config.norm_eps, config.norm_offset)


def norm_scale(config: ModelConfig, axes: str, shape: tuple[int, ...]) -> nnx.Param:
    """Return the scale of an RMSNorm; `axes` as in `parameter`."""
    return filled_parameter(0 if config.norm_offset else 1, axes, shape)


def branch_norm(config: ModelConfig, place: str) -> nnx.Param | None:
    """Return the scale of a branch's norm, pre or post; None if the settings leave it out."""
    return norm_scale(config, "M", (config.dim,)) if config.norms in (place, "both") else None


@jax.named_scope("dropout")
def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Zero a fraction `rate` of x [B, T, M] and scale up the rest; without a key (evaluation) return x unchanged."""
    if key is None or rate == 0:
        return x
    # A key per token of the whole batch, so that the devices of a mesh draw the masks of one device.
    B, T, M = x.shape
    rows = collectives.first_sequence(B) + jnp.arange(B)
    positions = collectives.first_position(T) + jnp.arange(T)

    def keep(row: Array, position: Array) -> Array:
        return jax.random.bernoulli(jax.random.fold_in(jax.random.fold_in(key, row), position), 1 - rate, (M,))

    keep_mask = jax.vmap(lambda row: jax.vmap(lambda position: keep(row, position))(positions))(rows)
    return jnp.where(keep_mask, x / (1 - rate), 0).astype(x.dtype)


@jax.custom_vjp
def swiglu(g: Array, u: Array) -> Array:
    """Compute silu(g) * u elementwise; the backward pass computes the sigmoid once for both gradients."""
    return _swiglu_fwd(g, u)[0]


def _swiglu_fwd(g: Array, u: Array) -> tuple[Array, tuple[Array, Array]]:
    g_f32, u_f32 = g.astype(jnp.float32), u.astype(jnp.float32)
    return (g_f32 * jax.nn.sigmoid(g_f32) * u_f32).astype(g.dtype), (g, u)


def _swiglu_bwd(residuals: tuple[Array, Array], dh: Array) -> tuple[Array, Array]:
    g, u, dh = (a.astype(jnp.float32) for a in (*residuals, dh))
    s = jax.nn.sigmoid(g)
    dg, du = dh * u * s * (1 + g * (1 - s)), dh * g * s
    return dg.astype(residuals[0].dtype), du.astype(residuals[1].dtype)


swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)


class MLP(nnx.Module):
    """SwiGLU, clamped SwiGLU, GeGLU or GELU feed-forward network: [..., M] -> [..., F] -> [..., M]."""

    def __init__(
        self, config: ModelConfig, key: Callable[[], Array], out_std: float, hidden: int | None = None
    ) -> None:
        M, F = config.dim, hidden or config.hidden
        self.config = config
        if config.mlp != "gelu":
            self.gate = parameter(key(), "MF", (M, F), 0.02)
        self.up = parameter(key(), "MF", (M, F), 0.02)
        self.down = parameter(key(), "FM", (F, M), out_std)

    def __call__(self, x: Array) -> Array:
        """Apply the network to x [..., M]."""
        config = self.config
        if config.mlp == "gelu":
            return dense(jax.nn.gelu(dense(x, self.up)), self.down)
        gate, up = dense(x, self.gate), dense(x, self.up)
        if config.mlp == "swiglu":
            return dense(swiglu(gate, up), self.down)
        gate_f32, up_f32 = gate.astype(jnp.float32), up.astype(jnp.float32)
        if config.mlp == "geglu":
            h = jax.nn.gelu(gate_f32, approximate=True) * up_f32
        else:
            h = clamped_swiglu(gate_f32, up_f32, config.mlp_limit, config.mlp_alpha)
        return dense(h.astype(x.dtype), self.down)
