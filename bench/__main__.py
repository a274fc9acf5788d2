"""Time every operation and the model (`python -m bench`): a table, JSON files and one HTML page."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bench.operations import baselines
from bench.report import console_table, history, html_report, results
from dantinox import cli
from dantinox.kernels import workloads
from dantinox.system.console import Console

PROG = "bench"
# On Ctrl-C the child ends silently, because this process prints the message.
SILENT_ON_CTRL_C = "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
PYTEST = SILENT_ON_CTRL_C + "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
Subject = Literal["attention", "grouped_matmul", "moe_mlp", "decode_attention", "linear_cross_entropy", "model"]
SUBJECTS: tuple[Subject, ...] = (
    "attention",
    "grouped_matmul",
    "moe_mlp",
    "decode_attention",
    "linear_cross_entropy",
    "model",
)


@dataclass(frozen=True)
class Arguments:
    """What to measure."""

    op: tuple[Subject, ...] = SUBJECTS
    """Operations, and "model" for the model as a whole."""
    spec: tuple[str, ...] = ()
    """Workloads by name (default: all of this device)."""
    implementation: tuple[str, ...] = ()
    """Implementations and baselines by name (default: all)."""
    direction: Literal["both", "forward", "forward+backward"] = "both"
    """Directions to time."""
    machine: Literal["auto", "cpu", "h100", "tpu"] = "auto"
    """Whose workloads to time; auto: those of this device."""
    budget: float = 0.3
    """Seconds of timing per workload and direction; compiling comes on top."""
    seconds: float = 0.0
    """Start no further workload after this many seconds (0: no limit)."""
    out: str | None = None
    """Folder for <device>/<date>-<op>.json (default: profiles, or runs/bench if an implementation is not built in)."""
    html: str = "runs/bench/report.html"
    """Path of the HTML page."""
    lines: str | None = None
    """File to which each finished workload is appended, one JSON object per line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    arguments = cli.parse(
        Arguments,
        argv,
        default=Arguments(),
        prog=PROG,
        description=__doc__.split("\n")[0],
    )
    with cli.one_line_errors(PROG):
        _check_names(arguments)
        custom = results.custom_implementations([op for op in arguments.op if op != "model"], arguments.implementation)
        out = Path(arguments.out or ("runs/bench" if custom else "profiles"))
        documents = time_operations(arguments)
        model = _time_model() if "model" in arguments.op and not arguments.spec else None
        console = Console(width=max(100, Console().width))  # one line per row, in a pipe too
        for op, document in documents.items():
            console_table.show(op, document, console)
        paths = results.write(documents, out)
        report = Path(arguments.html)
        report.parent.mkdir(parents=True, exist_ok=True)
        histories = history.collect(documents, out)
        report.write_text(html_report.render(documents, model, histories), "utf-8")
        if custom and arguments.out is None:
            console.print(f"\nnot built in: {', '.join(custom)}; the results are in {out}/", highlight=False)
        console.print(f"\n[dim]{' '.join(map(str, paths))}[/]\nreport: {report}", highlight=False)
    return 0


def _check_names(arguments: Arguments) -> None:
    """Raise ValueError for arguments that are out of range and for names that no workload has."""
    ops = [op for op in arguments.op if op != "model"]
    if not arguments.op:
        raise ValueError(f"--op is empty; allowed: {', '.join(SUBJECTS)}")
    if not arguments.seconds >= 0:
        raise ValueError(f"--seconds is {arguments.seconds}; allowed: 0 or more")
    if not arguments.budget > 0:
        raise ValueError(f"--budget is {arguments.budget}; allowed: seconds above 0")
    for op in ops:
        for name in results.custom_implementations([op], arguments.implementation):
            if name in baselines.BUILDERS[op]:
                raise ValueError(f"{name!r} names an implementation of {op} and a public kernel; rename it")
    known = {row.name for op in ops for row in workloads.select(op, "bench")}
    for name in arguments.spec:
        if name not in known:
            allowed = ", ".join(sorted(known))
            raise ValueError(f"--spec {name!r} is not a workload of {', '.join(ops)}; allowed: {allowed}")


def time_operations(arguments: Arguments) -> dict[str, dict[str, Any]]:
    """Run the bench files of the chosen operations in one pytest process.

    Returns:
        The document of each operation.
    """
    ops = [op for op in SUBJECTS if op in arguments.op and op != "model"]
    if not ops:
        return {}
    if importlib.util.find_spec("pytest_benchmark") is None:
        raise ValueError("pytest-benchmark is not installed; `make bench` installs it")
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        command = [sys.executable, "-c", PYTEST, "-s", "-p", "no:terminal", "-p", "no:cacheprovider"]
        command += [str(results.ROOT / "bench" / "operations" / f"bench_{op}.py") for op in ops]
        command += ["--progress", f"--benchmark-json={raw}", "--benchmark-quiet", "-m", ""]
        command += [f"--budget={arguments.budget}", f"--seconds={arguments.seconds}"]
        command += [f"--spec={name}" for name in arguments.spec]
        command += [f"--implementation={name}" for name in arguments.implementation]
        command += [] if arguments.direction == "both" else [f"--direction={arguments.direction}"]
        command += [] if arguments.lines is None else [f"--lines={Path(arguments.lines).absolute()}"]
        command += [] if arguments.machine == "auto" else [f"--machine={arguments.machine}"]
        # An outer pytest's variables would turn pytest-benchmark off.
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        code = subprocess.run(command, cwd=results.ROOT, env=env).returncode
        if not raw.exists() or not raw.stat().st_size:
            flags = "--spec, --implementation and --direction"
            raise ValueError(f"nothing was measured (pytest ended with {code}): no workload fits {flags} together")
        return results.from_pytest(json.loads(raw.read_text("utf-8")))


def _time_model() -> dict[str, dict[str, float]]:
    from bench import end_to_end

    return end_to_end.measure(end_to_end.Arguments(rounds=2))


if __name__ == "__main__":
    cli.run_main(main)
