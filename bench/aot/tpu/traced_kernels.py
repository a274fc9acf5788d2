"""Trace a program for a TPU, and find its kernel calls with the values of their tables, without compiling it."""

import jax

from bench.aot import programs
from bench.aot.cases import Case
from bench.aot.hardware import Target
from bench.aot.tpu import block_transfers
from bench.aot.tpu.products import with_skews
from dantinox.kernels import dispatch, workloads


def abstract_mesh(target: Target) -> jax.sharding.AbstractMesh:
    """A mesh that names the chip: Pallas asks for it where a kernel has a pipeline of its own."""
    device = jax.sharding.AbstractDevice(target.kind, 1, "tpu")
    return jax.sharding.AbstractMesh((), (), abstract_device=device)


def calls_by_skew(case: Case, target: Target) -> dict[str, list[block_transfers.KernelCall]]:
    """List the kernel calls of a program, in order, for each way to spread its rows over groups.

    Args:
        case: the program.
        target: the accelerator to trace it for.

    Raises:
        NotImplementedError: the implementation does not support this workload, or data decide which kernels run.
    """
    mesh = abstract_mesh(target)
    with dispatch.target_device(target.platform, target.kind), jax.sharding.use_abstract_mesh(mesh):
        program = programs.build(case)
        jaxpr = jax.make_jaxpr(program.function)(*(jax.ShapeDtypeStruct(*shape) for shape in program.shapes))
    calls = {}
    for skew, workload in with_skews(workloads.get(case.op, case.spec)).items():
        values = list(programs.integer_arrays(workload).values())
        first = len(program.shapes) - len(values)  # they are a program's last arguments
        calls[skew] = block_transfers.kernel_calls(jaxpr, dict(enumerate(values, first)))
    return calls
