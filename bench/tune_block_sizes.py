"""Time Hopper's grouped kernels at every block width that they support: `python -m bench.tune_block_sizes`.

The program prints each time beside the prediction of the cost model in
kernels/ops/grouped_matmul/pallas_sm90/block_sizes.py, and marks the width that the model chooses. Then it prints the
constants of the model, TILE_OVERHEAD_CYCLES, STORE_CYCLES_PER_COLUMN and L2_BYTES, that fit the measurements best, and
the clock rate of the SMs that the fit implies. Every measurement is written to a file immediately.
"""

import functools
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from rich.table import Table

from bench.operations.runner import error_summary
from bench.operations.timer import clock
from dantinox import cli
from dantinox.kernels import dispatch, workloads
from dantinox.kernels.ops.grouped_matmul.pallas_sm90 import block_sizes, gmm, tgmm, vjp
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.warp_specialized import Sm90GmmConfig
from dantinox.kernels.ops.moe.pallas_sm90 import down_proj_bwd, up_proj
from dantinox.system.console import Console

PROG = "bench.tune_block_sizes"
Row = dict[str, Any]
Shapes = tuple[tuple[tuple[int, ...], str], ...]
# (kernel, operation, workload), the most important sizes first: time may run out
KERNELS = (
    ("y", "grouped_matmul", "Mixtral-8x7B uniform"),
    ("dw", "grouped_matmul", "128 groups"),
    ("y", "grouped_matmul", "256 experts, narrow"),
    ("up", "moe_mlp", "Mixtral-8x7B uniform"),
    ("dh", "moe_mlp", "Mixtral-8x7B uniform"),
    ("y", "grouped_matmul", "decode, 128 experts"),
    ("y", "grouped_matmul", "dante-moe"),
    ("dx", "grouped_matmul", "128 groups"),
    ("dw", "grouped_matmul", "Qwen3-30B-A3B uniform"),
    ("y", "grouped_matmul", "aot odd sizes"),
)
L2_RATES = range(24, 66, 2)  # bytes per cycle and SM that the fit tries
WIDTHS = {
    "y": gmm.TILE_WIDTHS,
    "dx": gmm.TILE_WIDTHS,
    "dw": tgmm.TILE_WIDTHS,
    "up": up_proj.TILE_WIDTHS,
    "dh": down_proj_bwd.TILE_WIDTHS,
}


@dataclass(frozen=True)
class Arguments:
    """How long to measure, and where to write."""

    rounds: int = 5
    """Turns of each width; the result is their median."""
    seconds: float = 0.0
    """Start no further kernel after this many seconds (0: no limit)."""
    json: str | None = None
    """File for all results."""
    lines: str | None = None
    """File to which each measurement is appended, one JSON object per line."""
    tiny: bool = False
    """Use the smallest sizes, interpreted: a rehearsal without a GPU."""


@dataclass(frozen=True)
class GroupedKernel:
    """One kernel at the sizes of a workload.

    It multiplies [N, K] by [E, K, J]; for dw, [N, K]^T by [N, J].

    Attributes:
        kind: y, dx and dw of a grouped matmul; up and dh of a mixture of experts.
        name: the workload.
        sizes: rows of each group.
    """

    kind: str
    name: str
    N: int
    K: int
    J: int
    sizes: tuple[int, ...]

    @property
    def matrices(self) -> int:
        """Number of weight matrices per group."""
        return up_proj.NUM_UP_WEIGHTS if self.kind == "up" else 1

    @property
    def flops(self) -> int:
        """FLOPs of the rows that belong to a group."""
        return 2 * sum(self.sizes) * self.K * self.J * self.matrices

    def work(self) -> block_sizes.TileWork:
        """The work that the cost model assumes."""
        make_work = block_sizes.tgmm_work if self.kind == "dw" else block_sizes.gmm_work
        return make_work(self.N, len(self.sizes), self.K, self.J)

    def shapes(self) -> Shapes:
        """(shape, dtype) of the arrays that `run` takes."""
        N, K, J, E = self.N, self.K, self.J, len(self.sizes)
        x, dy = ((N, K), "bfloat16"), ((N, J), "bfloat16")
        matrix = ((E, J, K) if self.kind in ("dx", "dh") else (E, K, J), "bfloat16")
        if self.kind == "dw":
            return x, dy
        if self.kind == "up":
            return x, matrix, matrix
        if self.kind == "dh":
            return x, matrix, dy, dy, ((N,), "float32")
        return x, matrix

    def run(self, config: Sm90GmmConfig) -> Callable[..., Any]:
        """Return a function (group sizes, *arrays) -> results of the kernel."""

        def call(sizes: jax.Array, *arrays: jax.Array) -> Any:
            if self.kind == "dw":
                return tgmm.tgmm(*arrays, sizes, config)
            if self.kind == "up":
                return up_proj.up_proj(*arrays, sizes, config, save_residuals=True)
            if self.kind == "dh":
                return down_proj_bwd.down_proj_bwd(*arrays, sizes, config)
            return gmm.gmm([arrays[0]], [arrays[1]], sizes, config, transposed=self.kind == "dx")

        return call

    def chosen_width(self, num_sms: int) -> int:
        """The width that the cost model chooses, of all matrices together."""
        N, K, J, E, widths = self.N, self.K, self.J, len(self.sizes), WIDTHS[self.kind]
        if self.kind == "dw":
            return block_sizes.tgmm_block_sizes(N, E, K, J, num_sms, widths=widths).block_n
        tile = block_sizes.gmm_block_sizes(N, E, K, J, num_sms, widths=widths, num_weights=self.matrices)
        return tile.block_n * self.matrices


