"""The check that "auto" makes before it first chooses a kernel on a device."""

import functools
import logging
import os
import pwd
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dantinox import kernels
from dantinox.kernels import dispatch, first_use
from dantinox.kernels.dispatch import Device, target_device
from dantinox.kernels.ops.attention import api as attention_api
from dantinox.kernels.ops.decode_attention import api as decode_api
from dantinox.kernels.ops.grouped_matmul import api as grouped_matmul_api
from dantinox.kernels.ops.linear_cross_entropy import api as linear_cross_entropy_api
from dantinox.kernels.ops.moe import api as moe_api
from tests import conftest

TPU = Device("tpu", "TPU v6 lite")
APIS = (attention_api, grouped_matmul_api, moe_api, decode_api, linear_cross_entropy_api)


@pytest.fixture(autouse=True)
def no_earlier_check(monkeypatch, tmp_path):
    monkeypatch.setenv("DANTINOX_CACHE", str(tmp_path))
    for function in (first_use._check, first_use._check_once):
        function.cache_clear()
    yield
    for function in (first_use._check, first_use._check_once):
        function.cache_clear()


def check(pallas, reference=lambda: jnp.ones(3), tolerance=0.1, op="attention"):
    values = {"pallas": pallas, "reference": reference}
    return first_use._check(op, lambda name: {"o": first_use.Result(values[name](), tolerance)}, TPU)


def refuse():
    raise RuntimeError("Mosaic failed\nto compile")


@pytest.mark.parametrize(("own", "verdict"), [(None, "process 1: nan"), ("nan", "process 0: nan"), (None, None)])
def test_verdict_of_all_processes_counts_and_is_asked_for_once(own, verdict, monkeypatch, caplog):
    votes, name = [], "attention, triton, float32, D 64"
    monkeypatch.setattr(first_use, "_check_once", functools.cache(lambda *_: own))

    def vote(check, reason):
        votes.append((check, reason))
        return verdict

    with first_use.verdicts_by(vote):
        assert [first_use.disagreement("attention", None, "triton", "float32, D 64") for _ in range(2)] == [verdict] * 2
        with first_use.verdicts_by(None):
            assert first_use.disagreement("attention", None) == own
    assert first_use.disagreement("attention", None) == own
    assert votes == [(name, own)]
    assert caplog.messages == [f"{name} is not used: {verdict}"] * (own is None and verdict is not None)


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
        [f"attention: implementation='pallas' is not used: {expected}"] if expected else []
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


