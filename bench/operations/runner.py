"""One contest: a row of `dantinox.kernels.workloads`, forward or forward and backward, every implementation in turns.

All implementations of a row are compiled first; then they take turns, so that a drift of the machine falls on all of
them. Their arguments are random, and different in each turn where one set would stay in the cache.
"""

import functools
import math
import time
import types
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.operations import accuracy, baselines
from bench.operations.roofline import Ceilings
from bench.operations.timer import clock
from dantinox import kernels
from dantinox.kernels import workloads
from dantinox.kernels.cost import Cost
from dantinox.kernels.ops.decode_attention.kv_cache import quantize
from dantinox.kernels.workloads.types import Decode, Workload

Tree = dict[str, Any]
MACHINE = {"cpu": "cpu", "gpu": "h100", "tpu": "tpu"}
TURNS = (3, 12)  # the fewest and the most
QUICK = 0.1  # seconds below which it gets two more
SLOW = (0.5, 1.5, 3.0)  # seconds above each of which a call gets one turn less than the fewest
PATIENCE = 4.0  # seconds that one call may take by our own estimate


@dataclass(frozen=True)
class Contest:
    """A row and a direction."""

    spec: Workload
    backward: bool = False

    def __str__(self) -> str:
        return f"{self.spec.name}, {self.direction}"

    @property
    def direction(self) -> str:
        """What is timed."""
        return "forward+backward" if self.backward else "forward"

    def cost(self) -> Cost:
        """FLOPs and bytes of what is timed."""
        cost = self.spec.cost()
        return cost + self.spec.cost(backward=True) if self.backward else cost


def position(workload: Workload, axis: str) -> float:
    """Where a row stands on the axis of a sweep: a size, the window, or the slots of a cache."""
    value = workload.window if axis == "W" else getattr(workload, axis)
    return float(value)


@dataclass
class Result:
    """What came of one implementation: seconds of each turn, or why there are none."""

    seconds: list[float] = field(default_factory=list)
    refused: str | None = None
    temp_bytes: int = 0
    error: float | None = None


@dataclass
class Outcome:
    """A finished contest: results by implementation, and the ceilings at that time."""

    contest: Contest
    results: dict[str, Result]
    flops_per_second: float
    bytes_per_second: float
    seconds: float


def contests(op: str, machine: str | None = None, every: bool = False) -> list[Contest]:
    """The bench rows of an operation for this machine, in both directions where it has a gradient.

    On a CPU, rows that are there for a sweep are timed forward and backward only, unless `every` direction is wanted.
    """
    machine = machine or MACHINE[jax.default_backend()]
    found = []
    for row in workloads.select(op, "bench", machine):
        backward = (False,) if op == "decode_attention" else (False, True)
        if isinstance(row, workloads.MoE) and row.N == 1:
            backward = (False,)  # a step of decoding
        backward = (True,) if row.sweep and True in backward and machine == "cpu" and not every else backward
        found += [Contest(row, each) for each in backward]
    return found


def contestants(workload: Workload) -> dict[str, baselines.Choice]:
    """Name -> how to call it, or why it cannot take part: our implementations first, then the peers."""
    mine: dict[str, baselines.Choice] = {}
    for name, why in kernels.implementations(workload.op).items():
        mine[name] = ours(workload, name) if why is None else why
    if too_long := _reference_takes(workload):
        mine["reference"] = too_long
    elif workload.sweep and workload.devices == ("cpu",) and not isinstance(workload, Decode):
        mine["reference"] = "left out of the sweeps on a CPU, where it would take most of the time"
    return mine | baselines.peers(workload)


def ours(workload: Workload, implementation: str) -> baselines.Forward:
    """How one of our implementations is called on a row's arguments; decoding's state is the cache."""
    operation, options = getattr(kernels, workload.op), workload.options()

    def forward(inputs: Tree, state: Tree, aux: Tree) -> tuple[jax.Array, Tree]:
        if not isinstance(workload, Decode):
            return operation(**inputs, **aux, **options, implementation=implementation), state
        o, cache = operation(**inputs, cache=kernels.KVCache(**state, **aux), **options, implementation=implementation)
        return o, {name: getattr(cache, name) for name in state}

    return forward


