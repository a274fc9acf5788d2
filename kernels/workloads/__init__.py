"""The one table of problem sizes: parity tests, benchmarks, ahead-of-time compilation and tuning all read it.

A workload is an operation at one set of sizes, with the suites that run it and the devices it is meant for:

    suites      parity     tests, every run              long       tests, only in the long run
                bench      timed                         aot        cross-compiled for accelerators
                tune       used to tune block sizes      tutorial   used to compare the kernels of `kernels/tutorial`
                features   each feature alone and in pairs, for `python -m bench.judge`
    devices     small (any, in interpret mode too), cpu, h100, tpu

MODEL_* workloads have the sizes of published models; EDGE_CASES_* have sizes that break kernels: 1, 7, 127, 129,
T != S, windows of one and past the end, groups without rows. `sweep` names the axes of the plots that a workload
belongs to.
"""

from dantinox.kernels.workloads.attention import EDGE_CASES_ATTENTION, MODEL_ATTENTION
from dantinox.kernels.workloads.decode_attention import KV_CACHES
from dantinox.kernels.workloads.features import FEATURES
from dantinox.kernels.workloads.grouped_matmul import EDGE_CASES_GROUPED_MATMUL, MODEL_GROUPED_MATMUL
from dantinox.kernels.workloads.linear_cross_entropy import LINEAR_CROSS_ENTROPY
from dantinox.kernels.workloads.moe import EXPERTS
from dantinox.kernels.workloads.types import Attention, Decode, GroupedMatmul, LinearCrossEntropy, MoE, Workload

__all__ = [
    "DEVICES",
    "ROWS",
    "SUITES",
    "Attention",
    "Decode",
    "GroupedMatmul",
    "LinearCrossEntropy",
    "MoE",
    "Workload",
    "get",
    "select",
]
SUITES = ("parity", "long", "bench", "aot", "tune", "tutorial", "features")
DEVICES = ("small", "cpu", "h100", "tpu")
ROWS: tuple[Workload, ...] = (
    *EDGE_CASES_ATTENTION,
    *MODEL_ATTENTION,
    *EDGE_CASES_GROUPED_MATMUL,
    *MODEL_GROUPED_MATMUL,
    *EXPERTS,
    *KV_CACHES,
    *LINEAR_CROSS_ENTROPY,
    *FEATURES,
)


def select(op: str, suite: str, device: str | None = None) -> list[Workload]:
    """List the workloads of an operation in a suite.

    Args:
        op: the operation.
        suite: one of `SUITES`.
        device: only those for this device; None: all.

    Raises:
        ValueError: there is no such operation, suite or device.
    """
    for argument, value, allowed in (
        ("op", op, sorted({row.op for row in ROWS})),
        ("suite", suite, SUITES),
        ("device", device, (*DEVICES, None)),
    ):
        if value not in allowed:
            raise ValueError(f"{argument} is {value!r}; allowed: {', '.join(map(str, allowed))}")
    chosen = [row for row in ROWS if row.op == op and suite in row.suites]
    return [row for row in chosen if device is None or device in row.devices]


def get(op: str, name: str) -> Workload:
    """Return the workload with a name.

    Raises:
        ValueError: there is no such workload; the message lists the names.
    """
    by_name = {row.name: row for row in ROWS if row.op == op}
    if name not in by_name:
        raise ValueError(f"{op} has no spec {name!r}; allowed: {', '.join(by_name)}")
    return by_name[name]