def kernel_of(kind: str, op: str, name: str) -> GroupedKernel:
    """Return a kernel at the sizes of a workload of kernels/workloads/."""
    workload = workloads.get(op, name)
    if op == "moe_mlp":
        counts = np.bincount(workload.integer_inputs()["expert_ids"].reshape(-1), minlength=workload.E)
        return GroupedKernel(kind, name, workload.N * workload.k, workload.M, workload.F, tuple(map(int, counts)))
    K, J = (workload.F, workload.M) if kind == "dx" else (workload.M, workload.F)
    return GroupedKernel(kind, name, workload.N, K, J, tuple(map(int, workload.integer_inputs()["group_sizes"])))


def tiny_kernels() -> list[GroupedKernel]:
    """List one small kernel of each kind, with two groups."""
    return [GroupedKernel(kind, "tiny", 40, 64, 128, (30, 10)) for kind in WIDTHS]


def measure(
    kernel: GroupedKernel, num_sms: int, interpret: Any, rounds: int, write: Callable[[Row], None]
) -> list[Row]:
    """Time every width of a kernel, in turns.

    Args:
        kernel: the kernel.
        num_sms: SMs of the GPU.
        interpret: parameters of the interpreter, or None.
        rounds: turns of each width.
        write: called with each row.

    Returns:
        A row per width, with "why" instead of times for a width that failed.
    """
    sizes, arrays = jnp.asarray(kernel.sizes, jnp.int32), _arrays(kernel.shapes())
    widths = WIDTHS[kernel.kind]

    def compiled(width: int) -> Any:
        return jax.jit(kernel.run(Sm90GmmConfig(num_sms, interpret, width))).lower(sizes, *arrays).compile()

    with ThreadPoolExecutor(1 if interpret else 4) as threads:
        pending = {width: threads.submit(compiled, width) for width in widths}
    programs, reasons, reference = {}, {}, None
    differences: dict[int, float] = {}
    for width, future in pending.items():
        try:
            program = future.result()
            out = jax.block_until_ready(program(sizes, *arrays))
            reference = out if reference is None else reference
            differences[width] = _difference(out, reference, sum(kernel.sizes))
            programs[width] = program
        except Exception as problem:  # the other widths may still run
            reasons[width] = error_summary(problem)
    seconds: dict[int, list[float]] = {width: [] for width in programs}
    for _ in range(rounds):
        for width, program in [*programs.items()]:
            try:
                seconds[width] += clock().sample(lambda _, program=program: program(sizes, *arrays), 1, "mosaic_gpu")
            except Exception as problem:
                reasons[width] = error_summary(problem)
                del programs[width]
    rows = []
    for width in widths:
        row = {
            "kernel": kernel.kind,
            "row": kernel.name,
            "width": width,
            "chosen": width == kernel.chosen_width(num_sms),
        }
        row |= {"N": kernel.N, "K": kernel.K, "J": kernel.J, "E": len(kernel.sizes)}
        if width in reasons:
            row["why"] = reasons[width]
        else:
            seconds_per_call = median(seconds[width])
            row |= {"seconds": seconds_per_call, "flops_per_second": kernel.flops / seconds_per_call}
            row |= {"difference": differences[width]}
            row |= dict(zip(("clocks", "starts", "columns"), model_terms(kernel, width, num_sms)))
        write(row)
        rows.append(row)
    return rows


