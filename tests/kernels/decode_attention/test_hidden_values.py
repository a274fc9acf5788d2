"""Slots that the query does not see have no effect, whatever they hold: in the output and in gradients, bit for bit.

These are slots past the length, tokens outside the window and the token that the new one replaces. Every query of a
sequence sees the same slots, so no slot is hidden from one query and visible to another.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import numpy_interpreter
from bench.verification.fast_compile import jit_fast_compile
from dantinox import kernels
from dantinox.kernels import dispatch
from dantinox.kernels.ops.decode_attention.kv_cache import QMAX, quantize
from tests.helpers import tolerance
from tests.kernels.decode_attention.test_decode_attention import IMPLEMENTATIONS

B, H, K, C, D, WINDOW = 4, 4, 2, 16, 8, 6
LENGTHS = np.array([0, 3, 16, 38])
ALL = ["reference", *IMPLEMENTATIONS]
FILLS = (0.0, np.nan, np.inf, -np.inf, 3e38)
Arrays = dict[str, Any]


def hidden_slots(window: int | None) -> np.ndarray:
    """[B, C]; the slot of the new token counts as hidden, since its old content does."""
    hidden = np.ones((B, C), bool)
    for b, length in enumerate(LENGTHS):
        for age in range(1, min(length + 1, C, window or C)):
            hidden[b, (length - age) % C] = False
    return hidden


def inputs(dtype: str, fill: float, window: int | None) -> Arrays:
    """The arrays of a call whose hidden slots hold `fill`, in their values and in their scales."""
    rng = np.random.default_rng(0)
    hidden = hidden_slots(window)[:, None]
    shapes = {"q": (B, H, D), "k": (B, K, D), "v": (B, K, D), "gate": (B, H, 1)}
    x: Arrays = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    for name in ("cache_k", "cache_v"):
        ring, scale = quantize(jnp.asarray(rng.standard_normal((B, K, C, D)), jnp.float32), jnp.dtype(dtype))
        stored = np.clip(np.nan_to_num(fill), -127, 127) if dtype == "int8" else fill
        x[name] = jnp.where(hidden[..., None], jnp.asarray(stored, jnp.float32).astype(dtype), ring)
        if scale is not None:
            x[f"{name[-1]}_scale"] = jnp.where(hidden, fill, scale)
    return x


def decode(implementation: str, window: int | None, x: Arrays) -> jax.Array:
    cache = kernels.KVCache(x["cache_k"], x["cache_v"], jnp.int32(LENGTHS), x.get("k_scale"), x.get("v_scale"))
    o, _ = kernels.decode_attention(
        x["q"], x["k"], x["v"], cache, gate=x["gate"], window=window, softcap=3.0, implementation=implementation
    )
    return o


@pytest.mark.parametrize("window", [None, WINDOW], ids=["no window", "window"])
@pytest.mark.parametrize("dtype", ["float32", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.sampled(5)
def test_hidden_slots_do_not_change_the_output(implementation, dtype, window):
    run = jit_fast_compile(lambda x: decode(implementation, window, x))
    expected = {"o": run(inputs(dtype, FILLS[0], window))}
    for fill in FILLS[1:]:
        tolerance.assert_bit_equal(expected, {"o": run(inputs(dtype, fill, window))})


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_hidden_slots_do_not_change_the_output_of_the_tpu_kernel(dtype):
    def run(fill: float) -> Arrays:
        with dispatch.target_device(*tolerance.INTERPRETED_DEVICES["TPU"]), np.errstate(all="ignore"):
            return {"o": numpy_interpreter.run(lambda x: decode("pallas", WINDOW, x), inputs(dtype, fill, WINDOW))}

    for fill in FILLS[1:]:
        tolerance.assert_bit_equal(run(FILLS[0]), run(fill))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.sampled(4)
def test_hidden_slots_do_not_change_gradients(implementation, dtype):
    """And the gradients of their content are zero."""
    hidden = hidden_slots(WINDOW)[:, None]

    def gradients(x: Arrays) -> Arrays:
        stored = {name: x[name] for name in ("cache_k", "cache_v") if x[name].dtype in QMAX}
        loss = lambda x: jnp.sum(jnp.sin(decode(implementation, WINDOW, x | stored)))
        return jax.grad(loss)({name: array for name, array in x.items() if name not in stored})

    run = jit_fast_compile(gradients)
    expected = run(inputs(dtype, FILLS[0], WINDOW))
    for fill in FILLS[1:]:
        tolerance.assert_bit_equal(expected, run(inputs(dtype, fill, WINDOW)))
    of_cache = {name: x for name, x in expected.items() if x.shape[:3] == (B, K, C)}
    assert of_cache
    for name, gradient in of_cache.items():
        assert not np.any(np.where(hidden[..., None] if gradient.ndim == 4 else hidden, gradient, 0)), name
        assert np.any(gradient), name


def second_derivative(implementation: str, x: Arrays) -> jax.Array:
    loss = lambda q: jnp.sum(decode(implementation, WINDOW, x | {"q": q}) ** 2)
    return jax.jvp(jax.grad(loss), (x["q"],), (jnp.ones_like(x["q"]),))[1]


def test_second_derivative_matches_the_reference():
    x = inputs("float32", 0.0, WINDOW)
    found, expected = (jit_fast_compile(lambda x, n=n: second_derivative(n, x))(x) for n in ("xla", "reference"))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", [("cpu", "cpu"), ("tpu", "TPU v6 lite"), ("cuda", "NVIDIA H100 80GB HBM3")], ids=str)
def test_gradient_of_a_kernel_is_refused_by_one_sentence(device):
    x = jnp.ones((1, 2, 64), jnp.bfloat16)
    cache = kernels.KVCache.zeros(1, 2, 64, 64, jnp.bfloat16)

    def loss(q: jax.Array, k: jax.Array) -> jax.Array:
        return jnp.sum(kernels.decode_attention(q, k, x, cache, implementation="pallas")[0].astype(jnp.float32))

    sentence = "^decode_attention: implementation='pallas' has no gradient; implementation='xla' has one"
    with dispatch.target_device(*device):
        for argument in (0, 1):
            with pytest.raises(NotImplementedError, match=sentence):
                jax.make_jaxpr(jax.grad(loss, argument))(x, x)
