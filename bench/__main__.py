"""Is it fast? `python -m bench`: every operation and the whole model, as a table, JSON files and one HTML page."""

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

from rich.console import Console

from bench.report import console_table, html_report, results
from dantinox import cli
from dantinox.kernels import workloads

PROG = "bench"
# Ctrl-C ends it without a word: this process says what there is to say.
QUIET = "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
PYTEST = QUIET + "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
Part = Literal["attention", "grouped_matmul", "moe_mlp", "decode_attention", "model"]
PARTS: tuple[Part, ...] = ("attention", "grouped_matmul", "moe_mlp", "decode_attention", "model")


@dataclass(frozen=True)
class Arguments:
    """What to measure."""

    op: tuple[Part, ...] = PARTS
    """Operations, and the whole model."""
    spec: tuple[str, ...] = ()
    """Rows by name; none: all of this machine's."""
    implementation: tuple[str, ...] = ()
    """Implementations by name, peers too; none: all."""
    direction: Literal["both", "forward", "forward+backward"] = "both"
    """Which passes."""
    machine: Literal["auto", "cpu", "h100", "tpu"] = "auto"
    """Whose rows; auto: this device's."""
    budget: float = 0.3
    """Seconds of timing for each row and direction; compiling comes on top."""
    seconds: float = 0.0
    """Start no further row after so many seconds; 0: no limit."""
    out: str = "profiles"
    """Folder for <device>/<date>-<op>.json."""
    html: str = "runs/bench/report.html"
    """Where the page goes."""
    lines: str | None = None
    """Append each row here as soon as it was measured, a JSON object a line; None: nowhere."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    arguments = cli.parse(
        Arguments,
        argv,
        default=Arguments(),
        prog=PROG,
        description=__doc__.split("\n")[0],
    )
    with cli.one_line_errors(PROG):
        _check(arguments)
        documents = operations(arguments)
        model = _model() if "model" in arguments.op and not arguments.spec else None
        console = Console(width=max(100, Console().width))  # a row is one line, in a pipe too
        for op, document in documents.items():
            console_table.show(op, document, console)
        paths = results.write(documents, Path(arguments.out))
        report = Path(arguments.html)
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(html_report.render(documents, model))
        console.print(f"\n[dim]{' '.join(map(str, paths))}[/]\nreport: {report}", highlight=False)
    return 0


def _check(arguments: Arguments) -> None:
    """Names that no row has would measure nothing."""
    ops = [op for op in arguments.op if op != "model"]
    if not arguments.op:
        raise ValueError(f"--op is empty; allowed: {', '.join(PARTS)}")
    if not arguments.seconds >= 0:
        raise ValueError(f"--seconds is {arguments.seconds}; allowed: 0 or more")
    if not arguments.budget > 0:
        raise ValueError(f"--budget is {arguments.budget}; allowed: seconds above 0")
    known = {row.name for op in ops for row in workloads.select(op, "bench")}
    for name in arguments.spec:
        if name not in known:
            raise ValueError(f"--spec {name!r} is no row of {', '.join(ops)}; allowed: {', '.join(sorted(known))}")


def operations(arguments: Arguments) -> dict[str, dict[str, Any]]:
    """Run the chosen bench files in one pytest process; operation -> document."""
    ops = [op for op in PARTS if op in arguments.op and op != "model"]
    if not ops:
        return {}
    if importlib.util.find_spec("pytest_benchmark") is None:
        raise ValueError("pytest-benchmark is not installed here; allowed: `make bench`, which installs it")
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
        # A pytest around this one would turn pytest-benchmark off.
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        code = subprocess.run(command, cwd=results.ROOT, env=env).returncode
        if not raw.exists() or not raw.stat().st_size:
            chosen = "--spec, --implementation and --direction"
            raise ValueError(f"nothing was measured (pytest ended with {code}); no row fits {chosen} together")
        return results.from_pytest(json.loads(raw.read_text()))


def _model() -> dict[str, dict[str, float]]:
    from bench import end_to_end

    return end_to_end.measure(end_to_end.Arguments(rounds=2))


if __name__ == "__main__":
    cli.run_main(main)