def model_terms(
    kernel: GroupedKernel, width: int, num_sms: int, l2: float = block_sizes.L2_BYTES
) -> tuple[float, float, float]:
    """The cost model's cycles without its two constants, and how many times it adds each constant."""
    tile = block_sizes.block_sizes_of_width(width, kernel.matrices)
    model = functools.partial(block_sizes.estimate_cycles, kernel.work(), tile, kernel.matrices, num_sms, l2_bytes=l2)
    bare = model(tile_overhead=0, store_per_column=0)
    return bare, model(tile_overhead=1, store_per_column=0) - bare, model(tile_overhead=0, store_per_column=1) - bare


def fit(rows: Sequence[Row], num_sms: int) -> dict[str, float] | None:
    """Fit the constants of the cost model: least squares of its relative errors.

    Returns:
        "clock_ghz" that the fit implies, "TILE_OVERHEAD_CYCLES", "STORE_CYCLES_PER_COLUMN", "L2_BYTES" per cycle and
        SM, and the "worst" relative error; None if there are too few rows.
    """
    rows = [row for row in rows if "seconds" in row]
    if len(rows) < 4:
        return None
    fits = [solution for l2 in L2_RATES if (solution := _fit_given_l2(rows, num_sms, l2)) is not None]
    if not fits:
        return None
    _, constants = min(fits, key=lambda fit: fit[0])
    return constants


def _fit_given_l2(rows: Sequence[Row], num_sms: int, l2: float) -> tuple[float, dict[str, float]] | None:
    """Fit the other constants for a given rate of L2, which is a linear problem.

    Returns:
        The sum of squared relative errors, and the constants; None if the rows do not determine them.
    """
    # seconds = (clocks + starts TILE_OVERHEAD_CYCLES + columns STORE_CYCLES_PER_COLUMN) / f: linear in 1/f and in the
    # constants over f.
    kernels = [GroupedKernel(row["kernel"], row["row"], row["N"], row["K"], row["J"], (0,) * row["E"]) for row in rows]
    terms = [model_terms(kernel, row["width"], num_sms, l2) for kernel, row in zip(kernels, rows)]
    matrix = np.array([[term / row["seconds"] for term in row_terms] for row_terms, row in zip(terms, rows)])
    scale = np.abs(matrix).max(axis=0)
    solution, _, rank, _ = np.linalg.lstsq(matrix / scale, np.ones(len(rows)), rcond=None)
    period, start, column = solution / scale
    if rank < 3 or period <= 0:
        return None
    errors = matrix @ (solution / scale) - 1
    constants = {
        "clock_ghz": 1e-9 / period,
        "TILE_OVERHEAD_CYCLES": start / period,
        "STORE_CYCLES_PER_COLUMN": column / period,
        "L2_BYTES": float(l2),
    }
    return float(np.sum(errors**2)), constants | {"worst": float(np.abs(errors).max())}


