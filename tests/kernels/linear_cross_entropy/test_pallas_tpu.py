"""The Pallas linear cross-entropy: its blocks, what it refuses, and several tiles against the reference."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import numpy_interpreter
from dantinox import kernels
from dantinox.kernels import workloads
from dantinox.kernels.dispatch import Device, target_device
from dantinox.kernels.ops.linear_cross_entropy import pallas
from dantinox.kernels.ops.linear_cross_entropy.pallas_tpu import block_sizes, limits
from dantinox.kernels.ops.linear_cross_entropy.pallas_tpu.block_sizes import BlockSizes
from tests.helpers import cases, tolerance
from tests.helpers.jaxpr_walk import largest_intermediate

CPU, TPU = Device("cpu", "cpu"), Device("tpu", "TPU v6 lite")


def test_blocks_fit_and_are_whole_registers():
    for N, V, M, itemsize in itertools.product((1, 7, 127, 129, 8192), (1, 15, 129, 151_936), (1, 129, 4096), (2, 4)):
        sizes = block_sizes.block_sizes(TPU, N, V, M, itemsize)
        assert sizes.block_n % 128 == 0 and sizes.block_v % 16 == 0
        assert block_sizes.vmem_bytes(sizes.block_n, sizes.block_v, M, itemsize) <= block_sizes.BLOCK_BYTES
        assert sizes.block_n - N < 128 or sizes.block_n <= 1024
        on_cpu = block_sizes.block_sizes(CPU, N, V, M, itemsize)
        assert (on_cpu.block_n, on_cpu.block_v) == (min(N, 8192), min(V, 2048))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_too_wide_for_vmem_are_refused_with_the_limit(dtype):
    shapes = jax.ShapeDtypeStruct((8, 100_000), dtype), jax.ShapeDtypeStruct((16, 100_000), dtype)
    targets = jax.ShapeDtypeStruct((8,), jnp.int32)
    with target_device(*TPU):
        f = functools.partial(kernels.linear_cross_entropy, implementation="pallas")
        with pytest.raises(NotImplementedError, match=r"M is 100000, whose .* take \d+ MiB of VMEM; allowed: 40"):
            jax.eval_shape(f, *shapes, targets)
        jax.eval_shape(kernels.linear_cross_entropy, *shapes, targets)
    assert limits.unsupported_reason(dtype, 4096) is None


def test_float16_is_wider_in_vmem_than_bfloat16():
    widths = range(128, 100_000, 128)
    widest = {
        dtype: max(M for M in widths if limits.unsupported_reason(dtype, M) is None)
        for dtype in ("float32", "bfloat16", "float16")
    }
    assert widest["float16"] == widest["float32"] < widest["bfloat16"]


SIZES = {  # one tile, several of rows and words, parts of tiles, a last tile of one word
    "one tile": BlockSizes(128, 64, 128, 64),
    "several tiles": BlockSizes(32, 16, 32, 16),
    "parts of tiles": BlockSizes(32, 16, 16, 8),
    "uneven parts": BlockSizes(32, 18, 20, 7),
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("device", [CPU, TPU], ids=["CPU", "TPU"])
@pytest.mark.parametrize("N", [1, 70], ids="N={}".format)
@pytest.mark.sampled(6)
def test_tile_sizes_do_not_change_results(monkeypatch, device, sizes, N):
    """In NumPy, where unwritten memory, blocks past the end of an array included, holds NaN."""
    monkeypatch.setattr(pallas, "block_sizes", lambda *_: sizes)
    for V, options in ((37, {"softcap": 2.0, "z_loss": 0.1}), (48, {"softcap": None, "z_loss": 0.0})):
        row = cases.make_workload(workloads.LinearCrossEntropy, N=N, M=5, V=V, absent="some")
        inputs, aux, dout = cases.draw(row)
        absent = (aux["targets"] < 0)[:, None]
        inputs = {name: np.float32(x) for name, x in inputs.items()}

        def run(inputs, dout, aux=aux, options=options, implementation="pallas"):
            f = functools.partial(kernels.linear_cross_entropy, **aux, **options, implementation=implementation)
            return tolerance.output_and_gradients(lambda arrays: f(**arrays), inputs, dout)

        expected = numpy_interpreter.run(functools.partial(run, implementation="reference"), inputs, np.float32(dout))
        poisoned = inputs | {"h": np.where(absent, np.float32(np.nan), inputs["h"])}
        with target_device(*device):
            got = numpy_interpreter.run(functools.partial(run), poisoned, np.float32(dout))
        for name, value in expected.items():
            np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-5, err_msg=f"V={V}: {name}")


def test_tpu_kernels_keep_no_more_than_a_tile_of_logits():
    N, V, M = 8192, 151_936, 1024
    shapes = jax.ShapeDtypeStruct((N, M), jnp.bfloat16), jax.ShapeDtypeStruct((V, M), jnp.bfloat16)
    f = functools.partial(kernels.linear_cross_entropy, implementation="pallas")
    with target_device(*TPU):
        jaxpr = jax.make_jaxpr(jax.grad(lambda h, w, t: f(h, w, t).mean(), argnums=(0, 1)))(
            *shapes, jax.ShapeDtypeStruct((N,), jnp.int32)
        )
    assert largest_intermediate(jaxpr) == V * M  # dw
