"""The simulated devices detect planted faults, and none in the Pallas kernels."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from bench.verification import race_detector
from bench.verification.fast_compile import jit_fast_compile
from dantinox import kernels
from dantinox.kernels import workloads
from dantinox.kernels.dispatch import target_device
from dantinox.kernels.ops.attention.pallas_tpu import block_sizes
from dantinox.kernels.ops.attention.pallas_tpu.block_sizes import TpuBlockSizes
from tests.helpers import cases, tolerance

X = np.arange(16 * 128, dtype=np.float32).reshape(16, 128)
BLOCK = (8, 128)


def tpu_double(x: jax.Array, *, shared: bool = False) -> jax.Array:
    """2 x by two cores, a block of rows each; with `shared` both write the first block."""

    def kernel(x_ref, o_ref):
        o_ref[...] = 2 * x_ref[...]

    return pl.pallas_call(
        kernel,
        grid=(2,),
        in_specs=[pl.BlockSpec(BLOCK, lambda i: (i, 0))],
        out_specs=pl.BlockSpec(BLOCK, lambda i: (0 if shared else i, 0)),
        out_shape=jax.ShapeDtypeStruct(BLOCK if shared else x.shape, x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
    )(x)


def tpu_sum(x: jax.Array, *, clear: bool = True) -> jax.Array:
    """Sum of the blocks of rows, in scratch memory that must be cleared first."""

    def kernel(x_ref, o_ref, total):
        if clear:

            @pl.when(pl.program_id(0) == 0)
            def _():
                total[...] = jnp.zeros_like(total)

        total[...] += x_ref[...]
        o_ref[...] = total[...]

    return pl.pallas_call(
        kernel,
        grid=(2,),
        in_specs=[pl.BlockSpec(BLOCK, lambda i: (i, 0))],
        out_specs=pl.BlockSpec(BLOCK, lambda i: (0, 0)),
        out_shape=jax.ShapeDtypeStruct(BLOCK, x.dtype),
        scratch_shapes=[pltpu.VMEM(BLOCK, x.dtype)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
    )(x)


def tpu_rows(x: jax.Array, *, first: int = 8) -> jax.Array:
    """Eight rows from `first` on, past the end of 16 where that is more than 8."""

    def kernel(first_ref, x_ref, o_ref):
        o_ref[...] = x_ref[pl.ds(first_ref[0], 8), :]

    return pl.pallas_call(
        kernel,
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pltpu.VMEM)],
        out_specs=pl.BlockSpec(memory_space=pltpu.VMEM),
        out_shape=jax.ShapeDtypeStruct(BLOCK, x.dtype),
    )(jnp.array([first], jnp.int32), x)


def gpu_hand_over(x: jax.Array, *, barrier: bool = True, write: bool = True) -> jax.Array:
    """One warpgroup puts 2 x into shared memory, the other takes it from there, after a barrier or at once."""

    def kernel(x_ref, o_ref, shared, full):
        warpgroup = jax.lax.axis_index("warpgroup")

        @pl.when(warpgroup == 0)
        def _():
            if write:
                shared[...] = 2 * x_ref[...]
            if barrier:
                plgpu.barrier_arrive(full)

        @pl.when(warpgroup == 1)
        def _():
            if barrier:
                plgpu.barrier_wait(full)
            o_ref[...] = shared[...]

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_types=[plgpu.SMEM(x.shape, x.dtype), plgpu.Barrier(num_arrivals=1)],
        num_threads=2,
        thread_name="warpgroup",
    )(x)


def gpu_multiply(x: jax.Array, *, barrier: bool = True, commit: bool = True) -> jax.Array:
    """One warpgroup puts 2 x into shared memory, the other multiplies it with itself there."""

    def kernel(x_ref, o_ref, shared, full):
        warpgroup = jax.lax.axis_index("warpgroup")

        @pl.when(warpgroup == 0)
        def _():
            shared[...] = 2 * x_ref[...]
            if commit:
                plgpu.commit_smem()
            if barrier:
                plgpu.barrier_arrive(full)

        @pl.when(warpgroup == 1)
        def _():
            if barrier:
                plgpu.barrier_wait(full)

            def square(acc):
                plgpu.wgmma(acc, shared, shared)
                plgpu.wgmma_wait(0)
                return acc[...]

            o_ref[...] = pl.run_scoped(square, plgpu.ACC(x.shape))

    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(x.shape, jnp.float32),
        scratch_types=[plgpu.SMEM(x.shape, x.dtype, transforms=transforms), plgpu.Barrier(num_arrivals=1)],
        num_threads=2,
        thread_name="warpgroup",
    )(x)


def test_correct_tpu_kernel_passes():
    found = race_detector.on_tpu(tpu_double, X)
    assert found.clean, found
    np.testing.assert_array_equal(found.result, 2 * X)
    found = race_detector.on_tpu(tpu_sum, X)
    assert found.clean, found
    np.testing.assert_array_equal(found.result, X[:8] + X[8:])


def test_two_tpu_cores_writing_one_block_is_a_race():
    found = race_detector.on_tpu(functools.partial(tpu_double, shared=True), X)
    assert found.races and not found.out_of_bounds
    # One core takes the blocks one after the other.
    assert not race_detector.on_tpu(functools.partial(tpu_double, shared=True), X, cores=1).races


def test_race_in_first_of_two_kernels_is_detected():
    assert race_detector.on_tpu(lambda x: tpu_double(jnp.tile(tpu_double(x, shared=True), (2, 1))), X).races


def test_uninitialized_tpu_memory_is_detected():
    found = race_detector.on_tpu(functools.partial(tpu_sum, clear=False), X)
    assert found.uninitialized and not found.races and np.isnan(found.result).any()


def test_out_of_bounds_tpu_read_is_detected_and_next_run_works():
    found = race_detector.on_tpu(functools.partial(tpu_rows, first=12), X)
    assert found.out_of_bounds and "(16, 128)" in found.out_of_bounds and found.result is None
    found = race_detector.on_tpu(tpu_rows, X)
    assert found.clean
    np.testing.assert_array_equal(found.result, X[8:])


def test_correct_gpu_kernel_passes():
    found = race_detector.on_gpu(gpu_hand_over, X)
    assert found.clean, found
    np.testing.assert_array_equal(found.result, 2 * X)


def test_missing_gpu_barrier_is_a_race():
    assert race_detector.on_gpu(functools.partial(gpu_hand_over, barrier=False), X).races


def test_wgmma_operand_reads_are_checked():
    """Which the simulator does not do by itself."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((64, 64)), jnp.bfloat16)
    found = race_detector.on_gpu(gpu_multiply, x)
    assert found.clean, found
    np.testing.assert_allclose(found.result, np.float32(2 * x) @ np.float32(2 * x), rtol=1e-5, atol=1e-5)
    assert race_detector.on_gpu(functools.partial(gpu_multiply, commit=False), x).races, "it reads past what is written"
    assert race_detector.on_gpu(functools.partial(gpu_multiply, barrier=False), x).races