def show(rows: Sequence[Row], constants: dict[str, float] | None, console: Console) -> None:
    """Print all rows as a table, and the constants."""
    table = Table(title="Hopper's grouped kernels by block width")
    for name in ("kernel", "row", "width", "ms", "TFLOP/s", "model, ms", ""):
        table.add_column(name, justify="left" if name in ("kernel", "row", "") else "right")
    ghz = constants["clock_ghz"] if constants else 1.755
    fastest = {}
    for row in rows:
        if "seconds" in row:
            key = row["kernel"], row["row"]
            fastest[key] = min(fastest.get(key, row["seconds"]), row["seconds"])
    for row in rows:
        head = row["kernel"], row["row"], str(row["width"])
        if "why" in row:
            table.add_row(*head, "", "", "", row["why"])
            continue
        model = (
            row["clocks"]
            + block_sizes.TILE_OVERHEAD_CYCLES * row["starts"]
            + block_sizes.STORE_CYCLES_PER_COLUMN * row["columns"]
        )
        notes = ["chosen"] if row["chosen"] else []
        notes += ["fastest"] if row["seconds"] == fastest[row["kernel"], row["row"]] else []
        notes += [] if row["difference"] <= 1e-2 else [f"differs by {row['difference']:.1e}"]
        rate = f"{row['flops_per_second'] / 1e12:.1f}"
        table.add_row(*head, f"{row['seconds'] * 1e3:.4g}", rate, f"{model / ghz / 1e6:.4g}", ", ".join(notes))
    console.print(table)
    if constants is None:
        console.print(
            "too little was measured to fit TILE_OVERHEAD_CYCLES and STORE_CYCLES_PER_COLUMN", highlight=False
        )
        return
    console.print(
        f"TILE_OVERHEAD_CYCLES = {constants['TILE_OVERHEAD_CYCLES']:.0f} and "
        f"STORE_CYCLES_PER_COLUMN = {constants['STORE_CYCLES_PER_COLUMN']:.1f} cycles at "
        f"{constants['clock_ghz']:.2f} GHz and L2_BYTES = {constants['L2_BYTES']:g} per cycle fit best, within "
        f"{constants['worst']:.0%}; block_sizes.py has {block_sizes.TILE_OVERHEAD_CYCLES}, "
        f"{block_sizes.STORE_CYCLES_PER_COLUMN} and {block_sizes.L2_BYTES}",
        highlight=False,
        soft_wrap=True,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and measure."""
    return run(cli.parse(Arguments, argv, default=Arguments(), prog=PROG, description=__doc__.split("\n")[0]))


def run(arguments: Arguments) -> int:
    """Measure, write and print; return 1 if a width did not run or its result differs from the others."""
    start_time = time.monotonic()
    with cli.one_line_errors(PROG):
        if arguments.rounds < 1:
            raise ValueError(f"--rounds is {arguments.rounds}; allowed: 1 or more")
        if arguments.tiny:
            # A simulated GPU waits for its barriers in threads; NPROC is the number of threads of JAX's pool.
            os.environ.setdefault("NPROC", str(max(8, os.cpu_count() or 1)))
        elif reason := dispatch.pallas_unsupported_device("grouped_matmul") or (
            not dispatch.on_gpu() and "this device is not a GPU"
        ):
            raise ValueError(f"{reason}; --tiny rehearses it, interpreted")
        interpret = plgpu.InterpretGPUParams() if arguments.tiny else None
        num_sms = 2 if arguments.tiny else vjp.num_sms(dispatch.current_device().kind)
        console, rows = Console(width=140), []
        write = functools.partial(_append, arguments.lines)
        for kernel in tiny_kernels() if arguments.tiny else [kernel_of(*row) for row in KERNELS]:
            if arguments.seconds and rows and time.monotonic() - start_time > arguments.seconds:
                console.print("no time left for more kernels", highlight=False)
                break
            try:
                rows += measure(kernel, num_sms, interpret, arguments.rounds, write)
            except Exception as problem:  # such as out of memory: other workloads are smaller
                row = {"kernel": kernel.kind, "row": kernel.name, "width": 0, "chosen": False}
                rows.append(row | {"why": error_summary(problem)})
                write(rows[-1])
            console.print(f"{kernel.kind} {kernel.name}: {time.monotonic() - start_time:.0f} s", highlight=False)
        constants = fit(rows, num_sms)
        if arguments.json:
            document = {"device": dispatch.current_device().kind, "clock": clock().name, "fit": constants, "rows": rows}
            Path(arguments.json).write_text(json.dumps(document, indent=1) + "\n", "utf-8")
        show(rows, constants, console)
        if arguments.tiny:
            console.print("interpreted at tiny sizes: this shows that every kernel runs, not the constants of a GPU")
    return 1 if any("why" in row or not row["difference"] <= 1e-2 for row in rows) else 0


def _append(path: str | None, row: Row) -> None:
    if path is not None:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _arrays(shapes: Shapes) -> list[jax.Array]:
    """Draw random arrays, scaled so that every product is near 1."""
    return [_normal(jax.random.key(i), *shape) for i, shape in enumerate(shapes)]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    scale = shape[-2] ** -0.5 if len(shape) == 3 else 1.0
    return (jax.random.normal(key, shape, dtype) * scale).astype(dtype)


@jax.jit
def _relative_difference(actual: jax.Array, expected: jax.Array, rows: int) -> jax.Array:
    actual, expected = actual.astype(jnp.float32), expected.astype(jnp.float32)
    if actual.ndim < 3:  # the backward pass of a mixture leaves unassigned rows undefined
        assigned = (jnp.arange(actual.shape[0]) < rows).reshape(-1, *[1] * (actual.ndim - 1))
        actual, expected = jnp.where(assigned, actual, 0), jnp.where(assigned, expected, 0)
    return jnp.max(jnp.abs(actual - expected)) / jnp.maximum(jnp.max(jnp.abs(expected)), 1e-9)


def _difference(out: Any, reference: Any, rows: int) -> float:
    """Largest difference over the largest value, of all results; NaN if one is NaN."""
    pairs = zip(jax.tree.leaves(out), jax.tree.leaves(reference), strict=True)
    return float(np.max([float(_relative_difference(actual, expected, rows)) for actual, expected in pairs]))


if __name__ == "__main__":
    cli.run_main(main)
