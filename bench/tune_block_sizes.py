"""Which tiles are fastest on Hopper? `python -m bench.tune_block_sizes`: the grouped kernels alone, at every width they
can have.

What is measured is beside what the model of kernels/ops/grouped_matmul/pallas_sm90/block_sizes.py says, with the width
that it chooses; at the end come the constants of the model, TILE_OVERHEAD_CYCLES, STORE_CYCLES_PER_COLUMN and L2_BYTES,
that fit the measurements best, and the clock rate that the SMs would have if the model were right. Each measurement is
written as soon as it is there.
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
from rich.console import Console
from rich.table import Table

from bench.timer import clock
from dantinox import cli
from dantinox.kernels import dispatch, workloads
from dantinox.kernels.ops.grouped_matmul.pallas_sm90 import block_sizes, gmm, tgmm, vjp
from dantinox.kernels.ops.grouped_matmul.pallas_sm90.warp_specialized import Sm90GmmConfig
from dantinox.kernels.ops.moe.pallas_sm90 import down_proj_bwd, up_proj

PROG = "bench.tune_block_sizes"
Row = dict[str, Any]
Shapes = tuple[tuple[tuple[int, ...], str], ...]
# The sizes that decide first: time may run out.
ROWS = (
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
L2_RATES = range(24, 66, 2)  # bytes per clock and core, of which the fit takes the best
WIDTHS = {
    "y": gmm.TILE_WIDTHS,
    "dx": gmm.TILE_WIDTHS,
    "dw": tgmm.TILE_WIDTHS,
    "up": up_proj.TILE_WIDTHS,
    "dh": down_proj_bwd.TILE_WIDTHS,
}


@dataclass(frozen=True)
class Arguments:
    """How long, and where to."""

    rounds: int = 5
    """Turns of each width; the median counts."""
    seconds: float = 0.0
    """Start no further row after so many seconds; 0: no limit."""
    json: str | None = None
    """Where to write all of it; None: nowhere."""
    lines: str | None = None
    """Append each measurement here as soon as it is there, a JSON object a line; None: nowhere."""
    tiny: bool = False
    """The smallest sizes, interpreted: a rehearsal, without a GPU."""


@dataclass(frozen=True)
class Kernel:
    """One kernel at one row's sizes: [N, K] times [E, K, J], or for dw the sums [N, K]^T [N, J]."""

    kind: str
    name: str
    N: int
    K: int
    J: int
    sizes: tuple[int, ...]

    @property
    def matrices(self) -> int:
        return up_proj.NUM_UP_WEIGHTS if self.kind == "up" else 1

    @property
    def flops(self) -> int:
        """Of the rows that are somebody's."""
        return 2 * sum(self.sizes) * self.K * self.J * self.matrices

    def work(self) -> block_sizes.TileWork:
        of = block_sizes.tgmm_work if self.kind == "dw" else block_sizes.gmm_work
        return of(self.N, len(self.sizes), self.K, self.J)

    def shapes(self) -> Shapes:
        """Of the arrays that `run` takes."""
        N, K, J, E = self.N, self.K, self.J, len(self.sizes)
        wide = lambda *shape: (shape, "bfloat16")
        matrix = wide(E, J, K) if self.kind in ("dx", "dh") else wide(E, K, J)
        if self.kind == "dw":
            return wide(N, K), wide(N, J)
        if self.kind == "up":
            return wide(N, K), matrix, matrix
        if self.kind == "dh":
            return wide(N, K), matrix, wide(N, J), wide(N, J), ((N,), "float32")
        return wide(N, K), matrix

    def run(self, config: Sm90GmmConfig) -> Callable[..., Any]:
        """(group sizes, *arrays) -> what the kernel makes."""

        def call(sizes: jax.Array, *given: jax.Array) -> Any:
            if self.kind == "dw":
                return tgmm.tgmm(*given, sizes, config)
            if self.kind == "up":
                return up_proj.up_proj(*given, sizes, config, save_residuals=True)
            if self.kind == "dh":
                return down_proj_bwd.down_proj_bwd(*given, sizes, config)
            return gmm.gmm([given[0]], [given[1]], sizes, config, transposed=self.kind == "dx")

        return call

    def chosen(self, cores: int) -> int:
        """The width that the model takes, of all matrices together."""
        N, K, J, E, widths = self.N, self.K, self.J, len(self.sizes), WIDTHS[self.kind]
        if self.kind == "dw":
            return block_sizes.tgmm_block_sizes(N, E, K, J, cores, widths=widths).block_n
        sizes = block_sizes.gmm_block_sizes(N, E, K, J, cores, widths=widths, num_weights=self.matrices)
        return sizes.block_n * self.matrices


