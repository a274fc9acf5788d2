"""Measure what each step of kernels/tutorial gains (`python -m bench.tutorial`).

On this machine: accuracy, time in turns with other implementations, memory, and the pairs of queries and keys that are
visited. For TPU v6e, without having one: what the compiler made of each kernel. The tables of README.md and of the
tutorial's README are printed from the file that this program writes.
"""

import datetime
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from bench.aot import hardware, worker_pool
from bench.aot.cases import Case
from bench.aot.tpu import vliw_schedule
from bench.operations import runner
from bench.operations.baselines import Candidate
from bench.operations.roofline import Ceilings
from bench.operations.timer import clock
from bench.report import markdown, results
from bench.report.console_table import duration, size
from dantinox import cli
from dantinox.kernels import tutorial, workloads
from dantinox.kernels.tutorial import common, step4_tile_skipping
from dantinox.system import malloc

PROG = "bench.tutorial"
WORKLOAD = workloads.get("attention", "tutorial")
MASK = common.Mask(WORKLOAD.T, WORKLOAD.S, WORKLOAD.causal, WORKLOAD.window)
OPTIONS = {"causal": WORKLOAD.causal, "window": WORKLOAD.window, "scale": WORKLOAD.scale}
IDEAS = {
    "naive": "one program per head, all scores on the chip",
    "tiled": "one tile of queries at a time",
    "online_softmax": "one tile of keys at a time, with a running softmax",
    "tile_skipping": "the grid is the list of visible tiles",
    "packed_gqa_gate": "the heads of a group in one tile, the gate in its epilogue",
}
BASELINES = {
    "xla": "`dantinox.kernels.attention`, plain XLA",
    "pallas": "`dantinox.kernels.attention`, Pallas",
    "jax.nn xla": "`jax.nn.dot_product_attention`",
}
TARGET = hardware.get("v6e")
MAX_ERROR = 1e-5  # relative to the largest value, in float32
FILE = "tutorial.json"
READMES = {"README.md": True, "kernels/tutorial/README.md": False}  # path -> whether its table is the short one
MARKS = ("<!-- tutorial: printed by bench/tutorial.py -->\n", "<!-- end of tutorial -->")
Row = dict[str, Any]


@dataclass(frozen=True)
class Arguments:
    """How long, with what, where to."""

    budget: float = 10.0
    """Seconds of timing, shared by all implementations."""
    compile: bool = True
    """Compile for TPU v6e as well."""
    compiler: str = ".venv-aot/bin/python"
    """The Python that has libtpu; `make tutorial` builds it."""
    out: str = "profiles"
    """Folder for <device>/tutorial.json; with the default, the tables of both README.md are rewritten."""


def main(argv: Sequence[str] | None = None) -> int:
    """Check, time, compile, write and print; exit with 1 if a step is wrong."""
    arguments = cli.parse(Arguments, argv, default=Arguments(), prog=PROG, description=__doc__.split("\n")[0])
    malloc.tune_glibc_malloc()
    with cli.one_line_errors(PROG):
        if not arguments.budget > 0:
            raise ValueError(f"--budget is {arguments.budget}; allowed: seconds above 0")
        compiler = results.ROOT / arguments.compiler
        if arguments.compile and not compiler.exists():
            raise ValueError(
                f"--compiler {compiler} does not exist; `make tutorial` builds it, --no-compile does without it"
            )
        common.interpret()  # raises on a GPU
        rows = time_steps(arguments.budget)
        if arguments.compile:
            for name, row in compile_steps(compiler).items():
                rows[name] |= row
        folder = Path(arguments.out) / results.device_folder(jax.default_backend(), jax.devices()[0].device_kind)
        folder.mkdir(parents=True, exist_ok=True)
        head = {"date": str(datetime.date.today()), "device": jax.devices()[0].device_kind, "jax": jax.__version__}
        head |= {"sizes": WORKLOAD.label(), "dtype": WORKLOAD.dtypes[0], "visible_pairs": num_visible_pairs()}
        document = head | {"rows": rows}
        (folder / FILE).write_text(json.dumps(document, indent=1) + "\n")
        Console(width=200).print(table(document), markup=False, highlight=False)
        if folder.resolve() == results.ROOT / "profiles" / "cpu":
            for name, short in READMES.items():
                path = results.ROOT / name
                path.write_text(update_readme(path.read_text(), document, short))
    wrong = [name for name, row in rows.items() if not row.get("error", 0) <= MAX_ERROR]
    for name in wrong:
        print(f"{PROG}: {name}: error {rows[name]['error']:.1e}, allowed {MAX_ERROR:.0e}")
    return 1 if wrong else 0


