"""Every operation on four simulated devices, against one device: `shard_map` with its check, and explicit axes."""

import textwrap
from pathlib import Path

import pytest

from tests.helpers.simulated_devices import run_with_devices

ROOT = Path(__file__).parents[2]
PROGRAM = """
    import functools
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from bench.verification.fast_compile import FAST_COMPILE_OPTIONS
    from dantinox import kernels

    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    quick = functools.partial(jax.jit, compiler_options=FAST_COMPILE_OPTIONS)
    DATA, WHOLE = P("data"), P()

    def attention(q, k, v, gate, ids):
        f = lambda *x: kernels.attention(*x[:3], gate=x[3], window=9, segment_ids=ids, implementation=NAME)
        o, pull = jax.vjp(f, q, k, v, gate)
        return o, *pull(o)

    def grouped_matmul(x, w, sizes):
        y, pull = jax.vjp(lambda *x: kernels.grouped_matmul(*x, sizes, implementation=NAME), x, w)
        return y, *pull(y)

    def moe_mlp(x, *rest):
        ids, weights, *w = rest
        f = lambda x, weights, *w: kernels.moe_mlp(x, *w, ids, weights, implementation=NAME)
        y, pull = jax.vjp(f, x, weights, *w)
        return y, *pull(y)

    def linear_cross_entropy(h, w, targets):
        f = lambda *x: kernels.linear_cross_entropy(*x, targets, z_loss=0.1, implementation=NAME)
        loss, pull = jax.vjp(f, h, w)
        return loss, *pull(loss)

    def decode_attention(q, k, v, cache_k, cache_v, length):
        o, cache = kernels.decode_attention(q, k, v, kernels.KVCache(cache_k, cache_v, length), implementation=NAME)
        return o, *cache[:3]

    tokens = draw(8, 20, 4, 8), draw(8, 20, 2, 8), draw(8, 20, 2, 8), draw(8, 20, 4, 1)
    ids = jnp.asarray(rng.integers(0, 2, (8, 20)).cumsum(1))
    ring = draw(8, 2, 16, 8), draw(8, 2, 16, 8), jnp.asarray(rng.integers(0, 40, 8))
    experts = draw(3, 8, 5), draw(3, 8, 5), draw(3, 5, 8)
    # (function, arguments, their specs, those of the results)
    calls = [
        (attention, (*tokens, ids), (DATA,) * 5, (DATA,) * 5),
        (decode_attention, (draw(8, 4, 8), draw(8, 2, 8), draw(8, 2, 8), *ring), (DATA,) * 6, (DATA,) * 4),
        (linear_cross_entropy, (draw(24, 8), draw(11, 8), jnp.asarray(rng.integers(-1, 11, 24))),
         (DATA, WHOLE, DATA), (DATA, DATA, WHOLE)),
        (moe_mlp, (draw(24, 8), jnp.asarray(rng.integers(-1, 4, (24, 2))), draw(24, 2), *experts),
         (DATA,) * 3 + (WHOLE,) * 3, (DATA,) * 3 + (WHOLE,) * 3),
    ]

    def check(name, found, expected, mesh, specs):
        for i, (a, b, spec) in enumerate(zip(found, expected, specs, strict=True)):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5, err_msg=f"{name} {i}")
            assert a.sharding.is_equivalent_to(NamedSharding(mesh, spec), a.ndim), (name, i, a.sharding)

    for function, arrays, in_specs, out_specs in calls:
        expected = quick(function)(*arrays)
        mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
        mapped = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
        check(f"{function.__name__} in shard_map", quick(mapped)(*arrays), expected, mesh, out_specs)
        mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
        with jax.set_mesh(mesh):
            put = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, in_specs, strict=True)]
            found = quick(function)(*put)
        check(f"{function.__name__} on explicit axes", found, expected, mesh, out_specs)

    # Groups of a device's own rows, and one matrix per group for all.
    x, w = draw(32, 8), draw(3, 8, 5)
    sizes = jnp.array([[3, 0, 4], [8, 0, 0], [0, 0, 0], [1, 2, 3]])
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    each = lambda x, w, sizes: grouped_matmul(x, w, sizes[0])
    mapped = jax.shard_map(each, mesh=mesh, in_specs=(DATA, WHOLE, DATA), out_specs=(DATA, DATA, WHOLE))
    y, dx, dw = quick(mapped)(x, w, sizes)
    parts = [quick(grouped_matmul)(x[8 * i : 8 * i + 8], w, sizes[i]) for i in range(4)]
    np.testing.assert_allclose(y, jnp.concatenate([part[0] for part in parts]), rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(dx, jnp.concatenate([part[1] for part in parts]), rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(dw, sum(part[2] for part in parts), rtol=2e-5, atol=2e-5)
"""


@pytest.mark.parametrize(
    "implementation", ["auto", *(pytest.param(name, marks=pytest.mark.slow) for name in ("pallas", "reference"))]
)
def test_four_devices_equal_one(implementation):
    code = textwrap.dedent(PROGRAM).replace("NAME", repr(implementation))
    run_with_devices("-c", code, devices=4)
