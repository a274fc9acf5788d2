"""The Pallas decoding kernel from inside: the blocks it visits, and what a TPU makes of it."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dantinox import kernels
from dantinox.kernels import workloads
from dantinox.kernels.dispatch import target_device
from dantinox.kernels.ops.decode_attention.pallas_tpu import kernel
from dantinox.kernels.ops.decode_attention.pallas_tpu.block_table import visits
from tests import numpy_interpreter
from tests.helpers import cases, race_detector, tolerance
from tests.kernels.decode_attention.test_decode_attention import draw

V6E = ("tpu", "TPU v6 lite")


def row(*lengths: int, **sizes) -> workloads.Decode:
    return cases.row(workloads.Decode, lengths=lengths, **sizes)


@pytest.mark.parametrize("block", [1, 3, 4, 8])
def test_the_visits_are_the_blocks_that_hold_seen_tokens(block):
    for C, limit in itertools.product((1, 8, 10, 13), (1, 2, 5, 13)):
        limit, lengths = min(limit, C), np.arange(3 * C + 2)
        steps = functools.partial(visits, slots=C, limit=limit, block=block)
        found = numpy_interpreter.run(steps, np.int32(lengths))
        expected = []
        for b, length in enumerate(lengths):
            seen = [p % C // block for p in range(max(0, length + 1 - limit), length + 1)]
            expected += [(b, at) for at in dict.fromkeys(seen)]
        count = int(found.count)
        assert count == len(expected) and found.ends[-1] == count and found.sequence.shape[0] >= count
        assert list(zip(found.sequence[:count].tolist(), found.block[:count].tolist(), strict=True)) == expected
        np.testing.assert_array_equal(found.slot, lengths % C)
        np.testing.assert_array_equal(found.seen, np.minimum(lengths + 1, limit))


TILED = {  # whole blocks: the simulator knows no others
    "a window across the ring's end": row(5, 40, 48, 100, C=48, window=11, gate="elementwise"),
    "a ring in three blocks, cap, gate": row(0, 47, 48, 150, C=48, softcap=1.5, gate="head"),
    "one head, one token": row(0, 16, C=32, H=1, K=1, window=1),
}


def watched(operation: Callable[..., Any], *args: Any) -> Any:
    """What JAX's simulated TPU gives, which watches for races too."""
    found = race_detector.on_tpu(operation, *args, cores=1)
    assert not found.races and found.out_of_bounds is None
    return found.result


@pytest.mark.parametrize("run", [numpy_interpreter.run, pytest.param(watched, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", TILED)
def test_a_tpu_appends_and_attends_in_one_kernel(name, run, monkeypatch):
    """The tile that the new token lies in leaves with it, and nothing else of the ring is touched."""
    case = TILED[name]
    monkeypatch.setattr(kernel, "_block", lambda *_: 16)
    step = draw(case, fill=np.nan)
    inputs = {key: jnp.float32(x) for key, x in step.inputs.items()}
    cache = kernels.KVCache(jnp.float32(step.cache_k), jnp.float32(step.cache_v), **case.integer_inputs())
    operation = lambda inputs, cache: kernels.decode_attention(
        **inputs, cache=cache, **case.options(), implementation="pallas"
    )
    with target_device(*V6E):
        o, after = run(operation, inputs, cache)
    plain, _ = kernels.decode_attention(**inputs, cache=cache, **case.options(), implementation="reference")
    tolerance.check({"o": o}, {"o": plain}, {"o": step.o}, "float32")
    for ring, old, new in ((after.k, step.cache_k, "k"), (after.v, step.cache_v, "v")):
        expected = old.copy()
        for b, length in enumerate(case.lengths):
            expected[b, :, length % case.C] = step.inputs[new][b]
        np.testing.assert_array_equal(ring, expected)


@pytest.mark.parametrize("least", [0, 0.5])
@pytest.mark.parametrize(("C", "window"), [(600, None), (1100, 300), (1537, 513)])
def test_several_blocks_are_the_formula(C, window, least):
    """Block by block, and at once where every ring is at least half full."""
    lengths = (int(least * C) - 1, C - 2, C - 1, 3 * C + 7) if least else (0, C // 2 - 2, C - 1, 3 * C + 7)
    case = row(*lengths, C=C, window=window, gate="head", D=8)
    run = lambda name: jax.jit(
        lambda inputs, cache: kernels.decode_attention(**inputs, cache=cache, **case.options(), implementation=name)
    )
    pallas, found = run("pallas"), []
    for fill in (0, np.nan):
        step = draw(case, fill=fill)
        inputs = {key: jnp.float32(x) for key, x in step.inputs.items()}
        cache = kernels.KVCache(jnp.float32(step.cache_k), jnp.float32(step.cache_v), **case.integer_inputs())
        found.append({"o": pallas(inputs, cache)[0]})
    tolerance.check(found[1], {"o": run("reference")(inputs, cache)[0]}, {"o": step.o}, "float32")
    tolerance.same_bits(*found)


@pytest.mark.parametrize("name", ["xla", "pallas"])
@pytest.mark.parametrize("mapped", ["q", "k", "length"])
def test_mapped_over_an_axis_it_is_a_loop(name, mapped):
    """As where several tokens are tried on one cache."""
    rng = np.random.default_rng(0)
    shapes = {"q": (3, 4, 8), "k": (3, 2, 8), "v": (3, 2, 8), "ring": (3, 2, 16, 8)}
    x = {key: jnp.array(rng.standard_normal((2, *shape)), jnp.float32) for key, shape in shapes.items()}
    x["length"] = jnp.array([[3, 7, 20], [4, 0, 16]])
    axes = {key: 0 if key == mapped else None for key in x}
    x = {key: value if key == mapped else value[0] for key, value in x.items()}

    def run(x: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
        cache = kernels.KVCache(x["ring"], -x["ring"], x["length"])
        o, cache = kernels.decode_attention(x["q"], x["k"], x["v"], cache, window=9, implementation=name)
        return o, cache.k, cache.v, cache.length

    one = tolerance.quick(run)
    loop = [one({key: value[n] if key == mapped else value for key, value in x.items()}) for n in range(2)]
    for mine, *ones in zip(tolerance.quick(jax.vmap(run, (axes,)))(x), *loop, strict=True):
        np.testing.assert_allclose(mine, jnp.stack(ones), rtol=1e-5, atol=1e-5)
