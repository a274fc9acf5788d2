"""The Hopper tutorial: error of its steps on a simulated GPU, and what the compiler makes of them for an H100.

A process of its own compiles each step, because the compiler reads its options from the environment and prints the
machine code. The traffic is predicted, not measured: `predict_traffic` has the model.
"""

import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench.aot import hardware
from bench.aot.gpu import compiler as gpu_compiler
from bench.aot.gpu import ptx, sass
from bench.report import markdown, results
from bench.report.console_table import size
from dantinox.kernels import dispatch
from dantinox.kernels.ops.grouped_matmul.pallas_sm90 import tile_scheduler, vjp
from dantinox.kernels.tutorial import hopper as steps
from dantinox.kernels.tutorial.hopper import common as kernel_common
from dantinox.kernels.tutorial.hopper import step4_persistent

README = "kernels/tutorial/hopper/README.md"
MARKS = ("<!-- tutorial: printed by bench/tutorial/hopper.py -->\n", "<!-- end of tutorial -->")
IDEAS = {
    "one_warpgroup": "one warpgroup loads, waits and multiplies",
    "tma_ring": "loads run ahead, in a ring buffer of stages",
    "warp_specialized": "one warpgroup loads, two multiply",
    "persistent": "one thread block per SM, tiles in panels",
}
BASELINES = {"pallas": "`dantinox.kernels.grouped_matmul` with one group"}
TARGET = hardware.get("h100")
N = M = F = 8192  # compiled, and the traffic predicted, at these sizes
CHECKED = (257, 384, 320)  # N, M, F of the simulation: several tiles, partial ones too, and more steps than stages
DTYPE = "bfloat16"
MAX_ERROR = 2.0**-8  # relative to the largest value: one ulp of bfloat16
COMPILE_SECONDS = 240
Array = jax.Array
Row = dict[str, Any]


def measure(budget: float, compiler: Path | None) -> dict[str, Any]:
    """Check and compile every step; see `bench.tutorial`. A simulation is not timed, so the budget is not used."""
    rows: dict[str, Row] = {}
    for name in (*IDEAS, *BASELINES):
        rows[name] = {"error": float(f"{error(name):.2g}")}
        if compiler is not None:
            rows[name] |= compile_row(name, compiler)
        if blocks := rows[name].get("blocks_per_sm"):
            rows[name] |= predict_traffic(TILINGS[name], N, M, F, blocks * TARGET.num_sms)._asdict()
    return {
        "date": str(datetime.date.today()),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "target": TARGET.name,
        "sizes": f"N {N}, M {M}, F {F}",
        "dtype": DTYPE,
        "rows": rows,
    }


def wrong(document: Mapping[str, Any]) -> list[str]:
    """Names of the rows whose error is above the bound."""
    return [name for name, row in document["rows"].items() if not row["error"] <= MAX_ERROR]


# --- on this machine ---


def matmul(name: str, **options: Any) -> Callable[[Array, Array], Array]:
    """Return the function of a step or baseline; `options` are those of `pallas_sm90.vjp.grouped_matmul`."""
    if name in steps.STEPS:
        return steps.load_step(name)
    return lambda x, w: vjp.grouped_matmul(x, w[None], jnp.array([x.shape[0]], jnp.int32), **options)


def error(name: str) -> float:
    """Largest error, relative to the largest value, on a Hopper GPU or a simulated one."""
    n, m, f = CHECKED
    keys = jax.random.split(jax.random.key(0))
    x, w = (jax.random.normal(key, shape, DTYPE) for key, shape in zip(keys, ((n, m), (m, f)), strict=True))
    run = matmul(name, interpret=kernel_common.interpret() or None, blocks=2)
    y = np.asarray(jax.jit(run)(x, w), np.float64)
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    return float(np.abs(y - exact).max() / np.abs(exact).max())


# --- for an H100 ---


