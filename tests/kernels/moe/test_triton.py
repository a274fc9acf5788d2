"""The Triton mixture of experts in Triton's interpreter, in this environment or in that of `make aot`."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dantinox import kernels
from dantinox.kernels.dispatch import target_device
from dantinox.kernels.ops.moe import api
from tests.helpers import random_shapes
from tests.helpers.triton_programs import assert_checks_hold, assert_judge_finds_nothing_wrong, needs_triton

slow = pytest.mark.slow


@needs_triton
@pytest.mark.parametrize(
    "checks",
    [
        pytest.param(("features",), id="features"),
        pytest.param(("hidden_values", "forward"), id="hidden values", marks=slow),
        pytest.param(("number_range", "tf32", "second_derivative"), id="numbers", marks=slow),
        pytest.param(("sizes", "determinism"), id="sizes", marks=slow),
        pytest.param(("workloads",), id="workloads", marks=slow),
        pytest.param(("vmap", "shard_map", "remat_and_scan"), id="transformations", marks=slow),
    ],
)
def test_checks_hold(checks):
    assert_checks_hold("triton_moe", checks)


@needs_triton
@slow
def test_random_shapes_keep_the_error_rule():
    """EXAMPLES in the environment is the number of shapes; a failure names its seed."""
    check = f"random_shapes={random_shapes.scale_examples(8)}"
    assert_checks_hold("triton_moe", [check], timeout=24 * 3600)


SMALL = ("experts without tokens, unseen NaN, float32", "clamped activation, float32")


@needs_triton
@slow
@pytest.mark.parametrize("cases", [SMALL, pytest.param((), id="all")])
def test_judge_finds_nothing_wrong(cases):
    assert_judge_finds_nothing_wrong("moe_mlp", cases)


CHOICES = {  # what auto takes where jax-triton is installed
    ("NVIDIA H100 80GB HBM3", "bfloat16"): "triton",
    ("NVIDIA A100-SXM4-80GB", "float32"): "triton",
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
    with target_device("gpu", "NVIDIA L4"):
        chosen = api.OPERATION.select("auto", jnp.ones((4, 8), "bfloat16"), jnp.ones((2, 8, 8), "bfloat16"))
    assert chosen is next(i.function for i in api.OPERATION.implementations if i.name == "xla")
    ((op, probe, name, subject),) = asked
    assert (op, name, subject) == ("moe_mlp", "triton", "bfloat16")
    names = ("o", "dx", "dw_gate", "dw_up", "dw_down", "dexpert_weights")
    assert probe("reference").keys() == {f"{name} (bfloat16)" for name in names}


def test_triton_without_nvidia_gpu_raises_with_the_reason():
    x, w, ids = jnp.ones((2, 4)), jnp.ones((2, 4, 4)), jnp.zeros((2, 1), int)
    for platform, kind in (("cpu", "cpu"), ("tpu", "TPU v6 lite"), ("gpu", "AMD Instinct MI300X")):
        with target_device(platform, kind), pytest.raises(NotImplementedError, match="NVIDIA"):
            kernels.moe_mlp(x, w, w, w, ids, jnp.ones((2, 1)), implementation="triton")


def test_float64_raises_with_the_reason(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    x, w, ids = np.ones((2, 4)), np.ones((2, 4, 4)), np.zeros((2, 1), int)
    with target_device("gpu", "NVIDIA L4"), jax.enable_x64(True), pytest.raises(NotImplementedError, match="float64"):
        kernels.moe_mlp(x, w, w, w, ids, np.ones((2, 1)), implementation="triton")


def test_missing_jax_triton_raises_with_install_hint(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with target_device("gpu", "NVIDIA A100-SXM4-80GB"), pytest.raises(NotImplementedError, match="EXTRAS=triton"):
        kernels.moe_mlp(
            jnp.ones((2, 4)), *[jnp.ones((2, 4, 4))] * 3, jnp.zeros((2, 1), int), jnp.ones((2, 1)),
            implementation="triton",
        )  # fmt: skip