def kernel(kind: str, op: str, name: str) -> Kernel:
    """That of a row of kernels/workloads/."""
    spec = workloads.get(op, name)
    if op == "moe_mlp":
        counts = np.bincount(spec.integer_inputs()["expert_ids"].reshape(-1), minlength=spec.E)
        return Kernel(kind, name, spec.N * spec.k, spec.M, spec.F, tuple(map(int, counts)))
    K, J = (spec.F, spec.M) if kind == "dx" else (spec.M, spec.F)
    return Kernel(kind, name, spec.N, K, J, tuple(map(int, spec.integer_inputs()["group_sizes"])))


def tiny() -> list[Kernel]:
    """One of each kind, of two groups."""
    return [Kernel(kind, "tiny", 40, 64, 128, (30, 10)) for kind in WIDTHS]


def measure(of: Kernel, cores: int, interpret: Any, rounds: int, write: Callable[[Row], None]) -> list[Row]:
    """Every width of a kernel, in turns; one that fails says why and takes nothing with it."""
    sizes, arrays = jnp.asarray(of.sizes, jnp.int32), _arrays(of.shapes())
    widths = WIDTHS[of.kind]

    def compiled(width: int) -> Any:
        return jax.jit(of.run(Sm90GmmConfig(cores, interpret, width))).lower(sizes, *arrays).compile()

    with ThreadPoolExecutor(1 if interpret else 4) as threads:
        pending = {width: threads.submit(compiled, width) for width in widths}
    programs, failed, first = {}, {}, None
    error: dict[int, float] = {}
    for width, future in pending.items():
        try:
            program = future.result()
            out = jax.block_until_ready(program(sizes, *arrays))
            first = out if first is None else first
            error[width] = _difference(out, first, sum(of.sizes))
            programs[width] = program
        except Exception as problem:  # another width may still run
            failed[width] = _said(problem)
    seconds: dict[int, list[float]] = {width: [] for width in programs}
    for _ in range(rounds):
        for width, program in [*programs.items()]:
            try:
                seconds[width] += clock().sample(lambda _, program=program: program(sizes, *arrays), 1, "mosaic_gpu")
            except Exception as problem:
                failed[width] = _said(problem)
                del programs[width]
    rows = []
    for width in widths:
        row = {"kernel": of.kind, "row": of.name, "width": width, "chosen": width == of.chosen(cores)}
        row |= {"N": of.N, "K": of.K, "J": of.J, "E": len(of.sizes)}
        if width in failed:
            row["why"] = failed[width]
        else:
            took = median(seconds[width])
            row |= {"seconds": took, "flops_per_second": of.flops / took, "difference": error[width]}
            row |= dict(zip(("clocks", "starts", "columns"), terms(of, width, cores)))
        write(row)
        rows.append(row)
    return rows


def terms(of: Kernel, width: int, cores: int, l2: float = block_sizes.L2_BYTES) -> tuple[float, float, float]:
    """The model's clocks: without its two constants, and how many times it adds each of them."""
    model = functools.partial(
        block_sizes.estimate_cycles,
        of.work(),
        block_sizes.block_sizes_of_width(width, of.matrices),
        of.matrices,
        cores,
        l2_bytes=l2,
    )
    bare = model(tile_overhead=0, store_per_column=0)
    return bare, model(tile_overhead=1, store_per_column=0) - bare, model(tile_overhead=0, store_per_column=1) - bare


