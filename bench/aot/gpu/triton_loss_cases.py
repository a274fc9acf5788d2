"""Compile the Triton linear cross-entropy for the GPUs of each generation, and check what the compiler made of it.

    python -m bench.aot.gpu.triton_loss_cases [TARGET...] [--short] [--jobs N] [--write]

A row fails as one of `triton_cases` does: it does not compile, needs more shared memory than a block has, multiplies
outside the tensor cores, or spills registers in 16 bits. --write keeps the table in profiles/aot/.
"""

import argparse
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from bench.aot import hardware
from bench.aot.gpu.triton_cases import Kernel, compile_kernels

DTYPES = ("bfloat16", "float16", "float32", "float32, highest precision")
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {"M": 1024, "V": 32768},
    "soft cap, odd sizes": {"M": 1000, "V": 32001, "softcap": 30.0},
}
N = 1024
KERNELS = ("forward", "logit_gradients")
FILE = Path("profiles/aot/triton_linear_cross_entropy.md")

Row = tuple[str, str]  # dtype, features
# The soft cap and the masks of odd sizes take registers; in 16 bits, kernels without them have tiles of their own.
ROWS: tuple[Row, ...] = (("bfloat16", "plain"), *((dtype, "soft cap, odd sizes") for dtype in DTYPES))
SHORT: tuple[Row, ...] = ROWS[1:2]


def compile_loss(target: hardware.Gpu, dtype: str, sizes_and_options: dict[str, Any]) -> list[Kernel]:
    """Compile the forward and the backward pass; return the kernels, a second one for a rest of the vocabulary."""
    import jax
    import jax.numpy as jnp

    from dantinox import kernels

    options = dict(sizes_and_options)
    dtype, _, precision = dtype.partition(", ")
    h, w = (jax.ShapeDtypeStruct((size, options["M"]), dtype) for size in (N, options.pop("V")))
    del options["M"]

    def run(h: Any, w: Any, targets: Any, dloss: Any) -> Any:
        def losses(h: Any, w: Any) -> Any:
            return kernels.linear_cross_entropy(h, w, targets, implementation="triton", **options)

        loss, vjp = jax.vjp(losses, h, w)
        return loss, vjp(dloss)

    rows = [jax.ShapeDtypeStruct((N,), dtype) for dtype in (jnp.int32, jnp.float32)]
    with jax.default_matmul_precision("highest" if precision else "default"):
        return compile_kernels(target, run, (h, w, *rows))


def problems(target: hardware.Gpu, dtype: str, kernel: Kernel) -> list[str]:
    """Return what is wrong with a kernel."""
    found = []
    if kernel.smem_bytes > target.smem_per_block:
        found.append(f"{kernel.smem_bytes} bytes of shared memory of {target.smem_per_block}")
    if not kernel.tensor_core_instructions:
        found.append("its product does not run on the tensor cores")
    if kernel.spill_bytes and "16" in dtype:
        found.append(f"{kernel.spill_bytes} bytes spilled")
    return found


def compile_rows(name: str, chosen: Sequence[Row]) -> list[tuple[Row, list[Kernel], list[str]]]:
    """Compile the rows of a card; return each with its kernels and its problems."""
    target = hardware.get(name)
    assert isinstance(target, hardware.Gpu)
    found = []
    for row in chosen:
        dtype, features = row
        try:
            made = compile_loss(target, dtype, FEATURES[features])
            wrong = [f"{k.name}: {text}" for k in made for text in problems(target, dtype, k)]
        except Exception as error:  # a compiler may raise anything, and the next row must still be compiled
            made, wrong = [], [f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"]
        print(f"{name}, {dtype}, {features}: {'; '.join(wrong) or 'right'}", file=sys.stderr, flush=True)
        found.append((row, made, wrong))
    return found


def table(results: dict[tuple[str, Row], list[Kernel]], old: str = "") -> str:
    """Return the table of profiles/aot: the most that each of the two kernels needs, by card, dtype and features.

    Args:
        results: kernels by card and row.
        old: the table before, whose rows of other cards stay.
    """
    lines = [
        "# The Triton linear cross-entropy, compiled for GPUs that were not there",
        "",
        f"Written by `python -m bench.aot.gpu.triton_loss_cases --write`, at {N} rows, about 1024 columns and 32768 "
        "words, for two kernels: the forward pass and the logits' gradients. Every product runs on the tensor cores, "
        "and every kernel fits the card's shared memory.",
        "",
        "| card | dtype | features | registers | spilled bytes | shared memory, KiB | tensor core instructions |",
        "|---|---|---|---|---|---|---|",
    ]
    new_cards = {card for card, _ in results}
    for card in (target.name for target in hardware.TARGETS.values()):
        if card not in new_cards:
            lines += [line for line in old.splitlines() if line.startswith(f"| {card} |")]
        for (name, (dtype, features)), made in results.items():
            if name != card:
                continue
            largest = [
                max((k for k in made if k.name == kernel), key=lambda k: (k.spill_bytes, k.registers))
                for kernel in KERNELS
            ]
            columns = [
                [f"{k.registers}" for k in largest],
                [f"{k.spill_bytes}" for k in largest],
                [f"{k.smem_bytes / 1024:.0f}" for k in largest],
                [f"{k.tensor_core_instructions}" for k in largest],
            ]
            lines.append(f"| {card} | {dtype} | {features} | {' | '.join(', '.join(column) for column in columns)} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print a line per problem, and return 1 if there is one."""
    gpus = [target.name for target in hardware.TARGETS.values() if isinstance(target, hardware.Gpu)]
    parser = argparse.ArgumentParser(prog="bench.aot.gpu.triton_loss_cases", description=__doc__.split("\n")[0])
    parser.add_argument("target", nargs="*", choices=gpus, help="default: all")
    parser.add_argument("--short", action="store_true", help="one row per card")
    parser.add_argument("--jobs", type=int, default=2, help="cards that are compiled for at once (2)")
    parser.add_argument("--write", action="store_true", help=f"write {FILE}")
    arguments = parser.parse_args(argv)
    chosen, targets = SHORT if arguments.short else ROWS, arguments.target or gpus
    results: dict[tuple[str, Row], list[Kernel]] = {}
    failed = 0
    with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn")) as processes:
        pending = [processes.submit(compile_rows, name, chosen) for name in targets]
        for name, future in zip(targets, pending):
            for row, made, wrong in future.result():
                results[name, row] = made
                failed += len(wrong)
                if wrong:
                    print(f"{name}, {', '.join(row)}: {'; '.join(wrong)}", flush=True)
    count = sum(map(len, results.values()))
    print(f"Triton linear cross-entropy: {count} kernels compiled, {failed} problems")
    if arguments.write and not failed:
        FILE.write_text(table(results, FILE.read_text("utf-8") if FILE.exists() else ""), "utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
