"""Check in the first seconds on a GPU that each kernel is right, and that 50 runs give the same bits.

A case runs one compiled kernel, with its gradients if it has any, at a size with ragged edges. It compares every output
with the reference in float32 by the rule of the tests: error <= 2 x error of plain jnp in the kernel's dtype + 1 ulp.
Then it runs one compiled program at a large size repeatedly and compares all bits: the kernels are reproducible by
design, so a difference is a race.
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

from bench.gpu.process import MARK
from bench.operations import runner
from bench.operations.baselines import Forward
from bench.verification import wrong_places
from dantinox import kernels
from dantinox.kernels import workloads
from dantinox.kernels.ops.attention.pallas_sm90 import vjp as attention_sm90
from dantinox.kernels.ops.decode_attention.pallas_sm90 import kernel as decode_sm90
from dantinox.kernels.ops.grouped_matmul.pallas_sm90 import vjp
from dantinox.kernels.ops.linear_cross_entropy.pallas_sm90 import vjp as loss_sm90
from dantinox.kernels.ops.moe.pallas_sm90 import vjp as experts_vjp
from dantinox.kernels.workloads.types import Attention, Decode, GroupedMatmul, LinearCrossEntropy, MoE, Workload

REPEATS = 50
SPLITS = 5
Tree = dict[str, Any]


@dataclass(frozen=True)
class SmokeCase:
    """What to run.

    Attributes:
        check: the sizes that are compared with the reference.
        large: the sizes of the repeats.
        tiny: the sizes of a rehearsal.
        backward: whether to run the gradients too.
    """

    check: Workload
    large: Workload
    tiny: Workload
    backward: bool = False


@dataclass(frozen=True)
class Arguments:
    """Which case to run, and how often to repeat it."""

    case: str
    repeats: int = REPEATS
    tiny: bool = False
    """Use tiny sizes in the GPU interpreter: a rehearsal without a GPU."""


def _workload(kind: type[Workload], **sizes: Any) -> Any:
    return kind(name="smoke", suites=(), devices=(), dtypes=("bfloat16",), **sizes)


def _attention_workload(T: int, S: int, H: int, K: int, D: int, **options: Any) -> Attention:
    return _workload(Attention, T=T, S=S, H=H, K=K, D=D, **options)


def _grouped_workload(N: int, M: int, F: int, *sizes: int) -> GroupedMatmul:
    return _workload(GroupedMatmul, N=N, M=M, F=F, E=len(sizes), sizes=sizes)


def _decode_workload(C: int, *lengths: int, H: int, K: int, D: int, **options: Any) -> Decode:
    return _workload(Decode, C=C, lengths=lengths, H=H, K=K, D=D, **options)


def _loss_workload(N: int, M: int, V: int, **options: Any) -> LinearCrossEntropy:
    return _workload(LinearCrossEntropy, N=N, M=M, V=V, **options)


OPERATIONS = {  # those whose kernels are persistent
    GroupedMatmul: vjp.grouped_matmul,
    MoE: experts_vjp.moe_mlp,
    LinearCrossEntropy: loss_sm90.linear_cross_entropy,
}
RAGGED_WORKLOAD = _grouped_workload(1100, 512, 768, 300, 0, 129, 1, 513)  # an empty group, 157 unassigned rows
EXPERTS_WORKLOAD = _workload(MoE, N=600, M=256, F=512, E=6, k=2, skew="zipf")
CASES: Mapping[str, SmokeCase] = {  # in the order in which they run
    "grouped-y": SmokeCase(
        RAGGED_WORKLOAD,
        workloads.get("grouped_matmul", "Mixtral-8x7B uniform"),
        _grouped_workload(80, 64, 64, 71, 0, 7),
    ),
    "attention-d128": SmokeCase(
        _attention_workload(1100, 1100, 8, 2, 128),
        workloads.get("attention", "16k d128 causal"),
        _attention_workload(70, 70, 1, 1, 128),
    ),
    "attention-d128-gradients": SmokeCase(
        _attention_workload(1100, 1100, 8, 2, 128, gate="elementwise"),
        workloads.get("attention", "16k d128 causal"),
        _attention_workload(70, 70, 1, 1, 128),
        backward=True,
    ),
    "decode-5-splits": SmokeCase(
        _decode_workload(4096, 0, 63, 4095, 4096, 12293, H=8, K=2, D=128),
        _decode_workload(32768, *[32767] * 8, H=32, K=8, D=128),
        _decode_workload(136, 7, 300, H=2, K=1, D=64),
    ),
    "grouped-gradients": SmokeCase(
        RAGGED_WORKLOAD,
        workloads.get("grouped_matmul", "Mixtral-8x7B uniform"),
        _grouped_workload(40, 64, 64, 30, 0, 7),
        backward=True,
    ),
    "experts-gradients": SmokeCase(
        EXPERTS_WORKLOAD,
        workloads.get("moe_mlp", "Mixtral-8x7B uniform"),
        _workload(MoE, N=20, M=64, F=64, E=2, k=1),
        backward=True,
    ),
    "loss-gradients": SmokeCase(
        _loss_workload(1100, 520, 5001, softcap=30.0, z_loss=1e-2, absent="some"),
        workloads.get("linear_cross_entropy", "8k tokens, V=32768"),
        _loss_workload(20, 64, 70, softcap=30.0, z_loss=1e-2, absent="some"),
        backward=True,
    ),
    "attention-d256": SmokeCase(
        _attention_workload(700, 700, 4, 2, 256, gate="head"),
        workloads.get("attention", "16k d256 causal"),
        _attention_workload(70, 70, 1, 1, 256),
        backward=True,
    ),
    "attention-d64-segments-window": SmokeCase(
        _attention_workload(1100, 1100, 4, 2, 64, window=300, segments="packed"),
        _attention_workload(16384, 16384, 16, 4, 64, window=1024, segments="packed"),
        _attention_workload(70, 70, 1, 1, 64, window=40, segments="packed"),
        backward=True,
    ),
}


def run(arguments: Arguments) -> int:
    """Compare, repeat and print; return 1 if anything is wrong."""
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


def sm90_function(workload: Workload, tiny: bool) -> Forward:
    """Return a function that calls the Hopper kernel of a workload, compiled or (`tiny`) interpreted."""
    interpret = plgpu.InterpretGPUParams() if tiny else None
    options = workload.options()
    if isinstance(workload, Attention | Decode):
        options["scale"] = workload.D**-0.5 if workload.scale is None else workload.scale

    def forward(inputs: Tree, state: Tree, aux: Tree) -> tuple[jax.Array, Tree]:
        if isinstance(workload, Attention):
            ids = aux.get("segment_ids")
            ids = ids if ids is None or isinstance(ids, tuple) else (ids, ids)
            with_gate = {"gate": None} | inputs
            return attention_sm90.attention(**with_gate, **options, segment_ids=ids, interpret=interpret), state
        if isinstance(workload, Decode):
            cache = kernels.KVCache(**state, **aux)
            with_gate = {"gate": None} | inputs
            num_splits = 2 if tiny else SPLITS
            o, cache = decode_sm90.decode_attention(
                **with_gate, cache=cache, **options, num_splits=num_splits, interpret=interpret
            )
            return o, {"k": cache.k, "v": cache.v}
        operation = OPERATIONS[type(workload)]
        return operation(**inputs, **aux, **options, interpret=interpret, blocks=2 if tiny else 0), state

    return forward


@functools.cache
def jitted_program(workload: Workload, backward: bool, tiny: bool) -> Callable[..., tuple[Tree, Tree]]:
    """Jitted (inputs, state, aux, cotangent) -> (output and gradients by name, state)."""
    return jax.jit(runner.build_program(sm90_function(workload, tiny), backward))


def compare(workload: Workload, backward: bool, tiny: bool) -> list[str]:
    """Compare a kernel with the reference; return a line for each array that is wrong."""
    inputs, state, dout = runner.random_arguments(workload)
    aux = jax.tree.map(jnp.asarray, workload.integer_inputs())
    actual, cache = jitted_program(workload, backward, tiny)(inputs, state, aux, dout)
    reference = jax.jit(runner.build_program(runner.implementation_function(workload, "reference"), backward))
    bfloat16_results, expected_cache = reference(inputs, state, aux, dout)

    def widen(tree: Tree) -> Tree:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    with jax.default_matmul_precision("highest"):
        float32_results, _ = reference(widen(inputs), widen(state), aux, widen(dout))
    wrong = []
    for name, value in float32_results.items():
        expected = np.asarray(value, np.float64)
        ulp = float(jnp.finfo(workload.dtypes[0]).eps) * max(1.0, float(np.abs(expected).max(initial=0)))
        allowed = 2 * float(np.abs(np.asarray(bfloat16_results[name], np.float64) - expected).max(initial=0)) + ulp
        values = np.asarray(actual[name], np.float64)
        if not np.abs(values - expected).max(initial=0) <= allowed:  # NaN is wrong
            wrong.append(f"{name}: {wrong_places.describe(values, expected, allowed)}")
    for name, cache_array in cache.items():
        differing = int(_num_differing(cache_array, expected_cache[name]))
        if differing:
            wrong.append(f"cache.{name}: {differing} of {cache_array.size} values differ from the reference's cache")
    return wrong


def repeat(workload: Workload, backward: bool, tiny: bool, repeats: int) -> list[str]:
    """Run one compiled program repeatedly; return a line for each array in which a bit changed."""
    workload = dataclasses.replace(workload, dtypes=("bfloat16",))
    inputs, state, dout = runner.random_arguments(workload)
    aux = jax.tree.map(jnp.asarray, workload.integer_inputs())
    run_once = jitted_program(workload, backward, tiny)
    first = jax.block_until_ready(run_once(inputs, state, aux, dout))

    def by_name(outputs: tuple[Tree, Tree]) -> Tree:
        return outputs[0] | {f"cache.{name}": array for name, array in outputs[1].items()}

    first_arrays = by_name(first)
    changed: dict[str, list[int]] = {}
    for _ in range(1, repeats):
        results = run_once(inputs, state, aux, dout)
        for name, value in by_name(results).items():
            changed.setdefault(name, []).append(_num_differing(value, first_arrays[name]))
    lines = []
    for name, counts in changed.items():
        values = [int(count) for count in counts]
        if any(values):
            num_runs = sum(value > 0 for value in values)
            extent = f"in up to {max(values)} of {first_arrays[name].size} places"
            lines.append(f"{name}: {num_runs} of {repeats - 1} repeats differ from the first run, {extent}")
    return lines


@jax.jit
def _num_differing(a: jax.Array, b: jax.Array) -> jax.Array:
    """Count the elements whose bits differ."""
    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}[a.dtype.itemsize]
    a_bits, b_bits = (jax.lax.bitcast_convert_type(x, bits) for x in (a, b))
    return jnp.sum(a_bits != b_bits, dtype=jnp.int32)