def test_uninitialized_gpu_memory_is_detected():
    found = race_detector.on_gpu(functools.partial(gpu_hand_over, write=False), X)
    assert found.uninitialized and not found.races


def test_function_without_kernel_raises():
    with pytest.raises(AssertionError, match="no Pallas kernel ran"):
        race_detector.on_tpu(lambda x: 2 * x, X)


V6E = ("tpu", "TPU v6 lite")
OPS = ("attention", "grouped_matmul", "moe_mlp", "decode_attention", "linear_cross_entropy")


def small(op: str) -> list[workloads.Workload]:
    """The smallest rows of the tests."""
    elements = lambda row: sum(np.prod(shape) for shape in row.shapes().values())
    return sorted(workloads.select(op, "parity"), key=elements)[:4]


def both_passes(row: workloads.Workload, implementation: str) -> tuple:
    """(function of the arrays, arrays): output and gradients, or one step of decoding."""
    inputs, aux, dout = cases.draw(row)
    inputs, dout = {name: np.float32(x) for name, x in inputs.items()}, np.float32(dout)
    operation = functools.partial(getattr(kernels, row.op), **row.options(), implementation=implementation)
    if isinstance(row, workloads.Decode):
        rings = np.random.default_rng(1).standard_normal((2, *row.cache_shape())).astype(np.float32)
        return lambda inputs, cache: operation(**inputs, cache=cache), inputs, kernels.KVCache(*rings, **aux)

    def run(inputs, aux, dout):
        o, pull = jax.vjp(lambda inputs: operation(**inputs, **aux), inputs)
        return o, pull(dout)

    return run, inputs, aux, dout


