"""A row, an implementation and a direction become one function of arrays and the shapes to compile it at."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from bench.aot import baselines
from bench.aot.cases import Case
from dantinox import kernels
from dantinox.kernels import tutorial, workloads

Shape = tuple[tuple[int, ...], Any]


@dataclass(frozen=True)
class Program:
    """`function(*arguments)`, all of them arrays of the shapes and dtypes given."""

    function: Callable[..., Any]
    shapes: tuple[Shape, ...]
    donate: tuple[int, ...] = ()


def build(case: Case) -> Program:
    """The program of a case.

    Raises:
        NotImplementedError: the implementation does not take this row; the message says why.
    """
    workload = workloads.get(case.op, case.spec)
    if case.implementation in baselines.PEERS:
        peer = baselines.PEERS[case.implementation]
        if case.dtype not in (taken := peer.takes(case.op)):
            raise NotImplementedError(f"no {case.dtype}, only {' and '.join(taken)}")
        call = peer.build[case.op](workload)
    else:
        call = _ours(workload, case.implementation)
    if case.op == "decode_attention":
        return _decode(workload, case.dtype, call)

    names, aux = list(workload.shapes()), _flat(workload.integer_inputs())
    shapes = [(shape, jnp.dtype(case.dtype)) for shape in workload.shapes().values()]
    shapes += [(ids.shape, ids.dtype) for ids in aux.values()]

    def forward(*arrays: jax.Array) -> jax.Array:
        return call(dict(zip(names, arrays)), _nested(dict(zip(aux, arrays[len(names) :]))))

    if case.direction == "forward":
        return Program(forward, tuple(shapes))

    def both(cotangent: jax.Array, *arrays: jax.Array) -> tuple[Any, ...]:
        ids = arrays[len(names) :]
        out, pull = jax.vjp(lambda *inputs: forward(*inputs, *ids), *arrays[: len(names)])
        return out, *pull(cotangent.astype(out.dtype))

    return Program(both, ((workload.out_shape(), jnp.dtype(case.dtype)), *shapes))


def _ours(workload: workloads.Workload, implementation: str) -> Callable[..., Any]:
    operation = getattr(kernels, workload.op)
    if implementation in tutorial.RUNGS:
        run = tutorial.rung(implementation)
        return lambda inputs, aux: run(**inputs, **aux, **workload.options())

    def call(inputs: dict[str, jax.Array], aux: dict[str, Any]) -> Any:
        return operation(**inputs, **aux, **workload.options(), implementation=implementation)

    return call


def _decode(workload: workloads.Decode, dtype: str, call: Callable[..., Any]) -> Program:
    """One step, with the cache donated as generation does: an implementation that copies it shows in the temp bytes."""
    names = list(workload.shapes())
    shapes = [(shape, jnp.dtype(dtype)) for shape in workload.shapes().values()]
    first = len(names)
    rings = workload.cache(dtype) | {"length": ((workload.B,), "int32")}
    shapes += [(shape, jnp.dtype(kept)) for shape, kept in rings.values()]

    def step(*arrays: jax.Array) -> Any:
        cache = kernels.KVCache(**dict(zip(rings, arrays[first:])))
        return call(dict(zip(names, arrays)), {"cache": cache})

    return Program(step, tuple(shapes), donate=tuple(range(first, len(shapes))))


def _flat(aux: dict[str, Any]) -> dict[str, Any]:
    """Pairs of arrays under names of their own, because a program takes arrays."""
    flat: dict[str, Any] = {}
    for name, value in aux.items():
        flat |= {f"{name}.{i}": v for i, v in enumerate(value)} if isinstance(value, tuple) else {name: value}
    return flat


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    aux: dict[str, Any] = {}
    for name, value in flat.items():
        whole, dot, _ = name.partition(".")
        aux[whole] = (*aux.get(whole, ()), value) if dot else value
    return aux
