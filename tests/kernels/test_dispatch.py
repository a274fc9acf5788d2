"""Dispatch and validation: `ValueError` names the argument, `NotImplementedError` the implementation."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dantinox import kernels
from dantinox.kernels import dispatch, nvidia
from dantinox.kernels.ops.attention import api

Q = jnp.ones((1, 4, 4, 8))
KV = jnp.ones((1, 4, 2, 8))
IDS = jnp.zeros((1, 4), jnp.int32)
ATTENTION = {
    "q has shape": {"q": Q[0]},
    "q has dtype": {"q": Q.astype(jnp.int32)},
    "k has shape": {"k": jnp.ones((2, 4, 2, 8))},
    "k has shape (1, 4, 2, 7)": {"k": KV[..., :7]},
    "v has shape": {"v": KV[:, :3]},
    "v has dtype": {"v": KV.astype(jnp.bfloat16)},
    "q has 4 heads and k has 3": {"k": jnp.ones((1, 4, 3, 8)), "v": jnp.ones((1, 4, 3, 8))},
    "gate has shape": {"gate": Q[:, :, :1]},
    "gate has dtype": {"gate": Q.astype(jnp.float16)},
    "window is 0": {"window": 0},
    "window is -1": {"window": -1},
    "window is True": {"window": True},
    "window is 2.5": {"window": 2.5},
    "window is 2 with causal=False": {"window": 2, "causal": False},
    "softcap is 0": {"softcap": 0.0},
    "softcap is -1": {"softcap": -1.0},
    "softcap is nan": {"softcap": float("nan")},
    "softcap is 'a'": {"softcap": "a"},
    "scale is inf": {"scale": float("inf")},
    "scale is 'a'": {"scale": "a"},
    "segment_ids is one array": {"segment_ids": IDS, "k": KV[:, :3], "v": KV[:, :3]},
    "segment_ids q_ids has shape": {"segment_ids": (IDS[:, :3], IDS)},
    "segment_ids kv_ids has shape": {"segment_ids": (IDS, IDS[0])},
    "segment_ids q_ids has dtype": {"segment_ids": IDS.astype(jnp.float32)},
    "segment_ids holds 3": {"segment_ids": (IDS, IDS, IDS)},
    "implementation is 'fast'": {"implementation": "fast"},
    "implementation is None": {"implementation": None},
}


@pytest.mark.parametrize(("message", "bad"), ATTENTION.items(), ids=ATTENTION)
def test_invalid_attention_argument_raises_with_its_name(message, bad):
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        kernels.attention(**({"q": Q, "k": KV, "v": KV} | bad))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("nonsense", [None, "x"])
def test_non_array_argument_raises_with_its_name(name, nonsense):
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        kernels.attention(**({"q": Q, "k": KV, "v": KV} | {name: nonsense}))


def test_window_longer_than_sequence_equals_no_window():
    for implementation in ("reference", "xla"):
        for window in (10**6, 2**31, 2**40):
            wide = kernels.attention(Q, KV, KV, window=window, implementation=implementation)
            np.testing.assert_array_equal(wide, kernels.attention(Q, KV, KV, implementation=implementation))


X, W, SIZES = jnp.ones((6, 3)), jnp.ones((2, 3, 5)), jnp.array([2, 3])
GROUPED = {
    "x has shape": {"x": X[0]},
    "x has dtype": {"x": X.astype(jnp.int32)},
    "w has shape": {"w": W[:, :2]},
    "w has dtype": {"w": W.astype(jnp.bfloat16)},
    "group_sizes has shape (3,)": {"group_sizes": jnp.array([1, 2, 3])},
    "group_sizes has shape (2, 1)": {"group_sizes": SIZES[:, None]},
    "group_sizes has dtype": {"group_sizes": jnp.array([2.0, 3.0])},
    "implementation is ''": {"implementation": ""},
}


@pytest.mark.parametrize(("message", "bad"), GROUPED.items(), ids=GROUPED)
def test_invalid_grouped_matmul_argument_raises_with_its_name(message, bad):
    with pytest.raises(ValueError, match=re.escape(message)):
        kernels.grouped_matmul(**({"x": X, "w": W, "group_sizes": SIZES} | bad))


MOE_GOOD = {
    "x": X,
    "w_gate": W,
    "w_up": W,
    "w_down": jnp.ones((2, 5, 3)),
    "expert_ids": jnp.zeros((6, 2), jnp.int32),
    "expert_weights": jnp.ones((6, 2)),
}
MOE = {
    "x has shape": {"x": X[None]},
    "w_gate has shape": {"w_gate": W[:, :2]},
    "w_up has shape": {"w_up": W[..., :4]},
    "w_up has dtype": {"w_up": W.astype(jnp.bfloat16)},
    "w_down has shape": {"w_down": W},
    "expert_ids has shape": {"expert_ids": jnp.zeros((5, 2), jnp.int32)},
    "expert_ids has dtype": {"expert_ids": jnp.zeros((6, 2))},
    "expert_weights has shape": {"expert_weights": jnp.ones((6, 1))},
    "expert_weights has dtype": {"expert_weights": jnp.ones((6, 2), jnp.int32)},
    "expert_ids has shape (6, 0)": {
        "expert_ids": jnp.zeros((6, 0), jnp.int32),
        "expert_weights": jnp.ones((6, 0)),
    },
    "w_gate has shape (0, 3, 5)": {"w_gate": W[:0], "w_up": W[:0], "w_down": jnp.ones((0, 5, 3))},
    "implementation is 'Xla'": {"implementation": "Xla"},
}


@pytest.mark.parametrize(("message", "bad"), MOE.items(), ids=MOE)
def test_invalid_moe_mlp_argument_raises_with_its_name(message, bad):
    with pytest.raises(ValueError, match=re.escape(message)):
        kernels.moe_mlp(**(MOE_GOOD | bad))


LOSS_GOOD = {"h": X, "w": W[0].T, "targets": jnp.zeros(6, jnp.int32)}
LOSS = {
    "h has shape": {"h": X[0]},
    "h has dtype": {"h": X.astype(jnp.int32)},
    "w has shape": {"w": W[0]},
    "w has dtype": {"w": W[0].T.astype(jnp.bfloat16)},
    "targets has shape (5,)": {"targets": jnp.zeros(5, jnp.int32)},
    "targets has dtype": {"targets": jnp.zeros(6)},
    "targets holds 5; allowed: 0 to 4, or negative": {"targets": [0, 1, -1, 5, 2, 3]},
    "softcap is 0": {"softcap": 0.0},
    "softcap is nan": {"softcap": float("nan")},
    "z_loss is -0.1": {"z_loss": -0.1},
    "z_loss is None": {"z_loss": None},
    "z_loss is inf": {"z_loss": float("inf")},
    "implementation is 'cpu'": {"implementation": "cpu"},
}


@pytest.mark.parametrize(("message", "bad"), LOSS.items(), ids=LOSS)
def test_invalid_linear_cross_entropy_argument_raises_with_its_name(message, bad):
    with pytest.raises(ValueError, match=re.escape(message)):
        kernels.linear_cross_entropy(**(LOSS_GOOD | bad))


CACHE = kernels.KVCache.zeros(1, 2, 6, 8, jnp.float32)
DECODE = {
    "q has shape": {"q": Q},
    "k has dtype": {"k": KV[:, 0].astype(jnp.bfloat16)},
    "v has shape": {"v": KV[:, 0, :1]},
    "q has 3 heads and k has 2": {"q": Q[:, 0, :3]},
    "gate has shape": {"gate": Q[:, 0, :, :2]},
    "cache.k has shape": {"cache": CACHE._replace(k=CACHE.k[:, :1])},
    "cache.k has dtype": {"cache": CACHE._replace(k=CACHE.k.astype(jnp.int32))},
    "cache.v has shape": {"cache": CACHE._replace(v=CACHE.v[:, :, :5])},
    "cache.v has dtype": {"cache": CACHE._replace(v=CACHE.v.astype(jnp.int8))},
    "cache.length has shape": {"cache": CACHE._replace(length=jnp.zeros((2,), jnp.int32))},
    "cache.length has dtype": {"cache": CACHE._replace(length=jnp.zeros((1,)))},
    "cache": {"cache": tuple(CACHE)},
    "cache has 0 slots": {"cache": kernels.KVCache.zeros(1, 2, 0, 8, jnp.float32)},
    "window is 0": {"window": 0},
    "window is -1": {"window": -1},
    "softcap is 0": {"softcap": 0.0},
    "scale is nan": {"scale": float("nan")},
    "implementation is 'cpu'": {"implementation": "cpu"},
}


@pytest.mark.parametrize(("message", "bad"), DECODE.items(), ids=DECODE)
def test_invalid_decode_attention_argument_raises_with_its_name(message, bad):
    with pytest.raises(ValueError, match=re.escape(message)):
        kernels.decode_attention(**({"q": Q[:, 0], "k": KV[:, 0], "v": KV[:, 0], "cache": CACHE} | bad))


CALLS = {
    "attention": lambda name: kernels.attention(Q, KV, KV, implementation=name),
    "grouped_matmul": lambda name: kernels.grouped_matmul(X, W, SIZES, implementation=name),
    "moe_mlp": lambda name: kernels.moe_mlp(**MOE_GOOD, implementation=name),
    "decode_attention": lambda name: kernels.decode_attention(Q[:, 0], KV[:, 0], KV[:, 0], CACHE, implementation=name),
    "linear_cross_entropy": lambda name: kernels.linear_cross_entropy(**LOSS_GOOD, implementation=name),
}


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.sampled(2)
def test_named_implementation_runs_or_raises_with_the_reason(op):
    for name, why in kernels.implementations(op).items():
        if why is None:
            CALLS[op](name)
            continue
        with pytest.raises(NotImplementedError) as refusal:
            CALLS[op](name)
        assert name in str(refusal.value) and why in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.sampled(2)
def test_auto_runs_and_implementations_lists_every_name(op):
    CALLS[op]("auto")
    table = kernels.implementations(op)
    assert set(table) >= {"reference", "xla", "pallas", "triton"}
    assert ("auto", *table) == kernels.implementation_names(op)
    assert table["reference"] is None and table["xla"] is None


def test_table_entry_registers_an_implementation(monkeypatch):
    def custom(q, k, v, **options):
        return jnp.full_like(q, options["window"])

    before = kernels.implementation_names("attention")
    entry = dispatch.Implementation("custom", custom)
    operation = dataclasses.replace(api.OPERATION, implementations=(*api.OPERATION.implementations, entry))
    monkeypatch.setattr(api, "OPERATION", operation)
    monkeypatch.setitem(kernels._REGISTRY, "attention", operation)
    np.testing.assert_array_equal(kernels.attention(Q, KV, KV, window=3, implementation="custom"), jnp.full_like(Q, 3))
    assert kernels.implementations("attention") == kernels.implementations("attention") | {"custom": None}
    assert kernels.implementation_names("attention") == (*before, "custom")
    assert kernels.implementation_names(*kernels.OPERATIONS) == (*before, "custom")
    assert not np.array_equal(kernels.attention(Q, KV, KV, window=3), jnp.full_like(Q, 3)), "auto chose it"
    with pytest.raises(ValueError, match=f"allowed: {', '.join((*before, 'custom'))}"):
        kernels.attention(Q, KV, KV, implementation="mien")
    with pytest.raises(ValueError, match=r"allowed: auto, reference, xla, pallas, triton$"):
        kernels.moe_mlp(**MOE_GOOD, implementation="custom")


def test_auto_logs_why_preferred_implementation_is_skipped(monkeypatch, caplog):
    dispatch._log_choice.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    x = jnp.ones((1, 4, 1, 72), jnp.bfloat16)
    with caplog.at_level("INFO", "dantinox.kernels"), dispatch.target_device("cuda", "NVIDIA H100"):
        jax.eval_shape(kernels.attention, x, x, x)
    (said,) = caplog.messages
    assert said.startswith("attention: auto chose xla on gpu; not pallas: q has head dim 72 ")
    assert "; not triton: jax-triton is not installed" in said


CHOICES = {  # what auto takes for attention, where jax-triton is installed
    ("NVIDIA H100 80GB HBM3", "bfloat16", 64): "pallas",
    ("NVIDIA H100 80GB HBM3", "bfloat16", 80): "pallas",
    ("NVIDIA H100 80GB HBM3", "float32", 64): "triton",
    ("NVIDIA H100 80GB HBM3", "float16", 72): "triton",
    ("NVIDIA A100-SXM4-80GB", "bfloat16", 128): "triton",
    ("NVIDIA GeForce RTX 4090", "float32", 32): "triton",
    ("NVIDIA B200", "bfloat16", 128): "triton",
    ("NVIDIA L4", "bfloat16", 320): "xla",
    ("NVIDIA A10G", "float64", 64): "xla",
    ("Tesla T4", "float32", 64): "xla",
    ("AMD Instinct MI300X", "bfloat16", 64): "xla",
}


@pytest.mark.parametrize(("kind", "dtype", "D"), CHOICES)
def test_auto_prefers_hopper_kernels_then_triton_then_xla(kind, dtype, D, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    with dispatch.target_device("gpu", kind), jax.enable_x64(dtype == "float64"):
        x = jnp.ones((1, 4, 1, D), dtype)
        chosen = api.OPERATION.select("auto", x, x, x, None, True, False, None)
    by_name = {i.name: i.function for i in api.OPERATION.implementations}
    assert chosen is by_name[CHOICES[kind, dtype, D]]


@pytest.mark.parametrize(("softcap", "expected"), [(30.0, "pallas"), (1e-20, "triton"), (1e20, "triton")])
def test_auto_leaves_the_largest_and_smallest_soft_caps_to_triton(softcap, expected, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    with dispatch.target_device("gpu", "NVIDIA H100 80GB HBM3"):
        x = jnp.ones((1, 4, 1, 64), jnp.bfloat16)
        chosen = api.OPERATION.select("auto", x, x, x, None, True, False, softcap)
        if expected != "pallas":
            with pytest.raises(
                NotImplementedError, match=r"Hopper's kernels take 2\*\*-40 to 2\*\*40; impl.*'triton' runs"
            ):
                kernels.attention(x, x, x, softcap=softcap, implementation="pallas")
    assert chosen is {i.name: i.function for i in api.OPERATION.implementations}[expected]


def test_refusal_names_an_implementation_that_runs(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)

    def hint(kind, D, dtype="float32"):
        x = jnp.ones((1, 4, 1, D), dtype)
        with dispatch.target_device("gpu", kind), pytest.raises(NotImplementedError) as refusal:
            kernels.attention(x, x, x, implementation="pallas")
        return str(refusal.value).rpartition("; ")[2]

    assert hint("NVIDIA H100", 32) == hint("NVIDIA L4", 32) == "implementation='triton' runs here"
    assert hint("NVIDIA L4", 320) == hint("Tesla T4", 32) == "implementation='xla' runs here"
    assert hint("NVIDIA H100", 72, "bfloat16") == "implementation='triton' runs here"


CAPABILITIES = {
    "NVIDIA A100-SXM4-80GB": (8, 0),
    "NVIDIA A10G": (8, 6),
    "NVIDIA GeForce RTX 3090": (8, 6),
    "NVIDIA RTX A6000": (8, 6),
    "NVIDIA L4": (8, 9),
    "NVIDIA L40S": (8, 9),
    "NVIDIA GeForce RTX 4090 Laptop GPU": (8, 9),
    "NVIDIA RTX 6000 Ada Generation": (8, 9),
    "Quadro RTX 6000": (7, 5),
    "Quadro RTX 5000": (7, 5),
    "Tesla T4": (7, 5),
    "Tesla V100-SXM2-16GB": (7, 0),
    "NVIDIA H100 80GB HBM3": (9, 0),
    "NVIDIA GH200 480GB": (9, 0),
    "NVIDIA H20": (9, 0),
    "NVIDIA B200": (10, 0),
    "NVIDIA GB200": (10, 0),
    "NVIDIA GB300": (10, 3),
    "NVIDIA GeForce RTX 5090": (12, 0),
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": (12, 0),
    "NVIDIA GB10": (12, 1),
    "AMD Instinct MI300X": None,
    "TPU v6 lite": None,
}


@pytest.mark.parametrize("kind", CAPABILITIES)
def test_compute_capability_of_a_device_kind(kind):
    assert nvidia.capability_of_kind(kind) == CAPABILITIES[kind]


@pytest.mark.parametrize(("text", "capability"), [("9.0", (9, 0)), ("12.1", (12, 1)), ("gfx942", None), (None, None)])
def test_compute_capability_of_a_device(text, capability):
    class Gpu:
        compute_capability = text

    assert nvidia.capability_of_device(Gpu()) == capability


def test_unknown_operation_raises():
    with pytest.raises(ValueError, match="op is 'softmax'"):
        kernels.implementations("softmax")


def test_target_device_overrides_current_device():
    with dispatch.target_device("cuda", "NVIDIA A100"):
        assert dispatch.current_device() == ("gpu", "NVIDIA A100")
        with dispatch.target_device("tpu", "TPU v6 lite"):
            assert dispatch.current_device().platform == "tpu"
        assert "requires Hopper (compute capability 9.0)" in kernels.implementations("moe_mlp")["pallas"]
    assert dispatch.current_device() == (jax.default_backend(), jax.devices()[0].device_kind)


def test_jitted_function_is_traced_again_for_another_target_device():
    x = jnp.ones((1, 128, 1, 128), jnp.bfloat16)
    attend = jax.jit(lambda x: kernels.attention(x, x, x, implementation="pallas"))
    transformations = {
        "jit": attend,
        "grad": jax.jit(jax.grad(lambda x: attend(x).astype(jnp.float32).sum())),
        "remat": jax.jit(jax.grad(lambda x: jax.checkpoint(attend)(x).astype(jnp.float32).sum())),
        "scan": jax.jit(lambda x: jax.lax.scan(lambda x, _: (attend(x), None), x, length=2)[0]),
        "vmap": jax.jit(lambda x: jax.vmap(attend)(x[None])),
    }
    for name, f in transformations.items():
        here = str(f.trace(x).jaxpr)
        with dispatch.target_device("tpu", "TPU v6 lite"):
            tpu = str(f.trace(x).jaxpr)
        with dispatch.target_device("gpu", "NVIDIA H100"):
            gpu = str(f.trace(x).jaxpr)
        assert len({here, tpu, gpu}) == 3, name
        assert "interpret=True" in here and "interpret=True" not in tpu and "wgmma" in gpu, name
        assert str(f.trace(x).jaxpr) == here, name


def test_lazy_implementation_is_imported_on_first_call():
    missing = dispatch.lazy("dantinox.no_such_module:attention")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        missing(Q, KV, KV)
    naive = dispatch.lazy("dantinox.kernels.tutorial.attention.step1_naive:attention")
    options = {"gate": None, "causal": True, "window": None, "scale": 1.0, "softcap": None, "segment_ids": None}
    np.testing.assert_allclose(naive(Q, KV, KV, **options), jnp.ones_like(Q), rtol=1e-6)


def test_two_implementations_of_one_name_raise():
    twice = (*api.OPERATION.implementations, dispatch.Implementation("xla", lambda *args: None))
    with pytest.raises(ValueError, match="attention has two implementations of the name 'xla'"):
        dataclasses.replace(api.OPERATION, implementations=twice)


@pytest.mark.parametrize(
    ("kind", "installed", "reason"),
    [
        ("NVIDIA A100-SXM4-40GB", True, None),
        ("NVIDIA A100-SXM4-40GB", False, "jax-triton is not installed"),
        ("AMD Instinct MI300X", True, "its Triton kernels are for NVIDIA GPUs"),
    ],
)
def test_triton_is_offered_on_nvidia_gpus_with_jax_triton(kind, installed, reason, monkeypatch):
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: object() if installed else None)
    with dispatch.target_device("cuda", kind):
        found = kernels.implementations("moe_mlp")["triton"]
    assert found is None if reason is None else found.startswith(reason)
