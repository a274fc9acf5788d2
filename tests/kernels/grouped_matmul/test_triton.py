"""The Triton grouped matmul in Triton's interpreter, in this environment or in that of `make aot`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dantinox import kernels
from dantinox.kernels.dispatch import target_device
from dantinox.kernels.ops.grouped_matmul import api
from tests.helpers import random_shapes
from tests.helpers.triton_programs import assert_checks_hold, assert_judge_finds_nothing_wrong, needs_triton

slow = pytest.mark.slow


@needs_triton
@pytest.mark.parametrize(
    "checks",
    [
        pytest.param(("features",), id="features"),
        pytest.param(("dtypes", "tf32", "hidden_values", "tiles", "second_derivative"), id="dtypes", marks=slow),
        pytest.param(("sizes", "determinism"), id="sizes", marks=slow),
        pytest.param(("workloads",), id="workloads", marks=slow),
        pytest.param(("vmap", "shard_map", "remat_and_scan"), id="transformations", marks=slow),
    ],
)
def test_checks_hold(checks):
    assert_checks_hold("triton_grouped_matmul", checks)


@needs_triton
@slow
def test_random_shapes_keep_the_error_rule():
    """EXAMPLES in the environment is the number of shapes; a failure names its seed."""
    check = f"random_shapes={random_shapes.scale_examples(10)}"
    assert_checks_hold("triton_grouped_matmul", [check], timeout=24 * 3600)


SMALL = ("empty groups, rows past the sum, unseen NaN, float32", "uneven groups, bfloat16")


@needs_triton
@slow
@pytest.mark.parametrize("cases", [SMALL, pytest.param((), id="all")])
def test_judge_finds_nothing_wrong(cases):
    assert_judge_finds_nothing_wrong("grouped_matmul", cases)


CHOICES = {  # what auto takes where jax-triton is installed
    ("NVIDIA H100 80GB HBM3", "bfloat16"): "triton",
    ("NVIDIA A100-SXM4-80GB", "float32"): "triton",
    ("NVIDIA GeForce RTX 5090", "float16"): "triton",
    ("NVIDIA L4", "float64"): "xla",
    ("Tesla T4", "float32"): "xla",
    ("AMD Instinct MI300X", "bfloat16"): "xla",
}


@pytest.mark.parametrize(("kind", "dtype"), CHOICES)
def test_auto_prefers_kernels_on_nvidia_gpus(kind, dtype, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    with target_device("gpu", kind), jax.enable_x64(dtype == "float64"):
        chosen = api.OPERATION.select("auto", jnp.ones((4, 8), dtype), jnp.ones((2, 8, 8), dtype))
    by_name = {i.name: i.function for i in api.OPERATION.implementations}
    assert chosen is by_name[CHOICES[kind, dtype]]


def test_auto_checks_triton_in_the_dtype_of_a_call(monkeypatch):
    asked = []
    monkeypatch.setattr(api.first_use, "disagreement", lambda *args: asked.append(args) or "it differs")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    arrays = [(jnp.ones((4, 8), dtype), jnp.ones((2, 8, 8), dtype)) for dtype in ("float16", "bfloat16")]
    with target_device("gpu", "NVIDIA L4"):
        chosen = [api.OPERATION.select("auto", *pair) for pair in arrays]
    by_name = {i.name: i.function for i in api.OPERATION.implementations}
    assert chosen == [by_name["xla"]] * 2
    assert [(op, name, subject) for op, _, name, subject in asked] == [
        ("grouped_matmul", "triton", dtype) for dtype in ("float16", "bfloat16")
    ]
    probes = [probe for _, probe, _, _ in asked]
    assert probes[0] is not probes[1] and probes[0]("reference").keys() == {f"{x} (float16)" for x in ("o", "dx", "dw")}


def test_unsupported_inputs_raise_with_the_reason(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    x, w, sizes = np.ones((4, 8)), np.ones((2, 8, 8)), np.int32([1, 2])
    for kind, reason in (
        ("Tesla T4", r"require compute capability 8.0 and this is 'Tesla T4' \(7.5\)"),
        ("AMD Instinct MI300X", "for NVIDIA GPUs and this is 'AMD Instinct MI300X'"),
    ):
        with target_device("gpu", kind), pytest.raises(NotImplementedError, match=reason):
            kernels.grouped_matmul(np.float32(x), np.float32(w), sizes, implementation="triton")
    with target_device("gpu", "NVIDIA L4"), jax.enable_x64(True), pytest.raises(NotImplementedError, match="float64"):
        kernels.grouped_matmul(x, w, sizes, implementation="triton")
