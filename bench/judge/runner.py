"""Run the cases of an operation on all cores, each in the forms that the implementation has."""

import multiprocessing
import os
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from unittest import mock

from bench.judge import outcomes, presence, subject
from bench.judge.cases import Case
from bench.judge.outcomes import Outcome
from dantinox.system.progress import Progress

IN_NUMPY = ("CPU", "TPU")
ENVIRONMENT = {
    "NPROC": "8",  # a simulated GPU waits for barriers in threads of XLA's pool, which has one a core
    "OPENBLAS_NUM_THREADS": "1",
    "TRITON_INTERPRET": "1",  # `triton.jit` makes kernels for the interpreter
}
GRACE = 60.0  # seconds after the deadline for the cases that run
FIRST_CASES = 24  # that run before those in a simulator, which take longer


def run(
    op: str, kernel: str, name: str, cases: list[Case], forms: tuple[str, ...], deadline: float
) -> tuple[list[Outcome], str]:
    """Run cases in processes of their own: in NumPy and in Triton's interpreter all of them, in a simulator a few.

    Args:
        op: the operation.
        kernel: the name or the file of the kernel, which each process loads.
        name: the name of its implementation.
        cases: the cases, in the order in which they start.
        forms: the forms to judge.
        deadline: of `time.monotonic()`; no case starts after it.

    Returns:
        (the outcomes, how many cases no time was left for, or "").

    Raises:
        ValueError: a case ended its process.
    """
    numpy_forms = tuple(form for form in forms if form in IN_NUMPY)
    small = presence.simulated_cases(op)
    large = [case for case in cases if case not in small]
    in_numpy = [(numpy_forms, case) for case in large if numpy_forms]
    in_triton = [(("Triton",), case) for case in _each_feature_first(large) if "Triton" in forms]
    if len(cases) < FIRST_CASES:  # chosen by their ids
        small = [case for case in small if case in cases]
    simulated = [((form,), case) for form in forms if form not in IN_NUMPY for case in small]
    queue = [*in_numpy[:FIRST_CASES], *simulated, *in_numpy[FIRST_CASES:], *in_triton]
    number = len(queue)
    results: list[Outcome] = []
    workers = min(len(queue), max(1, len(os.sched_getaffinity(0))))
    context = multiprocessing.get_context("spawn")
    finished = 0
    progress = Progress(f"judging {name} in {len(queue)} cases", len(queue))
    with progress, mock.patch.dict(os.environ, ENVIRONMENT):
        pool = ProcessPoolExecutor(workers, context, _initialize, (op, kernel))
        pending: set[Future[list[Outcome]]] = set()
        try:
            while queue or pending:
                while queue and len(pending) < 2 * workers and time.monotonic() < deadline:
                    forms, case = queue.pop(0)
                    pending.add(pool.submit(outcomes.judge, op, name, forms, case))
                done, pending = wait(pending, deadline + GRACE - time.monotonic(), FIRST_COMPLETED)
                if not done:  # nothing is left to start, or a case hangs: a barrier that no one arrives at
                    break
                for future in done:
                    try:
                        results += future.result()
                    except BrokenProcessPool:
                        raise ValueError(f"{name} ended the process that ran it; --case runs a single case") from None
                    finished += 1
                    progress.advance()
        finally:
            for process in list((pool._processes or {}).values()) if pending else ():
                process.kill()
            pool.shutdown(cancel_futures=True)
    order = {case.id: number for number, case in enumerate(cases)}
    left = number - finished
    results.sort(key=lambda outcome: order.get(outcome.case.id, -1))
    return results, f"{left} of {number} cases; --seconds gives more" if left else ""


def _each_feature_first(cases: list[Case]) -> list[Case]:
    """Put the cheapest case of each feature first: Triton's interpreter has no time for all."""
    seen: set[str] = set()
    first = []
    for case in sorted(cases, key=lambda case: case.workload.cost().flops):
        if case.features() - seen:
            seen |= case.features()
            first.append(case)
    return [*first, *(case for case in cases if case not in first)]


def _initialize(op: str, kernel: str) -> None:
    """Load the kernel in a worker process."""
    subject.load(op, kernel)