def fit(rows: Sequence[Row], cores: int) -> dict[str, float] | None:
    """The model's constants that make its relative errors smallest, squared; None where there is too little to fit.

    Returns:
        {"clock_ghz": of the SMs, were the model right; "TILE_OVERHEAD_CYCLES"; "STORE_CYCLES_PER_COLUMN";
        "L2_BYTES": per cycle and SM; "worst": relative error}.
    """
    rows = [row for row in rows if "seconds" in row]
    if len(rows) < 4:
        return None
    fits = [found for l2 in L2_RATES if (found := _fit_given_l2(rows, cores, l2)) is not None]
    best = min(fits, key=lambda each: each[0], default=None)
    return best and best[1]


def _fit_given_l2(rows: Sequence[Row], cores: int, l2: float) -> tuple[float, dict[str, float]] | None:
    """(the sum of squared relative errors, the constants): a linear problem once the rate of L2 is given."""
    # seconds = (clocks + starts TILE_OVERHEAD_CYCLES + columns STORE_CYCLES_PER_COLUMN) / f: linear in 1/f and in the
    # constants over f.
    kernels = [Kernel(row["kernel"], row["row"], row["N"], row["K"], row["J"], (0,) * row["E"]) for row in rows]
    counted = [terms(of, row["width"], cores, l2) for of, row in zip(kernels, rows)]
    sides = np.array([[each / row["seconds"] for each in count] for count, row in zip(counted, rows)])
    scale = np.abs(sides).max(axis=0)
    found, _, rank, _ = np.linalg.lstsq(sides / scale, np.ones(len(rows)), rcond=None)
    period, start, column = found / scale
    if rank < 3 or period <= 0:
        return None
    errors = sides @ (found / scale) - 1
    constants = {
        "clock_ghz": 1e-9 / period,
        "TILE_OVERHEAD_CYCLES": start / period,
        "STORE_CYCLES_PER_COLUMN": column / period,
        "L2_BYTES": float(l2),
    }
    return float(np.sum(errors**2)), constants | {"worst": float(np.abs(errors).max())}


