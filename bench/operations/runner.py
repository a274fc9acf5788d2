"""Run one benchmark case: a workload in one direction, with every implementation and baseline.

All candidates are compiled first. Then they take turns, so that a drift of the machine affects all of them. Their
arguments are random, and differ from turn to turn where one set of them would stay in the cache.
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median_high
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.operations import accuracy, baselines
from bench.operations.baselines import Candidate, Forward
from bench.operations.roofline import Ceilings
from bench.operations.timer import clock
from dantinox import kernels
from dantinox.kernels import dispatch, tuning, workloads
from dantinox.kernels.cost import Cost
from dantinox.kernels.ops.decode_attention.kv_cache import quantize
from dantinox.kernels.workloads.types import Decode, Workload

Tree = dict[str, Any]
ArgumentSet = tuple[Tree, Tree, jax.Array]  # inputs, state, cotangent
DEVICES = {"cpu": "cpu", "gpu": "h100", "tpu": "tpu"}  # JAX's platform -> the device of `kernels.workloads`
MIN_TURNS, MAX_TURNS = 3, 12
SHORT_SECONDS = 0.1  # calls below this time get two extra turns
LONG_SECONDS = (0.5, 1.5, 3.0)  # for each of these times that a call exceeds, the minimum is one turn less
MAX_REFERENCE_SECONDS = 1.0  # estimated, for one forward pass


@dataclass(frozen=True)
class BenchmarkCase:
    """A workload and a direction."""

    workload: Workload
    backward: bool = False

    def __str__(self) -> str:
        return f"{self.workload.name}, {self.direction}"

    @property
    def direction(self) -> str:
        """The direction that is timed, as the reports name it."""
        return "forward+backward" if self.backward else "forward"

    def cost(self) -> Cost:
        """FLOPs and bytes of what is timed."""
        cost = self.workload.cost()
        return cost + self.workload.cost(backward=True) if self.backward else cost


@dataclass
class CandidateResult:
    """Result of one candidate.

    Attributes:
        seconds: the time of each turn.
        skip_reason: why there are no times, or None.
        temp_bytes: memory that the compiled program allocates beside arguments and results.
        error: relative error of output and gradients, or None if the candidate computes something else.
    """

    seconds: list[float] = field(default_factory=list)
    skip_reason: str | None = None
    temp_bytes: int = 0
    error: float | None = None


@dataclass
class CaseResult:
    """Result of a benchmark case.

    Attributes:
        results: the result of each candidate, by name.
        flops_per_second, bytes_per_second: the ceilings of the roofline, measured between the turns.
        seconds: wall time of the case.
    """

    case: BenchmarkCase
    results: dict[str, CandidateResult]
    flops_per_second: float
    bytes_per_second: float
    seconds: float


def benchmark_cases(op: str, device: str | None = None, all_directions: bool = False) -> list[BenchmarkCase]:
    """List the benchmark cases of an operation, in both directions where it has a gradient.

    Args:
        op: the operation.
        device: whose workloads to take (default: those of this device).
        all_directions: whether to run both directions of workloads that belong to a sweep on a CPU, too; else those
            run forward and backward only.
    """
    device = device or DEVICES[jax.default_backend()]
    cases = []
    for workload in workloads.select(op, "bench", device):
        directions = (False,) if op == "decode_attention" else (False, True)
        if isinstance(workload, workloads.MoE) and workload.N == 1:
            directions = (False,)  # a decoding step
        if workload.sweep and True in directions and device == "cpu" and not all_directions:
            directions = (True,)
        cases += [BenchmarkCase(workload, backward) for backward in directions]
    return cases


def sweep_coordinate(workload: Workload, axis: str) -> float:
    """Position of a workload on the axis of a sweep: a size, the window, or the slots of a cache."""
    return float(workload.window if axis == "W" else getattr(workload, axis))


def candidates(workload: Workload) -> dict[str, Candidate]:
    """List the candidates by name: our implementations first, then the baselines."""
    ours = {
        name: Candidate(name, implementation_function(workload, name) if reason is None else None, reason)
        for name, reason in kernels.implementations(workload.op).items()
    }
    if reason := _reference_cost_reason(workload):
        ours["reference"] = Candidate("reference", None, reason)
    elif workload.sweep and workload.devices == ("cpu",) and not isinstance(workload, Decode):
        reason = "left out of the sweeps on a CPU, where it would take most of the time"
        ours["reference"] = Candidate("reference", None, reason)
    untuned = {
        f"{name}, untuned": Candidate(f"{name}, untuned", tuning.forcing({})(implementation_function(workload, name)))
        for name, candidate in ours.items()
        if candidate.unsupported_reason is None and uses_measurements(workload, name)
    }
    return ours | untuned | {baseline.name: baseline for baseline in baselines.for_workload(workload)}


@functools.cache  # the second trace of a call would be that of the first, and choose nothing
def uses_measurements(workload: Workload, implementation: str) -> bool:
    """Return whether an implementation has block sizes that were measured on this device for a workload."""
    measured = tuning.table(dispatch.current_device()).block_sizes
    if not measured:
        return False
    inputs, state, _ = jax.eval_shape(functools.partial(random_arguments, workload))
    aux = workload.integer_inputs()
    with tuning.recording() as seen, contextlib.suppress(NotImplementedError):
        jax.eval_shape(implementation_function(workload, implementation), inputs, state, aux)
    return not measured.keys().isdisjoint(seen.choices)


def implementation_function(workload: Workload, implementation: str) -> Forward:
    """Return a function that calls one of our implementations; the state of decoding is the cache."""
    operation, options = getattr(kernels, workload.op), workload.options()

    def forward(inputs: Tree, state: Tree, aux: Tree) -> tuple[jax.Array, Tree]:
        if not isinstance(workload, Decode):
            return operation(**inputs, **aux, **options, implementation=implementation), state
        cache = kernels.KVCache(**state, **aux)
        o, cache = operation(**inputs, cache=cache, **options, implementation=implementation)
        return o, {name: getattr(cache, name) for name in state}

    return forward


def _reference_cost_reason(workload: Workload) -> str | None:
    """Say why the reference is left out: it would take too long or too much memory. None: it would not."""
    w = workload
    if isinstance(w, workloads.Attention):
        flops, floats = 4 * w.B * w.H * w.T * w.S * w.D, 3 * w.B * w.H * w.T * w.S
    elif isinstance(w, workloads.MoE):
        flops, floats = 6 * w.E * w.N * w.M * w.F, 3 * w.N * w.F
    elif isinstance(w, workloads.LinearCrossEntropy):
        flops, floats = 2 * w.N * w.M * w.V, 3 * w.N * w.V
    elif isinstance(w, workloads.GroupedMatmul):
        flops, floats = 2 * w.E * w.N * w.M * w.F, 3 * w.N * max(w.F, w.M)
    else:
        return None
    cpu = jax.default_backend() == "cpu"
    seconds, max_bytes = flops / (1e11 if cpu else 4e14), 4e9 if cpu else 2e10
    if seconds > MAX_REFERENCE_SECONDS or 4 * floats > max_bytes:
        return f"would take about {seconds:.1f} s forward and {4 * floats / 1e9:.1f} GB"
    return None


def build_program(forward: Forward, backward: bool) -> Callable[..., tuple[Tree, Tree]]:
    """Return (inputs, state, aux, dout) -> ({"o": output, "dNAME": gradient of each input}, state)."""

    def program(inputs: Tree, state: Tree, aux: Tree, dout: jax.Array) -> tuple[Tree, Tree]:
        if not backward:
            o, state = forward(inputs, state, aux)
            return {"o": o}, state
        o, vjp = jax.vjp(lambda inputs: forward(inputs, state, aux)[0], inputs)
        return {"o": o} | {f"d{name}": gradient for name, gradient in vjp(dout.astype(o.dtype))[0].items()}, state

    return program


class CompiledCandidate:
    """A compiled candidate with its arguments: `compiled(i)` runs it on the i-th set of them."""

    def __init__(self, case: BenchmarkCase, forward: Forward, argument_sets: Sequence[ArgumentSet]) -> None:
        self._aux = jax.tree.map(jnp.asarray, case.workload.integer_inputs())
        self._sets = [(inputs, jax.tree.map(jnp.copy, state), dout) for inputs, state, dout in argument_sets]
        inputs, state, dout = self._sets[0]
        jitted = jax.jit(build_program(forward, case.backward), donate_argnums=1)
        self._program = jitted.lower(inputs, state, self._aux, dout).compile()
        memory = self._program.memory_analysis()
        self.temp_bytes = int(memory.temp_size_in_bytes) if memory else 0

    def __call__(self, i: int) -> Tree:
        """Run the program on the i-th set of arguments; return its results by name."""
        index = i % len(self._sets)
        inputs, state, dout = self._sets[index]
        results, state = self._program(inputs, state, self._aux, dout)
        self._sets[index] = (inputs, state, dout)  # the old state was donated
        return results

    def run_with_cotangent(self, dout: jax.Array) -> Tree:
        """Run it on the first set of arguments with another cotangent."""
        inputs, state, original = self._sets[0]
        self._sets[0] = (inputs, state, dout)
        results = self(0)
        self._sets[0] = (inputs, self._sets[0][1], original)
        return results


def random_arguments(workload: Workload, seed: int = 0) -> ArgumentSet:
    """Draw (inputs, state, cotangent) in the workload's first dtype, scaled so that every product is near 1."""
    dtype = workload.dtypes[0]
    rng = np.random.default_rng(seed)
    inputs: Tree = {}
    for name, shape in workload.shapes().items():
        fan_in = workload.M if isinstance(workload, workloads.LinearCrossEntropy) else shape[-2]
        scale = fan_in**-0.5 if name.startswith("w") else 1.0
        if name == "expert_weights":  # as a router makes them: float32 in every dtype, and they sum to 1
            weights = rng.random(shape, np.float32)
            inputs[name] = jnp.asarray(weights / weights.sum(axis=-1, keepdims=True))
        else:
            inputs[name] = _normal(rng, shape, dtype, scale)
    state = {}
    if isinstance(workload, Decode):
        for name in ("k", "v"):
            values, scales = quantize(_normal(rng, workload.cache_shape(), dtype), workload.kv_dtype or dtype)
            state |= {name: values} if scales is None else {name: values, f"{name}_scale": scales}
    return inputs, state, _normal(rng, workload.out_shape(), dtype)


