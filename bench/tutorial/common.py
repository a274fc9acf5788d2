"""Shared by the tutorials: time steps beside baselines, compile them for TPU v6e, read and write results."""

import datetime
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from bench.aot import hardware, worker_pool
from bench.aot.cases import Case
from bench.aot.tpu import vliw_schedule
from bench.operations import runner
from bench.operations.baselines import Candidate
from bench.operations.roofline import Ceilings
from bench.operations.timer import clock
from bench.report import markdown, results
from dantinox.kernels import workloads

COMMITTED = results.ROOT / "profiles" / "cpu"
TARGET = hardware.get("v6e")
COMPILE_SECONDS = 240.0  # after which a compile is given up
MAX_ERROR = 1e-5  # relative to the largest value, in float32
Row = dict[str, Any]


def head(workload: workloads.Workload) -> dict[str, Any]:
    """The first fields of a document: when, where and at which sizes."""
    return {
        "date": str(datetime.date.today()),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "sizes": workload.label(),
        "dtype": workload.dtypes[0],
    }


def time_candidates(
    workload: workloads.Workload,
    steps: Sequence[Candidate],
    baselines: Sequence[str],
    budget: float,
    backward: bool = False,
) -> dict[str, Row]:
    """Check and time steps and baselines in turns.

    Args:
        workload: the problem size.
        steps: the steps of a tutorial.
        baselines: names of implementations and baselines of the operation.
        budget: seconds of timing, shared by all of them.
        backward: whether gradients are part of the time and of the error.

    Returns:
        Name -> seconds, spread, temp_bytes and error; or "refused": why it did not run.
    """
    names = (*(step.name for step in steps), *baselines)
    case = runner.BenchmarkCase(workload, backward)
    outcome = runner.run_case(case, Ceilings(clock()), budget=budget, only=names, extra=list(steps))
    rows: dict[str, Row] = {}
    for name in names:
        result = outcome.results[name]
        if result.skip_reason is not None:
            rows[name] = {"refused": result.skip_reason}
            continue
        low, middle, high = np.percentile(result.seconds, [25, 50, 75])
        figures = {"seconds": middle, "spread": (high - low) / middle, "temp_bytes": result.temp_bytes}
        rows[name] = {key: float(f"{value:.4g}") for key, value in figures.items()}
        if result.error is not None:
            rows[name]["error"] = float(f"{result.error:.2g}")
    return rows


def wrong(document: Mapping[str, Any], bound: float = MAX_ERROR) -> list[str]:
    """Names of the rows whose error is above the bound."""
    return [name for name, row in document["rows"].items() if not row.get("error", 0) <= bound]


class Compiled(NamedTuple):
    """A compiled program: the row of a profile, and the bundles of each branch of its kernels, by their names."""

    row: Row
    branches: dict[str, list[int]]


def compile_programs(cases: Mapping[str, Case], compiler: Path) -> dict[str, Compiled]:
    """Compile programs for the TPU.

    Args:
        cases: row -> program.
        compiler: a Python that has libtpu.

    Returns:
        Row -> what came of it; without kernels and with a "reason" in its row if it was not compiled.
    """
    programs: dict[str, Compiled] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        worker_pool.Worker(TARGET, COMPILE_SECONDS, Path(folder), str(compiler)) as worker,
    ):
        for name, case in cases.items():
            row, branches = worker.ask(case), {}
            for kernel in row.get("kernels", ()):
                dumps = worker_pool.dumps_folder(Path(folder), TARGET, case)
                text = vliw_schedule.read_final_bundles(dumps, kernel["name"])
                branches[kernel["name"]] = vliw_schedule.branch_sizes(text)
            programs[name] = Compiled(row, branches)
    return programs


def compile_cases(
    cases: Mapping[str, Case], compiler: Path, count: Callable[[str, int, Sequence[int]], int | None]
) -> dict[str, Row]:
    """Compile programs of one kernel each for the TPU.

    Args:
        cases: row -> program.
        compiler: a Python that has libtpu.
        count: (row, bundles of the schedule, bundles of each branch in it) -> bundles over all grid steps, or None.

    Returns:
        Row -> bundles of the kernel and of all grid steps, spills, VMEM; or why it was not compiled.
    """
    rows: dict[str, Row] = {}
    for name, (answer, branches) in compile_programs(cases, compiler).items():
        if answer["status"] != "compiled":
            rows[name] = {"not_compiled": answer["reason"]}
            continue
        (kernel,) = answer["kernels"]
        rows[name] = {key: kernel[key] for key in ("bundles", "spills", "fills", "mxu_share", "vmem_bytes")}
        executed = exact_count(kernel)
        rows[name]["bundles_of_all_steps"] = executed or count(name, kernel["bundles"], branches[kernel["name"]])
    return rows


def exact_count(kernel: Row) -> int | None:
    """The bundles that an attention kernel executes, where `bench.aot` knows them exactly."""
    return None if kernel.get("upper_bound") else kernel.get("executed")


def executed_bundles(bundles: int, branches: Sequence[int], steps: int, taken: Sequence[int]) -> int | None:
    """Count the bundles over all grid steps; a `pl.when` counts in the steps that take it.

    Args:
        bundles: the length of the kernel's schedule.
        branches: the bundles of each branch in it.
        steps: the number of grid steps.
        taken: how often each `pl.when` is taken, in order.

    Returns:
        The count; None if the schedule does not have the branches of the kernel.
    """
    if len(taken) > len(branches):  # another version of the compiler, another form of schedule
        return None
    branches = branches[: len(taken)]  # further branches copy the output, and count in every grid step
    always = steps * (bundles - sum(branches))
    return always + sum(times * length for times, length in zip(taken, branches, strict=True))


def file_name(tutorial: str) -> str:
    """Name of the file with the results of a tutorial, in the folder of a device."""
    return f"tutorial-{tutorial}.json"


def load_committed(tutorial: str) -> dict[str, Any]:
    """Load the results in profiles/cpu, from which the table is printed."""
    return json.loads((COMMITTED / file_name(tutorial)).read_text("utf-8"))


def update_readme(text: str, module: Any, document: Mapping[str, Any]) -> str:
    """Replace the table of a tutorial between its marks.

    Raises:
        ValueError: one of the marks does not occur exactly once.
    """
    return markdown.replace_between(text, module.MARKS, module.table(document) + "\n")
