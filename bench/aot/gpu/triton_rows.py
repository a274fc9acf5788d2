"""Compile the Triton kernels of an operation row by row, card by card, and check and tabulate what the compiler made.

A row fails if it does not compile, if a block needs more shared memory than the card has (jax-triton finds out at the
launch), if a product does not run on the tensor cores, or if a kernel of 16 bits spills registers.
"""

import argparse
import functools
import multiprocessing
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from bench.aot import hardware
from bench.aot.gpu.triton_cases import Kernel

DTYPES = ("bfloat16", "float16", "float32", "float32, highest precision")
Row = tuple[str, ...]  # the last but one is the dtype
Results = dict[tuple[str, Row], list[Kernel]]  # by card and row


class Suite(NamedTuple):
    """The rows of an operation.

    Attributes:
        name: the operation, as messages name it.
        module: the module whose `main` runs the suite.
        compile: a module-level function of (target, *row) that returns the kernels.
        rows: (..., dtype, sizes or features).
        short: the rows of --short.
        products: the products of each kernel by its name.
        file: where --write keeps the table.
        about: what the table says of the rows.
    """

    name: str
    module: str
    compile: Callable[..., list[Kernel]]
    rows: Sequence[Row]
    short: Sequence[Row]
    products: Mapping[str, int]
    file: Path
    about: str


def split_precision(dtype: str) -> tuple[str, str]:
    """Return a dtype of `DTYPES` and the matmul precision."""
    dtype, _, precision = dtype.partition(", ")
    return dtype, "highest" if precision else "default"


def problems(suite: Suite, target: hardware.Gpu, dtype: str, kernel: Kernel) -> list[str]:
    """Return what is wrong with a kernel."""
    found = []
    if kernel.smem_bytes > target.smem_per_block:
        found.append(f"{kernel.smem_bytes} bytes of shared memory of {target.smem_per_block}")
    if kernel.tensor_core_instructions < suite.products[kernel.name]:
        found.append(
            f"{kernel.tensor_core_instructions} tensor core instructions for {suite.products[kernel.name]} products"
        )
    if kernel.spill_bytes and "16" in dtype:
        found.append(f"{kernel.spill_bytes} bytes spilled")
    return found


def compile_rows(suite: Suite, name: str, chosen: Sequence[Row]) -> list[tuple[Row, list[Kernel], list[str]]]:
    """Compile the rows of a card; return each with its kernels and its problems."""
    target = hardware.get(name)
    assert isinstance(target, hardware.Gpu)
    found = []
    for row in chosen:
        try:
            made = suite.compile(target, *row)
            wrong = [f"{k.name}: {text}" for k in made for text in problems(suite, target, row[-2], k)]
        except Exception as error:  # a compiler may raise anything, and the next row must still be compiled
            made, wrong = [], [f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"]
        print(f"{name}, {', '.join(row)}: {'; '.join(wrong) or 'right'}", file=sys.stderr, flush=True)
        found.append((row, made, wrong))
    return found


def table(suite: Suite, heads: Sequence[str], results: Results, old: str = "") -> str:
    """Return the table of profiles/aot: the most that a kernel of each name needs, by card and row.

    Args:
        suite: the suite.
        heads: what the fields of a row are.
        results: kernels by card and row.
        old: the table before, whose rows of other cards stay.
    """
    figures = ("registers", "spilled bytes", "shared memory, KiB", "tensor core instructions")
    lines = [
        f"# The {suite.name}, compiled for GPUs that were not there",
        "",
        f"Written by `python -m {suite.module} --write`, {suite.about} Every product runs on the tensor cores, and "
        "every kernel fits the card's shared memory.",
        "",
        f"| {' | '.join(('card', *heads, *figures))} |",
        "|---" * (1 + len(heads) + len(figures)) + "|",
    ]
    new_cards = {card for card, _ in results}
    for card in (target.name for target in hardware.TARGETS.values()):
        if card not in new_cards:
            lines += [line for line in old.splitlines() if line.startswith(f"| {card} |")]
        lines += [_line(suite, card, row, made) for (name, row), made in results.items() if name == card]
    return "\n".join(lines) + "\n"


def _line(suite: Suite, card: str, row: Row, made: Sequence[Kernel]) -> str:
    names = [name for name in suite.products if any(kernel.name == name for kernel in made)]
    largest = [max((k for k in made if k.name == name), key=lambda k: (k.spill_bytes, k.registers)) for name in names]
    columns = [
        [f"{k.registers}" for k in largest],
        [f"{k.spill_bytes}" for k in largest],
        [f"{k.smem_bytes / 1024:.0f}" for k in largest],
        [f"{k.tensor_core_instructions}" for k in largest],
    ]
    return f"| {' | '.join((card, *row, *(', '.join(column) for column in columns)))} |"


def main(suite: Suite, heads: Sequence[str], argv: Sequence[str] | None = None) -> int:
    """Compile, print a line per problem, and return 1 if there is one."""
    gpus = [target.name for target in hardware.TARGETS.values() if isinstance(target, hardware.Gpu)]
    description = f"Compile the {suite.name} for the GPUs of each generation, and check what the compiler made of it."
    parser = argparse.ArgumentParser(prog=suite.module, description=description)
    parser.add_argument("target", nargs="*", choices=gpus, help="default: all")
    parser.add_argument("--short", action="store_true", help=f"{len(suite.short)} rows per card, not {len(suite.rows)}")
    parser.add_argument("--jobs", type=int, default=2, help="cards that are compiled for at once (2)")
    parser.add_argument("--write", action="store_true", help=f"write {suite.file}")
    arguments = parser.parse_args(argv)
    chosen, targets = suite.short if arguments.short else suite.rows, arguments.target or gpus
    results: Results = {}
    failed = 0
    compile_card: Any = functools.partial(compile_rows, suite)
    with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn")) as processes:
        pending = [processes.submit(compile_card, name, chosen) for name in targets]
        for name, future in zip(targets, pending):
            for row, made, wrong in future.result():
                results[name, row] = made
                failed += len(wrong)
                if wrong:
                    print(f"{name}, {', '.join(row)}: {'; '.join(wrong)}", flush=True)
    count = sum(map(len, results.values()))
    print(f"{suite.name}: {count} kernels compiled, {failed} problems")
    if arguments.write and not failed:
        old = suite.file.read_text("utf-8") if suite.file.exists() else ""
        suite.file.write_text(table(suite, heads, results, old), "utf-8")
    return 1 if failed else 0
