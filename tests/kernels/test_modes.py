"""Every operation and implementation under JAX's switches and transformations, outputs and gradients.

The default run has each switch under jit and each transformation without a switch; the slow tests have the rest of the
matrix. Meshes have one device: their types are those of many (`test_many_devices.py` has the values).
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bench.verification.fast_compile import FAST_COMPILE_OPTIONS
from dantinox import kernels
from dantinox.kernels import workloads
from tests.helpers import cases, tolerance

Tree = Any
SWITCHES: dict[str, Callable[[], Any]] = {
    "default": contextlib.nullcontext,
    "x64": lambda: jax.enable_x64(True),
    "rank promotion raises": lambda: jax.numpy_rank_promotion("raise"),
    "strict dtype promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "debug nans": lambda: jax.debug_nans(True),
    "debug infs": lambda: jax.debug_infs(True),
    "disable jit": lambda: jax.disable_jit(True),
    "highest matmul precision": lambda: jax.default_matmul_precision("highest"),
}
IMPLEMENTATIONS = ("reference", "xla", "pallas")


@dataclasses.dataclass(frozen=True)
class Call:
    """A small call of an operation.

    Attributes:
        row: its sizes.
        specs: partition spec of each argument over the mesh axis "data"; none for what every device holds whole.
        symbols: symbolic shape of each argument.
    """

    row: workloads.Workload
    specs: dict[str, P]
    symbols: dict[str, str]


DATA, WHOLE = P("data"), P()
CALLS = {
    "attention": Call(
        cases.attention(5, 5, B=2, H=4, K=2, D=4, window=3, gate="head", softcap=2.0, segments="packed"),
        dict.fromkeys(("q", "k", "v", "gate", "segment_ids", "o"), DATA),
        {"q": "b, t, 4, 4", "k": "b, t, 2, 4", "v": "b, t, 2, 4", "gate": "b, t, 4, 1", "segment_ids": "b, t"},
    ),
    "grouped_matmul": Call(
        cases.make_workload(workloads.GroupedMatmul, N=7, M=3, F=4, E=3, sizes=(2, 0, 4)),
        {"x": DATA, "w": WHOLE, "group_sizes": WHOLE, "o": DATA},
        {"x": "b, 3", "w": "3, 3, 4", "group_sizes": "3"},
    ),
    "moe_mlp": Call(
        cases.make_workload(workloads.MoE, N=6, M=3, F=4, E=3, k=2),
        {"x": DATA, "expert_ids": DATA, "expert_weights": DATA, "o": DATA},
        {"x": "b, 3", "w_gate": "3, 3, 4", "w_up": "3, 3, 4", "w_down": "3, 4, 3", "expert_ids": "b, 2",
         "expert_weights": "b, 2"},
    ),
    "linear_cross_entropy": Call(
        cases.make_workload(workloads.LinearCrossEntropy, N=7, M=3, V=5, softcap=2.0, z_loss=0.1, absent="some"),
        {"h": DATA, "targets": DATA, "o": DATA},
        {"h": "b, 3", "w": "5, 3", "targets": "b", "o": "b"},
    ),
    "decode_attention": Call(
        cases.make_workload(
            workloads.Decode, lengths=(3, 9), C=8, H=4, K=2, D=4, window=5, gate="head", softcap=2.0, sinks=True
        ),
        {"sinks": WHOLE},
        {"q": "b, 4, 4", "k": "b, 2, 4", "v": "b, 2, 4", "gate": "b, 4, 1", "sinks": "4", "cache.k": "b, 2, c, 4",
         "cache.v": "b, 2, c, 4", "length": "b"},
    ),
}  # fmt: skip


@functools.cache
def arguments(op: str, seed: int = 0) -> tuple[Tree, Tree, Tree]:
    """(differentiable inputs, other inputs, cotangent) in NumPy: float32 and int32."""
    inputs, aux, dout = cases.draw(CALLS[op].row, seed)
    inputs = {name: np.float32(x) for name, x in inputs.items()}
    if op == "decode_attention":
        shape, rng = CALLS[op].row.cache_shape(), np.random.default_rng(seed)
        aux = aux | {f"cache.{name}": np.float32(rng.standard_normal(shape)) for name in "kv"}
    return inputs, aux, np.float32(dout)


@functools.cache
def expected(op: str, seed: int = 0) -> Tree:
    """The results of the reference in float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, arguments(op, seed))
        return jax.tree.map(np.asarray, fast_jit(functools.partial(run, op, "reference"))(*wide))


