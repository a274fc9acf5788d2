"""The Triton attention in Triton's interpreter, in an environment that has Triton: this one, or that of `make aot`."""

import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dantinox import kernels
from dantinox.kernels.dispatch import target_device
from dantinox.kernels.triton_call import call_triton
from tests.helpers.triton_programs import assert_checks_hold, assert_judge_finds_nothing_wrong, needs_triton

slow = pytest.mark.slow


@needs_triton
@pytest.mark.parametrize(
    "checks",
    [
        pytest.param(("features",), id="features"),
        pytest.param(
            ("tf32", "vmap", "float16_range", "second_derivative"), id="precision, transformations", marks=slow
        ),
        pytest.param(("sizes", "determinism"), marks=slow),
        pytest.param(("shard_map", "remat_and_scan"), marks=slow),
    ],
)
def test_checks_hold(checks):
    assert_checks_hold("triton_attention", checks)


# A window with several tiles of keys, a gate, a soft cap, segments, other numbers of queries than keys, 16 bits.
SMALL = (
    "simulated: window, unseen NaN, bfloat16",
    "simulated: segments, bfloat16",
    "7 of 129, window, float32",
    "full, cap, float32",
)


@needs_triton
@slow
@pytest.mark.parametrize("cases", [SMALL, pytest.param((), id="all")])
def test_judge_finds_nothing_wrong(cases):
    assert_judge_finds_nothing_wrong("attention", cases, f"Triton {len(cases) or 66} ok")


@pytest.mark.parametrize(("capability", "ptx_version"), [((9, 0), 87), ((10, 3), 88), ((12, 0), 87), ((12, 1), 88)])
def test_kernel_is_compiled_for_the_capability_in_ptx_that_has_it(monkeypatch, capability, ptx_version):
    monkeypatch.setitem(sys.modules, "jax_triton", SimpleNamespace(triton_call=lambda *arrays, **options: options))
    options = call_triton(None, out_type=None, grid=(1,), capability=capability, num_warps=8, name="kernel")
    assert options["compute_capability"] == 10 * capability[0] + capability[1]
    assert (options["backend_options"]["num_warps"], options["backend_options"]["ptx_version"]) == (8, ptx_version)


def test_unsupported_inputs_raise_with_the_reason(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    for kind, D, reason in (
        ("NVIDIA L4", 264, "D is 264; its Triton kernels take at most 256; implementation='xla' runs here"),
        ("Tesla T4", 64, r"require compute capability 8.0 and this is 'Tesla T4' \(7.5\)"),
        ("AMD Instinct MI300X", 64, "for NVIDIA GPUs and this is 'AMD Instinct MI300X'"),
        ("NVIDIA X1", 64, "the compute capability of 'NVIDIA X1' is not known here"),
    ):
        x = jnp.ones((1, 8, 2, D))
        with target_device("gpu", kind), pytest.raises(NotImplementedError, match=reason):
            kernels.attention(x, x, x, implementation="triton")
    x = np.ones((1, 8, 2, 8))
    with target_device("gpu", "NVIDIA L4"), jax.enable_x64(True), pytest.raises(NotImplementedError, match="float64"):
        kernels.attention(x, x, x, implementation="triton")
