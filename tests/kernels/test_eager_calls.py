"""Eager calls: after the first of its shapes a call compiles nothing and keeps no memory."""

import gc
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest

from dantinox import kernels

Q, KV = jnp.ones((1, 9, 4, 8)), jnp.ones((1, 9, 2, 8))
X, W = jnp.ones((12, 8)), jnp.ones((3, 8, 16))
IDS, WEIGHTS = jnp.zeros((12, 2), jnp.int32), jnp.ones((12, 2))
SEGMENTS, SIZES = jnp.zeros((1, 9), jnp.int32), jnp.array([5, 0, 7])
CACHE = kernels.KVCache.zeros(1, 2, 16, 8, jnp.float32)


def attend(name: str) -> Callable[..., Any]:
    return lambda q: kernels.attention(q, KV, KV, window=4, softcap=2.0, segment_ids=SEGMENTS, implementation=name)


def multiply(name: str) -> Callable[..., Any]:
    return lambda x: kernels.grouped_matmul(x, W, SIZES, implementation=name)


def mix(name: str) -> Callable[..., Any]:
    return lambda x: kernels.moe_mlp(x, W, W, jnp.swapaxes(W, 1, 2), IDS, WEIGHTS, implementation=name)


def decode(name: str) -> Callable[..., Any]:
    return lambda q: kernels.decode_attention(q, KV[:, 0], KV[:, 0], CACHE, implementation=name)


def lose(name: str) -> Callable[..., Any]:
    return lambda h: kernels.linear_cross_entropy(h, W[:, 0, :8], IDS[:, 0], softcap=2.0, implementation=name)


CALLS = {
    "attention": (attend, Q),
    "grouped_matmul": (multiply, X),
    "moe_mlp": (mix, X),
    "decode_attention": (decode, Q[:, 0]),
    "linear_cross_entropy": (lose, X),
}


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """The names of the events of a compilation, as they happen."""
    events: list[str] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event.endswith("compile_duration"):
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


def eager_calls(op: str, implementation: str, derivative: str) -> Callable[[], Any]:
    make, x = CALLS[op]
    call = make(implementation)
    if derivative == "value":
        return lambda: call(x)
    return lambda: jax.grad(lambda x: jnp.sum(make(implementation)(x)))(x)


def parameters() -> list[Any]:
    return [
        (op, implementation, derivative)
        for op in CALLS
        for implementation in ("reference", "xla", "pallas")
        for derivative in ("value", "gradient")
        if (op, derivative) != ("decode_attention", "gradient")
    ]


@pytest.mark.parametrize(("op", "implementation", "derivative"), parameters())
@pytest.mark.sampled(12)
def test_second_eager_call_compiles_nothing(op, implementation, derivative, compilations):
    call = eager_calls(op, implementation, derivative)
    jax.block_until_ready(call())
    assert compilations
    compilations.clear()
    for _ in range(3):
        jax.block_until_ready(call())
    assert not compilations


def resident_bytes() -> int:
    """Bytes of this process in memory."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize(
    ("op", "implementation", "derivative"),
    [
        pytest.param(*parameter, marks=pytest.mark.slow if parameter[2] == "gradient" else ())
        for parameter in parameters()
        if parameter[1:] != ("reference", "gradient")  # a program per operation of jnp
    ],
)
@pytest.mark.slow
def test_memory_does_not_grow_over_a_thousand_eager_calls(op, implementation, derivative):
    call = eager_calls(op, implementation, derivative)
    for _ in range(200):
        call()
    gc.collect()
    before = resident_bytes()
    for _ in range(1000):
        call()
    gc.collect()
    assert resident_bytes() - before < 4 << 20  # a program kept per call takes 100 times that


def test_eager_call_equals_jitted_call():
    for op, (make, x) in CALLS.items():
        call = make("xla")
        eager, jitted = jax.tree.leaves(call(x)), jax.tree.leaves(jax.jit(call)(x))
        for a, b in zip(eager, jitted, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=op)