def _reference_takes(workload: Workload) -> str | None:
    """Why the reference is left out: it would take too long or too much memory."""
    s = workload
    if isinstance(s, workloads.Attention):
        flops, floats = 4 * s.B * s.H * s.T * s.S * s.D, 3 * s.B * s.H * s.T * s.S
    elif isinstance(s, workloads.MoE):
        flops, floats = 6 * s.E * s.N * s.M * s.F, 3 * s.N * s.F
    elif isinstance(s, workloads.GroupedMatmul):
        flops, floats = 2 * s.E * s.N * s.M * s.F, 3 * s.N * max(s.F, s.M)
    else:
        return None
    cpu = jax.default_backend() == "cpu"
    seconds, room = flops / (1e11 if cpu else 4e14), 4e9 if cpu else 2e10
    if seconds > PATIENCE / 4 or 4 * floats > room:
        return f"would take about {seconds:.1f} s forward and {4 * floats / 1e9:.1f} GB"
    return None


def program(forward: baselines.Forward, backward: bool) -> Callable[..., tuple[Tree, Tree]]:
    """(inputs, state, aux, dout) -> ({"o": output, "dNAME": gradient of each input}, state)."""

    def run(inputs: Tree, state: Tree, aux: Tree, dout: jax.Array) -> tuple[Tree, Tree]:
        if not backward:
            o, state = forward(inputs, state, aux)
            return {"o": o}, state
        o, pull = jax.vjp(lambda inputs: forward(inputs, state, aux)[0], inputs)
        return {"o": o} | {f"d{name}": gradient for name, gradient in pull(dout)[0].items()}, state

    return run


class Runner:
    """One implementation of a row, compiled, with its arguments: `runner(i)` runs it on the i-th set."""

    def __init__(self, contest: Contest, forward: baselines.Forward, sets: list[tuple[Tree, Tree, jax.Array]]) -> None:
        self.aux = jax.tree.map(jnp.asarray, contest.spec.integer_inputs())
        self.sets = [(inputs, jax.tree.map(jnp.copy, state), dout) for inputs, state, dout in sets]
        inputs, state, dout = self.sets[0]
        jitted = jax.jit(program(forward, contest.backward), donate_argnums=1)
        self.compiled = jitted.lower(inputs, state, self.aux, dout).compile()
        memory = self.compiled.memory_analysis()
        self.temp_bytes = int(memory.temp_size_in_bytes) if memory else 0

    def __call__(self, i: int) -> Tree:
        at = i % len(self.sets)
        inputs, state, dout = self.sets[at]
        results, state = self.compiled(inputs, state, self.aux, dout)
        self.sets[at] = (inputs, state, dout)  # the old state was donated
        return results

    def once(self, dout: jax.Array) -> Tree:
        """The results on the first set with another cotangent."""
        inputs, state, kept = self.sets[0]
        self.sets[0] = (inputs, state, dout)
        results = self(0)
        self.sets[0] = (inputs, self.sets[0][1], kept)
        return results


def arguments(workload: Workload, seed: int = 0) -> tuple[Tree, Tree, jax.Array]:
    """(inputs, state, cotangent) in the row's first dtype, random, at sizes that keep every product near 1."""
    dtype = workload.dtypes[0]
    rng = np.random.default_rng(seed)
    inputs: Tree = {}
    for name, shape in workload.shapes().items():
        scale = shape[-2] ** -0.5 if name.startswith("w") else 1.0
        if name == "expert_weights":  # they stay float32 beside narrow experts, and sum to 1: so a router gives them
            weights = rng.random(shape, np.float32)
            inputs[name] = jnp.asarray(weights / weights.sum(axis=-1, keepdims=True))
        else:
            inputs[name] = _normal(rng, shape, dtype, scale)
    state = {}
    if isinstance(workload, Decode):
        for name in ("k", "v"):
            numbers, factors = quantize(_normal(rng, workload.cache_shape(), dtype), workload.kv_dtype or dtype)
            state |= {name: numbers} if factors is None else {name: numbers, f"{name}_scale": factors}
    return inputs, state, _normal(rng, workload.out_shape(), dtype)


def _normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, scale: float = 1.0) -> jax.Array:
    """Normal numbers; large arrays are drawn on the device, where one key serves all sizes of a dtype quickly."""
    if math.prod(shape) < 2**24 or jax.default_backend() == "cpu":
        return jnp.asarray(rng.standard_normal(shape, np.float32) * np.float32(scale)).astype(dtype)
    return _on_device(jax.random.key(int(rng.integers(2**31))), shape, dtype, scale)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _on_device(key: jax.Array, shape: tuple[int, ...], dtype: str, scale: float) -> jax.Array:
    return (jax.random.normal(key, shape, dtype) * scale).astype(dtype)


