"""The NumPy evaluator: XLA's results, and kernel faults that XLA would not report."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from bench import numpy_interpreter

X = np.arange(24, dtype=np.float32).reshape(2, 3, 4) / 7 - 1
I = np.array([3, -1, 0, 9], np.int32)  # -1 counts from the end, 9 is outside

PROGRAMS = {
    "gather, filled outside": lambda x, i: x.at[:, 1, i].get(mode="fill", fill_value=-5),
    "gather, clipped": lambda x, i: x.at[..., i].get(mode="clip"),
    "gather along an axis": lambda x, i: jnp.take_along_axis(x, jnp.abs(i[:3])[None, :, None] % 4, 2),
    "gather of windows": lambda x, i: jax.vmap(lambda a, n: lax.dynamic_slice(a, (0, n), (2, 3)))(x, i[:2]),
    "scatter, dropped outside": lambda x, i: x.at[..., i].set(jnp.ones((2, 3, 4)), mode="drop"),
    "scatter that adds": lambda x, i: x.at[1, :, jnp.array([0, 0, 3])].add(2.5),
    "scatter of windows": lambda x, i: x.at[:, 1:].add(1).at[:, 0, 1:3].set(x[:, 1, :2]),
    "padding": lambda x, i: lax.pad(x, 9.0, [(0, 1, 2), (-1, 2, 0), (1, -2, 1)]),
    "sums both ways": lambda x, i: (jnp.cumsum(x, 1), lax.cumsum(x, 2, reverse=True), lax.cummax(x, 0)),
    "sorting": lambda x, i: (lax.sort((i % 2, -i, i), num_keys=2), jnp.argsort(x, axis=1)),
    "the largest": lambda x, i: (lax.top_k(x, 2), jnp.argmax(x, 1), jnp.max(x[:, :, :0], axis=2, initial=-3)),
    "batched product": lambda x, i: jnp.einsum("btd,bsd->bst", x, x, preferred_element_type=jnp.float32),
    "product over two axes": lambda x, i: lax.dot_general(x, x, (((0, 2), (0, 2)), ((), ()))),
    "narrow product": lambda x, i: x.astype(jnp.bfloat16)[0] @ x.astype(jnp.bfloat16)[1].T,
    "integers": lambda x, i: (
        i // 2,
        i % 4,
        lax.div(i, jnp.int32(2)),
        lax.rem(i, jnp.int32(4)),
        i >> 1,
        i.astype(bool),
    ),
    "as unsigned": lambda x, i: (i.astype(jnp.uint32) < 5, lax.bitcast_convert_type(x, jnp.int32)),
    "a loop": lambda x, i: lax.while_loop(lambda c: c[0] < 4, lambda c: (c[0] + 1, c[1] * 1.5), (i[2], x)),
    "a scan backwards": lambda x, i: lax.scan(lambda c, a: (c + a.sum(), c * a), 0.5, x, reverse=True),
    "branches": lambda x, i: [lax.switch(n, [jnp.sin, jnp.cos, jnp.tanh], x) for n in i],
    "a gradient": lambda x, i: jax.grad(lambda x: jnp.sum(jax.nn.softmax(jnp.tanh(x) @ x[0].T) ** 2))(x),
    "blocks of time": lambda x, i: jax.checkpoint(jax.nn.silu)(x).swapaxes(0, 2).reshape(3, -1)[::-1, 1::2],
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
@pytest.mark.sampled(2)
def test_result_equals_xla(program):
    mine, expected = numpy_interpreter.run(program, X, I), jax.jit(program)(X, I)
    assert jax.tree.structure(mine) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        near = 2e-2 if a.dtype == jnp.bfloat16 else 1e-6
        np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), rtol=near, atol=near)


def test_unsupported_primitive_raises_with_its_name():
    with pytest.raises(NotImplementedError, match="erf_inv"):
        numpy_interpreter.run(lax.erf_inv, X)


def rows_of(x, kernel, outs=None, block=4, scratch=(), **options):
    """kernel over blocks of four rows of x, as a TPU is asked to."""
    spec = pl.BlockSpec((block, x.shape[1]), lambda n: (n, 0))
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(-(-x.shape[0] // block),),
        in_specs=[spec],
        out_specs=outs or spec,
        scratch_shapes=list(scratch),
        **options,
    )(x)


ROWS = np.random.default_rng(0).standard_normal((10, 3)).astype(np.float32)


def double(x_ref, o_ref):
    o_ref[...] = 2 * x_ref[...]


def test_partial_last_block_is_padded_with_nan():
    np.testing.assert_array_equal(numpy_interpreter.run(functools.partial(rows_of, kernel=double), ROWS), 2 * ROWS)

    def total(x_ref, o_ref):
        o_ref[...] = jnp.broadcast_to(jnp.sum(x_ref[...]), o_ref.shape)

    found = numpy_interpreter.run(functools.partial(rows_of, kernel=total), ROWS)
    assert np.isfinite(found[:8]).all() and np.isnan(found[8:]).all()


def test_uninitialized_memory_is_nan():
    def half(x_ref, o_ref):
        o_ref[:2] = x_ref[:2]

    found = numpy_interpreter.run(functools.partial(rows_of, kernel=half), ROWS)
    np.testing.assert_array_equal(np.isnan(found[:, 0]), np.arange(10) % 4 >= 2)

    def kept(x_ref, o_ref, old_ref):
        o_ref[...] = old_ref[...]
        old_ref[...] = x_ref[...]

    scratch = [pltpu.VMEM((4, 3), jnp.float32)]
    found = numpy_interpreter.run(functools.partial(rows_of, kernel=kept, scratch=scratch), ROWS[:8])
    assert np.isnan(found[:4]).all()
    np.testing.assert_array_equal(found[4:], ROWS[:4])


def test_revisited_output_block_is_cleared_except_in_interpret_mode():
    def add(x_ref, o_ref):
        o_ref[...] = jnp.where(pl.program_id(0) < 2, 0, o_ref[...]) + x_ref[...]

    back = pl.BlockSpec((2, 3), lambda n: (n % 2, 0))
    run = lambda interpret: functools.partial(rows_of, kernel=add, outs=back, block=2, interpret=interpret)
    x = ROWS[:8]
    assert np.isnan(numpy_interpreter.run(run(False), x)[:4]).all()
    interpreted = numpy_interpreter.run(run(True), x)[:4]
    np.testing.assert_allclose(interpreted, x[:4] + x[4:], rtol=1e-6)
    np.testing.assert_array_equal(interpreted, jax.jit(run(True))(x)[:4])


@pytest.mark.parametrize("first", [-1, 2])
def test_out_of_bounds_access_raises(first):
    def shifted(x_ref, o_ref):
        o_ref[...] = jnp.concatenate([x_ref[pl.ds(pl.program_id(0) * 0 + first, 3)], x_ref[:1]])

    with pytest.raises(IndexError, match="outside"):
        numpy_interpreter.run(functools.partial(rows_of, kernel=shifted), ROWS[:8])


def test_block_is_loaded_before_previous_one_is_written_back():
    """In place, a step must not need what the step just before it wrote."""

    def follow(x_ref, o_ref):
        o_ref[...] = x_ref[...] + 1

    shifted = pl.BlockSpec((2, 3), lambda n: (jnp.minimum(n + 1, 3), 0))
    run = functools.partial(rows_of, kernel=follow, outs=shifted, block=2, input_output_aliases={0: 0})
    found = numpy_interpreter.run(run, ROWS[:8])
    np.testing.assert_array_equal(found[4:6], ROWS[2:4] + 1)


def test_debug_print_shows_values_and_program(capsys):
    def show(x_ref, o_ref):
        pl.debug_print("largest of {}: {}", pl.program_id(0), jnp.max(x_ref[...]))
        pl.debug_print("smallest", jnp.min(x_ref[...]))
        o_ref[...] = x_ref[...]

    numpy_interpreter.run(functools.partial(rows_of, kernel=show), np.float32([[1, 2], [3, 4], [5, 6], [7, 8]]))
    assert capsys.readouterr().out.splitlines()[0] == "program 0: largest of 0: 8.0"