def _normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, scale: float = 1.0) -> jax.Array:
    """Draw normal numbers; large arrays are drawn on an accelerator, which is faster."""
    if math.prod(shape) < 2**24 or jax.default_backend() == "cpu":
        return jnp.asarray(rng.standard_normal(shape, np.float32) * np.float32(scale)).astype(dtype)
    return _normal_on_device(jax.random.key(int(rng.integers(2**31))), shape, dtype, scale)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal_on_device(key: jax.Array, shape: tuple[int, ...], dtype: str, scale: float) -> jax.Array:
    return (jax.random.normal(key, shape, dtype) * scale).astype(dtype)


def num_argument_sets(workload: Workload) -> int:
    """Number of argument sets to rotate: together twice the size of the cache, at most 8."""
    return max(1, min(8, math.ceil(2 * cache_bytes() / max(workload.cost().bytes, 1))))


@functools.cache
def cache_bytes() -> int:
    """Size of the last-level cache."""
    if jax.default_backend() != "cpu":
        return 50 * 2**20  # L2 of an H100
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text("utf-8").strip()
        sizes.append(int(text.rstrip("KMG")) * {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1], 1))
    return max(sizes) or 32 * 2**20


def run_case(
    case: BenchmarkCase,
    ceilings: Ceilings,
    *,
    budget: float,
    only: Sequence[str] = (),
    extra: Sequence[Candidate] = (),
) -> CaseResult:
    """Compile every candidate, measure its error and time it.

    Args:
        case: what to run.
        ceilings: measures the ceilings of the roofline between the turns.
        budget: seconds of timing, shared by all candidates.
        only: names of the candidates to run; empty: all.
        extra: further candidates.
    """
    begin = time.monotonic()
    workload, results, compiled = case.workload, {}, {}
    argument_sets = [random_arguments(workload, seed) for seed in range(num_argument_sets(workload))]
    inputs, state, dout = argument_sets[0]
    sample = accuracy.CheckedSample(workload, inputs, workload.integer_inputs())
    masked_dout = (dout * sample.mask).astype(dout.dtype)
    reference = build_program(_reference(workload), case.backward)
    expected = accuracy.float32_reference(sample, reference, state, masked_dout)
    chosen = candidates(workload) | {candidate.name: candidate for candidate in extra}
    chosen = {name: candidate for name, candidate in chosen.items() if not only or name in only}
    # Compiling takes most of the time of a case on an accelerator, and the host has idle cores there.
    with ThreadPoolExecutor(1 if jax.default_backend() == "cpu" else 4) as threads:
        pending = {
            name: threads.submit(CompiledCandidate, case, candidate.function, argument_sets)
            for name, candidate in chosen.items()
            if candidate.unsupported_reason is None
        }
    first_seconds: dict[str, float] = {}
    for name, candidate in chosen.items():
        results[name] = result = CandidateResult(skip_reason=candidate.unsupported_reason)
        if candidate.unsupported_reason is not None:
            continue
        try:
            program = pending.pop(name).result()
            start = time.perf_counter()
            outputs = jax.block_until_ready(program.run_with_cotangent(masked_dout))
            first_seconds[name] = time.perf_counter() - start
        except Exception as error:  # baselines fail in many ways, and the other candidates still run
            result.skip_reason = error_summary(error)
            continue
        result.temp_bytes = program.temp_bytes
        result.error = None if name in baselines.YARDSTICKS else sample.error(outputs, expected)
        compiled[name] = program
    flops, bytes_moved = _time_in_turns(case, ceilings, compiled, results, first_seconds, budget)
    return CaseResult(case, results, flops, bytes_moved, time.monotonic() - begin)


