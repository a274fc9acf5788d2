"""Compile the Triton attention for the GPUs of each generation, with each feature, and check what the compiler made.

    python -m bench.aot.gpu.triton_cases [TARGET...] [--short] [--jobs N] [--write]

A row fails if it does not compile, if a block needs more shared memory than the card has (jax-triton finds out at the
launch), if a product does not run on the tensor cores, or if bfloat16 spills registers at a head dim of up to 128.
XLA takes no part, so a row takes seconds. --write keeps the table in profiles/aot/.
"""

import argparse
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from bench.aot import hardware
from bench.aot.gpu import compiler

HEAD_DIMS = (32, 64, 80, 96, 128, 192, 256)
FEATURES: dict[str, dict[str, Any]] = {
    "causal": {},
    "window": {"window": 300},
    "gate": {"gate": True},
    "segments": {"segments": True},
    "all, soft cap": {"window": 300, "gate": True, "segments": True, "softcap": 30.0},
}
DTYPES = ("bfloat16", "float32")
SHORT = (("bfloat16", 64, "all, soft cap"), ("float32", 32, "window"))
TENSOR_CORES = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")
PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4}
FILE = Path("profiles/aot/triton_attention.md")
MAX_HEAD_DIM_WITHOUT_SPILLS = 128


Row = tuple[str, int, str]  # dtype, head dim, features


class Kernel(NamedTuple):
    """What the compiler made of one kernel."""

    name: str
    registers: int
    spill_bytes: int
    smem_bytes: int
    tensor_core_instructions: int


def compile_kernels(target: hardware.Gpu, run: Callable[..., Any], arguments: Sequence[Any]) -> list[Kernel]:
    """Compile the Triton kernels of a function of arrays, of which only the shapes matter."""
    import jax
    from jax_triton import triton_lib

    from dantinox.kernels.dispatch import target_device

    made: list[Any] = []
    compile_ptx = triton_lib.compile_ttir_to_ptx_inplace

    def keep(*args: Any, **settings: Any) -> Any:
        made.append(compile_ptx(*args, **settings))
        return made[-1]

    jax.clear_caches()
    triton_lib.compile_ttir_to_ptx_inplace = keep
    try:
        with target_device(target.platform, target.kind):
            jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",))
    finally:
        triton_lib.compile_ttir_to_ptx_inplace = compile_ptx
    return [assemble(target, result.binary, result.shared_mem_bytes) for result in made]


def compile_attention(target: hardware.Gpu, dtype: str, D: int, options: dict[str, Any]) -> list[Kernel]:
    """Compile the forward and the backward pass of attention at 1024 tokens; return its kernels."""
    import jax
    import jax.numpy as jnp

    from dantinox import kernels

    options = dict(options)
    q, k = (jax.ShapeDtypeStruct((1, 1024, heads, D), dtype) for heads in (4, 2))
    gate = q if options.pop("gate", False) else None
    ids = jax.ShapeDtypeStruct((1, 1024), jnp.int32) if options.pop("segments", False) else None

    def run(q: Any, k: Any, v: Any, gate: Any, ids: Any) -> Any:
        def attend(q: Any, k: Any, v: Any, gate: Any) -> Any:
            return kernels.attention(q, k, v, gate=gate, segment_ids=ids, implementation="triton", **options)

        o, vjp = jax.vjp(attend, q, k, v, gate)
        return vjp(o)

    return compile_kernels(target, run, (q, k, k, gate, ids))


