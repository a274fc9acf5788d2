"""Compile the sizes that break kernels for a TPU: does each program compile, or is it refused with a reason?

    python -m bench.aot.tpu.edge_cases v6e [--random 200] [--long]

Compiles the Pallas kernels at every parity workload, forward and with gradients, in every dtype, and steps of decoding
that must not copy the KV cache. Where the kernel is refused, `auto` must compile. Neither the interpreter nor the NumPy
simulation of the tests knows what Mosaic cannot compile, or where XLA adds copies.
"""

import argparse
import dataclasses
import importlib.util
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from bench.aot import hardware
from bench.aot.cases import OPERATIONS
from bench.aot.tpu import compiler
from dantinox import cli
from dantinox.kernels import workloads

DTYPES = ("float32", "bfloat16", "float16")
EIGHT_BITS = ("int8", "float8_e4m3fn")
HEAD_DIMS = (32, 64, 80, 96, 128, 192, 256)
MAX_TEMP_SHARE = 0.02  # of a decoding step's temporary memory in its ring buffers


class EdgeCase(NamedTuple):
    """One program of the Pallas kernels, forward or with gradients ("both")."""

    workload: workloads.Workload
    dtype: str
    direction: str
    in_place: bool = False

    def __str__(self) -> str:
        """Return the operation, the workload, the dtypes and the direction."""
        cache = getattr(self.workload, "kv_dtype", None)
        dtype = self.dtype if cache is None else f"{self.dtype}, cache of {cache}"
        return f"{self.workload.op} / {self.workload.name} / {dtype} / {self.direction}"


def parity_cases(suites: tuple[str, ...]) -> Iterator[EdgeCase]:
    """Yield the workloads of the parity tests in every dtype."""
    for op in OPERATIONS:
        for workload in workloads.ROWS:
            if workload.op == op and set(suites) & set(workload.suites):
                yield from _with_dtypes(workload)


def in_place_cases() -> Iterator[EdgeCase]:
    """Yield decoding steps on large caches of every head dim, and of several tokens with sinks in each layout."""
    for D, T in [*((D, 1) for D in HEAD_DIMS), (80, 5), (128, 5)]:
        row = workloads.Decode(
            name=f"in place, heads of {D}, {T} tokens",
            **{"suites": (), "devices": (), "lengths": (9000,) * 8, "C": 16384, "H": 16, "K": 8, "D": D},
            **{"new_tokens": T, "sinks": T > 1},
        )
        for dtype, kv_dtype in (("bfloat16", None), ("float32", None), *(("bfloat16", x) for x in EIGHT_BITS)):
            yield EdgeCase(dataclasses.replace(row, kv_dtype=kv_dtype), dtype, "forward", in_place=True)


def random_cases(count: int, seed: int = 0) -> Iterator[EdgeCase]:
    """Yield programs of random sizes and features, `count` of each operation."""
    rng = np.random.default_rng(seed)
    for op in OPERATIONS:
        for n in range(count):
            workload = _RANDOM[op](rng, {"name": f"random {n}", "suites": (), "devices": ()})
            cases = list(_with_dtypes(workload))
            yield cases[rng.integers(len(cases))]


def _with_dtypes(workload: workloads.Workload) -> Iterator[EdgeCase]:
    if not isinstance(workload, workloads.Decode):
        yield from (EdgeCase(workload, dtype, way) for dtype in DTYPES for way in ("forward", "both"))
        return
    yield from (EdgeCase(workload, dtype, "forward") for dtype in DTYPES)
    for kv_dtype in EIGHT_BITS:
        eight_bits = dataclasses.replace(workload, kv_dtype=kv_dtype)
        yield from (EdgeCase(eight_bits, dtype, "forward") for dtype in DTYPES[:2])


def _any_of(rng: np.random.Generator, *values: Any) -> Any:
    return values[rng.integers(len(values))]


def _size(rng: np.random.Generator, most: int) -> int:
    """Draw a size whose logarithm is uniform."""
    return int(most ** rng.random())


def _attention(rng: np.random.Generator, common: dict[str, Any]) -> workloads.Workload:
    T, K, causal = _size(rng, 3000), _any_of(rng, 1, 2, 3, 8), bool(rng.integers(2))
    return workloads.Attention(
        T=T,
        S=_any_of(rng, T, _size(rng, 3000)),
        B=_any_of(rng, 1, 2),
        H=K * _any_of(rng, 1, 2, 3, 4, 8, 16),
        K=K,
        D=_any_of(rng, 1, 7, 32, 64, 80, 96, 128, 192, 256),
        causal=causal,
        window=_any_of(rng, None, _size(rng, 3000)) if causal else None,
        gate=_any_of(rng, "none", "head", "elementwise"),
        softcap=_any_of(rng, None, 20.0),
        segments=_any_of(rng, None, None, "separate"),
        sinks=bool(rng.integers(2)),
        **common,
    )


def _grouped_matmul(rng: np.random.Generator, common: dict[str, Any]) -> workloads.Workload:
    sizes = {"N": _size(rng, 8000), "M": _size(rng, 5000), "F": _size(rng, 5000), "E": _size(rng, 64)}
    return workloads.GroupedMatmul(**sizes, skew=_any_of(rng, *workloads.types.SKEWS), **common)


def _moe(rng: np.random.Generator, common: dict[str, Any]) -> workloads.Workload:
    E = _size(rng, 64)
    sizes = {"N": _size(rng, 3000), "M": _size(rng, 3000), "F": _size(rng, 3000)}
    return workloads.MoE(**sizes, E=E, k=int(rng.integers(1, min(E, 8) + 1)), **common)


