"""Bytes that the kernels of a row move on a TPU, against those that they must: nothing is compiled for it.

    python -m bench.aot.traffic [--out FOLDER]        adds them to the rows in a folder's profiles; new tables too

The program of a row is traced for the target and its kernels are counted by `blocks`; peers must be installed, as
`make aot` does. Not in it: XLA's operations around a kernel, such as the pass that transposes x for tokamax's dw.
"""

import contextlib
import dataclasses
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax.experimental import pallas as pl

from bench import targets
from bench.aot import blocks, peers, profile, programs
from bench.aot.plan import Case
from dantinox import cli
from kernels import dispatch, specs

PROG = "bench.aot.traffic"
IMPLEMENTATIONS = ("pallas", *peers.GROUPED_TILES)
# Of each operation its kernels, by a word of their names, the first that fits; what each must move: arrays as wide as
# M, arrays as wide as F, matrices of busy groups, matrices of all groups, float32 numbers a row.
PRODUCTS = {
    "grouped_matmul": {
        "dw": (("_dw", "tgmm"), (1, 1, 0, 1, 0)),
        "dx": (("_dx", "transpose"), (1, 1, 1, 0, 0)),
        "y": (("",), (1, 1, 1, 0, 0)),
    },
    "moe_mlp": {
        "up": (("experts_up",), (1, 1, 2, 0, 0)),
        "down": (("experts_down",), (1, 1, 1, 0, 1)),
        "dh": (("experts_dh",), (1, 5, 1, 0, 2)),
        "dx": (("experts_dx",), (1, 2, 2, 0, 0)),
        "dw_up": (("experts_dw_up",), (1, 2, 0, 2, 0)),
        "dw_down": (("experts_dw_down",), (1, 1, 0, 1, 0)),
    },
    "decode_attention": {"o": (("",), ())},
}
SKEWS = ("uniform", "zipf")
Row = dict[str, Any]


def add(row: Row, case: Case, target: targets.Target) -> None:
    """Writes `moved` into the kernels of a compiled row: bytes, by how rows are spread over groups."""
    if target.platform != "tpu" or case.op not in PRODUCTS or case.implementation not in IMPLEMENTATIONS:
        return
    found = of_case(case, target)
    for kernel in row["kernels"]:
        kernel.pop("moved", None)
        if counts := found.get(product_of(case.op, kernel["name"])):
            kernel["moved"] = counts


def of_case(case: Case, target: targets.Target) -> dict[str, dict[str, int]]:
    """Product -> how rows are spread -> bytes moved by its kernel; without those that nobody can count."""
    with dispatch.compiling_for(target.platform, target.kind), _plain_calls(case.implementation):
        program = programs.build(case)
        jaxpr = jax.make_jaxpr(program.function)(*(jax.ShapeDtypeStruct(*shape) for shape in program.shapes))
    found: dict[str, dict[str, int]] = {}
    for name, spec in spreads(specs.find(case.op, case.spec)).items():
        (values,) = spec.aux().values()  # a program's last argument
        for call in blocks.calls(jaxpr, {len(program.shapes) - 1: values}):
            if (count := blocks.moved(call)) is not None:
                found.setdefault(product_of(case.op, call.name), {})[name] = count
    return found


def spreads(spec: Any) -> dict[str, Any]:
    """The row with its rows spread over groups evenly and by Zipf's law; of decoding as it is."""
    if spec.op == "decode_attention":
        return {"lengths": spec}
    return {skew: dataclasses.replace(spec, skew=skew) for skew in SKEWS}


def product_of(op: str, kernel: str) -> str:
    """Which product of an operation a kernel computes, by its name."""
    return next((name for name, (words, _) in PRODUCTS[op].items() if any(word in kernel for word in words)), "")


def floor(spec: Any, product: str) -> int:
    """Bytes that a kernel must move: each operand and result once, of the matrices those of groups with rows.

    Of a mixture's `up` without a backward pass, for which it keeps g and u.
    """
    if spec.op == "decode_attention":
        return spec.cost().bytes
    N, sizes = spec.N, spec.aux().get("group_sizes")
    if sizes is None:
        N, sizes = spec.N * spec.k, np.bincount(spec.aux()["expert_ids"].ravel(), minlength=spec.E)
    of_M, of_F, busy, every, thin = PRODUCTS[spec.op][product][1]
    matrices = busy * int(np.count_nonzero(sizes)) + every * spec.E
    return spec.itemsize * (N * (of_M * spec.M + of_F * spec.F) + matrices * spec.M * spec.F) + 4 * thin * N


@contextlib.contextmanager
def _plain_calls(implementation: str) -> Iterator[None]:
    """tokamax's kernels copy blocks inside of one step, under the same rule: here the grid is an ordinary one."""
    if not implementation.startswith("tokamax"):
        yield
        return
    from tokamax._src import mosaic_tpu

    def call(kernel: Any, out_shape: Any, input_buffer_count: Any = None, **options: Any) -> Any:
        return pl.pallas_call(kernel, out_shape, **options)

    jax.clear_caches()  # what was traced before, or here, is not what the other finds
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
    from bench.aot import summary  # its tables need what is above

    arguments = cli.parse(Arguments, argv, default=Arguments(), prog=PROG, description=__doc__.split("\n")[0])
    with cli.user_errors(PROG):
        if importlib.util.find_spec("tokamax") is None:
            raise ValueError("tokamax is not installed here; allowed: .venv-aot/bin/python, which `make aot` builds")
        for name in summary.TPUS:
            file = profile.path(arguments.out, name)
            if (held := profile.load(file)) is None:
                continue
            for key, row in held["rows"].items():
                if row["status"] == "compiled":
                    add(row, Case(*key.split(" / ")), targets.get(name))
            # Read anew: someone may have compiled meanwhile.
            profile.save(file, profile.merged(profile.load(file), name, held["versions"], held["rows"]))
        summary.write(arguments.out)
    return 0


if __name__ == "__main__":
    cli.console(main)
