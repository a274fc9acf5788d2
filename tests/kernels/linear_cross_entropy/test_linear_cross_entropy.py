"""Linear cross-entropy: the reference against Python loops, every implementation against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dantinox import kernels
from dantinox.kernels import workloads
from dantinox.kernels.ops.linear_cross_entropy import xla
from tests.helpers import cases, random_shapes, tolerance
from tests.helpers.jaxpr_walk import largest_intermediate

OP = "linear_cross_entropy"
IMPLEMENTATIONS = tolerance.runnable_implementations(OP)


def row(N: int, M: int, V: int, **options) -> workloads.LinearCrossEntropy:
    return cases.make_workload(workloads.LinearCrossEntropy, N=N, M=M, V=V, **options)


def loops(h, w, targets, softcap=None, z_loss=0.0):
    """(loss, d loss[n] / d s[n, v]) one row and one logit at a time."""
    N, V = len(h), len(w)
    loss, slope = np.zeros(N), np.zeros((N, V))
    for n in range(N):
        if not 0 <= targets[n] < V:
            continue
        products = [sum(h[n, m] * w[v, m] for m in range(h.shape[1])) for v in range(V)]
        s = products if softcap is None else [softcap * np.tanh(x / softcap) for x in products]
        top = max(s)
        total = sum(np.exp(x - top) for x in s)
        lse = top + np.log(total)
        loss[n] = lse - s[targets[n]] + z_loss * lse**2
        for v in range(V):
            slope[n, v] = (1 + 2 * z_loss * lse) * np.exp(s[v] - top) / total - (v == targets[n])
            slope[n, v] *= 1 if softcap is None else 1 / np.cosh(products[v] / softcap) ** 2
    return loss, slope


def expected_by_loops(inputs, targets, dout, **options):
    """The loss and its gradients, from `loops`."""
    loss, slope = loops(**inputs, targets=targets, **options)
    slope = slope * np.where(targets >= 0, dout, 0)[:, None]
    return {"o": loss, "dh": slope @ inputs["w"], "dw": slope.T @ np.nan_to_num(inputs["h"])}


@pytest.mark.parametrize("options", [{}, {"softcap": 1.5}, {"z_loss": 0.2}, {"softcap": 3.0, "z_loss": 0.1}], ids=str)
@pytest.mark.parametrize("targets", [[0, 3, 2], [-1, 3, 0], [-5, -1, -1]], ids=str)
def test_reference_matches_python_loops(options, targets):
    inputs, _, dout = cases.draw(row(3, 2, 4))
    targets = np.int32(targets)
    with jax.enable_x64(True):
        got = tolerance.program(OP, "reference", tuple(options.items()))(inputs, {"targets": targets}, dout)
    for name, expected in expected_by_loops(inputs, targets, dout, **options).items():
        np.testing.assert_allclose(got[name], expected, rtol=1e-11, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("case", "dtype"), cases.workload_parameters(OP))
@pytest.mark.sampled(20)
def test_implementation_matches_reference(case, dtype, implementation):
    inputs, aux, dout = cases.draw(case)
    got = tolerance.assert_matches_reference(
        OP, implementation, inputs, dout, dtype, aux=aux, options=cases.options(case)
    )
    assert got["o"].dtype == jnp.float32
    for name in ("o", "dh"):
        assert not np.any(tolerance.to_float64(got[name])[aux["targets"] < 0]), f"{name}: rows that take no part"


@random_shapes.examples(6)
@given(
    implementation=st.sampled_from(IMPLEMENTATIONS),
    shape=random_shapes.shapes(12),
    softcap=st.sampled_from([None, 0.5, 4.0]),
    z_loss=st.sampled_from([0.0, 0.1]),
    absent=st.sampled_from(["none", "some"]),
    seed=st.integers(0, 99),
)
def test_random_sizes_match_python_loops(implementation, shape, softcap, z_loss, absent, seed):
    N, M, V = (int(size) for size in shape.integers(1, (20, 6, 40)))
    options = {"softcap": softcap, "z_loss": z_loss}
    inputs, aux, dout = cases.draw(row(N, M, V, absent=absent), seed)
    narrow = {name: np.float32(x) for name, x in inputs.items()}
    program = tolerance.program(OP, implementation, tuple(options.items()))
    for form, run in tolerance.kernel_variants(implementation, program).items():
        got = run(narrow, aux, np.float32(dout))
        for name, value in expected_by_loops(inputs, aux["targets"], dout, **options).items():
            np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=2e-4, err_msg=f"{form}: {name}")
    random_shapes.clear_programs()


def force_tiles(monkeypatch, block_v, block_n=4):
    """Give `xla` small tiles; with a block_v of all columns it has one."""
    monkeypatch.setattr(xla, "choose_block_v", lambda N: block_v)
    monkeypatch.setattr(xla, "choose_block_n", lambda V: block_n)
    monkeypatch.setattr(xla, "MAX_BLOCK_V", block_v)


OPTIONS = {"softcap": 2.0, "z_loss": 0.1}


@functools.cache
def program_in_tiles(block_v, block_n):
    """The loss and its gradients by `xla`, in the tiles that are set when it runs first."""

    def run(inputs, targets, dout):
        f = functools.partial(kernels.linear_cross_entropy, targets=targets, **OPTIONS, implementation="xla")
        return tolerance.output_and_gradients(lambda x: f(**x), inputs, dout)

    return jax.jit(run)


def run_in_tiles(monkeypatch, inputs, targets, dout, block_v=7, block_n=4):
    force_tiles(monkeypatch, block_v, block_n)
    narrow = {name: np.float32(x) for name, x in inputs.items()}
    return program_in_tiles(block_v, block_n)(narrow, targets, np.float32(dout))


@pytest.mark.parametrize("block_n", [1, 4, 9], ids="block_n={}".format)
@pytest.mark.parametrize("block_v", [7, 50], ids="block_v={}".format)
@pytest.mark.parametrize("cotangents", ["equal", "random"])
@pytest.mark.sampled(6)
def test_tile_size_does_not_change_xla(monkeypatch, block_v, block_n, cotangents):
    inputs, aux, dout = cases.draw(row(9, 5, 37, absent="some"))
    if cotangents == "equal":  # among the rows that take part
        dout = np.where(aux["targets"] >= 0, -0.3, dout)
    got = run_in_tiles(monkeypatch, inputs, **aux, dout=dout, block_v=block_v, block_n=block_n)
    for name, value in expected_by_loops(inputs, aux["targets"], dout, **OPTIONS).items():
        np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("value", [0, 0.7, np.inf, np.nan])
def test_rows_without_part_do_not_affect_tiles(monkeypatch, value):
    """Neither their values nor their cotangents do; an infinite or NaN cotangent of a row with part reaches dw."""
    inputs, aux, _ = cases.draw(row(9, 5, 37, absent="some"))
    run = functools.partial(run_in_tiles, monkeypatch)
    absent = aux["targets"] < 0
    clean = run(inputs, **aux, dout=np.where(absent, 0, 0.7))
    filled = inputs | {"h": np.where(absent[:, None], value, inputs["h"])}
    tolerance.assert_bit_equal(clean, run(filled, **aux, dout=np.where(absent, value, 0.7)))
    assert absent.any() and not absent.all()
    if not np.isfinite(value):
        assert not np.isfinite(run(inputs, **aux, dout=np.full(9, value))["dw"]).any()
    nothing = run(inputs, np.full(9, -1, np.int32), dout=np.full(9, value))
    assert not any(np.any(x) for x in nothing.values())


def test_equal_cotangents_take_three_products(monkeypatch):
    """Those of rows that take part: dw is computed again for unequal ones only, here as NaN."""
    inputs, _, dout = cases.draw(row(9, 5, 37))
    targets = np.where(np.arange(9) % 4 == 0, -1, 3).astype(np.int32)
    force_tiles(monkeypatch, 7)
    monkeypatch.setattr(xla, "_column_tiles_gradients", lambda h, w, *_: (h * jnp.nan, w * jnp.nan))
    run = jax.jit(program_in_tiles.__wrapped__(7, 4))
    narrow = {name: np.float32(x) for name, x in inputs.items()}
    assert np.isfinite(run(narrow, targets, np.full(9, 0.2, np.float32))["dw"]).all()
    assert np.isnan(run(narrow, targets, np.float32(dout))["dw"]).all()


@pytest.mark.parametrize("transformation", ["vmap", "scan", "remat", "shard_map", "x64", "ranks", "export"])
@pytest.mark.sampled(16)
def test_tiles_of_rows_below_transformations(monkeypatch, transformation):
    inputs, aux, dout = cases.draw(row(10, 5, 37, absent="some"))
    wide = transformation == "x64"
    dtype = np.float64 if wide else np.float32
    h, w, targets, dout = inputs["h"].astype(dtype), inputs["w"].astype(dtype), aux["targets"], dout.astype(dtype)
    force_tiles(monkeypatch, 7)

    def f(h, w, targets, dout):
        o, pull = jax.vjp(
            lambda h, w: kernels.linear_cross_entropy(h, w, targets, **OPTIONS, implementation="xla"), h, w
        )
        return o, *pull(dout)

    def two(function):
        return lambda *args: [x[1] for x in function(*(jnp.stack([jnp.ones_like(x), x]) for x in args))]

    mesh = jax.make_mesh((1,), ("x",), (jax.sharding.AxisType.Auto,))
    P = jax.sharding.PartitionSpec
    symbols = jax.export.symbolic_shape("n, 5")
    shapes = [jax.ShapeDtypeStruct(s, d) for s, d in ((symbols, dtype), (w.shape, dtype), (symbols[:1], np.int32))]
    form = {
        "vmap": lambda: two(jax.vmap(f)),
        "scan": lambda: two(lambda *args: jax.lax.scan(lambda c, x: (c, f(*x)), 0, args)[1]),
        "remat": lambda: jax.checkpoint(f),
        "shard_map": lambda: jax.shard_map(
            f, mesh=mesh, in_specs=(P("x"), P(), P("x"), P("x")), out_specs=(P("x"), P("x"), P())
        ),
        "x64": lambda: f,
        "ranks": lambda: f,
        "export": lambda: jax.export.export(jax.jit(f))(*shapes, jax.ShapeDtypeStruct(symbols[:1], dtype)).call,
    }[transformation]
    with jax.enable_x64(wide), jax.numpy_rank_promotion("raise"):
        got = jax.jit(form())(h, w, targets, dout)
    expected = expected_by_loops(inputs, targets, dout, **OPTIONS)
    for name, value, actual in zip(expected, expected.values(), got, strict=True):
        assert actual.dtype == dtype
        scale = 1e-10 if wide else 1e-4
        np.testing.assert_allclose(actual, value, rtol=scale, atol=scale, err_msg=name)


def test_xla_keeps_a_tile_of_logits():
    for N in (1, 100, 8192, 10**6):
        block_v = xla.choose_block_v(N)
        assert xla.MIN_BLOCK_V <= block_v <= xla.MAX_BLOCK_V and block_v & (block_v - 1) == 0
        assert N * block_v <= max(xla.MAX_TILE_LOGITS, N * xla.MIN_BLOCK_V)
    for V in (1, 100, 32_768, 151_936):
        block_n = xla.choose_block_n(V)
        assert block_n >= xla.MIN_BLOCK_N_CPU and block_n & (block_n - 1) == 0
        assert block_n * V <= max(xla.MAX_TILE_LOGITS, xla.MIN_BLOCK_N_CPU * V)
    N, M, V = 8192, 16, 60_000
    h, w = jax.ShapeDtypeStruct((N, M), jnp.float32), jax.ShapeDtypeStruct((V, M), jnp.float32)
    targets = jax.ShapeDtypeStruct((N,), jnp.int32)
    f = functools.partial(kernels.linear_cross_entropy, implementation="xla")
    jaxpr = jax.make_jaxpr(f)(h, w, targets)
    assert largest_intermediate(jaxpr) <= xla.MAX_TILE_LOGITS < N * V // 16
    jaxpr = jax.make_jaxpr(jax.grad(lambda h, w, targets: f(h, w, targets).mean(), argnums=(0, 1)))(h, w, targets)
    assert largest_intermediate(jaxpr) <= max(xla.MAX_TILE_LOGITS, xla.MIN_BLOCK_N_CPU * V)


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_rows_without_part_do_not_affect_results(implementation):
    case = row(140, 24, 300, softcap=2.0, z_loss=0.1, absent="some")
    inputs, aux, dout = cases.draw(case)
    absent = aux["targets"] < 0
    program = tolerance.program(OP, implementation, cases.options(case))
    for form, run in tolerance.kernel_variants(implementation, program).items():
        results = []
        for fill in (0, np.nan, np.inf):
            filled = {"h": np.float32(np.where(absent[:, None], fill, inputs["h"])), "w": np.float32(inputs["w"])}
            results.append(run(filled, aux, np.float32(np.where(absent, fill, dout))))
        for poisoned in results[1:]:
            tolerance.assert_bit_equal(results[0], poisoned)
        assert absent.any() and not np.any(np.asarray(results[0]["o"])[absent]), form


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_target_past_the_vocabulary_takes_no_part(implementation):
    """On a device its value is not read, so it cannot raise."""
    case = row(12, 8, 20)
    inputs, aux, dout = cases.draw(case)
    narrow = {name: np.float32(x) for name, x in inputs.items()}
    run = tolerance.program(OP, implementation, cases.options(case))
    results = []
    for absent in (-1, 20, 2**31 - 1, -(2**31)):
        targets = jnp.asarray(np.where(np.arange(12) % 4 == 1, absent, aux["targets"]), jnp.int32)
        results.append(run(narrow, {"targets": targets}, np.float32(dout)))
    for other in results[1:]:
        tolerance.assert_bit_equal(results[0], other)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_row_affects_its_own_loss_and_gradient_only(implementation):
    inputs, aux, dout = cases.draw(row(20, 8, 33))
    inputs, changed = {name: np.float32(x) for name, x in inputs.items()}, np.arange(20) == 6
    run = tolerance.program(OP, implementation)
    before = run(inputs, aux, np.float32(dout))
    for fill in (np.nan, np.inf, 60000):
        after = run(inputs | {"h": np.where(changed[:, None], np.float32(fill), inputs["h"])}, aux, np.float32(dout))
        kept = [{name: np.asarray(r[name])[~changed] for name in ("o", "dh")} for r in (before, after)]
        tolerance.assert_bit_equal(*kept)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_two_runs_are_bit_equal(implementation):
    inputs, aux, dout = cases.draw(row(129, 40, 300, absent="some"))
    run = tolerance.program(OP, implementation)
    arguments = {name: np.float32(x) for name, x in inputs.items()}, aux, np.float32(dout)
    tolerance.assert_bit_equal(run(*arguments), run(*arguments))


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
@pytest.mark.sampled(2)
def test_logits_beyond_the_range_of_exponentials(implementation):
    """Logits of 1e4 in the first of several tiles: their exponentials overflow float32, the loss does not."""
    h = np.float32([[100.0], [-100.0], [3.0]])
    w = np.float32(np.concatenate([[0.0, 100.0, 120.0, -7.0], np.linspace(-1, 1, xla.MAX_BLOCK_V)]))[:, None]
    targets, dout = np.int32([2, 2, 0]), np.float32([1, 1, 1])
    expected = expected_by_loops({"h": np.float64(h), "w": np.float64(w)}, targets, dout)
    run, arrays = tolerance.program(OP, implementation), ({"h": h, "w": w}, {"targets": targets})
    got = run(*arrays, dout)
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    without_gradients = run(*arrays, None)["o"]
    np.testing.assert_allclose(without_gradients, expected["o"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.sampled(2)
def test_float16_gradients_of_a_mean_do_not_vanish(implementation):
    """Each logit's gradient is below float16's least number, and their sums are not."""
    N, M, V = 64, 8, 4000
    rng = np.random.default_rng(0)
    inputs = {"h": np.float16(rng.standard_normal((N, M))), "w": np.float16(rng.random((V, M)) + 1)}
    targets, dout = np.int32(rng.integers(0, V, N)), np.full(N, 2.0**-14, np.float32)
    got = tolerance.program(OP, implementation)(inputs, {"targets": targets}, dout)
    wide = {name: np.float32(x) for name, x in inputs.items()}
    expected = tolerance.program(OP, "reference")(wide, {"targets": targets}, dout)
    np.testing.assert_allclose(np.float32(got["dh"]), expected["dh"], rtol=2e-3, atol=2.0**-24)


@pytest.mark.parametrize("implementation", ["auto", "reference", *IMPLEMENTATIONS])
def test_sizes_of_zero(implementation):
    f = functools.partial(kernels.linear_cross_entropy, implementation=implementation)
    no_rows = f(jnp.ones((0, 3)), jnp.ones((4, 3)), jnp.zeros(0, jnp.int32))
    assert no_rows.shape == (0,) and no_rows.dtype == jnp.float32
    no_words = f(jnp.ones((2, 3), jnp.bfloat16), jnp.ones((0, 3), jnp.bfloat16), jnp.zeros(2, jnp.int32))
    np.testing.assert_array_equal(no_words, np.zeros(2, np.float32))
    no_width = f(jnp.ones((2, 0)), jnp.ones((4, 0)), jnp.array([1, -1]))
    np.testing.assert_allclose(no_width, [np.log(4), 0], rtol=1e-6)
