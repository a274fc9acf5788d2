"""The Pallas attention under vmap, remat, scan and shard_map."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dantinox import kernels
from tests.helpers import cases, tolerance

ROOT = Path(__file__).parents[2]
CASE = cases.attention(20, 24, H=4, window=9, gate="elementwise", softcap=2.0)


def attention_of_case(q: jax.Array, k: jax.Array, v: jax.Array, gate: jax.Array) -> jax.Array:
    return kernels.attention(q, k, v, gate=gate, implementation="pallas", **CASE.options())


def output_and_gradients(*inputs: jax.Array) -> tuple[jax.Array, ...]:
    """(o, dq, dk, dv, dgate), of sum(o^2) / 2."""
    o, pull = jax.vjp(attention_of_case, *inputs)
    return o, *pull(o)


def stacked_inputs() -> list[jax.Array]:
    """The inputs of TURNED three times over, all different."""
    draws = [narrow_values(seed) for seed in range(3)]
    return [jnp.stack(x) for x in zip(*draws, strict=True)]


def narrow_values(seed: int) -> list[np.ndarray]:
    return [np.float32(x) for x in cases.draw(CASE, seed)[0].values()]


def assert_close(found: Any, expected: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), tuple(found), tuple(expected))


def test_vmap_equals_a_loop():
    many = stacked_inputs()
    one = tolerance.jit_fast_compile(output_and_gradients)
    loop = [one(*x) for x in zip(*many, strict=True)]
    assert_close(
        tolerance.jit_fast_compile(jax.vmap(output_and_gradients))(*many),
        [jnp.stack(x) for x in zip(*loop, strict=True)],
    )
    # Keys and values shared by all, and an axis in the middle.
    q, k, v, gate = many
    some = jax.vmap(lambda q, gate: attention_of_case(q, k[0], v[0], gate), in_axes=(2, 0), out_axes=1)
    loop = [one(q[n], k[0], v[0], gate[n])[0] for n in range(3)]
    assert_close([tolerance.jit_fast_compile(some)(jnp.moveaxis(q, 0, 2), gate)], [jnp.stack(loop, axis=1)])


def test_remat_does_not_change_gradients():
    inputs = narrow_values(0)
    loss = lambda f: lambda *x: jnp.sum(f(*x) ** 2) / 2
    again = tolerance.jit_fast_compile(jax.grad(loss(jax.checkpoint(attention_of_case)), argnums=(0, 1, 2, 3)))(*inputs)
    assert_close(again, tolerance.jit_fast_compile(output_and_gradients)(*inputs)[1:])


def test_gradient_descent_inside_a_loop():
    """Three steps of gradient descent on the keys in one lax.scan."""
    q, k, v, gate = narrow_values(0)
    slope = jax.grad(lambda k: jnp.sum(attention_of_case(q, k, v, gate) ** 2))
    step = lambda k, _: (k - 0.1 * slope(k), None)
    found, _ = tolerance.jit_fast_compile(lambda k: jax.lax.scan(step, k, length=3))(k)
    by_hand, one = k, tolerance.jit_fast_compile(lambda k: step(k, None)[0])
    for _ in range(3):
        by_hand = one(by_hand)
    assert np.abs(found - k).max() > 1e-3
    assert_close([found], [by_hand])


SHARDED = """
    import functools
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec as P
    from dantinox import kernels
    from tests.helpers import tolerance

    mesh = jax.make_mesh((2, 2), ("data", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rng = np.random.default_rng(0)
    draw = lambda heads, n: jnp.float32(rng.standard_normal((4, 20, heads, n)))
    inputs = draw(4, 8), draw(2, 8), draw(2, 8), draw(4, 1)
    ids = jnp.asarray(rng.integers(0, 2, (4, 20)).cumsum(1))
    quick = functools.partial(jax.jit, compiler_options=tolerance.FAST_COMPILE_OPTIONS)

    def run(q, k, v, gate, ids):
        f = lambda *x: kernels.attention(*x[:3], gate=x[3], window=9, segment_ids=ids, implementation="pallas")
        o, pull = jax.vjp(f, q, k, v, gate)
        return o, *pull(o)

    expected = quick(run)(*inputs, ids)
    for where in WHERE:
        specs = dict(in_specs=(*[where] * 4, P(*where[:1])), out_specs=(where,) * 5)
        mapped = jax.shard_map(run, mesh=mesh, **specs, check_vma=CHECK)
        put = [jax.device_put(x, NamedSharding(mesh, where)) for x in inputs]
        for a, b in zip(quick(mapped)(*put, ids), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
            assert a.sharding.is_equivalent_to(NamedSharding(mesh, where), 4), (where, a.sharding)
"""


@pytest.mark.parametrize(
    "where",
    [
        'P("data", None, "heads")',
        pytest.param('P("data")', marks=pytest.mark.slow),
        pytest.param('P(None, None, "heads")', marks=pytest.mark.slow),
    ],
)
def test_shard_map_over_sequences_and_heads_equals_one_device(where):
    code = textwrap.dedent(SHARDED).replace("WHERE", f"[{where}]").replace("CHECK", "False")
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    environment |= {"PATH": os.environ.get("PATH", ""), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
