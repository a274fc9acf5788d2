"""What did the compiler make of it? Compiles the kernels for GPUs and TPUs that are not there: `python -m bench.aot`.

Every `aot` row of kernels/workloads/, with every implementation and the public kernels beside it, in processes of its
own. It needs the compile-only plugins (`make aot` installs them into an environment of their own) and no accelerator.
"""

import importlib.util
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from bench.aot import cases as aot_cases
from bench.aot import hardware, profile, worker_pool
from bench.aot.cases import Case
from bench.aot.gpu import compiler as gpu_compiler
from bench.aot.report import console_table, readme
from bench.aot.tpu import compiler as tpu_compiler
from dantinox import cli

PROG = "bench.aot"


@dataclass(frozen=True)
class Arguments:
    """What to compile."""

    target: tuple[str, ...] = ()
    """Accelerators: h100, b200, a100, v5e, v6e, tpu7x; all where none is named."""
    op: tuple[str, ...] = ()
    """Operations; all where none is named."""
    spec: tuple[str, ...] = ()
    """Rows of kernels/workloads/, by name."""
    implementation: tuple[str, ...] = ()
    """Implementations, the public ones too: pallas, triton, xla, tokamax, splash, megablox, ..., or your own."""
    short: bool = False
    """Only one program of each kind, for h100 and v6e: a minute."""
    check: bool = False
    """Write nothing; fail where a program got worse than the committed profile says."""
    out: Path = Path("profiles/aot")
    """Folder of the profiles."""
    keep: Path | None = None
    """Keep what the compilers dumped, in this folder."""
    timeout: float = 240.0
    """Seconds that one program may take."""
    jobs: int = 2
    """Targets compiled for at a time."""


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print tables, and write or check the profiles."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the plugins are for the workers
    arguments = cli.parse(
        Arguments,
        argv,
        default=Arguments(),
        prog=PROG,
        description=__doc__.split("\n")[0],
    )
    with cli.one_line_errors(PROG):
        work = planned(arguments)
        for target in work:
            available(target)
        committed = {target: profile.load(profile.path(arguments.out, target.name)) for target in work}
        if arguments.timeout <= 0 or arguments.jobs < 1:
            raise ValueError("timeout and jobs must be positive")
        console = Console(width=None if sys.stdout.isatty() else 200)
        with ThreadPoolExecutor(arguments.jobs) as threads:
            workers = [worker_pool.Worker(target, arguments.timeout, arguments.keep) for target in work]
            try:
                pending = [
                    threads.submit(finish, worker, target, work[target], committed[target], arguments, console)
                    for worker, target in zip(workers, work)
                ]
                worse = [line for each in pending for line in each.result()]
            finally:
                threads.shutdown(wait=False, cancel_futures=True)
                for worker in workers:  # also ends what a thread still waits for
                    worker.close()
        if not arguments.check:
            readme.write(arguments.out)
    for line in worse:
        print(f"{PROG}: worse: {line}", file=sys.stderr)
    return 1 if worse else 0


def planned(arguments: Arguments) -> dict[hardware.Target, list[Case]]:
    """The programs of each target.

    Raises:
        ValueError: a name that nothing has, or a choice that leaves nothing to compile.
    """
    names = arguments.target or (aot_cases.SHORT_TARGETS if arguments.short else tuple(hardware.TARGETS))
    filters = {"ops": arguments.op, "names": arguments.spec, "implementations": arguments.implementation}
    chosen = [hardware.get(name) for name in dict.fromkeys(names)]
    work = {target: aot_cases.cases(target, **filters, short=arguments.short) for target in chosen}
    if not any(work.values()):
        raise ValueError("nothing to compile: no row has this operation, spec and implementation on this target")
    return {target: cases for target, cases in work.items() if cases}


def available(target: hardware.Target) -> None:
    """Check that the compiler for a target is installed, without loading it.

    Raises:
        ValueError: it is not; the message says how to get it.
    """
    cuda = isinstance(target, hardware.Gpu)
    modules = gpu_compiler.MODULES if cuda else tpu_compiler.MODULES
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if cuda and not missing:
        missing = [path.name for path in (gpu_compiler.PTXAS, gpu_compiler.CUOBJDUMP) if not path.exists()]
    if missing:
        raise ValueError(
            f"{target.name} needs {' and '.join(missing)}, which this Python does not have; "
            "`make aot` installs what it needs into .venv-aot"
        )


def finish(
    worker: worker_pool.Worker,
    target: hardware.Target,
    cases: list[Case],
    committed: profile.Profile | None,
    arguments: Arguments,
    console: Console,
) -> list[str]:
    """Compile all programs of a target, print them, write or compare; returns what got worse."""
    file = profile.path(arguments.out, target.name)
    known: dict[tuple, profile.Row] = {}
    rows: dict[Case, profile.Row] = {}
    kept: dict[str, profile.Row] = {}
    with worker:
        for number, case in enumerate(cases, 1):
            program = case.program()
            if program not in known:
                known[program] = worker.ask(case)
            row = rows[case] = known[program] | {"roofline_ms": float(f"{case.roofline_seconds(target) * 1e3:.4g}")}
            kept[case.key] = {name: value for name, value in row.items() if name != "seconds"}
            print(f"{target.name} {number}/{len(cases)}: {case.key}: {row['status']}", file=sys.stderr)
            if (
                not arguments.check
            ):  # after each one, and read anew: a run of an hour may be interrupted, or not be alone
                profile.save(file, profile.merged(profile.load(file), target.name, worker.versions, kept))
    console_table.show(target, rows, console)
    if not arguments.check:
        return []
    if committed is None:
        return [f"{target.name}: there is no {profile.path(arguments.out, target.name).name} to compare with"]
    if committed["versions"] != worker.versions:
        console.print(f"{target.name}: compiled by {worker.versions}, the profile by {committed['versions']}")
    return [f"{target.name}: {line}" for line in profile.regressions(committed["rows"], kept)]


if __name__ == "__main__":
    cli.run_main(main)
