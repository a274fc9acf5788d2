"""Judge a kernel in a minute: which features are right, where the others are wrong, and what no case looked at.

`python -m bench.judge attention mine.py` runs the kernel without its device: its form for a CPU, its form for a TPU in
NumPy, a Hopper kernel in JAX's simulator and a Triton kernel in Triton's interpreter. Then it times the kernel on this
machine and compiles it for a TPU and for an H100.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dantinox import cli
from dantinox.system.console import Console

if TYPE_CHECKING:
    from bench.judge.cases import Case

PROG = "bench.judge"
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Arguments:
    """What to judge."""

    op: str = ""
    """Operation: attention, grouped_matmul, moe_mlp, decode_attention or linear_cross_entropy."""
    kernel: str = ""
    """Name of an implementation, or a Python file that registers one or defines a function of the operation's name."""
    case: tuple[str, ...] = ()
    """Only these cases, by the ids that failures show."""
    dump: str = ""
    """Only write what these variables of the kernel hold, such as s,p, in the first --case."""
    tile: str = ""
    """The step to --dump, by the last indices of the grid, such as 3,2 (default: the first)."""
    seconds: float = 50.0
    """Start no further case after this many seconds; what is left counts as not judged."""
    bench: bool = True
    """Time the kernel on this machine."""
    compile: bool = True
    """Compile the kernel for a TPU v6e, an H100 or both, as its forms are, where the compilers are installed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Judge; returns 1 if a result is wrong or the kernel does not compile."""
    words = cli.positional_run(argv, "--op", "--kernel")
    arguments = cli.parse(Arguments, words, default=Arguments(), prog=PROG, description=__doc__.split("\n")[0])
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the cases run on all cores
    with cli.one_line_errors(PROG):
        return judge(arguments)


def judge(arguments: Arguments) -> int:
    """Run the cases and print the verdict."""
    from bench.judge import cases, presence, report, runner, subject, verdicts
    from dantinox.kernels import OPERATIONS

    if arguments.op not in OPERATIONS:
        raise ValueError(f"op is {arguments.op!r}; allowed: {', '.join(OPERATIONS)}")
    if not arguments.kernel:
        raise ValueError(f"the kernel is missing; allowed: {PROG} {arguments.op} NAME|FILE")
    if not arguments.seconds > 0:
        raise ValueError(f"--seconds is {arguments.seconds:g}; allowed: seconds above 0")
    start, console = time.monotonic(), Console(width=max(120, Console().width))
    op, name = arguments.op, subject.load(arguments.op, arguments.kernel)
    all_cases = cases.cases(op)
    chosen = _choose([*all_cases, *presence.simulated_cases(op)], arguments.case) or all_cases
    if arguments.dump:
        return _dump(op, name, chosen[0], arguments, console)
    found, absent = presence.forms_of(op, name)
    on_gpu = bool({"Hopper", "Triton"} & {*found})
    targets = ["v6e"] * ("TPU" in found or not on_gpu) + ["h100"] * on_gpu
    compiling = {target: _start_compiling(arguments, target) for target in targets if arguments.compile}
    outcomes, no_time = runner.run(op, arguments.kernel, name, chosen, found, start + arguments.seconds)
    judged = tuple(form for form in dict.fromkeys(o.form for o in outcomes))
    features = (*cases.FEATURES[op], *cases.DTYPES)
    if arguments.case:
        features = tuple(each for each in features if any(each in case.features() for case in chosen))
    results = list(dict.fromkeys(result for outcome in outcomes for result in outcome.states))
    table = {form: verdicts.verdicts(outcomes, form, features, results) for form in judged}
    console.print(f"[bold]{op}[/]: {name}\n", highlight=False)
    report.show(table, console)
    report.show_failures(table, console)
    console.print()
    report.show_reasons(outcomes, console)
    if no_time:
        absent["no time left"] = no_time
    for target in targets:
        if compiling.get(target) is None:
            missing = f'no Python here has the compilers; `make aot ARGS="--short --target {target}"` builds .venv-aot'
            absent[f"compiled for {target}"] = missing if arguments.compile else "--no-compile"
    report.show_not_judged(table, absent, console)
    console.print()
    wrong = any(verdict.is_wrong for column in table.values() for verdict in column.values())
    if arguments.bench:
        _show_bench_row(op, name, console, wrong)
    compiles = all([_show_compiled(process, target, console) for target, process in compiling.items() if process])
    judged_any = any("ok" in outcome.states.values() for outcome in outcomes)
    right = "[bold green]nothing wrong found[/]" if judged_any else "[bold magenta]NOTHING JUDGED[/]"
    verdict = "[bold red]WRONG[/]" if wrong else right
    if not compiles:
        verdict += ", [bold red]DOES NOT COMPILE[/]"
    console.print(f"\n{verdict}: {report.summary(table, outcomes)}; {time.monotonic() - start:.0f} s", highlight=False)
    return int(wrong or not compiles)


