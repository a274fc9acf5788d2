"""What one process of `bench.tune` measures: two choices of block sizes, or all implementations, in turns.

    python -m bench.tune.measurement < order.json

A choice may crash its process, or hang it: then the program that started it has lost one choice, not its results.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median, quantiles
from typing import Any

import jax
import numpy as np

from bench.operations.runner import (
    BenchmarkCase,
    CompiledCandidate,
    implementation_function,
    num_argument_sets,
    random_arguments,
)
from bench.operations.timer import clock
from dantinox import kernels
from dantinox.kernels import tuning, workloads

MAX_DIFFERENCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 4e-3}  # of the largest value: other orders of adding


@dataclass(frozen=True)
class Order:
    """What to measure.

    Attributes:
        op: the operation.
        workload: name of the workload.
        backward: with gradients.
        implementation: whose block sizes to compare; "" compares the implementations.
        base: choices of block sizes, by name, beside those of the heuristics.
        trial: choices that are compared with them.
        rounds: turns of each.
    """

    op: str
    workload: str
    backward: bool
    implementation: str = ""
    base: Mapping[str, tuning.Size] = field(default_factory=dict)
    trial: Mapping[str, tuning.Size] = field(default_factory=dict)
    rounds: int = 7

    def to_json(self) -> str:
        """Return the order as JSON."""
        return json.dumps(asdict(self))


def measure(order: Order) -> dict[str, Any]:
    """Run an order.

    Returns:
        Of block sizes: "choices" of the base, by name, "ratio" of the trial's time to the base's, in the median over
        the turns, its quartiles as "spread", and the "difference" of their results relative to the largest value. Of
        implementations: "calls", for which "auto" chooses, and "ratios" to the fastest with their "spread".
    """
    case = BenchmarkCase(workloads.get(order.op, order.workload), order.backward)
    sets = [random_arguments(case.workload, seed) for seed in range(num_argument_sets(case.workload))]

    def compiled(implementation: str, choices: Mapping[str, tuning.Size]) -> CompiledCandidate:
        with tuning.forcing(choices):
            return CompiledCandidate(case, implementation_function(case.workload, implementation), sets)

    if not order.implementation:
        return _compare_implementations(order, compiled)
    with tuning.recording() as seen:
        base = compiled(order.implementation, order.base)
    if not order.trial:
        return {"choices": seen.choices}
    trial = compiled(order.implementation, {**order.base, **order.trial})
    difference = _difference(trial(0), base(0))
    limit = MAX_DIFFERENCE[case.workload.dtypes[0]]
    if not difference <= limit:
        raise ValueError(f"the results differ by {difference:.2g} of the largest value; allowed: {limit:g}")
    base_seconds, trial_seconds = _time_in_turns([base, trial], order.rounds)
    ratio, spread = _ratio(trial_seconds, base_seconds)
    return {"choices": seen.choices, "ratio": ratio, "spread": spread, "difference": difference}


def _compare_implementations(order: Order, compiled: Any) -> dict[str, Any]:
    with tuning.recording() as seen:
        compiled("auto", order.base)
    names = [
        n for n, why in kernels.implementations(order.op).items() if why is None and n in ("xla", "pallas", "triton")
    ]
    programs, refused = {}, {}
    for name in names:
        try:
            programs[name] = compiled(name, order.base)
        except NotImplementedError as error:
            refused[name] = str(error)
    reference = programs["xla"](0)
    for name, program in programs.items():
        difference = _difference(program(0), reference)
        if not difference <= MAX_DIFFERENCE[workloads.get(order.op, order.workload).dtypes[0]]:
            raise ValueError(f"{name} differs from xla by {difference:.2g} of the largest value")
    seconds = dict(zip(programs, _time_in_turns(list(programs.values()), order.rounds), strict=True))
    fastest = min(seconds, key=lambda name: median(seconds[name]))
    ratios = {name: _ratio(times, seconds[fastest]) for name, times in seconds.items()}
    return {
        "calls": sorted(set(seen.calls)),
        "ratios": {name: ratio for name, (ratio, _) in ratios.items()},
        "spread": {name: spread for name, (_, spread) in ratios.items()},
        "refused": refused,
    }


def _time_in_turns(programs: Sequence[CompiledCandidate], rounds: int) -> list[list[float]]:
    """Return the seconds of each turn of each program; the first turn only warms up."""
    timer, seconds = clock(), [[] for _ in programs]
    for turn in range(rounds + 1):
        for program, times in zip(programs, seconds, strict=True):
            taken = timer.sample(lambda i, program=program, turn=turn: program(turn + i), 1)[0]
            if turn:
                times.append(taken)
    return seconds


def _ratio(seconds: Sequence[float], base: Sequence[float]) -> tuple[float, list[float]]:
    """Return the median of the ratios of the turns, and their quartiles."""
    ratios = [a / b for a, b in zip(seconds, base, strict=True)]
    low, middle, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return round(middle, 4), [round(low, 4), round(high, 4)]


def _difference(actual: Any, expected: Any) -> float:
    """Return the largest difference of all results, each relative to its largest value; NaN if one is NaN."""
    differences = []
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        differences.append(np.max(np.abs(a - b)) / max(float(np.max(np.abs(b))), 1e-30))
    return float(np.max(differences))


if __name__ == "__main__":
    print(json.dumps(measure(Order(**json.load(sys.stdin)))))