def test_agreement_is_remembered_for_the_same_device_sources_and_versions(monkeypatch):
    runs = []

    def values(name, differs):
        runs.append(name)
        return {"o": first_use.Result(jnp.float32(1 + (differs and name == "triton")), 0)}

    def reason(subject="float32", device=TPU, differs=False):
        first_use._check_once.cache_clear()
        first_use._check.cache_clear()
        monkeypatch.setattr(first_use, "current_device", lambda: device)
        runs.clear()
        found = first_use.disagreement("attention", lambda name: values(name, differs), "triton", subject)
        return found, len(runs)

    assert [reason(), reason()] == [(None, 2), (None, 0)]
    assert reason("bfloat16") == (None, 2)
    assert reason(device=Device("gpu", "NVIDIA L4")) == (None, 2)
    monkeypatch.setattr(first_use, "_source_hash", lambda: "edited")
    for _ in range(2):  # a disagreement is not remembered
        found, count = reason(differs=True)
        assert "differs from the reference" in found and count == 2
    monkeypatch.setenv("DANTINOX_CACHE", "/proc/none")  # cannot be written
    assert [reason(), reason()] == [(None, 2), (None, 2)]
    monkeypatch.setattr(first_use, "_cache_folder", lambda: None)
    assert [reason(), reason()] == [(None, 2), (None, 2)]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"DANTINOX_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"DANTINOX_CACHE": "~/a"}, "/h/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/dantinox"),
        ({"XDG_CACHE_HOME": "b"}, "/h/.cache/dantinox"),  # its specification has absolute paths only
        ({}, "/h/.cache/dantinox"),
        ({"HOME": ""}, None),
    ],
)
def test_passed_checks_are_kept_in_the_cache_folder(variables, expected, monkeypatch):
    for name in ("DANTINOX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"HOME": "/h"} | variables).items():
        monkeypatch.setenv(name, value)
    if not os.environ["HOME"]:  # a container may run as a user without a home folder

        def unknown(uid):
            raise KeyError(uid)

        monkeypatch.delenv("HOME")
        monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert first_use._cache_folder() == (expected and Path(expected))


def test_hash_depends_on_every_source(monkeypatch, tmp_path):
    def source_hash(text):
        (tmp_path / "ops" / "kernel.py").write_text(text)
        return first_use._source_hash.__wrapped__()

    (tmp_path / "ops").mkdir()
    monkeypatch.setattr(first_use, "__file__", str(tmp_path / "first_use.py"))
    assert source_hash("a = 1") == source_hash("a = 1") != source_hash("a = 2")


@pytest.mark.parametrize(
    "api",
    [pytest.param(api, marks=() if api is grouped_matmul_api else pytest.mark.slow) for api in APIS],
    ids=lambda api: api.OPERATION.name,
)
def test_right_kernels_pass_and_wrong_ones_do_not(api, monkeypatch):
    """The kernels of CPUs stand for those of the device."""
    op = api.OPERATION.name
    assert first_use._check(op, api._PROBE, TPU) is None
    right = getattr(api.pallas, op)

    def wrong(*args, **options):
        return jax.tree.map(lambda x: (x * 1.1).astype(x.dtype), right(*args, **options))

    monkeypatch.setattr(api.pallas, op, wrong)
    first_use._check.cache_clear()
    conftest.clear_traces()
    assert re.search(r"failed its check on TPU v6 lite: [oy] \(float32", first_use._check(op, api._PROBE, TPU))


@pytest.mark.parametrize("api", APIS, ids=lambda api: api.OPERATION.name)
def test_auto_takes_xla_where_the_check_fails(api, monkeypatch, caplog):
    """On a TPU whose kernel is wrong, every call is served, and one line says why not by the kernel."""
    op = api.OPERATION.name
    monkeypatch.setattr(dispatch, "current_device", lambda: TPU)
    monkeypatch.setattr(first_use, "announced_device", lambda: None)
    monkeypatch.setattr(first_use, "current_device", lambda: TPU)
    q, cache = jnp.ones((1, 4, 2, 8)), kernels.KVCache(jnp.ones((1, 2, 128, 8)), jnp.ones((1, 2, 128, 8)), jnp.ones(1))
    matrices = (jnp.ones((16, 8)), jnp.ones((2, 8, 8)))
    inputs = {
        "attention": (q, q, q, None, True, False, None),
        "decode_attention": (q[:, 0], cache),
        "linear_cross_entropy": (*matrices, None),
    }.get(op, matrices)

    def chosen(difference):
        first_use._check.cache_clear()
        first_use._check_once.cache_clear()
        monkeypatch.setattr(
            api, "_PROBE", lambda name: {"o": first_use.Result(jnp.float32(1 + difference * (name == "pallas")), 0)}
        )
        return {api.OPERATION.select("auto", *inputs).__module__.removeprefix(f"{api.__package__}.") for _ in range(3)}

    with caplog.at_level(logging.WARNING, logger="dantinox.kernels"):
        assert (chosen(1), chosen(0)) == ({"xla"}, {"api"})
    assert len(caplog.records) == 1


def test_announced_device_is_not_checked():
    """Cross-compiling for a TPU compiles what a TPU runs."""
    with target_device(*TPU):
        assert first_use.disagreement("attention", functools.partial(pytest.fail, "checked")) is None
        kernels.implementations("attention")