def num_visible_pairs() -> int:
    """Number of pairs that every implementation must compute."""
    return WORKLOAD.cost().flops // (4 * WORKLOAD.D)


# --- on this machine ---


def time_steps(budget: float) -> dict[str, Row]:
    """Check and time every step and baseline.

    Args:
        budget: seconds of timing, shared by all of them.

    Returns:
        Name -> seconds, spread, bytes of memory and error, or why it did not run; for steps, what they visit as well.
    """
    steps = [Candidate(name, step_function(name)) for name in tutorial.STEPS]
    names = (*tutorial.STEPS, *BASELINES)
    case = runner.BenchmarkCase(WORKLOAD)
    outcome = runner.run_case(case, Ceilings(clock()), budget=budget, only=names, extra=steps)
    rows: dict[str, Row] = {}
    for name in names:
        result = outcome.results[name]
        if result.skip_reason is not None:
            rows[name] = {"refused": result.skip_reason}
            continue
        low, middle, high = np.percentile(result.seconds, [25, 50, 75])
        figures = {"seconds": middle, "spread": (high - low) / middle, "temp_bytes": result.temp_bytes}
        rows[name] = {key: float(f"{value:.4g}") for key, value in figures.items()}
        rows[name]["error"] = float(f"{result.error:.2g}")
        if name in tutorial.STEPS:
            rows[name] |= count_visited(name)
    return rows


def step_function(name: str) -> runner.Forward:
    """Return a function that calls a step."""
    attention = tutorial.load_step(name)
    return lambda inputs, state, aux: (attention(**inputs, **aux, **OPTIONS), state)


class StepGrid(NamedTuple):
    """The grid of a step's kernel, and its blocks of queries and keys."""

    grid: tuple[int, ...]
    q_block: tuple[int, ...]
    kv_block: tuple[int, ...]


def step_grid(name: str) -> StepGrid:
    """Read the grid and the blocks of a step from its Pallas call."""
    inputs = [jax.ShapeDtypeStruct(shape, jnp.dtype(WORKLOAD.dtypes[0])) for shape in WORKLOAD.shapes().values()]
    attention = tutorial.load_step(name)
    jaxpr = jax.make_jaxpr(lambda q, k, v: attention(q, k, v, **OPTIONS))(*inputs)
    (kernel,) = [equation for equation in jaxpr.eqns if equation.primitive.name == "pallas_call"]
    mapping = kernel.params["grid_mapping"]
    q_block, kv_block, *_ = (block.transformed_block_aval.shape for block in mapping.block_mappings)
    return StepGrid(mapping.grid, q_block, kv_block)


def count_visited(name: str) -> Row:
    """Count the grid steps, the pairs in the tiles of all of them, and the bytes of k and v fetched in bfloat16."""
    grid, q_block, kv_block = step_grid(name)
    pairs = math.prod(grid) * math.prod(q_block[:-1]) * math.prod(kv_block[:-1])
    return {"steps": math.prod(grid), "pairs": pairs, "kv_bytes": num_kv_fetches(name) * 2 * math.prod(kv_block) * 2}


