"""Bytes that the kernels of a row move on a TPU, against the minimum, without compiling anything.

    python -m bench.aot.memory_traffic [--out FOLDER]       adds them to the rows in a folder's profiles; new tables too

The program of a row is traced for the target and its kernels are counted by `block_transfers`; peers must be installed,
as `make aot` does. Not in it: XLA's operations around a kernel, such as the pass that transposes x for tokamax's dw.
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

from bench.aot import baselines, hardware, profile, programs
from bench.aot.cases import Case
from bench.aot.report import readme_tables
from bench.aot.tpu import block_transfers, products
from bench.aot.tpu.products import PRODUCTS, product_of, spreads
from dantinox import cli
from dantinox.kernels import dispatch, workloads

PROG = "bench.aot.memory_traffic"
IMPLEMENTATIONS = ("pallas", *baselines.GROUPED_TILES)
Row = dict[str, Any]


def add(row: Row, case: Case, target: hardware.Target) -> None:
    """Writes `moved` into the kernels of a compiled row: bytes, by how rows are spread over groups."""
    if target.platform != "tpu" or case.op not in PRODUCTS or case.implementation not in IMPLEMENTATIONS:
        return
    found = of_case(case, target)
    for kernel in row["kernels"]:
        kernel.pop("moved", None)
        if counts := found.get(product_of(case.op, kernel["name"])):
            kernel["moved"] = counts


def of_case(case: Case, target: hardware.Target) -> dict[str, dict[str, int]]:
    """Product -> how rows are spread -> bytes moved by its kernel, if its transfers can be counted."""
    with dispatch.target_device(target.platform, target.kind), _plain_calls(case.implementation):
        program = programs.build(case)
        jaxpr = jax.make_jaxpr(program.function)(*(jax.ShapeDtypeStruct(*shape) for shape in program.shapes))
    found: dict[str, dict[str, int]] = {}
    for name, spec in spreads(workloads.get(case.op, case.spec)).items():
        (values,) = spec.integer_inputs().values()  # a program's last argument
        for call in block_transfers.calls(jaxpr, {len(program.shapes) - 1: values}):
            if (count := block_transfers.moved(call)) is not None:
                found.setdefault(product_of(case.op, call.name), {})[name] = count
    return found


@contextlib.contextmanager
def _plain_calls(implementation: str) -> Iterator[None]:
    """tokamax's kernels copy blocks within one grid step, by the same rule: give them an ordinary grid instead."""
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
    """Their folder."""


def main(argv: Sequence[str] | None = None) -> int:
    """Count what the compiled rows of the profiles move."""
    arguments = cli.parse(Arguments, argv, default=Arguments(), prog=PROG, description=__doc__.split("\n")[0])
    with cli.one_line_errors(PROG):
        if importlib.util.find_spec("tokamax") is None:
            raise ValueError("tokamax is not installed here; allowed: .venv-aot/bin/python, which `make aot` builds")
        for name in products.TPUS:
            file = profile.path(arguments.out, name)
            if (held := profile.load(file)) is None:
                continue
            for key, row in held["rows"].items():
                if row["status"] == "compiled":
                    add(row, Case(*key.split(" / ")), hardware.get(name))
            # Load it again: another process may have compiled rows meanwhile.
            profile.save(file, profile.merged(profile.load(file), name, held["versions"], held["rows"]))
        readme_tables.write(arguments.out)
    return 0


if __name__ == "__main__":
    cli.run_main(main)
