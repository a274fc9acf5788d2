"""Compile the kernels for GPUs and TPUs without having one, and report what the compilers made of them.

`python -m bench.aot` compiles every `aot` workload of kernels/workloads/ with every implementation and with the public
kernels, in processes of its own. It needs the compile-only plugins, which `make aot` installs into an environment of
their own, and no accelerator.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench.aot import cases as aot_cases
from bench.aot import hardware, profile, worker_pool
from bench.aot.cases import Case
from bench.aot.gpu import compiler as gpu_compiler
from bench.aot.report import console_table, readme
from bench.aot.tpu import compiler as tpu_compiler
from bench.report import results
from dantinox import cli
from dantinox.system.console import Console

PROG = "bench.aot"


@dataclass(frozen=True)
class Arguments:
    """What to compile."""

    target: tuple[str, ...] = ()
    """Accelerators: h100, b200, a100, rtx4090, rtx5090, v5e, v6e, tpu7x (default: all)."""
    op: tuple[str, ...] = ()
    """Operations (default: all)."""
    spec: tuple[str, ...] = ()
    """Workloads of kernels/workloads/, by name (default: all)."""
    implementation: tuple[str, ...] = ()
    """Implementations and public kernels: pallas, triton, xla, tokamax, splash, megablox, ..., or your own. With one of
    your own, and no workloads named, only the main workload of each operation is compiled."""
    all: bool = False
    """Compile every workload for an implementation of your own too."""
    short: bool = False
    """Compile one program of each kind, for h100 and v6e; takes a minute."""
    check: bool = False
    """Compare with the committed profiles, write nothing, and fail if a program got worse. Without names of operations,
    workloads or implementations, also compile the sizes that break kernels for the TPUs, and the Triton kernels with
    every feature for the GPUs."""
    out: Path | None = None
    """Folder of the profiles (default: profiles/aot, or runs/aot if an implementation is not built in)."""
    keep: Path | None = None
    """Folder that keeps what the compilers dumped."""
    timeout: float = 240.0
    """Seconds after which a program is given up."""
    jobs: int = 2
    """Number of targets that are compiled for at once."""


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
        work = plan(arguments)
        for target in work:
            check_compiler_installed(target)
        custom = custom_implementations(work)
        out = arguments.out or Path("runs/aot" if custom and not arguments.check else "profiles/aot")
        committed = {target: profile.load(profile.path(out, target.name)) for target in work}
        if arguments.timeout <= 0 or arguments.jobs < 1:
            raise ValueError("timeout and jobs must be positive")
        console = Console(width=None if sys.stdout.isatty() else 200)
        live = len(work) == 1  # the rows of several targets would mix
        with ThreadPoolExecutor(arguments.jobs) as threads:
            workers = [worker_pool.Worker(target, arguments.timeout, arguments.keep) for target in work]
            try:
                pending = [
                    threads.submit(
                        compile_cases, worker, target, work[target], committed[target], out, arguments, console, live
                    )
                    for worker, target in zip(workers, work)
                ]
                worse = [line for future in pending for line in future.result()]
            finally:
                threads.shutdown(wait=False, cancel_futures=True)
                for worker in workers:  # this also ends the wait of a thread
                    worker.close()
        if not arguments.check:
            readme.write(out)
            if custom and arguments.out is None:
                console.print(f"not built in: {', '.join(custom)}; the profiles are in {out}/", highlight=False)
            if custom and main_rows_only(arguments, custom):
                console.print("only the main workloads; --all compiles the others too", highlight=False)
    for line in worse:
        print(f"{PROG}: worse: {line}", file=sys.stderr)
    failed = False
    if arguments.check and not (arguments.op or arguments.spec or arguments.implementation):
        failed = any([compile_edge_cases(target) for target in work if isinstance(target, hardware.Tpu)])
        if gpus := [target.name for target in work if isinstance(target, hardware.Gpu)]:
            failed |= compile_triton_cases(["--short"] if arguments.short else gpus)
        if not (arguments.short or arguments.target):
            failed |= fails("bench.aot.pods", "--check")
    return 1 if worse or failed else 0


def compile_edge_cases(target: hardware.Tpu) -> bool:
    """Compile the sizes that break kernels, and programs for four chips; return whether one of them fails."""
    commands = [["bench.aot.tpu.edge_cases", target.name]]
    if target.name == "v6e":
        commands.append(["bench.aot.tpu.mesh_cases"])
    # Each in a process of its own, as libtpu compiles for one kind of machine per process.
    return any([fails(*words) for words in commands])


def compile_triton_cases(words: Sequence[str]) -> bool:
    """Compile the Triton kernels with their features; return whether the compiler made something unfit of one."""
    modules = ("triton_cases", "triton_loss_cases", "triton_gmm_cases", "triton_decode_cases")
    return any([fails(f"bench.aot.gpu.{module}", *words) for module in modules])


def fails(*words: str) -> bool:
    """Run a module; return whether it fails, after printing the end of what it wrote to stderr."""
    done = subprocess.run([sys.executable, "-m", *words], stderr=subprocess.PIPE, encoding="utf-8", errors="replace")
    if done.returncode:
        end = "\n".join(done.stderr.strip().splitlines()[-20:])
        print(f"{PROG}: {' '.join(words)} failed with exit code {done.returncode}:\n{end}", file=sys.stderr)
    return done.returncode != 0


def plan(arguments: Arguments) -> dict[hardware.Target, list[Case]]:
    """List the programs of each target.

    Raises:
        ValueError: a name is unknown, or no program fits all names.
    """
    names = arguments.target or (aot_cases.SHORT_TARGETS if arguments.short else tuple(hardware.TARGETS))
    filters = {"ops": arguments.op, "names": arguments.spec, "implementations": arguments.implementation}
    chosen = [hardware.get(name) for name in dict.fromkeys(names)]
    work = {target: aot_cases.cases(target, **filters, short=arguments.short) for target in chosen}
    if main_rows_only(arguments, custom_implementations(work)):
        work = {target: [case for case in cases if case.is_main()] for target, cases in work.items()}
    if not any(work.values()):
        raise ValueError("nothing to compile: no workload has this operation, spec and implementation on this target")
    return {target: cases for target, cases in work.items() if cases}


def main_rows_only(arguments: Arguments, custom: Sequence[str]) -> bool:
    """Whether to compile only the main workloads: one that is not built in is asked for, and no workload is named."""
    asked = any(name in custom for name in arguments.implementation)
    return asked and not (arguments.all or arguments.check or arguments.short or arguments.spec)


def custom_implementations(work: Mapping[hardware.Target, Sequence[Case]]) -> list[str]:
    """List the implementations of these programs that are not built in."""
    cases = [case for target_cases in work.values() for case in target_cases]
    return results.custom_implementations({case.op for case in cases}, [case.implementation for case in cases])


def check_compiler_installed(target: hardware.Target) -> None:
    """Check that the compiler for a target is installed, without loading it.

    Raises:
        ValueError: it is not installed; the message says how to install it.
    """
    cuda = isinstance(target, hardware.Gpu)
    modules = gpu_compiler.MODULES if cuda else tpu_compiler.MODULES
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if cuda and not missing:
        missing = [path.name for path in (gpu_compiler.PTXAS, gpu_compiler.CUOBJDUMP) if not path.exists()]
    if missing:
        raise ValueError(
            f"{target.name} needs {' and '.join(missing)}, which this Python does not have; "
            "`make aot` installs them into .venv-aot"
        )


def compile_cases(
    worker: worker_pool.Worker,
    target: hardware.Target,
    cases: list[Case],
    committed: profile.Profile | None,
    out: Path,
    arguments: Arguments,
    console: Console,
    live: bool,
) -> list[str]:
    """Compile all programs of a target, print a table, and write its profile into `out` or check it.

    If `live`, each row is printed when it is compiled, otherwise the table at the end.

    Returns:
        A line for each way in which a program got worse; always empty unless `arguments.check`.
    """
    file = profile.path(out, target.name)
    compiled: dict[tuple, profile.Row] = {}
    rows: dict[Case, profile.Row] = {}
    written: dict[str, profile.Row] = {}
    printer = console_table.Printer(target, console)
    with worker:
        for number, case in enumerate(cases, 1):
            program = case.program()
            if program not in compiled:
                compiled[program] = worker.ask(case)
            row = rows[case] = compiled[program] | {"roofline_ms": float(f"{case.roofline_seconds(target) * 1e3:.4g}")}
            written[case.key] = {name: value for name, value in row.items() if name != "seconds"}
            print(f"{target.name} {number}/{len(cases)}: {case.key}: {row['status']}", file=sys.stderr)
            if live:
                printer.add(case, row)
            if not arguments.check:
                # After every program, and from the file as it is now: the run may be interrupted, and another one may
                # write to the same file.
                profile.save(file, profile.merge(profile.load(file), target.name, worker.versions, written))
    if not live:
        for case in sorted(rows, key=lambda case: list(dict.fromkeys(c.op for c in rows)).index(case.op)):
            printer.add(case, rows[case])
    if not arguments.check:
        return []
    if committed is None:
        return [f"{target.name}: no {file.name} to compare with"]
    if committed["versions"] != worker.versions:
        console.print(f"{target.name}: compiled by {worker.versions}, the profile by {committed['versions']}")
    return [f"{target.name}: {line}" for line in profile.regressions(committed["rows"], written)]


if __name__ == "__main__":
    cli.run_main(main)
