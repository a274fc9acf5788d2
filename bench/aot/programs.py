"""Build the program of a case: a function of arrays, and the shapes to compile it at."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from bench.aot import baselines
from bench.aot.cases import Case
from dantinox import kernels
from dantinox.kernels import dispatch, tutorial, workloads
from dantinox.kernels.ops.moe.pallas_tpu import TpuExpertsKernels

Shape = tuple[tuple[int, ...], Any]


@dataclass(frozen=True)
class Program:
    """A function to compile.

    Attributes:
        function: takes arrays only.
        shapes: (shape, dtype) of each argument.
        donate: positions of the arguments that are donated.
    """

    function: Callable[..., Any]
    shapes: tuple[Shape, ...]
    donate: tuple[int, ...] = ()


def build(case: Case) -> Program:
    """Build the program of a case.

    Raises:
        NotImplementedError: the implementation does not support this workload; the message says why.
    """
    workload = workloads.get(case.op, case.spec)
    if case.implementation in baselines.BASELINES:
        baseline = baselines.BASELINES[case.implementation]
        if case.dtype not in (supported := baseline.dtypes_of(case.op)):
            raise NotImplementedError(f"no {case.dtype}, only {' and '.join(supported)}")
        return _program(workload, baseline.build[case.op](workload), case.dtype, case.direction)
    return build_workload(workload, case.implementation, case.dtype, case.direction)


def build_workload(workload: workloads.Workload, implementation: str, dtype: str, direction: str) -> Program:
    """Build the program of one of our implementations for a workload, which need not be in the table."""
    return _program(workload, _implementation(workload, implementation), dtype, direction)


def _program(workload: workloads.Workload, call: Callable[..., Any], dtype: str, direction: str) -> Program:
    """Build the program of a call, by itself or with its gradients."""
    if isinstance(workload, workloads.Decode):
        return _decode_program(workload, dtype, call)

    names, aux = list(workload.shapes()), integer_arrays(workload)
    shapes = [(shape, jnp.dtype(dtype)) for shape in workload.shapes().values()]
    shapes += [(ids.shape, ids.dtype) for ids in aux.values()]

    def forward(*arrays: jax.Array) -> jax.Array:
        return call(dict(zip(names, arrays)), _restore_pairs(dict(zip(aux, arrays[len(names) :]))))

    if direction == "forward":
        return Program(forward, tuple(shapes))

    def forward_and_backward(cotangent: jax.Array, *arrays: jax.Array) -> tuple[Any, ...]:
        ids = arrays[len(names) :]
        out, vjp = jax.vjp(lambda *inputs: forward(*inputs, *ids), *arrays[: len(names)])
        return out, *vjp(cotangent.astype(out.dtype))

    return Program(forward_and_backward, ((workload.out_shape(), jnp.dtype(dtype)), *shapes))


def _implementation(workload: workloads.Workload, implementation: str) -> Callable[..., Any]:
    operation = getattr(kernels, workload.op)
    if implementation == "experts_up":
        return _experts_up
    if implementation in tutorial.steps(workload.op):
        step = tutorial.load_step(workload.op, implementation)

        def call_step(inputs: dict[str, jax.Array], aux: dict[str, Any]) -> Any:
            if implementation == "swiglu":  # has a second weight; a schedule does not depend on its values
                inputs = {**inputs, "w_up": inputs["w"]}
            return step(**inputs, **aux, **workload.options())

        return call_step

    def call(inputs: dict[str, jax.Array], aux: dict[str, Any]) -> Any:
        return operation(**inputs, **aux, **workload.options(), implementation=implementation)

    return call


def _experts_up(inputs: dict[str, jax.Array], aux: dict[str, Any]) -> jax.Array:
    """Run one kernel of the mixture of experts by itself, with the same weights twice."""
    up_proj = TpuExpertsKernels(dispatch.current_device()).up_proj
    return up_proj(inputs["x"], inputs["w"], inputs["w"], aux["group_sizes"], save_residuals=False)[0]


def _decode_program(workload: workloads.Decode, dtype: str, call: Callable[..., Any]) -> Program:
    """Build one decoding step that donates the cache, as generation does: a copy of it would show in the temp bytes."""
    names = list(workload.shapes())
    shapes = [(shape, jnp.dtype(dtype)) for shape in workload.shapes().values()]
    first = len(names)
    cache_shapes = workload.cache(dtype) | {"length": ((workload.B,), "int32")}
    shapes += [(shape, jnp.dtype(name)) for shape, name in cache_shapes.values()]

    def step(*arrays: jax.Array) -> Any:
        cache = kernels.KVCache(**dict(zip(cache_shapes, arrays[first:])))
        return call(dict(zip(names, arrays)), {"cache": cache})

    return Program(step, tuple(shapes), donate=tuple(range(first, len(shapes))))


def integer_arrays(workload: workloads.Workload) -> dict[str, Any]:
    """The integer inputs. Each array of a pair has a name of its own, because a program takes arrays only."""
    flat: dict[str, Any] = {}
    for name, value in workload.integer_inputs().items():
        flat |= {f"{name}.{i}": v for i, v in enumerate(value)} if isinstance(value, tuple) else {name: value}
    return flat


def _restore_pairs(flat: dict[str, Any]) -> dict[str, Any]:
    """Undo what `integer_arrays` does to pairs."""
    aux: dict[str, Any] = {}
    for name, value in flat.items():
        stem, dot, _ = name.partition(".")
        aux[stem] = (*aux.get(stem, ()), value) if dot else value
    return aux
