"""`dantinox.kernels.attention` against `jax.nn.dot_product_attention`, over the cases of that function's own tests.

Those tests do not ship with JAX; its function is the oracle here, in float32.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import tolerance
from tests.peers import masks
from tests.peers.masks import NotMapped

IMPLEMENTATIONS = tolerance.runnable_implementations("attention")
NO_BIAS = "attention has no bias"
B, T, S, H, D = 2, 128, 128, 4, 32
CHECKERBOARD = (np.arange(T)[:, None] + np.arange(S)) % 2 == 0
PADDING = {"query_seq_lengths": np.int32([T // 2, T // 4]), "key_value_seq_lengths": np.int32([S // 4, S // 2])}
MASKS: dict[str, dict[str, Any]] = {
    "causal": {"is_causal": True},
    "padding": PADDING,
    "padded queries": {"query_seq_lengths": np.int32([T, 1])},
    "padded keys": {"key_value_seq_lengths": np.int32([1, S - 1]), "is_causal": True},
    "custom": {"mask": np.tri(T, dtype=bool)[None, None]},
    "custom per head": {"mask": np.arange(S) >= np.arange(H)[None, :, None, None]},
    "checkerboard": {"mask": CHECKERBOARD[None, None]},
    "causal, padding": {"is_causal": True, **PADDING},
    "causal, checkerboard": {"is_causal": True, "mask": CHECKERBOARD[None, None]},
    "custom, padding": {"mask": np.tri(T, dtype=bool)[None, None], **PADDING},
    "sliding window": {"local_window_size": (3, 0)},
    "sliding window to both sides": {"local_window_size": 5},
    "sliding window of the future": {"local_window_size": (0, 4), "scale": 0.3},
    "causal, sliding window": {"is_causal": True, "local_window_size": (3, 2)},
    "bias": {"bias": np.ones((1, H, T, S), np.float32)},
    "bias, causal": {"bias": np.ones((B, H, T, S), np.float32), "is_causal": True},
}
NOT_MAPPED = {
    "checkerboard": masks.NO_SUCH_MASK,
    "causal, checkerboard": masks.NO_SUCH_MASK,
    "bias": NO_BIAS,
    "bias, causal": NO_BIAS,
}
TOLERANCES = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 3e-3}


def as_mask(
    T: int, S: int, *, mask: Any, is_causal: bool, query_seq_lengths: Any, key_value_seq_lengths: Any, window: Any
) -> np.ndarray | None:
    """Make the mask, which broadcasts to [B, H, T, S], of the arguments of `jax.nn.dot_product_attention`."""
    ahead = np.arange(S) - np.arange(T)[:, None]
    parts = [] if mask is None else [mask]
    if is_causal:
        parts.append((ahead <= 0)[None, None])
    if window is not None:
        left, right = (window, window) if isinstance(window, int) else window
        parts.append(((-left <= ahead) & (ahead <= right))[None, None])
    if query_seq_lengths is not None:
        parts.append(np.arange(T)[:, None] < query_seq_lengths[:, None, None, None])
    if key_value_seq_lengths is not None:
        parts.append(np.arange(S) < key_value_seq_lengths[:, None, None, None])
    return functools.reduce(np.logical_and, parts) if parts else None


def dot_product_attention(
    q, k, v, bias=None, mask=None, *, scale=None, is_causal=False, query_seq_lengths=None, key_value_seq_lengths=None,
    local_window_size=None, return_residual=False, implementation,
):  # fmt: skip
    """Our attention with the arguments of `jax.nn.dot_product_attention`."""
    if bias is not None:
        raise NotMapped(NO_BIAS)
    mask = as_mask(
        q.shape[-3],
        k.shape[-3],
        mask=mask,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        window=local_window_size,
    )
    one = q.ndim == 3
    if one:
        q, k, v = q[None], k[None], v[None]
    o, lse = masks.attention(q, k, v, mask, scale=scale, implementation=implementation)
    if one:
        o, lse = o[0], lse[0]
    return (o, lse) if return_residual else o


def draw(dtype: str, K: int = H, T: int = T, S: int = S) -> tuple[jax.Array, ...]:
    """(q, k, v, the cotangent of the output)."""
    rng = np.random.default_rng(0)
    shapes = (B, T, H, D), (B, S, K, D), (B, S, K, D), (B, T, H, D)
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def run(f: Any, q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array, sees_key: Any) -> dict[str, jax.Array]:
    """The output, the log-sum-exp and the gradients of f, of queries that see a key."""

    def masked(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        o, lse = f(q, k, v, return_residual=True)
        return jnp.where(sees_key[..., None], o, 0), jnp.where(sees_key, lse, 0)

    o, pull, lse = jax.vjp(masked, q, k, v, has_aux=True)
    return {"o": o, "lse": lse} | dict(zip(("dq", "dk", "dv"), pull(do), strict=True))


def assert_matches_jax(implementation: str, arrays: Any, vmap: bool = False, **options: Any) -> None:
    dtype, T, S = arrays[0].dtype.name, arrays[0].shape[1], arrays[1].shape[1]
    names = "mask", "is_causal", "query_seq_lengths", "key_value_seq_lengths"
    given = {name: options.get(name, False if name == "is_causal" else None) for name in names}
    mask = as_mask(T, S, **given, window=options.get("local_window_size"))
    sees_key = jnp.ones((B, T, H), bool)
    if mask is not None:
        sees_key = jnp.asarray(np.broadcast_to(mask.any(-1), (B, H, T)).swapaxes(1, 2))
    ours = functools.partial(dot_product_attention, implementation=implementation, **options)
    if vmap:
        ours = lambda q, k, v, **residual: jax.vmap(
            functools.partial(dot_product_attention, implementation=implementation, **residual)
        )(q, k, v)
    theirs = functools.partial(jax.nn.dot_product_attention, implementation="xla", **options)
    actual = jax.jit(functools.partial(run, ours))(*arrays, sees_key)
    expected = jax.jit(functools.partial(run, theirs))(*(x.astype(jnp.float32) for x in arrays), sees_key)
    for name, x in actual.items():
        assert x.dtype == ("float32" if name == "lse" else dtype), name
        atol = TOLERANCES[dtype] * max(1, np.abs(expected[name]).max())
        np.testing.assert_allclose(np.float32(x), expected[name], rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("vmap", [False, True])
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.sampled(24)
def test_groups_of_heads(dtype, group, vmap, implementation):
    assert_matches_jax(implementation, draw(dtype, H // group), vmap)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.sampled(48)
def test_masks(dtype, name, implementation):
    if name not in NOT_MAPPED:
        assert_matches_jax(implementation, draw(dtype), **MASKS[name])
        return
    with pytest.raises(NotMapped) as refusal:
        assert_matches_jax(implementation, draw(dtype), **MASKS[name])
    assert str(refusal.value) == NOT_MAPPED[name]
    pytest.skip(f"not mapped: {NOT_MAPPED[name]}")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("sizes", [(7, 128), (128, 7), (1, 129), (127, 127)], ids=str)
@pytest.mark.parametrize("name", ["causal", "sliding window", "sliding window to both sides", "none"])
@pytest.mark.sampled(24)
def test_other_lengths(name, sizes, implementation):
    """JAX aligns causal masks and windows top-left, ours are aligned bottom-right."""
    T, S = sizes
    assert_matches_jax(implementation, draw("float32", 2, T, S), **MASKS.get(name, {}))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bias_gradient(implementation):
    pytest.skip(f"not mapped: {NO_BIAS}")


def test_every_mask_that_is_not_mapped_is_one_of_the_cases():
    assert not set(NOT_MAPPED) - set(MASKS)