def compile_row(name: str, compiler: Path) -> Row:
    """Compile a step in a process of its own.

    Args:
        name: a step or baseline.
        compiler: a Python that has the compiler.

    Returns:
        Registers, spills and the other figures of `compile_here`; or "not_compiled", why there are none.
    """
    with tempfile.TemporaryDirectory() as folder:
        dumps = Path(folder)
        (dumps / "triton").mkdir()
        variables = gpu_compiler.environment(dumps) | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
        program = "import sys; from bench.tutorial import hopper; hopper.compile_here(*sys.argv[1:])"
        try:
            with (dumps / "printed.txt").open("w", encoding="utf-8") as printed:
                done = subprocess.run(
                    [str(compiler), "-c", program, name, folder],
                    stdout=printed,
                    stderr=subprocess.PIPE,
                    text=True,
                    env={**os.environ, **variables, "PYTHONUNBUFFERED": "1"},
                    cwd=results.ROOT,
                    timeout=COMPILE_SECONDS,
                    check=False,
                    encoding="utf-8",
                )
        except subprocess.TimeoutExpired:
            return {"not_compiled": f"took more than {COMPILE_SECONDS} s"}
        if done.returncode:
            return {"not_compiled": done.stderr.strip().split("\n")[-1][:200]}
        return json.loads((dumps / "row.json").read_text("utf-8"))


def compile_here(name: str, folder: str) -> None:
    """Compile a step and write row.json into the folder, which also receives what this process prints."""
    dumps = Path(folder)
    compile_ = gpu_compiler.make_compiler(TARGET)
    with dispatch.target_device(TARGET.platform, TARGET.kind):
        compile_(matmul(name), (((N, M), jnp.dtype(DTYPE)), ((M, F), jnp.dtype(DTYPE))), ())
    sys.stdout.flush()
    printed = (dumps / "printed.txt").read_text(errors="replace", encoding="utf-8")
    ((kernel,), _), ((barriers, _),) = gpu_compiler.read(TARGET, dumps, printed), ptx.mosaic_smem(printed)
    (module,) = ptx.split_modules(printed)
    row = {key: kernel[key] for key in ("registers", "spill_bytes", "smem_bytes", "threads")}
    row |= {"blocks_per_sm": kernel["blocks"], "barriers": barriers}
    row["max_registers"] = sorted(int(n) for n in re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)", module))
    row |= loop_of(assembled(module, dumps))
    (dumps / "row.json").write_text(json.dumps(row), "utf-8")


def assembled(module: str, dumps: Path) -> list[sass.Instruction]:
    """Assemble a PTX module of one kernel and return its machine code."""
    source, cubin = dumps / "kernel.ptx-source", dumps / "kernel.cubin"
    source.write_text(module, "utf-8")
    gpu_compiler.assemble(TARGET, source, cubin)
    dumped = subprocess.run(
        [gpu_compiler.CUOBJDUMP, "--dump-sass", cubin], capture_output=True, text=True, check=True, encoding="utf-8"
    )
    (code,) = sass.functions(dumped.stdout).values()
    return code


