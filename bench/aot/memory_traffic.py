"""Count the bytes that kernels move on a TPU, against the minimum, without compiling anything.

    python -m bench.aot.memory_traffic [--out FOLDER]       adds them to the profiles in a folder; rewrites the tables

Each program is traced for the target, and `block_transfers` counts its kernels. The public kernels must be installed,
as `make aot` does. XLA's operations around a kernel do not count, such as the transposition of x for tokamax's dw.
"""

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from jax.experimental import pallas as pl

from bench.aot import baselines, hardware, profile
from bench.aot.cases import Case
from bench.aot.report import readme
from bench.aot.tpu import block_transfers, products, traced_kernels
from bench.aot.tpu.products import PRODUCTS, product_of
from dantinox import cli

PROG = "bench.aot.memory_traffic"
IMPLEMENTATIONS = ("pallas", *baselines.GROUPED_TILES)
Row = dict[str, Any]


def add(row: Row, case: Case, target: hardware.Target) -> None:
    """Add `moved`, bytes by the skew of the rows over groups, to the kernels of a compiled row.

    Args:
        row: a row of a profile; it is changed.
        case: the program of the row.
        target: the accelerator that it was compiled for.
    """
    if target.platform != "tpu" or case.op not in PRODUCTS or case.implementation not in IMPLEMENTATIONS:
        return
    moved = bytes_moved(case, target)
    for kernel in row["kernels"]:
        kernel.pop("moved", None)
        if counts := moved.get(product_of(case.op, kernel["name"])):
            kernel["moved"] = counts


def bytes_moved(case: Case, target: hardware.Target) -> dict[str, dict[str, int]]:
    """Count the bytes that the kernels of a program move: product -> skew -> bytes, where they can be counted."""
    with _plain_pallas_call(case.implementation):
        calls_by_skew = traced_kernels.calls_by_skew(case, target)
    counts: dict[str, dict[str, int]] = {}
    for skew, calls in calls_by_skew.items():
        for call in calls:
            if (count := block_transfers.bytes_moved(call)) is not None:
                counts.setdefault(product_of(case.op, call.name), {})[skew] = count
    return counts


@contextlib.contextmanager
def _plain_pallas_call(implementation: str) -> Iterator[None]:
    """Give tokamax's kernels an ordinary grid: theirs copy blocks within one step, by the same rule."""
    if not implementation.startswith("tokamax"):
        yield
        return
    from tokamax._src import mosaic_tpu

    def call(kernel: Any, out_shape: Any, input_buffer_count: Any = None, **options: Any) -> Any:
        return pl.pallas_call(kernel, out_shape, **options)

    jax.clear_caches()  # the patched and the unpatched call must not share traces
    with mock.patch.object(mosaic_tpu, "custom_buffered_pallas_call", call):
        yield
    jax.clear_caches()


@dataclass(frozen=True)
class Arguments:
    """Where the profiles are."""

    out: Path = Path("profiles/aot")
    """Folder of the profiles."""


def main(argv: Sequence[str] | None = None) -> int:
    """Count the bytes that the compiled rows of the profiles move."""
    arguments = cli.parse(Arguments, argv, default=Arguments(), prog=PROG, description=__doc__.split("\n")[0])
    with cli.one_line_errors(PROG):
        if importlib.util.find_spec("tokamax") is None:
            raise ValueError("tokamax is not installed; use .venv-aot/bin/python, which `make aot` builds")
        for name in products.TPUS:
            file = profile.path(arguments.out, name)
            if (document := profile.load(file)) is None:
                continue
            for key, row in document["rows"].items():
                if row["status"] == "compiled":
                    add(row, Case(*key.split(" / ")), hardware.get(name))
            # Load it again: another process may have compiled rows meanwhile.
            profile.save(file, profile.merge(profile.load(file), name, document["versions"], document["rows"]))
        readme.write(arguments.out)
    return 0


if __name__ == "__main__":
    cli.run_main(main)
