"""The Triton decode attention in Triton's interpreter, in this environment or in that of `make aot`."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest

from dantinox import kernels
from dantinox.kernels.dispatch import target_device
from dantinox.kernels.ops.decode_attention import api
from tests.helpers import random_shapes
from tests.helpers.triton_programs import assert_checks_hold, assert_judge_finds_nothing_wrong, needs_triton

slow = pytest.mark.slow


CHECKS = ("workloads", "sizes", "hidden_slots", "number_range", "eight_bits", "dtypes", "tf32", "determinism")


@needs_triton
@pytest.mark.parametrize("check", ["features", *(pytest.param(check, marks=slow) for check in CHECKS)])
def test_check_holds(check):
    assert_checks_hold("triton_decode_attention", [check])


@needs_triton
@slow
@pytest.mark.parametrize("transformation", ["vmap", "shard_map", "scan", "gradient"])
def test_transformation_is_right(transformation):
    assert_checks_hold("triton_decode_transformations", [transformation])


@needs_triton
@slow
def test_random_shapes_match_python_loops():
    number = random_shapes.scale_examples(10)
    assert_checks_hold("triton_decode_attention", [f"random_shapes={number}"], timeout=300 + 10 * number)


SMALL = ("simulated: ragged lengths, unseen NaN, bfloat16", "five tokens, float32", "sinks, float32")


@needs_triton
@slow
@pytest.mark.parametrize("cases", [SMALL, pytest.param((), id="all")])
def test_judge_finds_nothing_wrong(cases):
    assert_judge_finds_nothing_wrong("decode_attention", cases)


def step(dtype: str = "float32", D: int = 8, cache_dtype: str | None = None):
    """The arguments of a call: q, k, v and the cache."""
    q, kv = jnp.ones((1, 2, D), dtype), jnp.ones((1, 1, D), dtype)
    return q, kv, kv, kernels.KVCache.zeros(1, 1, 4, D, cache_dtype or dtype)


CHOICES = {  # what auto takes where jax-triton is installed
    ("NVIDIA H100 80GB HBM3", "bfloat16"): "triton",
    ("NVIDIA A100-SXM4-80GB", "float32"): "triton",
    ("NVIDIA GeForce RTX 5090", "float16"): "triton",
    ("NVIDIA L4", "float64"): "xla",
    ("Tesla T4", "float32"): "xla",
    ("AMD Instinct MI300X", "bfloat16"): "xla",
}


@pytest.mark.parametrize(("kind", "dtype"), CHOICES)
def test_auto_prefers_triton_on_nvidia_gpus(kind, dtype, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    with target_device("gpu", kind), jax.enable_x64(dtype == "float64"):
        q, _, _, cache = step(dtype)
        chosen = api.OPERATION.select("auto", q, cache)
    by_name = {i.name: i.function for i in api.OPERATION.implementations}
    assert chosen is by_name[CHOICES[kind, dtype]]


def test_auto_checks_triton_in_the_dtypes_of_a_call(monkeypatch):
    asked = []
    monkeypatch.setattr(api.first_use, "disagreement", lambda *args: asked.append(args) or "it differs")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    by_name = {i.name: i.function for i in api.OPERATION.implementations}
    with target_device("gpu", "NVIDIA L4"):
        for dtype, D, cache_dtype in (("float16", 8, None), ("float32", 80, "float8_e4m3fn")):
            q, _, _, cache = step(dtype, D, cache_dtype)
            assert api.OPERATION.select("auto", q, cache) is by_name["xla"]
    assert [(op, name, subject) for op, _, name, subject in asked] == [
        ("decode_attention", "triton", "float16, D 8, cache float16"),
        ("decode_attention", "triton", "float32, D 80, cache float8_e4m3fn"),
    ]
    results = jax.eval_shape(lambda: asked[1][1]("reference"))
    fields = ("o", "k", "v", "length", "k_scale", "v_scale")
    names = {f"{field} (float32, D = 80, T = {T})" for field in fields for T in (1, 4)}
    assert results.keys() == names | {f"o (float32, D = 80, T = {T}) in TF32" for T in (1, 4)}


def test_unsupported_inputs_raise_with_the_reason(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    for kind, dtype, D, cache_dtype, reason in (
        ("NVIDIA L4", "float32", 264, None, "D is 264; its Triton kernels take at most 256; implementation='xla' runs"),
        ("NVIDIA L4", "float32", 8, "float64", "cache.k is float64 and its Triton kernels multiply at most float32"),
        ("NVIDIA L4", "float64", 8, None, "float64 is not supported: the kernel accumulates in float32"),
        ("Tesla T4", "float32", 8, None, r"require compute capability 8.0 and this is 'Tesla T4' \(7.5\)"),
        ("AMD Instinct MI300X", "float32", 8, None, "for NVIDIA GPUs and this is 'AMD Instinct MI300X'"),
    ):
        with jax.enable_x64(True), target_device("gpu", kind), pytest.raises(NotImplementedError, match=reason):
            kernels.decode_attention(*step(dtype, D, cache_dtype), implementation="triton")


@pytest.mark.skipif(importlib.util.find_spec("jax_triton") is None, reason="jax-triton is not installed")
@pytest.mark.parametrize(("cache_dtype", "refs"), [("bfloat16", 2), ("int8", 4)])
def test_ring_buffers_are_passed_in_place(cache_dtype, refs):
    """jax-triton makes each reference an output that is aliased to its input."""
    with target_device("gpu", "NVIDIA A100-SXM4-80GB"):
        arguments = step("bfloat16", 64, cache_dtype)
        jaxpr = str(jax.make_jaxpr(lambda *x: kernels.decode_attention(*x, implementation="triton"))(*arguments))
    assert [len(re.findall(rf"= {name}\b", jaxpr)) for name in ("new_ref", "triton_kernel_call", "freeze")] == [
        refs,
        1,
        refs,
    ]