def checked_parameters() -> list[Any]:
    """(op, row) parameters; one row of an operation in every run, but those whose smallest block takes seconds."""
    slow = lambda op, n: pytest.mark.slow if n or op == "linear_cross_entropy" else ()
    found = [(op, row, slow(op, n)) for op in OPS for n, row in enumerate(small(op))]
    return [pytest.param(op, row, id=f"{op}: {row.name}", marks=marks) for op, row, marks in found]


@pytest.mark.parametrize(("op", "row"), checked_parameters())
@pytest.mark.sampled(2)
def test_pallas_tpu_kernels_have_no_race_or_invalid_read(op, row):
    """The kernels for TPUs, as they would be compiled there."""
    with target_device(*V6E):
        why = kernels.implementations(op)["pallas"]
        if why is not None:
            pytest.skip(why)
        run, *arguments = both_passes(row, "pallas")
        found = race_detector.on_tpu(run, *arguments)
    assert found.clean, found._replace(result=None)


row = cases.attention


TILED = {  # two heads, for the two cores
    "subtile of half a head, cap, segments, fewer queries": (
        row(12, 28, D=4, softcap=1.5, gate="head", segments="separate"),
        TpuBlockSizes(block_q=16, block_kv=8, block_q_compute=8, block_kv_compute=4, kv_span=16),
    ),
    "subtile of one head, window, gate": (
        row(24, 24, H=4, window=5, gate="elementwise"),
        TpuBlockSizes(block_q=8, block_kv=16, block_q_compute=8, block_kv_compute=8, kv_span=16),
    ),
    "subtile of two heads, segments, fewer queries": (
        row(12, 20, H=8, D=4, segments="separate"),
        TpuBlockSizes(block_q=4, block_kv=8, block_q_compute=8, block_kv_compute=4, kv_span=8),
    ),
    "segments, more queries, one span": (
        row(20, 12, D=4, segments="unmatched", causal=False),
        TpuBlockSizes(block_q=8, block_kv=4, block_q_compute=8, block_kv_compute=4, kv_span=64),
    ),
    "more queries, window": (
        row(21, 9, H=4, window=3, softcap=2.0),
        TpuBlockSizes(block_q=8, block_kv=4, block_q_compute=16, block_kv_compute=4, kv_span=8),
    ),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in TILED])
def test_attention_with_several_blocks_subtiles_and_spans(name, monkeypatch):
    """What only a TPU makes of the kernel: pieces in turn, gradients of keys summed on the chip; and its values."""
    case, chosen = TILED[name]
    monkeypatch.setattr(block_sizes, "heuristic_block_sizes", lambda *_, **__: chosen)
    with target_device(*V6E):
        run, *arguments = both_passes(case, "pallas")
        found = race_detector.on_tpu(run, *arguments)
    assert found.clean, found._replace(result=None)
    o, (gradients, *_) = found.result
    mine = {"o": o} | {f"d{name}": gradient for name, gradient in gradients.items()}
    inputs, aux, dout = cases.draw(case)
    options = cases.options(case)
    tolerance.assert_matches_reference(
        "attention", "pallas", inputs, dout, "float32", aux=aux, options=options, run=lambda *_: mine
    )


@pytest.mark.parametrize("op", OPS)
@pytest.mark.sampled(4)
def test_checked_programs_run_with_xla(op):
    """The check above calls each operation rightly: so it does not fail first on the day there is a kernel."""
    run, *arguments = both_passes(small(op)[0], "xla")
    program = jit_fast_compile(run)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(program(*arguments)))