def run(
    op: str, implementation: str, inputs: Tree, aux: Tree, dout: Any, wrap: Callable[..., Any] = lambda f: f
) -> Tree:
    """{"o": output, "dNAME": gradient of each input}; of decode attention the output and the cache.

    Args:
        op: the operation.
        implementation: its implementation.
        inputs, aux, dout: see `arguments`.
        wrap: transforms the call itself, such as `jax.checkpoint`.
    """
    options = CALLS[op].row.options()
    if op == "decode_attention":
        cache = kernels.KVCache(aux["cache.k"], aux["cache.v"], aux["length"])
        o, cache = wrap(functools.partial(kernels.decode_attention, **options, implementation=implementation))(
            cache=cache, **inputs
        )
        return {"o": o, "cache.k": cache.k, "cache.v": cache.v, "length": cache.length}
    f = functools.partial(getattr(kernels, op), **options, implementation=implementation)
    return tolerance.output_and_gradients(wrap(lambda inputs: f(**inputs, **aux)), inputs, dout)


def assert_right(op: str, result: Tree, seed: int = 0) -> None:
    """To float32's rounding; `test_implementation_matches_reference` has the error bound."""
    exact = expected(op, seed)
    assert set(result) == set(exact)
    for name, x in result.items():
        np.testing.assert_allclose(x, exact[name], rtol=1e-5, atol=2e-6, err_msg=name)


def stacked(op: str) -> Tree:
    return jax.tree.map(lambda *x: np.stack(x), arguments(op, 0), arguments(op, 1))


def assert_both_right(op: str, results: Tree) -> None:
    for seed in (0, 1):
        assert_right(op, jax.tree.map(lambda x, seed=seed: x[seed], results), seed)


def call_eagerly(op: str, implementation: str) -> None:
    assert_right(op, run(op, implementation, *jax.tree.map(jnp.asarray, arguments(op))))


def call_jitted(op: str, implementation: str) -> None:
    assert_right(op, fast_jit(functools.partial(run, op, implementation))(*arguments(op)))


def call_jit_in_jit(op: str, implementation: str) -> None:
    inner = jax.jit(functools.partial(run, op, implementation))
    assert_right(op, fast_jit(lambda *x: inner(*x))(*arguments(op)))


def call_vmapped(op: str, implementation: str) -> None:
    assert_both_right(op, fast_jit(jax.vmap(functools.partial(run, op, implementation)))(*stacked(op)))


def call_in_scan(op: str, implementation: str) -> None:
    def step(carry: None, arrays: Tree) -> tuple[None, Tree]:
        return carry, run(op, implementation, *arrays)

    assert_both_right(op, fast_jit(lambda *arrays: jax.lax.scan(step, None, arrays)[1])(*stacked(op)))


def call_rematerialized(op: str, implementation: str) -> None:
    call = functools.partial(run, op, implementation, wrap=jax.checkpoint)
    assert_right(op, fast_jit(call)(*arguments(op)))


def one_device_mesh(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((1,), ("data",), axis_types=(kind,), devices=jax.devices()[:1])


def shardings(op: str, arrays: Tree) -> tuple[Tree, Tree]:
    """The partition specs of the arguments and of the results."""
    default = DATA if op == "decode_attention" else WHOLE
    inputs, aux, _ = arrays
    spec = lambda name: CALLS[op].specs.get(name, default)
    in_specs = {name: spec(name) for name in inputs}, {name: spec(name) for name in aux}, spec("o")
    return in_specs, {name: spec(name.removeprefix("d")) for name in expected(op)}


def call_in_shard_map(op: str, implementation: str) -> None:
    arrays = arguments(op)
    in_specs, out_specs = shardings(op, arrays)
    call = functools.partial(run, op, implementation)
    mapped = jax.shard_map(call, mesh=one_device_mesh(AxisType.Auto), in_specs=in_specs, out_specs=out_specs)
    assert_right(op, fast_jit(mapped)(*arrays))


def call_on_explicit_axes(op: str, implementation: str) -> None:
    arrays, mesh = arguments(op), one_device_mesh(AxisType.Explicit)
    in_specs, out_specs = shardings(op, arrays)
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    arrays = jax.tree.map(put, arrays, in_specs)
    with jax.set_mesh(mesh):
        result = fast_jit(functools.partial(run, op, implementation))(*arrays)
    assert_right(op, result)
    for name, x in result.items():
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, out_specs[name]), x.ndim), name


def call_in_pmap(op: str, implementation: str) -> None:
    arrays = jax.tree.map(lambda x: x[None], arguments(op))
    result = jax.pmap(functools.partial(run, op, implementation), devices=jax.devices()[:1])(*arrays)
    assert_right(op, jax.tree.map(lambda x: x[0], result))


