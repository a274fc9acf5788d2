"""The one table of problem sizes: parity tests, benchmarks, ahead-of-time compilation and tuning all read it.

A workload is an operation at one set of sizes, with the suites that run it and the devices it is meant for:

    suites      parity    every run of the tests          long   the long run only
                bench     timed                           aot    cross-compiled for accelerators
                tune      block sizes are measured on it  ladder the kernels of `kernels/tutorial` are compared on it
    devices     small (any, interpreted too), cpu, h100, tpu

MODEL_* workloads have the sizes of published models; EDGE_CASES_* are there because they hurt: 1, 7, 127, 129, T != S,
windows of one and past the end, groups without rows. `sweep` names the axes over which a workload belongs to a plot.
"""

from dantinox.kernels.workloads.attention import EDGE_CASES_ATTENTION, MODEL_ATTENTION
from dantinox.kernels.workloads.decode_attention import KV_CACHES
from dantinox.kernels.workloads.grouped_matmul import EDGE_CASES_GROUPED_MATMUL, MODEL_GROUPED_MATMUL
from dantinox.kernels.workloads.moe import EXPERTS
from dantinox.kernels.workloads.types import Attention, Decode, GroupedMatmul, MoE, Workload

__all__ = ["DEVICES", "ROWS", "SUITES", "Attention", "Decode", "GroupedMatmul", "MoE", "Workload", "get", "select"]
SUITES = ("parity", "long", "bench", "aot", "tune", "ladder")
DEVICES = ("small", "cpu", "h100", "tpu")
ROWS: tuple[Workload, ...] = (
    *EDGE_CASES_ATTENTION,
    *MODEL_ATTENTION,
    *EDGE_CASES_GROUPED_MATMUL,
    *MODEL_GROUPED_MATMUL,
    *EXPERTS,
    *KV_CACHES,
)


def select(op: str, suite: str, device: str | None = None) -> list[Workload]:
    """The workloads of an operation in a suite, and for a device where one is named.

    Raises:
        ValueError: no such operation, suite or device.
    """
    for what, value, allowed in (
        ("op", op, sorted({row.op for row in ROWS})),
        ("suite", suite, SUITES),
        ("device", device, (*DEVICES, None)),
    ):
        if value not in allowed:
            raise ValueError(f"{what} is {value!r}; allowed: {', '.join(map(str, allowed))}")
    chosen = [row for row in ROWS if row.op == op and suite in row.suites]
    return [row for row in chosen if device is None or device in row.devices]


def get(op: str, name: str) -> Workload:
    """The row of that name.

    Raises:
        ValueError: there is none; the message lists the names.
    """
    mine = {row.name: row for row in ROWS if row.op == op}
    if name not in mine:
        raise ValueError(f"{op} has no spec {name!r}; allowed: {', '.join(mine)}")
    return mine[name]