def _decode_attention(rng: np.random.Generator, common: dict[str, Any]) -> workloads.Workload:
    K, C, window = _any_of(rng, 1, 2, 5, 8, 32), _size(rng, 9000), _any_of(rng, None, _size(rng, 9000))
    T = min(C, _any_of(rng, 1, 1, 2, 5, 16))
    return workloads.Decode(
        lengths=(1,) * _size(rng, 65),
        C=C if window is None or T == 1 else max(C, window + T - 1),
        new_tokens=T,
        sinks=bool(rng.integers(2)),
        H=K * _any_of(rng, 1, 2, 3, 8),
        K=K,
        D=_any_of(rng, 1, 7, 16, 32, 64, 72, 80, 96, 128, 192, 256, 576),
        window=window,
        gate=_any_of(rng, "none", "head", "elementwise"),
        softcap=_any_of(rng, None, 20.0),
        **common,
    )


def _linear_cross_entropy(rng: np.random.Generator, common: dict[str, Any]) -> workloads.Workload:
    sizes = {"N": _size(rng, 8000), "M": _size(rng, 3000), "V": _size(rng, 40000)}
    options = {"softcap": _any_of(rng, None, 20.0), "z_loss": _any_of(rng, 0.0, 1e-4)}
    return workloads.LinearCrossEntropy(**sizes, **options, **common)


_RANDOM: dict[str, Callable[..., workloads.Workload]] = {
    "attention": _attention,
    "grouped_matmul": _grouped_matmul,
    "moe_mlp": _moe,
    "decode_attention": _decode_attention,
    "linear_cross_entropy": _linear_cross_entropy,
}


def check(case: EdgeCase, compile_: Callable[[EdgeCase, str], Any]) -> tuple[str, str]:
    """Compile a program.

    Args:
        case: the program.
        compile_: compiles a case with an implementation.

    Returns:
        ("compiled", ""), ("refused", reason) or ("failed", reason).
    """
    try:
        compiled = compile_(case, "pallas")
    except NotImplementedError as error:
        try:
            compile_(case, "auto")
        except Exception as auto_error:
            return "failed", f"auto: {first_line(auto_error)}"
        return "refused", first_line(error)
    except Exception as error:  # a compiler may raise anything
        return "failed", first_line(error)
    if case.in_place:
        share = compiled.memory_analysis().temp_size_in_bytes / _cache_bytes(case)
        if share > MAX_TEMP_SHARE:
            return "failed", f"temporary memory is {share:.1%} of the KV cache; allowed: {MAX_TEMP_SHARE:.0%}"
    return "compiled", ""


def _cache_bytes(case: EdgeCase) -> int:
    assert isinstance(case.workload, workloads.Decode)
    itemsize = jnp.dtype(case.workload.kv_dtype or case.dtype).itemsize
    return 2 * itemsize * int(np.prod(case.workload.cache_shape()))


def first_line(error: BaseException) -> str:
    """Return the kind of an error and its message in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def make_compiler(target: hardware.Tpu) -> Callable[[EdgeCase, str], Any]:
    """Return a function that compiles a case with an implementation for a chip."""
    from bench.aot import programs
    from dantinox.kernels import dispatch

    compile_program = compiler.make_compiler(target)

    def compile_(case: EdgeCase, implementation: str) -> Any:
        with dispatch.target_device(target.platform, target.kind):
            program = programs.build_workload(case.workload, implementation, case.dtype, case.direction)
            return compile_program(program.function, program.shapes, program.donate)

    return compile_


def main(argv: list[str] | None = None) -> int:
    """Compile all cases for one chip; returns 1 if one fails."""
    tpus = [name for name, target in hardware.TARGETS.items() if isinstance(target, hardware.Tpu)]
    parser = argparse.ArgumentParser(prog="bench.aot.tpu.edge_cases", description=__doc__.split("\n")[0])
    parser.add_argument("chip", choices=tpus, help="the chip to compile for")
    parser.add_argument("--random", type=int, default=0, metavar="N", help="N random programs per operation instead")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random programs")
    parser.add_argument("--long", action="store_true", help="the workloads of the long tests too")
    arguments = parser.parse_args(argv)
    if importlib.util.find_spec("libtpu") is None:
        parser.error("needs libtpu, which this Python does not have; `make aot` installs it into .venv-aot")
    target = hardware.get(arguments.chip)
    assert isinstance(target, hardware.Tpu)
    os.environ |= compiler.environment(target, None)
    suites = ("parity", "long") if arguments.long else ("parity",)
    cases = [*parity_cases(suites), *in_place_cases()]
    if arguments.random:
        cases = list(random_cases(arguments.random, arguments.seed))
    return run(target.name, cases, make_compiler(target))


def run(name: str, cases: list[EdgeCase], compile_: Callable[[EdgeCase, str], Any]) -> int:
    """Check all cases and print those that fail and a summary; returns 1 if one fails."""
    start, outcomes = time.perf_counter(), Counter[str]()
    for case in cases:
        outcome, reason = check(case, compile_)
        outcomes[outcome] += 1
        if outcome == "failed":
            print(f"{name}: {case}: {reason}", flush=True)
    summary = ", ".join(f"{outcomes[outcome]} {outcome}" for outcome in ("compiled", "refused", "failed"))
    print(
        f"{name}: {len(cases)} programs at the sizes that break kernels: {summary}, {time.perf_counter() - start:.0f} s"
    )
    return int(outcomes["failed"] > 0)


if __name__ == "__main__":
    cli.run_main(main)