def assemble(target: hardware.Gpu, text: str, smem_bytes: int) -> Kernel:
    """Assemble the PTX of one kernel.

    Raises:
        ValueError: the assembler refuses it.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(text, "utf-8")
        ((name, usage),) = compiler.assemble(target, source, os.devnull).items()
    instructions = len(TENSOR_CORES.findall(text))
    name = name.removesuffix("_kernel")
    return Kernel(name, usage.registers, usage.spill_bytes, smem_bytes, instructions)


def problems(target: hardware.Gpu, dtype: str, D: int, kernel: Kernel) -> list[str]:
    """Return what is wrong with a kernel."""
    found = []
    if kernel.smem_bytes > target.smem_per_block:
        found.append(f"{kernel.smem_bytes} bytes of shared memory of {target.smem_per_block}")
    if kernel.tensor_core_instructions < PRODUCTS[kernel.name]:
        found.append(f"{kernel.tensor_core_instructions} tensor core instructions for {PRODUCTS[kernel.name]} products")
    if kernel.spill_bytes and dtype == "bfloat16" and D <= MAX_HEAD_DIM_WITHOUT_SPILLS:
        found.append(f"{kernel.spill_bytes} bytes spilled")
    return found


def rows(short: bool) -> Iterator[Row]:
    """Yield (dtype, head dim, features)."""
    if short:
        yield from SHORT
        return
    for D in HEAD_DIMS:
        for dtype in DTYPES:
            for features in FEATURES:
                yield dtype, D, features


def compile_rows(name: str, chosen: Sequence[Row]) -> list[tuple[Row, list[Kernel], list[str]]]:
    """Compile the rows of a card; return each with its kernels and its problems."""
    target = hardware.get(name)
    assert isinstance(target, hardware.Gpu)
    found = []
    for row in chosen:
        dtype, D, features = row
        try:
            made = compile_attention(target, dtype, D, FEATURES[features])
            wrong = [f"{k.name}: {text}" for k in made for text in problems(target, dtype, D, k)]
        except Exception as error:  # a compiler may raise anything, and the next row must still be compiled
            made, wrong = [], [f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"]
        print(f"{name}, {dtype}, D {D}, {features}: {'; '.join(wrong) or 'right'}", file=sys.stderr, flush=True)
        found.append((row, made, wrong))
    return found


def table(results: dict[tuple[str, str, int], list[Kernel]], old: str = "") -> str:
    """Return the table of profiles/aot: the most that a kernel needs over the features, by card, dtype and head dim.

    Args:
        results: kernels by card, dtype and head dim.
        old: the table before, whose rows of other cards stay.
    """
    lines = [
        "# The Triton attention, compiled for GPUs that were not there",
        "",
        "Written by `python -m bench.aot.gpu.triton_cases --write`: the largest figures over the features that were "
        "compiled, at 1024 tokens, 4 heads on 2. Every product runs on the tensor cores, and every kernel fits the "
        "card's shared memory.",
        "",
        "| card | dtype | D | registers: fwd, dq, dkv | spilled bytes | shared memory, KiB |",
        "|---|---|--:|---|---|---|",
    ]
    new_cards = {card for card, _, _ in results}
    for card in (target.name for target in hardware.TARGETS.values()):
        if card not in new_cards:
            lines += [line for line in old.splitlines() if line.startswith(f"| {card} |")]
            continue
        lines += _rows_of_card(card, results)
    return "\n".join(lines) + "\n"


def _rows_of_card(card: str, results: dict[tuple[str, str, int], list[Kernel]]) -> Iterator[str]:
    for (target, dtype, D), made in results.items():
        if target != card:
            continue
        largest = [
            max((kernel for kernel in made if kernel.name == name), key=lambda k: (k.spill_bytes, k.registers))
            for name in PRODUCTS
        ]
        smem = [max(k.smem_bytes for k in made if k.name == name) / 1024 for name in PRODUCTS]
        yield (
            f"| {target} | {dtype} | {D} | {', '.join(str(k.registers) for k in largest)} "
            f"| {', '.join(str(k.spill_bytes) for k in largest)} | {', '.join(f'{x:.0f}' for x in smem)} |"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print a line per problem, and return 1 if there is one."""
    gpus = [target.name for target in hardware.TARGETS.values() if isinstance(target, hardware.Gpu)]
    parser = argparse.ArgumentParser(prog="bench.aot.gpu.triton_cases", description=__doc__.split("\n")[0])
    parser.add_argument("target", nargs="*", choices=gpus, help="default: all")
    parser.add_argument("--short", action="store_true", help="two rows per card")
    parser.add_argument("--head-dim", nargs="+", type=int, choices=HEAD_DIMS, default=HEAD_DIMS, help="default: all")
    parser.add_argument("--features", nargs="+", choices=FEATURES, default=list(FEATURES), help="default: all")
    parser.add_argument("--jobs", type=int, default=2, help="cards that are compiled for at once (2)")
    parser.add_argument("--write", action="store_true", help=f"write {FILE}")
    arguments = parser.parse_args(argv)
    chosen = [row for row in rows(arguments.short) if row[1] in arguments.head_dim and row[2] in arguments.features]
    targets = arguments.target or gpus
    results: dict[tuple[str, str, int], list[Kernel]] = {}
    failed = count = 0
    with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn")) as processes:
        pending = [processes.submit(compile_rows, name, chosen) for name in targets]
        for name, future in zip(targets, pending):
            for (dtype, D, features), made, wrong in future.result():
                results.setdefault((name, dtype, D), []).extend(made)
                count += len(made)
                failed += len(wrong)
                if wrong:
                    print(f"{name}, {dtype}, D {D}, {features}: {'; '.join(wrong)}", flush=True)
    print(f"Triton attention: {count} kernels compiled, {failed} problems")
    if arguments.write and not failed:
        FILE.write_text(table(results, FILE.read_text("utf-8") if FILE.exists() else ""), "utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