def sets_needed(workload: Workload) -> int:
    """Sets of arguments to go round: enough to be twice the cache, at most 8."""
    return max(1, min(8, math.ceil(2 * cache_bytes() / max(workload.cost().bytes, 1))))


@functools.cache
def cache_bytes() -> int:
    """Size of the last cache before memory."""
    if jax.default_backend() != "cpu":
        return 50 * 2**20  # an H100's L2
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text.rstrip("KMG")) * {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1], 1))
    return max(sizes) or 32 * 2**20


def hold(
    contest: Contest,
    ceilings: Ceilings,
    *,
    budget: float,
    only: tuple[str, ...] = (),
    guests: Mapping[str, baselines.Choice] = types.MappingProxyType({}),
) -> Outcome:
    """Compile, judge and time every implementation of a row.

    Args:
        budget: seconds of timing for the whole contest.
        only: names of the implementations to take; none: all.
        guests: what takes part beside the contestants, by name.
    """
    begin = time.monotonic()
    workload, results, runners = contest.spec, {}, {}
    sets = [arguments(workload, seed) for seed in range(sets_needed(workload))]
    part = accuracy.Part(workload, sets[0][0], workload.integer_inputs())
    masked = (sets[0][2] * part.mask).astype(sets[0][2].dtype)
    exact = accuracy.by_row(workload) if getattr(workload, "E", 0) > accuracy.MANY else ours(workload, "reference")
    truth = accuracy.truth(part, program(exact, contest.backward), sets[0][1], masked)
    first: dict[str, float] = {}
    chosen = {name: f for name, f in (contestants(workload) | dict(guests)).items() if not only or name in only}
    # On a machine with an accelerator the processor has cores to spare, and compiling is most of the time there.
    with ThreadPoolExecutor(1 if jax.default_backend() == "cpu" else 4) as threads:
        compiled = {
            name: threads.submit(Runner, contest, forward, sets)
            for name, forward in chosen.items()
            if not isinstance(forward, str)
        }
    for name, forward in chosen.items():
        results[name] = result = Result()
        if isinstance(forward, str):
            result.refused = forward
            continue
        try:
            runner = compiled.pop(name).result()
            start = time.perf_counter()
            judged = jax.block_until_ready(runner.once(masked))
            first[name] = time.perf_counter() - start
        except Exception as error:  # a peer may fail in its own way, and the others still run
            result.refused = _said(error)
            continue
        result.temp_bytes = runner.temp_bytes
        result.error = None if name in baselines.YARDSTICKS else part.error(judged, truth)
        runners[name] = runner
    flops, moved = _turns(contest, ceilings, runners, results, first, budget)
    return Outcome(contest, results, flops, moved, time.monotonic() - begin)


def _said(error: Exception) -> str:
    """An error in one line."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])[:220]


def _turns(
    contest: Contest,
    ceilings: Ceilings,
    runners: dict[str, Runner],
    results: dict[str, Result],
    first: dict[str, float],
    budget: float,
) -> tuple[float, float]:
    """Time all runners in turns; returns the medians of the ceilings meanwhile."""
    timer, rates = clock(), []
    turns: dict[str, int] = {}
    for name, seconds in first.items():  # a slow one takes fewer turns
        fair = budget / max(1, len(first)) / max(seconds, 1e-4)
        fewest = TURNS[0] + 2 * (seconds < QUICK) - sum(seconds > limit for limit in SLOW)
        turns[name] = max(fewest, min(TURNS[1], int(fair)))
        if not turns[name]:  # the call that was judged has to do
            results[name].seconds.append(seconds)
    for turn in range(max(turns.values(), default=0)):
        if turn % 4 == 0:
            rates.append(ceilings.sample(contest.spec.dtypes[0]))
        for name, runner in [*runners.items()]:
            if turn < turns[name]:
                try:
                    results[name].seconds.append(timer.sample(functools.partial(_shifted, runner, turn), 1)[0])
                except Exception as error:  # one that fails late must not take the others' times along
                    results[name].refused = _said(error)
                    del runners[name]
    rates.append(ceilings.sample(contest.spec.dtypes[0]))
    middle = lambda values: sorted(values)[len(values) // 2]
    return middle([rate[0] for rate in rates]), middle([rate[1] for rate in rates])


def _shifted(runner: Runner, turn: int, i: int) -> Tree:
    return runner(turn + i)
