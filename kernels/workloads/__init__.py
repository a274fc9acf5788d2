"""The one table of shapes: parity tests, benchmarks, ahead-of-time compilation and tuning all read it.

A row is an operation at one set of sizes, with the purposes it serves and the machines it is for:

    purposes    parity  every run of the tests     long  the long run only
                bench   timed                      aot   compiled for machines that are not there
                tune    tile sizes are measured on it
    ladder  the kernels of kernels/tutorial are compared on it
    machines    small (any, interpreted too), cpu, h100, tpu

Real rows carry the sizes of published models; the others are there because they hurt: 1, 7, 127, 129, T != S, windows
of one and past the end, groups without rows. `sweep` names the axes over which
a row belongs to a plot.
"""

from dantinox.kernels.workloads.attention import NASTY_ATTENTION, REAL_ATTENTION
from dantinox.kernels.workloads.decode_attention import RINGS
from dantinox.kernels.workloads.grouped_matmul import NASTY_GROUPS, REAL_GROUPS
from dantinox.kernels.workloads.moe import EXPERTS
from dantinox.kernels.workloads.types import Attention, Decode, GroupedMatmul, MoE, Spec

__all__ = ["MACHINES", "PURPOSES", "ROWS", "Attention", "Decode", "GroupedMatmul", "MoE", "Spec", "find", "rows"]
PURPOSES = ("parity", "long", "bench", "aot", "tune", "ladder")
MACHINES = ("small", "cpu", "h100", "tpu")
ROWS: tuple[Spec, ...] = (*NASTY_ATTENTION, *REAL_ATTENTION, *NASTY_GROUPS, *REAL_GROUPS, *EXPERTS, *RINGS)


def rows(op: str, purpose: str, machine: str | None = None) -> list[Spec]:
    """The rows of an operation for a purpose, and for a machine where one is named.

    Raises:
        ValueError: no such operation, purpose or machine.
    """
    for what, value, allowed in (
        ("op", op, sorted({row.op for row in ROWS})),
        ("purpose", purpose, PURPOSES),
        ("machine", machine, (*MACHINES, None)),
    ):
        if value not in allowed:
            raise ValueError(f"{what} is {value!r}; allowed: {', '.join(map(str, allowed))}")
    chosen = [row for row in ROWS if row.op == op and purpose in row.purposes]
    return [row for row in chosen if machine is None or machine in row.machines]


def find(op: str, name: str) -> Spec:
    """The row of that name.

    Raises:
        ValueError: there is none; the message lists the names.
    """
    mine = {row.name: row for row in ROWS if row.op == op}
    if name not in mine:
        raise ValueError(f"{op} has no spec {name!r}; allowed: {', '.join(mine)}")
    return mine[name]