def call_exported(op: str, implementation: str) -> None:
    """With a symbolic batch and length, where the implementation does not need the sizes."""
    arrays = arguments(op)
    scope, symbols = export.SymbolicScope(), CALLS[op].symbols
    symbols = {"o": symbols.get("q", symbols.get("x"))} | symbols
    if op == "grouped_matmul":
        symbols["o"] = "b, 4"

    def abstract(name: str, x: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(export.symbolic_shape(symbols[name], scope=scope), x.dtype)

    inputs, aux, dout = arrays
    shapes = (*({name: abstract(name, x) for name, x in group.items()} for group in (inputs, aux)), abstract("o", dout))
    exporter = export.export(jax.jit(functools.partial(run, op, implementation)))
    if implementation == "pallas":
        with pytest.raises(NotImplementedError, match=r"implementation='xla' takes symbolic sizes"):
            exporter(*shapes)
        return
    assert_right(op, exporter(*shapes).call(*arrays))


def call_forward_mode(op: str, implementation: str) -> None:
    """A directional derivative, or JAX's sentence that there is none."""
    inputs, aux, dout = arguments(op)
    tangents = {name: np.float32(np.random.default_rng(2).standard_normal(x.shape)) for name, x in inputs.items()}
    forward = lambda inputs: run(op, implementation, inputs, aux, None)["o"]
    try:
        _, derivative = jax.jvp(forward, (inputs,), (tangents,))
    except (TypeError, NotImplementedError) as refusal:
        assert implementation != "reference"
        assert "forward-mode" in str(refusal) or "implementation=" in str(refusal)
        return
    if op != "decode_attention":
        exact = expected(op)
        along = sum(np.sum(np.asarray(exact[f"d{name}"]) * tangents[name]) for name in inputs)
        assert float(np.sum(np.float64(derivative) * dout)) == pytest.approx(along, rel=1e-4, abs=1e-4)


TRANSFORMATIONS = {
    "eager": call_eagerly,
    "jit": call_jitted,
    "jit in jit": call_jit_in_jit,
    "vmap": call_vmapped,
    "scan": call_in_scan,
    "remat": call_rematerialized,
    "shard_map": call_in_shard_map,
    "explicit axes": call_on_explicit_axes,
    "pmap": call_in_pmap,
    "export": call_exported,
    "jvp": call_forward_mode,
}


def fast_jit(f: Callable[..., Any]) -> Callable[..., Any]:
    return jax.jit(f, compiler_options=FAST_COMPILE_OPTIONS)


def is_slow(switch: str, transformation: str, implementation: str) -> bool:
    """Return whether only the long run has a mode: two changes at once, or a transformation of plain jnp."""
    if implementation == "reference":
        return transformation != "jit" or switch == "disable jit"
    return switch != "default" and transformation != "jit"


def parameters() -> list[Any]:
    """(switch, transformation, op, implementation)."""
    pairs = [(switch, transformation) for switch in SWITCHES for transformation in TRANSFORMATIONS]
    return [
        pytest.param(
            switch,
            transformation,
            op,
            implementation,
            id=f"{switch}-{transformation}-{op}-{implementation}",
            marks=pytest.mark.slow if is_slow(switch, transformation, implementation) else (),
        )
        for switch, transformation in pairs
        for op in CALLS
        for implementation in IMPLEMENTATIONS
    ]


@pytest.mark.parametrize(("switch", "transformation", "op", "implementation"), parameters())
@pytest.mark.sampled(128)
def test_operation_is_right_in_every_mode(switch, transformation, op, implementation):
    expected(op, 0), expected(op, 1)  # computed without the switch
    with SWITCHES[switch]():
        TRANSFORMATIONS[transformation](op, implementation)


@pytest.mark.parametrize("op", ["attention", "grouped_matmul", "moe_mlp", "linear_cross_entropy"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.sampled(32)
def test_second_derivative_is_right_or_refused(op, implementation):
    inputs, aux, dout = arguments(op)

    def slope(inputs: Tree, implementation: str) -> jax.Array:
        gradients = run(op, implementation, inputs, aux, jnp.asarray(dout, jax.tree.leaves(inputs)[0].dtype))
        return sum(jnp.sum(jnp.sin(x)) for name, x in gradients.items() if name != "o")

    if implementation == "pallas":
        with pytest.raises(NotImplementedError, match=rf"^{op}: implementation='pallas' has no second derivative"):
            jax.grad(slope)(inputs, implementation)
        return
    found = fast_jit(jax.grad(functools.partial(slope, implementation=implementation)))(inputs)
    with jax.enable_x64(True):
        wide = {name: np.float64(x) for name, x in inputs.items()}
        exact = jax.grad(functools.partial(slope, implementation="reference"))(wide)
    for name, x in found.items():
        np.testing.assert_allclose(x, exact[name], rtol=1e-4, atol=1e-4, err_msg=name)