def loop_of(code: list[sass.Instruction]) -> Row:
    """Count the instructions and wgmmas of the shortest loop that multiplies, all branches in it included."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    targets = [(index.get(instruction.target), i) for i, instruction in enumerate(code)]
    loops = [code[first : last + 1] for first, last in targets if first is not None and first <= last]
    products = [(len(loop), sum(each.products > 0 for each in loop)) for loop in loops]
    instructions, wgmma = min(pair for pair in products if pair[1])
    return {"loop_instructions": instructions, "loop_wgmma": wgmma}


# --- traffic ---


class Tiling(NamedTuple):
    """How a kernel walks over the output.

    Attributes:
        rows: of a tile; all have `COLUMNS` columns.
        stages: of the ring buffer.
        order: (row tiles, column tiles) -> [tiles, 2], row and column of each tile, in the order in which they start.
    """

    rows: int
    stages: int
    order: Callable[[int, int], np.ndarray]


def row_by_row(row_tiles: int, column_tiles: int) -> np.ndarray:
    """Order of the blocks of a grid."""
    return np.stack(np.divmod(np.arange(row_tiles * column_tiles), column_tiles), axis=1)


def by_panels(row_tiles: int, column_tiles: int) -> np.ndarray:
    """Order of step 4."""
    n = jnp.arange(row_tiles * column_tiles)
    row, column = step4_persistent.panel_order(n, row_tiles, column_tiles)
    return np.stack([row // step4_persistent.TILE_ROWS, column // kernel_common.COLUMNS], axis=1)


def by_snake(row_tiles: int, column_tiles: int) -> np.ndarray:
    """Order of the grouped matmul."""
    n = jnp.arange(row_tiles * column_tiles)
    return np.stack(tile_scheduler.snake_order(n, row_tiles, column_tiles), axis=1)


TILINGS = {
    "one_warpgroup": Tiling(64, 1, row_by_row),
    "tma_ring": Tiling(64, kernel_common.STAGES, row_by_row),
    "warp_specialized": Tiling(128, kernel_common.STAGES, row_by_row),
    "persistent": Tiling(128, kernel_common.STAGES, by_panels),
    "pallas": Tiling(128, 4, by_snake),
}


class Traffic(NamedTuple):
    """Bytes that are read: by the SMs, from L2, and by L2, from memory."""

    l2_bytes: int
    memory_bytes: int


def predict_traffic(tiling: Tiling, n: int, m: int, f: int, concurrent: int) -> Traffic:
    """Predict the bytes that a product reads.

    Thread blocks start in order, `concurrent` at once, and walk through the contraction at the same pace. L2 is one
    cache that evicts what was not used for longest. Results are not counted: every kernel writes them once.

    Args:
        tiling: of the kernel.
        n: rows of x and of the result.
        m: columns of x, rows of w.
        f: columns of w and of the result.
        concurrent: thread blocks that run at the same time.
    """
    cache = Cache(TARGET.l2_bytes)
    l2_bytes = 0
    for row_bytes, block in _reads(tiling, n, m, f, concurrent):
        l2_bytes += row_bytes
        cache.read(block, row_bytes)
    return Traffic(l2_bytes, cache.missed_bytes)


def _reads(tiling: Tiling, n: int, m: int, f: int, concurrent: int) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Yield (bytes, block) for each copy to shared memory, in order."""
    depth, width = kernel_common.DEPTH, kernel_common.COLUMNS
    tiles = tiling.order(-(-n // tiling.rows), -(-f // width)).tolist()
    for first in range(0, len(tiles), concurrent):
        for k in range(m // depth):
            for row, column in tiles[first : first + concurrent]:
                yield tiling.rows * depth * 2, ("x", row, k)
                yield width * depth * 2, ("w", column, k)


class Cache:
    """A cache of whole blocks that evicts the least recently used ones.

    Attributes:
        missed_bytes: bytes of the reads that it did not hold.
    """

    def __init__(self, capacity: int) -> None:
        self.missed_bytes = 0
        self._free = capacity
        self._blocks: OrderedDict[Any, int] = OrderedDict()

    def read(self, block: Any, size: int) -> None:
        """Read a block."""
        if block in self._blocks:
            self._blocks.move_to_end(block)
            return
        self.missed_bytes += size
        self._blocks[block] = size
        self._free -= size
        while self._free < 0:
            self._free += self._blocks.popitem(last=False)[1]


# --- table ---


def table(document: Mapping[str, Any]) -> str:
    """Format the results as Markdown."""
    columns = ["", "new", "stages", "barriers", "threads", "registers per thread", "spills", "SMEM", "blocks per SM"]
    columns += ["wgmmas in the loop", "instructions per wgmma", "FLOPs per byte, L2", "memory", "error"]
    lines = [markdown.row(columns), "|---|---|" + "---:|" * (len(columns) - 2)]
    for number, (name, row) in enumerate(document["rows"].items(), 1):
        title = f"{number} `{name}`" if name in IDEAS else f"`{name}`"
        lines.append(markdown.row([title, (IDEAS | BASELINES)[name], *_cells(name, row)]))
    return "\n".join(lines)


def _cells(name: str, row: Row) -> list[str]:
    stages, error = str(TILINGS[name].stages), f"{row['error']:.0e}"
    if "registers" not in row:
        return [stages, row.get("not_compiled", ""), *[""] * 9, error]
    registers = str(row["registers"])
    if row["max_registers"]:
        registers += f" ({', '.join(map(str, row['max_registers']))})"
    return [
        stages,
        str(row["barriers"]),
        str(row["threads"]),
        registers,
        str(row["spill_bytes"]),
        size(row["smem_bytes"]),
        str(row["blocks_per_sm"]),
        str(row["loop_wgmma"]),
        f"{row['loop_instructions'] / row['loop_wgmma']:.1f}",
        *(f"{2 * N * M * F / row[key]:.0f}" for key in Traffic._fields),
        error,
    ]