def num_kv_fetches(name: str) -> int:
    """Count how often a tile of k is fetched: whenever a grid step needs another one than the step before it."""
    grid, q_block, kv_block = step_grid(name)
    if len(grid) == 4:
        tiles = [*range(grid[3])] * grid[2]
    elif name in ("naive", "tiled"):
        tiles = [0] * math.prod(grid[2:])
    else:
        tiles = step4_tile_skipping.visible_tiles(MASK, q_block[-2], kv_block[-2])[1]
    heads_per_kv_head = grid[1] // WORKLOAD.K
    needed = [(b, h // heads_per_kv_head, j) for b in range(grid[0]) for h in range(grid[1]) for j in tiles]
    return 1 + sum(before != after for before, after in pairwise(needed))


# --- for a TPU ---


def compile_steps(compiler: Path) -> dict[str, Row]:
    """Compile every step for the TPU, in bfloat16.

    Returns:
        Name -> bundles of the kernel and of all grid steps, spills, VMEM; or why it was not compiled.
    """
    rows: dict[str, Row] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        worker_pool.Worker(TARGET, 240, Path(folder), str(compiler)) as worker,
    ):
        for name in tutorial.STEPS:
            case = Case("attention", WORKLOAD.name, name, "bfloat16", "forward")
            answer = worker.ask(case)
            if answer["status"] != "compiled":
                rows[name] = {"not_compiled": answer["reason"]}
                continue
            (kernel,) = answer["kernels"]
            dumps = worker_pool.dumps_folder(Path(folder), TARGET, case)
            branches = vliw_schedule.branch_sizes(vliw_schedule.read_final_bundles(dumps, kernel["name"]))
            rows[name] = {key: kernel[key] for key in ("bundles", "spills", "fills", "mxu_share", "vmem_bytes")}
            rows[name]["bundles_of_all_steps"] = executed_bundles(name, kernel["bundles"], branches)
    return rows


def executed_bundles(name: str, bundles: int, branches: Sequence[int]) -> int | None:
    """Count the bundles over all grid steps; a `pl.when` counts in the steps that take it.

    Args:
        name: the step of the tutorial.
        bundles: the length of the kernel's schedule.
        branches: the bundles of each branch in it.

    Returns:
        The count; None if the schedule does not have the branches of the kernel.
    """
    taken = times_taken(name)
    if len(taken) > len(branches):  # another version of the compiler, another form of schedule
        return None
    branches = branches[: len(taken)]  # further branches copy the output, and count in every grid step
    always = math.prod(step_grid(name).grid) * (bundles - sum(branches))
    return always + sum(times * length for times, length in zip(taken, branches, strict=True))


def times_taken(name: str) -> list[int]:
    """Count how often each `pl.when` of a step is taken, in order."""
    grid, (*_, q_tile, _), (*_, k_tile, _) = step_grid(name)
    heads = math.prod(grid[:2])
    if name in ("naive", "tiled"):
        return []
    if name == "online_softmax":
        return [heads * grid[2]] * 2
    flags = step4_tile_skipping.visible_tiles(MASK, q_tile, k_tile)[2]
    first, masked, last = (
        heads * int(np.count_nonzero(flags & flag))
        for flag in (step4_tile_skipping.FIRST, step4_tile_skipping.MASKED, step4_tile_skipping.LAST)
    )
    return [first, masked, heads * len(flags) - masked, last]


# --- tables ---


def table(document: Mapping[str, Any], short: bool = False) -> str:
    """Format the results as Markdown; the short table is for README.md."""
    columns = ["", "new", "pairs computed / visible", "time, CPU"]
    columns += [] if short else ["temp, CPU", "error", "steps"]
    columns += ["v6e: bundles, all steps", "k and v fetched", "VMEM"]
    columns += [] if short else ["bundles of the program", "spills", "MXU slots"]
    lines = [markdown.row(columns), "|---|---|" + "---:|" * (len(columns) - 2)]
    for number, (name, row) in enumerate(document["rows"].items(), 1):
        title = f"{number} `{name}`" if name in IDEAS else f"`{name}`"
        if "refused" in row:
            lines.append(f"| {title} | {row['refused']} |" + " |" * (len(columns) - 2))
            continue
        cells = [title, IDEAS.get(name, BASELINES.get(name, ""))]
        lines.append(markdown.row([*cells, *_cells(name, row, document["visible_pairs"], short)]))
    return "\n".join(lines)


def _cells(name: str, row: Row, visible_pairs: int, short: bool) -> list[str]:
    cells = [f"{row['pairs'] / visible_pairs:.1f}" if name in IDEAS else "", duration(row["seconds"])]
    if not short:
        error = f"{row['error']:.0e}" if row["error"] else "0"
        cells += [size(row["temp_bytes"]), error, str(row.get("steps", ""))]
    cells.append(f"{row['bundles_of_all_steps'] / 1e3:.0f}k" if row.get("bundles_of_all_steps") else "")
    cells += [size(row[key]) if key in row else "" for key in ("kv_bytes", "vmem_bytes")]
    if short:
        return cells
    if "bundles" not in row:
        return [*cells, row.get("not_compiled", ""), "", ""]
    return [*cells, str(row["bundles"]), str(row["spills"]), f"{row['mxu_share']:.0%}"]


def update_readme(text: str, document: Mapping[str, Any], short: bool) -> str:
    """Replace the table between the marks.

    Raises:
        ValueError: one of the marks does not occur exactly once.
    """
    return markdown.replace_between(text, MARKS, table(document, short) + "\n")


def load_committed() -> dict[str, Any]:
    """Load the results in profiles/cpu, from which the tables are printed."""
    return json.loads((results.ROOT / "profiles" / "cpu" / FILE).read_text())


if __name__ == "__main__":
    cli.run_main(main)
