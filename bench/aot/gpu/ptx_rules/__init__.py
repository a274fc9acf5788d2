"""Check the PTX of a warp-specialized Hopper kernel for mistakes that an interpreter does not see.

`flow` follows every path through a kernel; `dry_run` runs blocks of it, without floating point. `launch` reads from
XLA's dump what the PTX does not have: grid, shared memory, tensor maps. What each rule proves, and what it cannot:

wgmma        on every path: no instruction reads an accumulator, or writes a register of a wgmma, before a wait_group
             covers it; no register enters a wgmma without a wgmma.fence since it was written; every wgmma is in a
             committed group. Not: that the accumulators are the right ones.
proxy_fence  on every path: fence.proxy.async and then a bar.sync come between a thread's write to shared memory and a
             bulk store; in the runs, for the bytes in question, also before a wgmma or a load. Not: that the barrier is
             one of all threads that wrote, if they are of several warpgroups.
bulk_stores  on every path: a bulk store is in a committed group, and wait_group 0 comes before the kernel ends; in the
             runs: nothing writes its bytes before a wait_group has covered it. Not: what happens to global memory.
registers    in the runs: the warpgroups take no more by setmaxnreg than the block starts with, and that is at most
             65,536. Not: that a warpgroup needs no more; ptxas knows.
barriers     in the runs: one thread initializes each mbarrier once, before a fence and a bar.sync of the block; every
             phase gets exactly the arrivals that it was initialized with; no wait is for ever; when the block ends, no
             phase and no load is left half done. Not: blocks, data and orders of the warpgroups that were not run.
expect_tx    in the runs: the bytes that a phase expects are those of the boxes that complete on it.
smem         in the runs: no load overwrites bytes that a wgmma or a bulk store may still read, no wgmma or thread reads
             bytes before their load has arrived, and all are within the block's memory. Not: bytes that threads read
             and a load overwrites; the order of threads within a warpgroup.
descriptors  in the runs: the swizzle of a wgmma's descriptor is that of the tensor map that filled the bytes, and a
             swizzled box starts where its pattern does. Not: operands that threads wrote, and offsets and strides
             within a box: parity in an interpreter and on a GPU shows these.
unresolved   the text does not say: an address, a predicate or a tensor map is not known, or a branch divides the
             threads of a warpgroup.

A run takes the threads of a warpgroup as in step. All runs may stop before the block's end where blocks are long; then
the rules on the end say nothing. Global memory holds made-up numbers, so a loop or a branch may run as no real data
make it run: the protocol has to hold for any data. A report counts the synchronizing instructions that a run reached;
rules on runs say nothing about the others.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from bench.aot.gpu.ptx_rules import flow, registers
from bench.aot.gpu.ptx_rules.dry_run import DryRun
from bench.aot.gpu.ptx_rules.finding import Finding
from bench.aot.gpu.ptx_rules.launch import Launch
from bench.aot.gpu.ptx_rules.program import Kernel

MIN_RUNS, MAX_RUNS = 4, 40
SHORT_RUN, LONG_RUN = 30_000, 300_000  # instructions of a warpgroup; a long one takes seconds
ALL_RUNS = 300_000  # instructions of all runs, after which none begins
ENOUGH = 0.85  # of the synchronizing instructions: then no run begins when they reach no more
TENSOR_MAP_BYTES = 128
SYNCHRONIZING = ("mbarrier.", "bar.sync", "cp.async.bulk", "wgmma.", "fence.", "setmaxnreg")


@dataclass(frozen=True)
class Report:
    """What the rules found in a kernel.

    Attributes:
        kernel: its name.
        findings: by line.
        instructions: how many it has.
        runs: how many blocks were run, and how many of them to the end.
        synchronizing: how many instructions synchronize or copy, and how many of them were run.
        phases: of all barriers in all runs.
    """

    kernel: str
    findings: tuple[Finding, ...]
    instructions: int
    runs: tuple[int, int]
    synchronizing: tuple[int, int]
    phases: int

    def summary(self) -> str:
        """Say what was checked."""
        synchronizing, covered = self.synchronizing
        return (
            f"{self.kernel}: {self.instructions} instructions, {self.runs[1]} of {self.runs[0]} runs to the end, "
            f"{self.phases} phases, {covered} of {synchronizing} synchronizing instructions run"
        )

    def first_finding(self) -> str:
        """Say what the first finding is, in one line."""
        first, more = self.findings[0], len(self.findings) - 1
        rest = f" (and {more} more)" if more else ""
        return f"{self.kernel}: {first.rule}: line {first.line} of the PTX: {first.message}{rest}"


def check(kernel: Kernel, launch: Launch, registers_at_launch: int | None = None) -> Report:
    """Run all rules on a kernel.

    Args:
        kernel: the kernel.
        launch: how the host launches it.
        registers_at_launch: registers per thread that ptxas gives it, if known.
    """
    found = dict.fromkeys(flow.check(kernel))
    if kernel.threads and kernel.threads != launch.threads:
        found[Finding("registers", 0, f"launched with {launch.threads} threads, made for {kernel.threads}")] = None
    synchronizing = [i for i, x in enumerate(kernel.instructions) if x.opcode.startswith(SYNCHRONIZING)]
    covered: set[int] = set()
    runs: list[DryRun] = []
    newest = 0  # the last run that reached more
    for seed in range(MAX_RUNS):
        runs.append(DryRun(kernel, launch, _block(launch.grid, seed), seed, SHORT_RUN))
        found |= dict.fromkeys(runs[-1].run())
        reached = {i for i in synchronizing if runs[-1].executed[i]}
        newest = newest if reached <= covered else seed
        covered |= reached
        all_reached = len(covered) == len(synchronizing)
        no_more = len(covered) > ENOUGH * len(synchronizing) and seed - newest >= MIN_RUNS
        if seed + 1 >= MIN_RUNS and (all_reached or no_more or sum(run.steps for run in runs) > ALL_RUNS):
            break
    if not any(run.finished for run in runs):
        runs.append(DryRun(kernel, launch, (0, 0, 0), 0, LONG_RUN))
        found |= dict.fromkeys(runs[-1].run())
        covered |= {i for i in synchronizing if runs[-1].executed[i]}
    longest = max(runs, key=lambda run: (run.finished, run.steps))
    settings = [(len(w.thread), w.max_registers) for w in longest.warpgroups]
    if longest.finished or all(setting for _, setting in settings):
        found |= dict.fromkeys(registers.check(launch.threads, registers_at_launch, settings))
    return Report(
        kernel.name,
        tuple(sorted(found, key=lambda finding: finding.line)),
        len(kernel.instructions),
        (len(runs), sum(run.finished for run in runs)),
        (len(synchronizing), len(covered)),
        sum(barrier.phase for run in runs for barrier in run.barriers.values()),
    )


def _block(grid: tuple[int, int, int], seed: int) -> tuple[int, int, int]:
    """Return the first, the last, the middle block, and others."""
    x, y, z = grid
    chosen = ((0, 0, 0), (x - 1, y - 1, z - 1), (x // 2, y // 2, z // 2))
    draw = random.Random(seed)
    return chosen[seed] if seed < len(chosen) else (draw.randrange(x), draw.randrange(y), draw.randrange(z))


def check_launched(kernel: Kernel, launches: Sequence[Launch], registers_at_launch: int | None = None) -> Report:
    """Check a kernel as one of these launches runs it; programs have several kernels of one name.

    Raises:
        ValueError: no launch fits it.
    """
    reports = [check(kernel, launch, registers_at_launch) for launch in launches if _fits(kernel, launch)]
    if not reports:
        raise ValueError(f"{kernel.name}: the dump of the program has no launch of it")
    return min(reports, key=lambda report: len(report.findings))


def _fits(kernel: Kernel, launch: Launch) -> bool:
    """Whether a launch may be of this kernel."""
    maps = sum(kernel.params.values()) // TENSOR_MAP_BYTES
    return (kernel.name, maps) == (launch.name, len(launch.tensor_maps))
