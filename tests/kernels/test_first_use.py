"""The check that "auto" makes before it first chooses a kernel on a device."""

import functools
import logging

import jax
import jax.numpy as jnp
import pytest

from dantinox import kernels
from dantinox.kernels import first_use
from dantinox.kernels.dispatch import Device, target_device
from dantinox.kernels.ops.attention import api as attention_api
from dantinox.kernels.ops.attention.pallas_cpu import fwd
from dantinox.kernels.ops.decode_attention import api as decode_api
from tests import conftest

TPU = Device("tpu", "TPU v6 lite")


@pytest.fixture(autouse=True)
def no_earlier_check():
    first_use._check.cache_clear()
    yield
    first_use._check.cache_clear()


def check(pallas, reference=lambda: jnp.ones(3), tolerance=0.1, op="attention"):
    values = {"pallas": pallas, "reference": reference}
    return first_use._check(op, lambda name: {"o": first_use.Result(values[name](), tolerance)}, TPU)


def refuse():
    raise RuntimeError("Mosaic failed\nto compile")


@pytest.mark.parametrize(
    ("pallas", "message"),
    [
        (lambda: jnp.array([1, 1, 1.05]), None),
        (lambda: jnp.array([1, 1, 1.5]), "o differs from the reference by 0.5 of its largest value; allowed: 0.1"),
        (lambda: jnp.array([1, jnp.nan, 1]), "o differs from the reference by nan of its largest value; allowed: 0.1"),
        (refuse, "RuntimeError: Mosaic failed to compile"),
    ],
    ids=["close", "far", "nan", "error"],
)
def test_wrong_or_failing_kernel_is_reported_once(pallas, message, caplog):
    with caplog.at_level(logging.WARNING, logger="dantinox.kernels"):
        reason = check(pallas)
    expected = message and f"it failed its check on TPU v6 lite: {message}"
    assert reason == expected
    assert [r.getMessage() for r in caplog.records] == (
        [f"attention: the Pallas kernel is not used: {expected}"] if expected else []
    )


def test_check_runs_once_and_outside_of_the_callers_trace_and_settings():
    runs = []

    def probe(name):
        x = jnp.arange(4.0)
        runs.append((name, x.dtype, isinstance(x, jax.core.Tracer), jax.sharding.get_abstract_mesh().empty))
        return {"o": first_use.Result(x, 0)}

    @jax.jit
    def traced(x):
        assert first_use._check("attention", probe, TPU) is None
        return x + 1

    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.enable_x64(True), jax.set_mesh(mesh), jax.debug_nans(True):
        traced(jnp.ones(3))
        traced(jnp.ones(4))
    assert runs == [(name, jnp.float32, False, True) for name in ("pallas", "reference")]


@pytest.mark.parametrize("api", [attention_api, decode_api], ids=["attention", "decode_attention"])
def test_right_kernels_pass_and_wrong_ones_do_not(api, monkeypatch):
    """The kernels of CPUs stand for those of the device."""
    op = api.OPERATION.name
    assert first_use._check(op, api._PROBE, TPU) is None
    module = fwd if api is attention_api else decode_api.cpu_kernel
    right = getattr(module, "attention_fwd" if api is attention_api else "decode_attention")

    def wrong(*args, **options):
        result = right(*args, **options)
        return result._replace(o=result.o * 1.1) if api is attention_api else (result[0] * 1.1, result[1])

    monkeypatch.setattr(module, right.__name__, wrong)
    first_use._check.cache_clear()
    conftest.clear_traces()
    assert "o (float32" in first_use._check(op, api._PROBE, TPU)


def test_auto_takes_xla_where_the_check_fails(monkeypatch, caplog):
    """On a TPU whose kernel is wrong, every call is served, and one line says why not by the kernel."""
    monkeypatch.setattr(attention_api.dispatch, "current_device", lambda: TPU)
    monkeypatch.setattr(first_use, "announced_device", lambda: None)
    monkeypatch.setattr(first_use, "current_device", lambda: TPU)
    monkeypatch.setattr(attention_api, "_PROBE", lambda name: {"o": first_use.Result(jnp.float32(name == "pallas"), 0)})
    q = jnp.ones((1, 4, 2, 8))
    with caplog.at_level(logging.WARNING, logger="dantinox.kernels"):
        chosen = [attention_api.OPERATION.select("auto", q, q, None, True, False) for _ in range(3)]
    assert {function.__module__ for function in chosen} == {"dantinox.kernels.ops.attention.xla"}
    assert len(caplog.records) == 1


def test_announced_device_is_not_checked():
    """Cross-compiling for a TPU compiles what a TPU runs."""
    with target_device(*TPU):
        assert first_use.disagreement("attention", functools.partial(pytest.fail, "checked")) is None
        kernels.implementations("attention")
