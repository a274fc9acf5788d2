"""Checks of the Triton decode attention under JAX's transformations, in Triton's interpreter: needs Triton, no GPU.

`python -m tests.helpers.triton_decode_transformations NAME...` runs as `triton_decode_attention` does.
"""

import functools
import sys
from typing import Any

from tests.helpers.triton_decode_attention import (  # isort: skip (sets the environment)
    arguments,
    assert_same_cache,
    decode,
    interpret,
    row,
    small_blocks,
)
from tests.helpers.triton_attention import error, run_checks  # isort: skip

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tests.helpers.decode_steps import draw

Array = jax.Array


def transformed_arguments() -> Any:
    case = row(0, 7, 12, 30, C=12, H=4, K=2, D=8, window=8, gate="head", new_tokens=3)
    inputs, cache = arguments(draw(case), case)
    return inputs, cache, {"window": 8}


def check_vmap() -> None:
    """A batch over any of the arrays, also of batches."""
    inputs, cache, options = transformed_arguments()
    stack = lambda x: jax.tree.map(lambda a: jnp.stack([a, a * 2, a + 1]).astype(a.dtype), x)
    caches = cache._replace(**{name: jnp.stack([getattr(cache, name)] * 3) for name in cache._fields[:3]})
    caches = caches._replace(k=caches.k.at[1].mul(2), length=caches.length.at[2].add(5))
    sinks = jnp.linspace(-1.0, 1.0, 4)

    def run(implementation: str, inputs: Any, cache: Any, sinks: Array) -> Any:
        return decode(implementation, sinks=sinks, **options)(inputs, cache)

    for axes, arrays in (
        ((0, None, None), (stack(inputs), cache, sinks)),
        ((None, 0, None), (inputs, caches, sinks)),
        ((0, 0, 0), (stack(inputs), caches, jnp.stack([sinks, -sinks, 2 * sinks]))),
    ):
        f, reference = (jax.vmap(functools.partial(run, name), in_axes=axes) for name in ("triton", "reference"))
        with small_blocks():
            o, new = interpret(f, *arrays)
        expected, expected_cache = jax.jit(reference)(*arrays)
        assert error(o, expected) < 5e-6, axes
        assert_same_cache(new, expected_cache)
    twice = jax.vmap(jax.vmap(functools.partial(run, "triton"), in_axes=(0, None, None)), in_axes=(None, 0, None))
    nested, _ = interpret(twice, stack(inputs), caches, sinks)
    one = [jax.tree.map(lambda x, n=n: x[n], y) for y, n in ((stack(inputs), 2), (caches, 1))]
    assert error(nested[1, 2], run("reference", *one, sinks)[0]) < 5e-6


def check_shard_map() -> None:
    """Two devices, each with half of the sequences, under `shard_map` with its default check."""
    inputs, cache, options = transformed_arguments()
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = PartitionSpec("data")
    f = jax.shard_map(decode("triton", **options), mesh=mesh, in_specs=(rows, rows), out_specs=rows)
    o, new = interpret(f, inputs, cache)
    expected, expected_cache = decode("reference", **options)(inputs, cache)
    assert error(o, expected) < 5e-6
    assert_same_cache(new, expected_cache)


def check_scan() -> None:
    """A scan over steps, and over layers inside, that carries the cache; x64, with ranks that do not promote."""
    inputs, cache, options = transformed_arguments()

    def generate(implementation: str, inputs: Any, cache: Any) -> Any:
        def step(carry: Any, _: None) -> Any:
            q, caches = carry

            def layer(q: Array, layer_cache: Any) -> Any:
                return decode(implementation, **options)(inputs | {"q": q}, layer_cache)

            q, caches = jax.lax.scan(layer, q, caches)
            return (q, caches), q

        caches = jax.tree.map(lambda x: jnp.stack([x, x]), cache)
        return jax.lax.scan(step, (inputs["q"], caches), length=3)

    expected = jax.jit(functools.partial(generate, "reference"))(inputs, cache)
    assert error(interpret(functools.partial(generate, "triton"), inputs, cache), expected) < 5e-6
    with jax.enable_x64(True), jax.numpy_rank_promotion("raise"):
        assert error(interpret(functools.partial(generate, "triton"), inputs, cache), expected) < 5e-6


def check_gradient() -> None:
    """It is refused by one sentence."""
    inputs, cache, options = transformed_arguments()
    loss = lambda x: jnp.sum(decode("triton", **options)(inputs | x, cache)[0])
    for name in ("q", "v"):
        try:
            interpret(jax.grad(loss), {name: inputs[name]})
        except NotImplementedError as refusal:
            assert "implementation='triton' has no gradient; implementation='xla' has one" in str(refusal)
        else:
            raise AssertionError("a gradient came out")


if __name__ == "__main__":
    sys.exit(run_checks(globals(), sys.argv[1:]))
