"""Time an implementation against plain XLA, on one workload of this device."""

from collections.abc import Iterator
from statistics import median

from bench.report.console_table import duration

SPECS = {
    "attention": "S=512",
    "grouped_matmul": "E=8",
    "moe_mlp": "nano-moe",
    "decode_attention": "512 in C=1024",
    "linear_cross_entropy": "nano",
}
SECONDS = 2.0  # of timing


def rows(op: str, implementation: str) -> Iterator[str]:
    """Yield a line for each candidate of one workload."""
    from bench.operations.roofline import Ceilings
    from bench.operations.runner import BenchmarkCase, run_case
    from bench.operations.timer import clock
    from dantinox.kernels import workloads

    workload = workloads.get(op, SPECS[op])
    for backward in (False,) if op == "decode_attention" else (False, True):
        case = BenchmarkCase(workload, backward)
        result = run_case(case, Ceilings(clock()), budget=SECONDS / 2, only=(implementation, "xla"))
        times = {name: median(r.seconds) for name, r in result.results.items() if r.seconds}
        for name, candidate in result.results.items():
            if name not in (implementation, "xla"):
                continue
            if name not in times:
                yield f"{case}: {name}: {candidate.skip_reason}"
                continue
            ratio = f", {times[name] / times['xla']:.2f} of xla" if "xla" in times and name != "xla" else ""
            yield f"{case}: {name} {duration(times[name])}{ratio}, error {candidate.error:.1e}"
