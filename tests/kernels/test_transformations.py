"""Attention under vmap, remat, scan, shard_map, second derivatives and export with symbolic sizes."""

import functools
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.verification.fast_compile import jit_fast_compile
from dantinox import kernels
from tests.helpers import cases
from tests.helpers.simulated_devices import run_with_devices

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


@pytest.mark.slow
def test_vmap_equals_a_loop():
    many = stacked_inputs()
    one = jit_fast_compile(output_and_gradients)
    loop = [one(*x) for x in zip(*many, strict=True)]
    assert_close(
        jit_fast_compile(jax.vmap(output_and_gradients))(*many),
        [jnp.stack(x) for x in zip(*loop, strict=True)],
    )
    # Keys and values shared by all, and an axis in the middle.
    q, k, v, gate = many
    some = jax.vmap(lambda q, gate: attention_of_case(q, k[0], v[0], gate), in_axes=(2, 0), out_axes=1)
    loop = [one(q[n], k[0], v[0], gate[n])[0] for n in range(3)]
    assert_close([jit_fast_compile(some)(jnp.moveaxis(q, 0, 2), gate)], [jnp.stack(loop, axis=1)])


def test_remat_does_not_change_gradients():
    inputs = narrow_values(0)
    loss = lambda f: lambda *x: jnp.sum(f(*x) ** 2) / 2
    again = jit_fast_compile(jax.grad(loss(jax.checkpoint(attention_of_case)), argnums=(0, 1, 2, 3)))(*inputs)
    assert_close(again, jit_fast_compile(output_and_gradients)(*inputs)[1:])


def test_gradient_descent_inside_a_loop():
    """Three steps of gradient descent on the keys in one lax.scan."""
    q, k, v, gate = narrow_values(0)
    slope = jax.grad(lambda k: jnp.sum(attention_of_case(q, k, v, gate) ** 2))
    step = lambda k, _: (k - 0.1 * slope(k), None)
    found, _ = jit_fast_compile(lambda k: jax.lax.scan(step, k, length=3))(k)
    by_hand, one = k, jit_fast_compile(lambda k: step(k, None)[0])
    for _ in range(3):
        by_hand = one(by_hand)
    assert np.abs(found - k).max() > 1e-3
    assert_close([found], [by_hand])


SHARDED = """
    import functools
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec as P
    from bench.verification.fast_compile import FAST_COMPILE_OPTIONS
    from dantinox import kernels

    mesh = jax.make_mesh((2, 2), ("data", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rng = np.random.default_rng(0)
    draw = lambda heads, n: jnp.float32(rng.standard_normal((4, 20, heads, n)))
    inputs = draw(4, 8), draw(2, 8), draw(2, 8), draw(4, 1)
    ids = jnp.asarray(rng.integers(0, 2, (4, 20)).cumsum(1))
    quick = functools.partial(jax.jit, compiler_options=FAST_COMPILE_OPTIONS)

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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "check_vma"),
    [
        ('P("data", None, "heads")', True),
        ('P("data", None, "heads")', False),
        ('P("data")', True),
        ('P(None, None, "heads")', True),
    ],
)
def test_shard_map_over_sequences_and_heads_equals_one_device(where, check_vma):
    code = textwrap.dedent(SHARDED).replace("WHERE", f"[{where}]").replace("CHECK", str(check_vma))
    run_with_devices("-c", code, devices=4)


def test_ids_of_shards_vary():
    """Two arrays of ids in one shard, checked by shard_map: which keys are attended is a loop of its own."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    ids = np.arange(48).reshape(2, 24) // 5
    q, k = (jnp.stack([x[0]] * 2) for x in narrow_values(0)[:2])

    def run(q: jax.Array, k: jax.Array, ids: jax.Array) -> jax.Array:
        return kernels.attention(q, k, k, segment_ids=(ids[:, 4:], ids), implementation="pallas")

    spec = jax.sharding.PartitionSpec("data")
    mapped = jit_fast_compile(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec))
    assert_close([mapped(q, k, ids)], [jit_fast_compile(run)(q, k, ids)])


def curvature(implementation: str) -> Any:
    """Program of the gradient of <d loss / dq, direction>, in q, k, v and gate."""

    def along(direction: jax.Array, *x: jax.Array) -> jax.Array:
        f = lambda q: kernels.attention(q, *x[1:3], gate=x[3], implementation=implementation, **CASE.options())
        return jnp.vdot(jax.grad(lambda q: jnp.sum(f(q) ** 3))(x[0]), direction)

    return jit_fast_compile(jax.grad(along, argnums=(1, 2, 3, 4)))


def test_second_derivatives_of_xla_match_the_reference():
    inputs = narrow_values(0)
    direction = np.float32(np.random.default_rng(1).standard_normal(inputs[0].shape))
    found, expected = (curvature(implementation)(direction, *inputs) for implementation in ("xla", "reference"))
    assert all(np.abs(x).max() > 1e-2 for x in expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


def test_a_second_derivative_of_pallas_is_refused_by_one_sentence():
    inputs = narrow_values(0)
    with pytest.raises(NotImplementedError, match="pallas' has no second derivative; implementation='xla' has one"):
        curvature("pallas")(inputs[0], *inputs)


def test_export_with_symbolic_sizes_runs_for_every_size():
    B, T, S = jax.export.symbolic_shape("B, T, S")
    shapes = [jax.ShapeDtypeStruct((B, n, 2, 4), jnp.float32) for n in (T, S)]

    def attention(q: jax.Array, k: jax.Array, implementation: str) -> jax.Array:
        return kernels.attention(q, k, k, window=40, implementation=implementation)

    reference = functools.partial(attention, implementation="reference")
    for implementation in ("auto", "reference"):
        run = jit_fast_compile(functools.partial(attention, implementation=implementation))
        exported = jax.export.export(run)(*shapes)
        for B, T, S in ((2, 7, 9), (1, 150, 140)):  # the last would be computed in bands, if it were not symbolic
            q, k = (np.float32(np.random.default_rng(n).standard_normal((B, n, 2, 4))) for n in (T, S))
            expected = jit_fast_compile(reference)(q, k)
            np.testing.assert_allclose(exported.call(q, k), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(NotImplementedError, match="implementation='xla'"):
        jax.export.export(jax.jit(functools.partial(attention, implementation="pallas")))(*shapes)