def show(rows: Sequence[Row], constants: dict[str, float] | None, console: Console) -> None:
    """All of it as one table, and the constants."""
    table = Table(title="Hopper's grouped kernels by the width of their tiles")
    for name in ("kernel", "row", "width", "ms", "TFLOP/s", "model, ms", ""):
        table.add_column(name, justify="left" if name in ("kernel", "row", "") else "right")
    ghz = constants["clock_ghz"] if constants else 1.755
    best = {}
    for row in rows:
        if "seconds" in row:
            key = row["kernel"], row["row"]
            best[key] = min(best.get(key, row["seconds"]), row["seconds"])
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
        said = ["chosen"] if row["chosen"] else []
        said += ["fastest"] if row["seconds"] == best[row["kernel"], row["row"]] else []
        said += [] if row["difference"] <= 1e-2 else [f"differs by {row['difference']:.1e}"]
        rate = f"{row['flops_per_second'] / 1e12:.1f}"
        table.add_row(*head, f"{row['seconds'] * 1e3:.4g}", rate, f"{model / ghz / 1e6:.4g}", ", ".join(said))
    console.print(table)
    if constants is None:
        console.print(
            "too little was measured to fit TILE_OVERHEAD_CYCLES and STORE_CYCLES_PER_COLUMN", highlight=False
        )
        return
    console.print(
        f"TILE_OVERHEAD_CYCLES = {constants['TILE_OVERHEAD_CYCLES']:.0f} and "
        f"STORE_CYCLES_PER_COLUMN = {constants['STORE_CYCLES_PER_COLUMN']:.1f} clocks at "
        f"{constants['clock_ghz']:.2f} GHz and L2_BYTES = {constants['L2_BYTES']:g} per clock fit best, within "
        f"{constants['worst']:.0%}; block_sizes.py has {block_sizes.TILE_OVERHEAD_CYCLES}, "
        f"{block_sizes.STORE_CYCLES_PER_COLUMN} and {block_sizes.L2_BYTES}",
        highlight=False,
        soft_wrap=True,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and measure."""
    return run(cli.parse(Arguments, argv, default=Arguments(), prog=PROG, description=__doc__.split("\n")[0]))


def run(arguments: Arguments) -> int:
    """Measure, write, print; 1 where a width did not run or makes something else than the others."""
    began = time.monotonic()
    with cli.one_line_errors(PROG):
        if arguments.rounds < 1:
            raise ValueError(f"--rounds is {arguments.rounds}; allowed: 1 or more")
        if arguments.tiny:
            # A simulated GPU waits for its barriers in threads, one for each core that JAX believes to have.
            os.environ.setdefault("NPROC", str(max(8, os.cpu_count() or 1)))
        elif why := dispatch.unsupported_reason("grouped_matmul", "pallas") or (
            not dispatch.on_gpu() and "this is no GPU"
        ):
            raise ValueError(f"{why}; --tiny rehearses it, interpreted")
        interpret = plgpu.InterpretGPUParams() if arguments.tiny else None
        cores = 2 if arguments.tiny else vjp.num_sms(dispatch.current_device().kind)
        console, rows = Console(width=140), []
        write = functools.partial(_append, arguments.lines)
        for of in tiny() if arguments.tiny else [kernel(*row) for row in ROWS]:
            if arguments.seconds and rows and time.monotonic() - began > arguments.seconds:
                console.print("no time left for more rows", highlight=False)
                break
            try:
                rows += measure(of, cores, interpret, arguments.rounds, write)
            except Exception as problem:  # memory, say: other rows are smaller
                rows.append({"kernel": of.kind, "row": of.name, "width": 0, "chosen": False, "why": _said(problem)})
                write(rows[-1])
            console.print(f"{of.kind} {of.name}: {time.monotonic() - began:.0f} s", highlight=False)
        constants = fit(rows, cores)
        if arguments.json:
            document = {"device": dispatch.current_device().kind, "clock": clock().name, "fit": constants, "rows": rows}
            Path(arguments.json).write_text(json.dumps(document, indent=1) + "\n")
        show(rows, constants, console)
        if arguments.tiny:
            console.print("interpreted at tiny sizes: it shows that all of it runs, and no constant of a GPU")
    return 1 if any("why" in row or not row["difference"] <= 1e-2 for row in rows) else 0


def _said(problem: Exception) -> str:
    """An error in one line."""
    return ": ".join([type(problem).__name__, *str(problem).strip().splitlines()[:1]])[:220]


def _append(path: str | None, row: Row) -> None:
    if path is not None:
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")


def _arrays(shapes: Shapes) -> list[jax.Array]:
    """Random numbers at sizes that keep products near 1."""
    return [_normal(jax.random.key(i), *shape) for i, shape in enumerate(shapes)]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    scale = shape[-2] ** -0.5 if len(shape) == 3 else 1.0
    return (jax.random.normal(key, shape, dtype) * scale).astype(dtype)


@jax.jit
def _apart(one: jax.Array, other: jax.Array, rows: int) -> jax.Array:
    one, other = one.astype(jnp.float32), other.astype(jnp.float32)
    if one.ndim < 3:  # what back makes of nobody's rows is not set
        there = (jnp.arange(one.shape[0]) < rows).reshape(-1, *[1] * (one.ndim - 1))
        one, other = jnp.where(there, one, 0), jnp.where(there, other, 0)
    return jnp.max(jnp.abs(one - other)) / jnp.maximum(jnp.max(jnp.abs(other)), 1e-9)


def _difference(out: Any, first: Any, rows: int) -> float:
    """The largest difference over the largest number, of all results; NaN where one is."""
    pairs = zip(jax.tree.leaves(out), jax.tree.leaves(first), strict=True)
    return float(np.max([float(_apart(one, other, rows)) for one, other in pairs]))


if __name__ == "__main__":
    cli.run_main(main)