def _reference(workload: Workload) -> Forward:
    """Return the reference, or a gathering form of it where it would take too long to compile."""
    if getattr(workload, "E", 0) > accuracy.MAX_REFERENCE_GROUPS:
        return accuracy.gathered_reference(workload)
    return implementation_function(workload, "reference")


def error_summary(error: Exception) -> str:
    """Format an error in one line."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])[:220]


def _time_in_turns(
    case: BenchmarkCase,
    ceilings: Ceilings,
    compiled: dict[str, CompiledCandidate],
    results: dict[str, CandidateResult],
    first_seconds: dict[str, float],
    budget: float,
) -> tuple[float, float]:
    """Time the candidates in turns, and write their seconds into `results`.

    Args:
        case: the workload and the direction.
        ceilings: the ceilings of the roofline, measured in the same turns.
        compiled: the candidates by name.
        results: the result of each candidate, which gains its seconds.
        first_seconds: the time of each candidate's checked call, from which the number of its turns follows.
        budget: seconds of timing, shared by all candidates.

    Returns:
        The medians of the ceilings, (FLOP/s, bytes/s).
    """
    timer, rates = clock(), []
    dtype = case.workload.dtypes[0]
    num_turns: dict[str, int] = {}
    for name, seconds in first_seconds.items():
        within_budget = budget / max(1, len(first_seconds)) / max(seconds, 1e-4)
        least = MIN_TURNS + 2 * (seconds < SHORT_SECONDS) - sum(seconds > limit for limit in LONG_SECONDS)
        num_turns[name] = max(least, min(MAX_TURNS, int(within_budget)))
        if not num_turns[name]:  # too slow for a call of its own: use the time of the checked call
            results[name].seconds.append(seconds)
    for turn in range(max(num_turns.values(), default=0)):
        if turn % 4 == 0:
            rates.append(ceilings.sample(dtype))
        for name, program in [*compiled.items()]:
            if turn < num_turns[name]:
                try:
                    call = functools.partial(_call_shifted, program, turn)
                    results[name].seconds.append(timer.sample(call, 1)[0])
                except Exception as error:  # a late failure must not lose the times of the other candidates
                    results[name].skip_reason = error_summary(error)
                    del compiled[name]
    rates.append(ceilings.sample(dtype))
    return median_high([flops for flops, _ in rates]), median_high([moved for _, moved in rates])


def _call_shifted(program: CompiledCandidate, turn: int, i: int) -> Tree:
    return program(turn + i)