def _dump(op: str, name: str, case: "Case", arguments: Arguments, console: Console) -> int:
    from bench.judge import dump

    try:
        tile = tuple(int(index) for index in arguments.tile.split(",") if index)
    except ValueError:
        raise ValueError(f"--tile is {arguments.tile!r}; allowed: indices such as 3,2") from None
    variables = tuple(each.strip() for each in arguments.dump.split(",") if each.strip())
    for line in dump.dump(op, name, case, variables, tile):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0


def _choose(all_cases: "list[Case]", ids: tuple[str, ...]) -> "list[Case]":
    known = {case.id: case for case in all_cases}
    for each in ids:
        if each not in known:
            raise ValueError(f"--case is {each!r}; allowed: {'; '.join(known)}")
    return [known[each] for each in ids]


def _compiler_python() -> str | None:
    other = ROOT / ".venv-aot" / "bin" / "python"
    return sys.executable if importlib.util.find_spec("libtpu") else str(other) if other.exists() else None


def _start_compiling(arguments: Arguments, target: str) -> subprocess.Popen[str] | None:
    python = _compiler_python()
    if python is None:
        return None
    kernel = str(Path(arguments.kernel).absolute()) if arguments.kernel.endswith(".py") else arguments.kernel
    command = [python, "-m", "bench.judge.compile_row", arguments.op, kernel, target]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    # The cases go first: they have a time limit.
    nice = ["nice"] if shutil.which("nice") else []
    return subprocess.Popen([*nice, *command], cwd=ROOT, env=environment, encoding="utf-8", **pipes)


def _show_compiled(process: subprocess.Popen[str], target: str, console: Console) -> bool:
    """Print what the compiler made of the kernel, or its whole message; return whether it compiles or is refused."""
    out, err = process.communicate()
    if process.returncode:
        console.print(f"compiled for {target}: failed\n{err[-2000:]}", markup=False, highlight=False, soft_wrap=True)
        return False
    row = json.loads(out.splitlines()[-1])
    for direction, result in row["directions"].items():
        line = f"compiled for {target}, {row['spec']}, {direction.replace('both', 'forward and backward')}: "
        if result["status"] != "compiled":
            line += f"{result['status']}: {result['reason']}"
        else:
            line += "; ".join(map(_describe_kernel, result["kernels"]))
            line += f"; {result['temp_bytes'] / 2**20:.1f} MiB of temporary memory"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return all(result["status"] != "failed" for result in row["directions"].values())


def _describe_kernel(kernel: dict[str, Any]) -> str:
    if "registers" in kernel:
        smem = f"{kernel['smem_bytes'] / 2**10:.0f} KiB of shared memory"
        return f"{kernel['name']} {kernel['registers']} registers, {kernel['spill_bytes']} bytes spilled, {smem}"
    vmem = f"{(kernel['vmem_bytes'] or 0) / 2**20:.1f} MiB of VMEM"
    places = [f"{region['spills']} in {region['name']}" for region in kernel.get("regions", ()) if region["spills"]]
    spills = f"{kernel['spills']} spills" + (f" ({', '.join(places)})" if places else "")
    return f"{kernel['name']} {kernel['bundles']} bundles, {spills}, {vmem}"


def _show_bench_row(op: str, name: str, console: Console, wrong: bool) -> None:
    from bench.judge import bench_row

    for line in bench_row.rows(op, name):
        mark = " (wrong: see above)" if wrong and f": {name} " in line else ""
        console.print(f"timed here, {line}{mark}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    cli.run_main(main)
