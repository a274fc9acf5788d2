"""The first seconds on a GPU: is each kernel right, and does it give the same bits 50 times?

A case runs one compiled kernel (with its gradients where it has any) at a size with ragged edges, and compares every
output with the reference in float32 by the rule of the tests: error <= 2 x error of plain jnp in the kernel's dtype +
1 ulp. Then it runs one compiled program at a large size again and again and compares all bits: the kernels are
reproducible by design, so a difference is a race.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from bench import wrong_places
from bench.gpu.process import MARK
from bench.operations import runner
from bench.operations.baselines import Forward
from dantinox import kernels
from dantinox.kernels import workloads
from dantinox.kernels.ops.attention.pallas_sm90 import vjp as attention_sm90
from dantinox.kernels.ops.decode_attention.pallas_sm90 import kernel as decode_sm90
from dantinox.kernels.ops.grouped_matmul.pallas_sm90 import vjp
from dantinox.kernels.ops.moe.pallas_sm90 import vjp as experts_vjp
from dantinox.kernels.workloads.types import Attention, Decode, GroupedMatmul, MoE, Workload

REPEATS = 50
SPLITS = 5
Tree = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """What to run.

    Attributes:
        check: sizes for the comparison with the reference. large: for the repeats. tiny: for a rehearsal.
        backward: gradients too.
    """

    check: Workload
    large: Workload
    tiny: Workload
    backward: bool = False


@dataclass(frozen=True)
class Arguments:
    """Which case, and how often it repeats."""

    case: str
    repeats: int = REPEATS
    tiny: bool = False
    """Tiny sizes in the GPU interpreter: a rehearsal without a GPU."""


def _spec(kind: type[Workload], **sizes: Any) -> Any:
    return kind(name="smoke", suites=(), devices=(), dtypes=("bfloat16",), **sizes)


def _attention(T: int, S: int, H: int, K: int, D: int, **options: Any) -> Attention:
    return _spec(Attention, T=T, S=S, H=H, K=K, D=D, **options)


def _groups(N: int, M: int, F: int, *sizes: int) -> GroupedMatmul:
    return _spec(GroupedMatmul, N=N, M=M, F=F, E=len(sizes), sizes=sizes)


def _find(op: str, name: str) -> Workload:
    return workloads.get(op, name)


def _ring(C: int, *lengths: int, H: int, K: int, D: int, **options: Any) -> Decode:
    return _spec(Decode, C=C, lengths=lengths, H=H, K=K, D=D, **options)


RAGGED = _groups(1100, 512, 768, 300, 0, 129, 1, 513)  # an empty group, 157 unassigned rows
EXPERTS = _spec(MoE, N=600, M=256, F=512, E=6, k=2, skew="zipf")
CASES: Mapping[str, Case] = {  # in the order in which they run
    "grouped-y": Case(RAGGED, _find("grouped_matmul", "Mixtral-8x7B uniform"), _groups(80, 64, 64, 71, 0, 7)),
    "attention-d128": Case(
        _attention(1100, 1100, 8, 2, 128), _find("attention", "16k d128 causal"), _attention(70, 70, 1, 1, 128)
    ),
    "attention-d128-gradients": Case(
        _attention(1100, 1100, 8, 2, 128, gate="elementwise"),
        _find("attention", "16k d128 causal"),
        _attention(70, 70, 1, 1, 128),
        backward=True,
    ),
    "decode-5-splits": Case(
        _ring(4096, 0, 63, 4095, 4096, 12293, H=8, K=2, D=128),
        _ring(32768, *[32767] * 8, H=32, K=8, D=128),
        _ring(136, 7, 300, H=2, K=1, D=64),
    ),
    "grouped-gradients": Case(
        RAGGED, _find("grouped_matmul", "Mixtral-8x7B uniform"), _groups(40, 64, 64, 30, 0, 7), backward=True
    ),
    "experts-gradients": Case(
        EXPERTS,
        _find("moe_mlp", "Mixtral-8x7B uniform"),
        _spec(MoE, N=20, M=64, F=64, E=2, k=1),
        backward=True,
    ),
    "attention-d256": Case(
        _attention(700, 700, 4, 2, 256, gate="head"),
        _find("attention", "16k d256 causal"),
        _attention(70, 70, 1, 1, 256),
        backward=True,
    ),
    "attention-d64-segments-window": Case(
        _attention(1100, 1100, 4, 2, 64, window=300, segments="packed"),
        _attention(16384, 16384, 16, 4, 64, window=1024, segments="packed"),
        _attention(70, 70, 1, 1, 64, window=40, segments="packed"),
        backward=True,
    ),
}


def run(arguments: Arguments) -> int:
    """Compare, repeat, print; 1 where anything is wrong."""
    if arguments.case not in CASES:
        raise ValueError(f"case is {arguments.case!r}; allowed: {', '.join(CASES)}")
    case = CASES[arguments.case]
    start = time.monotonic()
    wrong = compare(case.tiny if arguments.tiny else case.check, case.backward, arguments.tiny)
    print(f"{arguments.case}: {'WRONG' if wrong else 'right'}, {time.monotonic() - start:.1f} s", flush=True)
    for line in wrong:
        print(f"{MARK}{arguments.case}: {line}", flush=True)
    start = time.monotonic()
    differing = repeat(case.tiny if arguments.tiny else case.large, case.backward, arguments.tiny, arguments.repeats)
    print(f"{arguments.case}: {arguments.repeats} runs, {time.monotonic() - start:.1f} s", flush=True)
    for line in differing:
        print(f"{MARK}{arguments.case}: {line}", flush=True)
    return 1 if wrong or differing else 0


def kernel(workload: Workload, tiny: bool) -> Forward:
    """The Hopper kernel of a row, compiled, or in the interpreter."""
    interpret = plgpu.InterpretGPUParams() if tiny else None
    options = workload.options()
    if isinstance(workload, Attention | Decode):
        options["scale"] = workload.D**-0.5 if workload.scale is None else workload.scale

    def forward(inputs: Tree, state: Tree, aux: Tree) -> tuple[jax.Array, Tree]:
        if isinstance(workload, Attention):
            ids = aux.get("segment_ids")
            ids = ids if ids is None or isinstance(ids, tuple) else (ids, ids)
            given = {"gate": None} | inputs
            return attention_sm90.attention(**given, **options, segment_ids=ids, interpret=interpret), state
        if isinstance(workload, Decode):
            cache = kernels.KVCache(**state, **aux)
            given = {"gate": None} | inputs
            num_splits = 2 if tiny else SPLITS
            o, cache = decode_sm90.decode_attention(
                **given, cache=cache, **options, num_splits=num_splits, interpret=interpret
            )
            return o, {"k": cache.k, "v": cache.v}
        operation = experts_vjp.moe_mlp if isinstance(workload, MoE) else vjp.grouped_matmul
        return operation(**inputs, **aux, interpret=interpret, blocks=2 if tiny else 0), state

    return forward


@functools.cache
def program(workload: Workload, backward: bool, tiny: bool) -> Callable[..., tuple[Tree, Tree]]:
    """Jitted (inputs, state, aux, cotangent) -> (output and gradients by name, state)."""
    return jax.jit(runner.program(kernel(workload, tiny), backward))


def compare(workload: Workload, backward: bool, tiny: bool) -> list[str]:
    """Where the kernel is wrong, an entry per array; empty where it is right."""
    inputs, state, dout = runner.arguments(workload)
    aux = jax.tree.map(jnp.asarray, workload.integer_inputs())
    actual, rings = program(workload, backward, tiny)(inputs, state, aux, dout)
    reference = jax.jit(runner.program(runner.ours(workload, "reference"), backward))
    plain, expected_rings = reference(inputs, state, aux, dout)
    wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
    with jax.default_matmul_precision("highest"):
        exact, _ = reference(wide(inputs), wide(state), aux, wide(dout))
    wrong = []
    for name, value in exact.items():
        truth = np.asarray(value, np.float64)
        ulp = float(jnp.finfo(workload.dtypes[0]).eps) * max(1.0, float(np.abs(truth).max(initial=0)))
        allowed = 2 * float(np.abs(np.asarray(plain[name], np.float64) - truth).max(initial=0)) + ulp
        found = np.asarray(actual[name], np.float64)
        if not np.abs(found - truth).max(initial=0) <= allowed:  # NaN is wrong
            wrong.append(f"{name}: {wrong_places.describe(found, truth, allowed)}")
    for name, ring in rings.items():
        off = _differing(ring, expected_rings[name])
        if off:
            wrong.append(f"cache.{name}: {int(off)} of {ring.size} values differ from the ring that it must be")
    return wrong


def repeat(workload: Workload, backward: bool, tiny: bool, repeats: int) -> list[str]:
    """Run one compiled program again and again; which arrays changed a bit."""
    workload = dataclasses.replace(workload, dtypes=("bfloat16",))
    inputs, state, dout = runner.arguments(workload)
    aux = jax.tree.map(jnp.asarray, workload.integer_inputs())
    run_once = program(workload, backward, tiny)
    first = jax.block_until_ready(run_once(inputs, state, aux, dout))
    named = lambda results: results[0] | {f"cache.{name}": ring for name, ring in results[1].items()}
    changed: dict[str, list[int]] = {}
    for _ in range(1, repeats):
        again = run_once(inputs, state, aux, dout)
        for name, value in named(again).items():
            changed.setdefault(name, []).append(_differing(value, named(first)[name]))
    lines = []
    for name, counts in changed.items():
        values = [int(count) for count in counts]
        if any(values):
            runs = sum(value > 0 for value in values)
            where = f"in up to {max(values)} of {named(first)[name].size} places"
            lines.append(f"{name}: {runs} of {repeats - 1} repeats differ from the first run, {where}")
    return lines


@jax.jit
def _differing(a: jax.Array, b: jax.Array) -> jax.Array:
    """How many elements have other bits."""
    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}[a.dtype.itemsize]
    as_bits = lambda x: jax.lax.bitcast_convert_type(x, bits)
    return jnp.sum(as_bits(a) != as_bits(b), dtype=jnp.int32)
